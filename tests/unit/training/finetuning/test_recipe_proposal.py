"""Proposed recipes: valid, close to the published ones at their sizes, and with longer schedules for few videos."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvd_scale.config import FinetuneRecipe, ModelConfig, load_finetune_recipe
from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.errors import UserError
from mvd_scale.training.finetuning.recipe_proposal import InitialEncoder, propose_recipe


def recipe(folder: Path, videos: int, frames: int, size: str = "B", classes: int = 3) -> FinetuneRecipe:
    rows = [Row(name=f"{k}", path=f"/v/{k}", label=k % classes, frames=frames) for k in range(videos)]
    proposal = propose_recipe(
        Manifest.from_rows(rows),
        ModelConfig(size=size),
        source="videos",
        weights=InitialEncoder(Path("encoder.safetensors")),
        validation="held_out",
        folder=folder / "run",
    )
    file = folder / "mine.yaml"
    file.write_text(proposal.to_yaml("mvd-scale finetune"))
    return load_finetune_recipe(file)


@pytest.mark.parametrize("videos", [3, 10, 60, 500, 9_500, 169_000])
def test_it_is_a_recipe_that_one_gpu_and_eight_can_run(tmp_path: Path, videos: int) -> None:
    made = recipe(tmp_path, videos, 300)
    steps = videos // made.lr_batch
    assert steps >= 1
    assert made.training.global_batch == made.data.copies * made.lr_batch
    made.micro_batch_and_accumulation(1)
    if videos >= 160:
        made.micro_batch_and_accumulation(8)
        assert steps >= 20
    assert made.validation is not None
    assert made.training.initial_encoder == Path("encoder.safetensors")


def test_its_head_tests_the_best_epoch_where_a_third_set_chooses_it_and_else_the_last(tmp_path: Path) -> None:
    rows = [Row(name=f"{k}", path=f"/v/{k}", label=k % 2, frames=100) for k in range(40)]
    for validation, weights in ((None, "runs/mine"), ("held_out", "runs/mine/best.safetensors")):
        made = propose_recipe(
            Manifest.from_rows(rows),
            ModelConfig(size="S"),
            source="videos",
            weights=InitialEncoder(Path("e")),
            validation=validation,
            folder=Path("runs/mine"),
        )
        assert f"evaluate {weights} TEST_VIDEOS --out runs/mine/test\n" in made.to_yaml("mvd-scale finetune")


def test_at_ucf101_s_size_it_is_ucf101_s(tmp_path: Path) -> None:
    made, published = recipe(tmp_path, 9_537, 180), load_finetune_recipe("finetune/b_ucf101")
    assert made.training.epochs == published.training.epochs
    assert made.training.base_lr == published.training.base_lr
    assert made.training.layer_decay == published.training.layer_decay
    assert made.classifier.dropout == published.classifier.dropout
    assert made.model.drop_path == published.model.drop_path


def test_many_videos_are_seen_less_often_than_few(tmp_path: Path) -> None:
    epochs = [recipe(tmp_path, videos, 300).training.epochs for videos in (50, 2_000, 30_000, 240_000)]
    assert epochs == sorted(epochs, reverse=True)
    assert epochs[0] == 200
    assert 30 <= epochs[-1] <= 75


@pytest.mark.parametrize(
    ("frames", "sampling", "stride", "test"),
    [(300, "window", 4, "dense"), (40, "window", 2, "dense"), (20, "segments", 4, "uniform")],
)
def test_clips_fit_into_the_videos(tmp_path: Path, frames: int, sampling: str, stride: int, test: str) -> None:
    made = recipe(tmp_path, 300, frames)
    assert (made.data.sampling, made.data.stride, made.test.sampling) == (sampling, stride, test)


def test_a_class_without_videos_is_said(tmp_path: Path) -> None:
    rows = [Row(name="a", path="/a", label=2, frames=9)]
    with pytest.raises(UserError, match="2 of 3 classes have no usable video: 0, 1"):
        propose_recipe(
            Manifest.from_rows(rows),
            ModelConfig(size="S"),
            source="videos",
            weights=InitialEncoder(Path("e")),
            validation=None,
            folder=tmp_path,
        )


def test_long_paths_stay_whole_and_an_image_encoder_is_given_clips(tmp_path: Path) -> None:
    source = "/data/" + "a folder with spaces/" * 9 + "train.csv"
    rows = [Row(name=f"{k}", path=f"/v/{k}", label=k % 2, frames=100) for k in range(40)]
    image = ModelConfig(size="B", frames=1, tubelet=1, positions="sincos2d", class_token=True)
    made = propose_recipe(
        Manifest.from_rows(rows),
        image,
        source=source,
        weights=InitialEncoder(Path("mae_b.pth")),
        validation=None,
        folder=tmp_path,
    )
    (tmp_path / "mine.yaml").write_text(made.to_yaml("mvd-scale finetune"))
    loaded = load_finetune_recipe(tmp_path / "mine.yaml")
    assert loaded.data.source == source
    assert (loaded.model.frames, loaded.model.tubelet, loaded.model.class_token) == (16, 2, False)
