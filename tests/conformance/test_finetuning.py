"""Stage 3 as its authors' code computes it: logits, schedules, layer-wise decay, frames and crops, test views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from nvidia.dali import fn, pipeline_def, types

from mvd_scale.checkpoints import Hints, build_classifier, export_checkpoint, read_checkpoint
from mvd_scale.checkpoints.formats.mvd import MVD_CLASSIFIER
from mvd_scale.checkpoints.formats.names import to_native_name
from mvd_scale.config import load_finetune_recipe
from mvd_scale.data.decoding.dali_geometry import Resampling, upright
from mvd_scale.data.sampling.eval_views import crop_corners, dense_views, uniform_views
from mvd_scale.data.sampling.frames import draw_frames
from mvd_scale.training.lr_schedule import cosine_schedule
from mvd_scale.training.optimizer import layer_index, layer_scale

from .conftest import OUTPUT, Vectors, publish


def test_logits(classifier: Vectors, tmp_path: Path) -> None:
    config = classifier.config
    file = publish(tmp_path, classifier.under("model."), "pth")
    shape = {"heads": config["heads"], "frames": config["T"], "input_size": config["S"]}
    checkpoint = read_checkpoint(file, Hints(**shape, positions="sincos3d"))
    assert (checkpoint.format, checkpoint.kind, checkpoint.unexpected) == ("mvd", "classifier", {})
    assert checkpoint.classes == classifier["logits"].shape[1]
    with torch.no_grad():
        logits = build_classifier(checkpoint)(classifier.clips("video"))
    torch.testing.assert_close(logits, classifier["logits"], **OUTPUT)
    export_checkpoint(checkpoint, "mvd", tmp_path / "out.pth")
    there = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert there.keys() == classifier.under("model.").keys()
    assert all(torch.equal(there[name], tensor) for name, tensor in classifier.under("model.").items())


def test_schedule(schedules: Any) -> None:
    reference = schedules["cosine_warmup"]
    steps = reference["steps_per_epoch"]
    assert reference["start"] == 0
    values = [
        cosine_schedule(
            step,
            total=reference["epochs"] * steps,
            start=reference["base"],
            end=reference["final"],
            warmup=reference["warmup_epochs"] * steps,
        )
        for step in range(len(reference["values"]))
    ]
    assert values == pytest.approx(reference["values"], rel=0, abs=1e-9)


def test_layer_wise_decay(schedules: Any) -> None:
    reference = schedules["layer_decay"]
    depth = max(index for index, _ in reference["groups"].values()) - 1
    for name, (index, factor) in reference["groups"].items():
        ours = to_native_name(name, MVD_CLASSIFIER.modules, MVD_CLASSIFIER.leaves)
        assert ours is not None
        assert layer_index(ours, depth) == index
        assert layer_scale(ours, depth, reference["decay"]) == pytest.approx(factor, rel=0, abs=1e-9)


def test_views(views: Any) -> None:
    for total, clips in views["dense_5x3"].items():
        assert dense_views(int(total), frames=16, stride=4, views=5).tolist() == clips
    for total, clips in views["uniform_2x3"].items():
        assert uniform_views(int(total), frames=16, views=2).tolist() == clips
    for size, corners in views["crops_yx"].items():
        height, width = map(int, size.split("x"))
        assert [list(corner) for corner in crop_corners(height, width, side=224, crops=3)] == corners


def test_segments(segments: Any) -> None:
    """Frame i takes every number of its published range, both ends included, and no other, equally often."""
    parts = segments["parts"]
    for length, ranges in segments["ranges"].items():
        low, high = np.array(ranges).T
        widest = int((high - low).max()) + 1
        # A number that is drawn with probability 1 / n is missed by 40 n draws once in 10^17.
        rng, draws = default_rng(int(length)), max(40 * widest, 400)
        clips = np.stack([draw_frames(rng, "segments", int(length), parts, 4) for _ in range(draws)])
        assert clips.dtype == np.int64
        for i in range(parts):
            seen, counts = np.unique(clips[:, i], return_counts=True)
            assert seen.tolist() == list(range(low[i], high[i] + 1)), f"frame {i} of {length}"
            assert np.abs(counts - draws / len(seen)).max() < 6 * np.sqrt(draws / len(seen)), f"frame {i} of {length}"


@pytest.mark.parametrize("on_gpu", [False, True])
def test_training_crop(traincrop: Vectors, on_gpu: bool) -> None:
    """The crop of a recipe of fine-tuning; DALI's operators, which a GPU uses, take frames on the host too."""
    crop = load_finetune_recipe("finetune/b_k400").data.crop
    resampling = Resampling(crop.interpolation, crop.antialias)
    for number, case in enumerate(traincrop.config):
        frames = traincrop[f"frame{number}"].numpy()[None]
        (top, left, height, width), side = case["box"], case["side"]

        @pipeline_def(batch_size=1, num_threads=1, device_id=None, enable_conditionals=True)
        def graph(frames=frames, box=(top, left, height, width), side=side) -> object:
            clip = fn.external_source(lambda: [frames], dtype=types.UINT8, ndim=4, layout="FHWC")
            sample = {
                "anchor": types.Constant(np.array([box[:2]], np.int32)),
                "shape": types.Constant(np.array([box[2:]], np.int32)),
                "mirror": types.Constant(np.zeros((1, 2), np.int32)),
            }
            how = {"copy": 0, "cut": "first", "turned": False, "on_gpu": on_gpu}
            return upright(sample, clip, (side, side), resampling, **how)

        (clips,) = graph().run()
        ours, published = np.array(clips.at(0))[0].astype(int), traincrop[f"out{number}"].numpy()
        assert np.abs(ours - np.round(published)).max() <= 1
