"""Clips and labels are mixed with the same weights."""

from __future__ import annotations

import pytest
import torch
from timm.data.mixup import mixup_target

from mvd_scale.config.finetune import MixConfig
from mvd_scale.training.finetuning.mixup import mix_clips, soft_labels

LABELS = torch.tensor([0, 2, 1, 3])
BRIGHTNESS = torch.tensor([10, 60, 130, 240])
CLIPS = BRIGHTNESS.to(torch.uint8).view(4, 1, 1, 1, 1).expand(4, 3, 40, 30, 3).contiguous()
HOT = soft_labels(LABELS, 5, 0.0)


def mixed(seed: int, **config: float) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    pixels, targets = mix_clips(CLIPS, HOT, MixConfig(**config))
    return pixels if pixels.is_floating_point() else pixels.float() / 255, targets


def test_smoothed_labels_are_timm_s() -> None:
    expected = mixup_target(LABELS, 5, lam=1.0, smoothing=0.1)
    torch.testing.assert_close(soft_labels(LABELS, 5, 0.1), expected)


@pytest.mark.parametrize("config", [{"mixup": 0.8, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}, {}], ids=str)
def test_a_label_counts_as_much_as_its_clip(config: dict[str, float]) -> None:
    """The mean brightness of a mixed clip is that of its two clips in the shares of their labels."""
    for seed in range(40):
        pixels, targets = mixed(seed, **config)
        expected = (targets[:, LABELS] * BRIGHTNESS).sum(1) / 255
        torch.testing.assert_close(pixels.mean((1, 2, 3, 4)), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_a_pasted_box_is_the_same_in_all_frames_and_has_the_frame_s_shape() -> None:
    shapes = []
    for seed in range(40):
        pixels, _ = mixed(seed, mixup=0.0, cutmix=1.0)
        assert (pixels == pixels[:, :1]).all()
        foreign = pixels[0, 0, :, :, 0] != CLIPS[0, 0, 0, 0, 0] / 255
        rows, columns = foreign.any(1).sum(), foreign.any(0).sum()
        assert foreign.sum() == rows * columns
        shapes.append((int(rows), int(columns)))
    whole = [(rows, columns) for rows, columns in shapes if 0 < rows < 40 and 0 < columns < 30]
    assert len(whole) > 10


def test_both_are_drawn_in_the_set_proportion() -> None:
    kinds = []
    for seed in range(200):
        torch.manual_seed(seed)
        kinds.append(mix_clips(CLIPS, HOT, MixConfig(switch=0.25))[0].dtype == torch.uint8)
    assert 25 < sum(kinds) < 80


def test_nothing_is_mixed_where_probability_is_0() -> None:
    pixels, targets = mix_clips(CLIPS, HOT, MixConfig(probability=0.0))
    assert torch.equal(pixels, CLIPS)
    assert torch.equal(targets, HOT)


def test_the_same_seed_mixes_alike() -> None:
    for seed in range(5):
        first, second = mixed(seed), mixed(seed)
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
