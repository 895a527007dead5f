"""The detector, its loss, its checkpoints, and the evaluation of its scores."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mvd_scale.checkpoints.weights import (
    build_classifier,
    build_detector,
    load_initial_encoder,
    read_checkpoint,
    save_weights,
)
from mvd_scale.config import DetectionRecipe, DetectorConfig, ModelConfig
from mvd_scale.config.data import ViewsConfig
from mvd_scale.config.detection import DetectionTest
from mvd_scale.detection.loader import DetectionBatch
from mvd_scale.detection.objective import DetectionLoss
from mvd_scale.detection.testing import BoxScorer, DetectionTestData
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder
from mvd_scale.models.encoder import IMAGENET_MEAN, IMAGENET_STD
from mvd_scale.models.positions import resize_positions

from .conftest import START, Scene

ops = pytest.importorskip("torchvision.ops", reason="needs torchvision: the detection extra")

from mvd_scale.models.detector import Detector  # noqa: E402

MODEL = ModelConfig(width=32, depth=2, heads=2, frames=4, input_size=32, patch_size=8)
CONFIG = DetectorConfig(classes=3, init_scale=1.0)
BOXES = torch.tensor([[0, 2.0, 3.0, 20.0, 30.0], [1, 0.0, 0.0, 32.0, 32.0], [1, 8.0, 8.0, 9.0, 9.0]])


@pytest.fixture
def detector() -> Detector:
    torch.manual_seed(0)
    return Detector(MODEL, CONFIG).eval()


def clips(height: int = 32, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 4, height, width, 3), dtype=torch.uint8, generator=generator)


def test_scores_are_of_the_strongest_cell_of_each_box(detector: Detector) -> None:
    """The head sees the mean over time, cut to each box by 7 x 7 cells, of which the maximum is taken."""
    tokens = detector.encoder(clips())
    features = tokens.view(2, 2, 4, 4, 32).mean(1).permute(0, 3, 1, 2)
    cells = ops.roi_align(features, BOXES, 7, 1 / 8, sampling_ratio=0, aligned=False)
    expected = detector.head(cells.flatten(2).max(2).values)
    torch.testing.assert_close(detector(clips(), BOXES), expected)


def test_boxes_are_read_as_by_the_published_code(detector: Detector) -> None:
    """A box is not shifted by half a cell, and one of less than a cell is read as one: RoIAlign by its definition."""
    seen: list[torch.Tensor] = []
    detector.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    # Features that are the column and the row of their cell: bilinear samples are the places of the samples.
    columns, rows = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="xy")
    tokens = torch.stack([columns, rows, *[torch.zeros(4, 4)] * 30], -1).flatten(0, 1).repeat(1, 2, 1)
    detector.encoder.forward = lambda pixels: tokens  # type: ignore[method-assign,assignment]
    for box, cells in (((8.0, 4.0, 22.0, 18.0), (1.0, 0.5, 1.75, 1.75)), ((8.0, 4.0, 9.0, 5.0), (1.0, 0.5, 1.0, 1.0))):
        detector(clips()[:1], torch.tensor([[0, *box]]))
        left, top, width, height = cells
        # Two samples or fewer in each of 7 cells: the last one lies half a sample before the end of the box.
        samples = -(-int(max(width, 1) * 8) // 56)
        last = torch.tensor([left + width * (1 - 0.5 / 7 / samples), top + height * (1 - 0.5 / 7 / samples)])
        torch.testing.assert_close(seen.pop()[0, :2], last)


def test_pixels_are_normalised_as_by_the_published_code_for_ava(detector: Detector) -> None:
    plain = Encoder(MODEL)
    plain.load_state_dict(detector.encoder.state_dict())
    mean, std = torch.tensor([122.7717, 115.9465, 102.9801]), torch.tensor([57.375] * 3)
    normalised = (clips().float() - mean) / std
    # What an encoder with ImageNet's mean and deviation must be given for the same normalised pixels.
    given = normalised * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)
    torch.testing.assert_close(detector.encoder(clips()), plain(given), rtol=0, atol=2e-5)
    assert (detector.encoder(clips()) - plain(clips())).abs().max() > 1e-3


def test_frames_of_any_size_are_seen_by_resized_positions(detector: Detector) -> None:
    assert detector(clips(32, 56), BOXES).shape == (3, 3)
    encoder = detector.encoder
    table = resize_positions(encoder.positions, (2, 4, 4), (2, 4, 7))
    wide = Encoder(MODEL)
    wide.mean, wide.std = encoder.mean, encoder.std
    wide.load_state_dict(encoder.state_dict())
    wide.config = ModelConfig(width=32, depth=2, heads=2, frames=4, input_size=56, patch_size=8)
    wide.register_buffer("positions", resize_positions(encoder.positions, (2, 4, 4), (2, 7, 7)), persistent=False)
    square = clips(56, 56)
    torch.testing.assert_close(encoder(square), wide(square))
    assert table.shape == (56, 32)


def test_a_batch_without_people_trains_nothing_and_breaks_nothing(detector: Detector) -> None:
    scores = detector(clips(), torch.zeros(0, 5))
    F.binary_cross_entropy_with_logits(scores, torch.zeros(0, 3), reduction="sum").backward()
    assert all(p.grad is not None and not p.grad.any() for p in detector.parameters())


def test_without_torchvision_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    with pytest.raises(UserError, match=r"needs torchvision: pip install 'mvd-scale\[detection\]'"):
        Detector(MODEL, CONFIG)


def batch_of(rows: list[int]) -> DetectionBatch:
    nothing, ids = torch.zeros(0), torch.tensor(rows)
    chosen = [n for row in rows for n in range(len(BOXES)) if BOXES[n, 0] == row]
    boxes = BOXES[chosen].clone()
    boxes[:, 0] = torch.tensor([rows.index(int(clip)) for clip in boxes[:, 0]])
    actions = torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 0]])[chosen]
    return DetectionBatch(
        pixels=clips()[rows], visible=nothing, masked=nothing, labels=ids, video_ids=ids, boxes=boxes, actions=actions
    )


def test_every_person_weighs_the_same_however_clips_are_batched(detector: Detector) -> None:
    objective = DetectionLoss()
    together, parts = objective(detector, batch_of([0, 1]))
    apart = [objective(detector, batch_of([row]))[0] for row in (0, 1)]
    torch.testing.assert_close(together, sum(apart) / 2)
    scores = detector(clips(), BOXES)
    by_hand = -sum(
        F.logsigmoid(score if done else -score)
        for row, doing in zip(scores, batch_of([0, 1]).actions, strict=True)
        for score, done in zip(row, doing, strict=True)
    )
    torch.testing.assert_close(together, by_hand / (3 * 2))
    assert 0 < float(parts["true_score"]) < 1


def test_a_detector_comes_back_as_it_was_and_is_no_classifier(detector: Detector, tmp_path: Path) -> None:
    file = tmp_path / "detector.safetensors"
    save_weights(file, detector.state_dict(), MODEL, views=ViewsConfig(stride=3, clips=1, crops=1), detector=CONFIG)
    read = read_checkpoint(file)
    assert (read.kind, read.detector, read.views.stride) == ("detector", CONFIG, 3)
    assert torch.equal(build_detector(read).eval()(clips(), BOXES), detector(clips(), BOXES))
    with pytest.raises(UserError, match="no classification head"):
        build_classifier(read)
    encoder = Encoder(MODEL)
    encoder.mean, encoder.std = detector.encoder.mean, detector.encoder.std
    load_initial_encoder(encoder, file)
    assert torch.equal(encoder(clips()), detector.encoder(clips()))
    save_weights(file, encoder.state_dict(), MODEL)
    with pytest.raises(UserError, match="holds encoder weights, not a detector"):
        build_detector(read_checkpoint(file))


@pytest.fixture
def told(scene: Scene, tmp_path: Path) -> DetectionTest:
    truth, people = [], []
    for frame, corners, action in zip(scene.truth.frame, scene.truth.corners, scene.truth.actions, strict=True):
        key = f"{scene.truth.frames[frame].video},{scene.truth.frames[frame].second}"
        box = ",".join(f"{corner:.6f}" for corner in corners)
        truth.append(f"{key},{box},{action},0")
        people += [f"{key},{box},,0.9", f"{key},0,0,1,1,,0.1"]
    (tmp_path / "truth.csv").write_text("\n".join(truth))
    (tmp_path / "people.csv").write_text("\n".join(people))
    (tmp_path / "actions.pbtxt").write_text('label { name: "a" label_id: 1 } label { name: "b" label_id: 2 }')
    return DetectionTest(
        annotations=tmp_path / "truth.csv",
        boxes=tmp_path / "people.csv",
        actions=tmp_path / "actions.pbtxt",
        starts_at=START,
    )


def test_right_scores_of_all_people_are_a_frame_map_of_one(scene: Scene, told: DetectionTest) -> None:
    test = DetectionTestData.open(told, scene.videos, 3, "the test")
    assert len(test.people) == len(scene.truth)
    order = [scene.truth.frames.index(test.people.frames[frame]) for frame in test.people.frame]
    scores = np.eye(4, dtype=np.float32)[scene.truth.actions[order]][:, 1:]
    found = test.found(scores)
    assert set(found.actions) == {1, 2}
    assert set(found.scores) == {0.0, 0.9}
    assert test.compute_map(found).mean == 1
    assert test.compute_map(test.found(1 - scores)).mean < 0.6
    scores[0] = np.nan
    assert len(test.found(scores)) == len(found) - 2
    assert test.compute_map(test.found(scores)).mean < 1


def test_the_test_widens_boxes_and_scores_by_the_sigmoid(detector: Detector) -> None:
    given = []

    def model(pixels: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        given.append((pixels.shape, boxes))
        return torch.zeros(len(boxes), 3)

    score = BoxScorer(model, CONFIG, 8)
    clip = torch.zeros(4, 30, 60, 3, dtype=torch.uint8)
    scores = score(clip, np.array([[0.25, 0.2, 0.75, 0.6]]))
    assert scores.tolist() == [[0.5] * 3]
    ((shape, boxes),) = given
    assert shape == (1, 4, 32, 64, 3)
    torch.testing.assert_close(boxes, torch.tensor([[0, 13.5, 5.7, 46.5, 18.3]]))


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("data", {"sampling": "window"}, "clips are centred on key frames"),
        ("data", {"mask": {"ratio": 0.5}}, "a detector needs all of them"),
        ("data", {"augment": {"rand_augment": {}}}, "moves the content of a box"),
        ("data", {"mixture": {"a": {"source": "a"}}}, "data.mixture cannot be combined with key frames"),
        ("data", {"crop": {"kind": "short_side", "sides": [200, 256]}}, "less than the crop of model.input_size 224"),
        ("data", {"crop": {"kind": "short_side", "sides": [300, 256]}}, "expected the smaller number first"),
        ("model", {"class_token": True}, "not supported by a detector"),
        ("detector", {"from_scratch": True}, "give either training.initial_encoder or detector.from_scratch"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(section: str, change: dict[str, object], said: str) -> None:
    values: dict[str, dict[str, object]] = {
        "run": {"folder": "unused"},
        "model": {"size": "B"},
        "data": {"mask": None},
        "detector": {},
        "key_frames": {"annotations": "ava.csv"},
        "training": {"epochs": 30, "global_batch": 128, "base_lr": 2.5e-4, "initial_encoder": "encoder.safetensors"},
    }
    DetectionRecipe.model_validate(values)
    values[section] |= change
    with pytest.raises(ValueError, match=said):
        DetectionRecipe.model_validate(values)
