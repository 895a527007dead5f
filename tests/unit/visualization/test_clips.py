from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mvd_scale.cli import cli
from mvd_scale.config import ModelConfig
from mvd_scale.data.generated.sample_clips import write_sample_clips
from mvd_scale.visualization.clips import mask_clip


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_clips(tmp_path_factory.mktemp("clips"))


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, ["data", "preview", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_sheet_and_a_moving_picture(tmp_path, clips):
    sheet = tmp_path / "sheet.png"
    for moving in (tmp_path / "clip.gif", tmp_path / "clip.mp4"):
        said = run(clips, "--recipe", "quickstart/student", "--out", sheet, "--clips", 2, "--moving", moving)
        assert str(sheet) in said
    assert np.asarray(Image.open(sheet).convert("RGB")).std() > 20
    with Image.open(tmp_path / "clip.gif") as gif:
        assert gif.n_frames > 1
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert len(list(container.decode(video=0))) > 1


def test_copies_and_augmentation_are_shown(tmp_path, clips):
    augment = "{rand_augment: {}, erasing: {probability: 1}}"
    arguments = ["--recipe", "quickstart/student", "--data.copies", 2, "--data.augment", augment]
    run(clips, "--out", tmp_path / "two.png", "--clips", 3, *arguments)
    run(clips, "--out", tmp_path / "one.png", "--clips", 2, *arguments)
    heights = [Image.open(tmp_path / f"{name}.png").height for name in ("one", "two")]
    assert heights[1] > 1.7 * heights[0]  # copies stay together: four clips, not three


def test_only_masked_patches_are_hidden():
    model = ModelConfig(width=16, depth=1, heads=1, frames=4, input_size=16, patch_size=8, tubelet=2)
    pixels = np.full((4, 16, 16, 3), 7, np.uint8)
    hidden = mask_clip(pixels, np.array([1, 2, 3, 4, 5, 6]), model)
    assert (hidden[:2, :8, :8] != 7).all()
    assert (hidden[2:, 8:, 8:] != 7).all()
    assert (hidden != 7).mean() == 2 / 8
    assert (pixels == 7).all()


def test_a_wrong_suffix_is_said(tmp_path, clips):
    arguments = ["data", "preview", str(clips), "--out", str(tmp_path / "a.png"), "--moving", str(tmp_path / "a.avi")]
    result = CliRunner().invoke(cli, arguments)
    assert "expected .gif or .mp4" in str(result.exception)
