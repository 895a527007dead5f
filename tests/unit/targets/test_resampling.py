"""Teachers of another token grid, input size or number of frames than the student's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from mvd_scale.checkpoints.weights import save_weights
from mvd_scale.config import ModelConfig, Recipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder
from mvd_scale.performance.planning.workload import build_workload
from mvd_scale.targets.build import load_targets
from mvd_scale.targets.load import teacher_input_sizes
from mvd_scale.targets.resampling import GridResampler, axis_weights
from mvd_scale.targets.target import EncoderTeacher, FrozenTeacher

SIDE = 48
MASKED = torch.tensor([[1, 2, 5, 6], [0, 3, 4, 7]])
VISIBLE = torch.tensor([[0, 3, 4, 7], [1, 2, 5, 6]])


def test_weights_of_an_axis_by_hand() -> None:
    # Centres of two cells over four: 0.5 and 2.5; a triangle of half-width 2.
    expected = torch.tensor([[0.75, 0.75, 0.25, 0.0], [0.0, 0.25, 0.75, 0.75]]) / 1.75
    torch.testing.assert_close(axis_weights(4, 2), expected)
    # Centres of four cells over two: -0.25, 0.25, 0.75, 1.25; the outer ones see one old cell.
    torch.testing.assert_close(axis_weights(2, 4), torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]))
    assert torch.equal(axis_weights(3, 3), torch.eye(3))


@pytest.mark.parametrize(("old", "new"), [((2, 16, 16), (2, 14, 14)), ((4, 3, 3), (2, 5, 5)), ((1, 2, 2), (3, 2, 2))])
def test_resampling_is_that_of_antialiased_interpolation(old: tuple[int, int, int], new: tuple[int, int, int]) -> None:
    grid = torch.randn(2, *old, 5)
    planes = F.interpolate(grid.flatten(0, 1).permute(0, 3, 1, 2), new[1:], mode="bilinear", antialias=True)
    lines = planes.permute(0, 2, 3, 1).unflatten(0, (2, old[0])).flatten(2).unsqueeze(1)
    size = (new[0], lines.shape[-1])
    expected = F.interpolate(lines, size, mode="bilinear", antialias=True)[:, 0].reshape(2, -1, 5)
    resampler = GridResampler(old, new)
    assert resampler(grid.flatten(1, 3).bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(resampler(grid.flatten(1, 3)), expected, rtol=0, atol=1e-5)


def recipe(target: dict[str, Any], **model: Any) -> Recipe:
    shape = {"width": 48, "depth": 1, "heads": 3, "frames": 4, "input_size": 32}
    return Recipe.model_validate(
        {
            "run": {"folder": "run"},
            "model": shape | model,
            "data": {"mask": {"ratio": 0.5}},
            "targets": {"other": {"decoder": {"width": 32, "depth": 1, "heads": 2}, **target}},
            "training": {"epochs": 2, "global_batch": 2, "base_lr": 1e-3, "warmup_epochs": 0},
        }
    )


def batch() -> ClipBatch:
    generator = torch.Generator().manual_seed(0)
    small, large = (
        torch.randint(0, 256, (2, 4, side, side, 3), dtype=torch.uint8, generator=generator) for side in (32, SIDE)
    )
    return ClipBatch(small, VISIBLE, MASKED, torch.zeros(2), torch.zeros(2), {SIDE: large})


def file(tmp_path: Path, **shape: Any) -> Path:
    torch.manual_seed(3)
    base = {"width": 48, "depth": 1, "heads": 3, "frames": 4, "input_size": SIDE}
    config = ModelConfig.model_validate(base | shape)
    save_weights(tmp_path / "teacher.safetensors", Encoder(config).state_dict(), config)
    return tmp_path / "teacher.safetensors"


def load(made: Recipe) -> FrozenTeacher:
    target = load_targets(made)["other"]
    assert isinstance(target, FrozenTeacher)
    return target


def at(features: Tensor, tokens: Tensor) -> Tensor:
    return features.gather(1, tokens.unsqueeze(-1).expand(-1, -1, features.shape[-1]))


def test_a_file_that_states_no_size_is_the_teacher_that_a_recipe_names_by_its_size(tmp_path: Path) -> None:
    """As published weights, of which only width, depth and heads are known."""
    path = file(tmp_path, width=384, depth=12, heads=6, input_size=32)
    named = {"size": "S", "frames": 4, "input_size": 32}
    wanted = {"kind": "video_teacher", "checkpoint": path}
    assert load(recipe({**wanted, "model": named})).teacher.config.width == 384
    with pytest.raises(UserError, match=r"is not the teacher of targets\.other\.model: it has width 384"):
        load(recipe({**wanted, "model": {**named, "size": "B"}}))


@pytest.mark.parametrize("positions", ["sincos3d", "rotary_vjepa2", "rotary_vjepa2_1"])
def test_a_video_teacher_of_another_size(tmp_path: Path, positions: str) -> None:
    path = file(tmp_path, positions=positions)
    made = recipe({"kind": "video_teacher", "checkpoint": path, "resample": True, "final_norm": True})
    target, clips = load(made), batch()
    assert teacher_input_sizes(made, {"other": target}) == (SIDE,)
    assert target.teacher.norm is not None
    expected = GridResampler((2, 3, 3), (2, 2, 2))(target.teacher(clips.at(SIDE)))
    torch.testing.assert_close(target.features(clips), at(expected, MASKED), rtol=0, atol=1e-5)


def test_a_rotary_teacher_at_the_size_that_gives_the_student_s_grid(tmp_path: Path) -> None:
    path = file(tmp_path, positions="rotary_vjepa2", frames=16)
    target, clips = load(recipe({"kind": "video_teacher", "checkpoint": path, "input_size": 32})), batch()
    assert (target.resampler, target.input_size) == (None, 32)
    torch.testing.assert_close(target.features(clips), at(target.teacher(clips.pixels), MASKED), rtol=0, atol=1e-5)


def test_a_video_teacher_that_sees_every_other_frame(tmp_path: Path) -> None:
    path = file(tmp_path, frames=2, tubelet=1, input_size=32)
    target, clips = load(recipe({"kind": "video_teacher", "checkpoint": path})), batch()
    expected = target.teacher(clips.pixels[:, [0, 2]])
    torch.testing.assert_close(target.features(clips), at(expected, MASKED), rtol=0, atol=1e-5)
    assert isinstance(target, EncoderTeacher)
    assert target.rows_key is None


def test_a_clip_is_resampled_in_time(tmp_path: Path) -> None:
    path = file(tmp_path, frames=4, tubelet=1, input_size=32)
    target, clips = load(recipe({"kind": "video_teacher", "checkpoint": path, "resample": True})), batch()
    whole = target.teacher(clips.pixels)
    first = (0.75 * whole[:, 0:4] + 0.75 * whole[:, 4:8] + 0.25 * whole[:, 8:12]) / 1.75
    torch.testing.assert_close(target.features(clips)[1, 0], first[1, 0], rtol=0, atol=1e-5)


def test_an_image_teacher_of_another_grid(tmp_path: Path) -> None:
    path = file(tmp_path, frames=1, tubelet=1, positions="sincos2d", class_token=True)
    target, clips = load(recipe({"kind": "image_teacher", "checkpoint": path, "resample": True})), batch()
    frames = [target.teacher(clips.at(SIDE)[:, [frame]])[:, 1:] for frame in (0, 2)]
    expected = GridResampler((2, 3, 3), (2, 2, 2))(torch.cat(frames, dim=1))
    torch.testing.assert_close(target.features(clips), at(expected, MASKED), rtol=0, atol=1e-5)


def test_a_model_of_timm_of_another_grid(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = "vit_tiny_patch16_224"
    torch.save(timm.create_model(vit).state_dict(), tmp_path / "vit.pth")
    given = {"kind": "timm", "vit": vit, "checkpoint": tmp_path / "vit.pth", "input_size": SIDE, "resample": True}
    target, clips = load(recipe(given)), batch()
    frames = [target.teacher(clips.at(SIDE)[:, [frame]]) for frame in (0, 2)]
    expected = GridResampler((2, 3, 3), (2, 2, 2))(torch.cat(frames, dim=1))
    torch.testing.assert_close(target.features(clips), at(expected, MASKED), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "shape", "said"),
    [
        ({}, {}, r"grid is 2x3x3 tokens, the student's 2x2x2: .*`resample: true`, or .*`input_size: 32`"),
        ({}, {"input_size": 32, "tubelet": 1}, r"grid is 4x2x2 tokens.*or choose other `frames`"),
        ({"frames": 3}, {}, r"targets\.other\.frames 3 is not a multiple of the teacher's tubelet of 2"),
        ({"input_size": 40}, {}, r"targets\.other\.input_size 40 is not a multiple of the teacher's patch of 16"),
        ({}, {"frames": 6}, r"takes 6 frames, the student's clips have 4: give targets\.other\.frames"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, target: dict[str, Any], shape: dict[str, Any], said: str) -> None:
    path = file(tmp_path, **shape)
    with pytest.raises(UserError, match=said):
        load(recipe({"kind": "video_teacher", "checkpoint": path, **target}))


def test_the_plan_counts_the_teacher_s_own_tokens() -> None:
    shape = {"width": 48, "depth": 2, "heads": 3, "frames": 4, "positions": "rotary_vjepa2"}

    def planned(side: int) -> dict[str, Any]:
        return {"kind": "video_teacher", "model": {**shape, "input_size": side}, "resample": side != 32}

    small, large = (build_workload(recipe(planned(side))) for side in (32, SIDE))
    (few,), (many,) = small.teachers, large.teachers
    # 18 tokens in place of 8; and all are computed in the last block, not only the 4 masked ones.
    assert many.layers[0].forward * 8 == few.layers[0].forward * 18
    assert (few.blocks[-1].outputs, many.blocks[-1].outputs) == (4, 18)
    assert large.pixels == 4 * (32**2 + SIDE**2) * 3


def test_a_student_has_no_rotary_positions() -> None:
    with pytest.raises(ValueError, match=r"model\.positions rotary_vjepa2 are those of frozen teachers"):
        recipe({"kind": "pixels"}, positions="rotary_vjepa2")
