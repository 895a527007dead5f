"""Rotary positions of V-JEPA 2 and 2.1 against their formulas, channel by channel."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from pydantic import ValidationError

from mvd_scale.config import ModelConfig
from mvd_scale.config.model import Positions
from mvd_scale.models import Encoder
from mvd_scale.models.layers.rotary import rotate, rotation_table
from mvd_scale.models.quantization import quantize_linear_layers

GRID = (2, 3, 4)
CHANNELS = 26
"""Three sections of 8 channels, and 2 that are not turned."""
BOTH: list[Positions] = ["rotary_vjepa2", "rotary_vjepa2_1"]


def packed() -> torch.Tensor:
    return torch.randn(2, 24, 3, 5, CHANNELS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def places(kind: Positions) -> list[tuple[float, float, float]]:
    """Time slice, row and column of each token; rows and columns of 2.1 end at 15."""
    down, across = (15 / 2, 15 / 3) if kind == "rotary_vjepa2_1" else (1.0, 1.0)
    return [(t, h * down, w * across) for t in range(2) for h in range(3) for w in range(4)]


def test_pairs_of_channels_are_turned_as_complex_numbers_in_v_jepa_2_1() -> None:
    qkv = packed()
    turned = rotate(qkv, rotation_table("rotary_vjepa2_1", GRID, CHANNELS).double())
    for token, place in enumerate(places("rotary_vjepa2_1")):
        for axis in range(3):
            for pair in range(4):
                first = 8 * axis + 2 * pair
                angle = place[axis] * 10000 ** (-pair / 4)
                given = complex(*qkv[1, token, 0, 3, first : first + 2].tolist())
                found = complex(*turned[1, token, 0, 3, first : first + 2].tolist())
                assert abs(found - given * cmath.exp(1j * angle)) < 1e-5


def test_channels_of_a_pair_have_different_frequencies_in_v_jepa_2() -> None:
    qkv = packed()
    turned = rotate(qkv, rotation_table("rotary_vjepa2", GRID, CHANNELS).double())
    for token, place in enumerate(places("rotary_vjepa2")):
        for channel in range(24):
            axis, inside = divmod(channel, 8)
            angle = place[axis] * 10000 ** (-(inside % 4) / 4)
            mine, partner = qkv[0, token, 1, 2, channel].item(), qkv[0, token, 1, 2, channel ^ 1].item()
            sign = -1 if channel % 2 == 0 else 1
            expected = mine * math.cos(angle) + sign * partner * math.sin(angle)
            assert abs(turned[0, token, 1, 2, channel].item() - expected) < 1e-5


@pytest.mark.parametrize("kind", BOTH)
def test_values_and_left_over_channels_stay(kind: Positions) -> None:
    qkv, rotation = packed(), rotation_table(kind, GRID, CHANNELS)
    turned = rotate(qkv, rotation)
    assert torch.equal(turned[:, :, 2], qkv[:, :, 2])
    assert torch.equal(turned[..., 24:], qkv[..., 24:])
    assert rotate(qkv.bfloat16(), rotation).dtype == torch.bfloat16


def test_scores_of_v_jepa_2_1_depend_on_the_distance_alone() -> None:
    query, key = (torch.randn(CHANNELS, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3))
    qkv = torch.stack([query, key, key]).view(1, 1, 3, 1, CHANNELS).expand(1, 24, 3, 1, CHANNELS)
    turned = rotate(qkv, rotation_table("rotary_vjepa2_1", GRID, CHANNELS))[0, :, :, 0]
    scores = turned[:, 0] @ turned[:, 1].T
    # From (0, 0, 0) to (1, 1, 1), and from (0, 1, 2) to (1, 2, 3).
    torch.testing.assert_close(scores[0, 12 + 4 + 1], scores[4 + 2, 12 + 8 + 3])


def test_rows_and_columns_of_v_jepa_2_1_end_at_those_of_its_first_size() -> None:
    first, large = (rotation_table("rotary_vjepa2_1", (1, side, side), CHANNELS) for side in (16, 24))
    torch.testing.assert_close(first[:, -1], large[:, -1])
    one = rotation_table("rotary_vjepa2_1", (2, 1, 1), CHANNELS)
    assert torch.equal(one[0, 0], torch.ones(CHANNELS))
    assert one.isfinite().all()


def model(**changes: object) -> ModelConfig:
    shape = {"width": 64, "depth": 2, "heads": 2, "frames": 4, "input_size": 32, "positions": "rotary_vjepa2"}
    return ModelConfig.model_validate(shape | changes)


def encoder(config: ModelConfig) -> Encoder:
    torch.manual_seed(0)
    made = Encoder(config).eval()
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


@pytest.mark.parametrize("kind", BOTH)
@torch.no_grad()
def test_an_encoder_takes_clips_of_any_number_and_size(kind: Positions) -> None:
    made = encoder(model(positions=kind))
    clips = torch.rand(3, 4, 32, 32, 3)
    features = made(clips)
    # On CPUs a batch goes through the blocks in parts.
    torch.testing.assert_close(features[2:], made(clips[2:]), rtol=0, atol=1e-5)
    torch.testing.assert_close(made(clips, output_tokens=torch.tensor([[5, 1]] * 3)), features[:, [5, 1]])
    longer = encoder(model(positions=kind, frames=8, input_size=48))
    wide = torch.rand(1, 8, 48, 48, 3)
    torch.testing.assert_close(made(wide), longer(wide), rtol=0, atol=1e-6)


@torch.no_grad()
def test_biases_of_the_keys_count() -> None:
    made = encoder(model())
    clips = torch.rand(1, 4, 32, 32, 3)
    before = made(clips)
    for name, parameter in made.named_parameters():
        if name.endswith("k_bias"):
            parameter.zero_()
    assert (made(clips) - before).abs().max() > 1e-3


@torch.no_grad()
def test_an_encoder_in_eight_bits_stays_close() -> None:
    made = encoder(model())
    clips = torch.rand(2, 4, 32, 32, 3)
    before = made(clips)
    after = quantize_linear_layers(made, "int8", torch.device("cpu"), torch.float32)(clips)
    assert torch.cosine_similarity(before, after, dim=-1).mean() > 0.99


def test_a_part_of_the_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="encodes whole clips"):
        encoder(model())(torch.rand(1, 4, 32, 32, 3), tokens=torch.tensor([[0, 1]]))


@pytest.mark.parametrize("changes", [{"heads": 16}, {"width": 63, "heads": 7}, {"class_token": True}])
def test_shapes_that_cannot_be_turned_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="turn pairs of channels along three axes"):
        model(**changes)
