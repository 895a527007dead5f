"""A classifier called with single videos: scores of the multi-view test, whatever the file; broken ones are named."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray

import mvd_scale
from mvd_scale.checkpoints.native import save_weights
from mvd_scale.cli import cli
from mvd_scale.config import ModelConfig
from mvd_scale.config.data import DataConfig, ViewsConfig
from mvd_scale.data.indexing.build import build_manifest
from mvd_scale.data.loaders.single_video import views_of_file, views_of_frames
from mvd_scale.data.loaders.view_loader import ViewLoader, ViewShape, view_items
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.errors import UserError
from mvd_scale.models import Classifier, Encoder

MODEL = ModelConfig(width=16, depth=1, heads=1, frames=4, input_size=32, patch_size=8)
VIEWS = ViewsConfig(stride=2, clips=2, crops=3)
NAMES = ("archery", "bowling", "curling")


def save_classifier(path: Path, seed: int = 0, **others: object) -> Classifier:
    torch.manual_seed(seed)
    classifier = Classifier(MODEL, 3, init_scale=100).eval()
    save_weights(path, classifier.state_dict(), MODEL, **others)
    return classifier


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_classifier(tmp_path / "classifier.safetensors", classes=NAMES, views=VIEWS)
    return tmp_path / "classifier.safetensors"


def encode(
    path: Path,
    codec: str = "libx264",
    *,
    frames: int = 30,
    size: tuple[int, int] = (32, 48),
    pixel_format: str = "yuv420p",
) -> Path:
    """A video whose brightness and colours move: no two views of it are alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *size, pixel_format
        for number in range(frames):
            picture = np.stack([np.full_like(rows, 8 * number), rows * 4, columns * 3 + number], axis=-1) % 256
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return path


def turn(path: Path) -> Path:
    """Have players turn a video by a quarter, clockwise, as phones do."""
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    data = path.read_bytes()
    at = data.index(upright, data.index(b"tkhd"))
    path.write_bytes(data[:at] + turned + data[at + 36 :])
    return path


def decode(path: Path) -> NDArray[np.uint8]:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_scores_are_the_mean_softmax_of_the_views_that_are_tested(tmp_path, weights):
    folder = tmp_path / "videos"
    for name, codec in (("a.mp4", "libx264"), ("b.webm", "libvpx-vp9"), ("c.mp4", "libx264")):
        encode(folder / name, codec, size=(48, 32) if name == "c.mp4" else (32, 48))
    manifest = build_manifest(folder, workers=1)
    items = view_items(manifest, VIEWS, frames=4)
    options = {"shape": ViewShape(4, 32), "batch": 3, "rank": DataRank(torch.device("cpu"))}
    with ViewLoader(manifest, DataConfig(workers=0), VIEWS, items, **options) as loader:
        batch = next(loader)
    plain, classifier = save_classifier(tmp_path / "again.safetensors"), mvd_scale.load_classifier(weights)
    with torch.no_grad():
        expected = [plain(pixels.flatten(0, 1)).softmax(1) for pixels in batch.pixels]
    for path, scores in zip(manifest.path, expected, strict=True):
        found = classifier(path)
        assert (found.dtype, found.shape) == (torch.float32, (3,))
        torch.testing.assert_close(found, scores.mean(0), atol=1e-6, rtol=0)
        # The views differ, so that another choice of them would show.
        assert scores.std(0).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "codec", "shape"),
    [
        ("ten_bits.mkv", "libx264", {"pixel_format": "yuv420p10le"}),
        ("odd_size.mkv", "libx264rgb", {"size": (33, 47), "pixel_format": "rgb24"}),
        ("odd_size.webm", "libvpx-vp9", {"size": (33, 47)}),
        ("one_frame.mp4", "libx264", {"frames": 1}),
        ("tiny.mp4", "libx264", {"size": (16, 20)}),
        ("no_times.avi", "mpeg4", {}),
        ("turned.mp4", "libx264", {}),
        ("turned_vp9.mp4", "libvpx-vp9", {}),
    ],
)
def test_odd_files_are_seen_as_players_show_them(tmp_path, name, codec, shape):
    path = encode(tmp_path / name, codec, **shape)
    frames = decode(path)
    if "turned" in name:
        frames = np.rot90(frames, 3, axes=(1, 2))
        turn(path)
    shown, expected = (
        cut(video, VIEWS, MODEL, torch.device("cpu")).float()
        for cut, video in ((views_of_file, str(path)), (views_of_frames, frames))
    )
    assert shown.shape == (6, 4, 32, 32, 3)
    # DALI, which decodes VP9, converts colours a little differently.
    assert (shown - expected).abs().mean() < 2


def test_frames_in_memory_are_a_video(tmp_path, weights):
    path = encode(tmp_path / "video.mp4")
    frames, classifier = decode(path), mvd_scale.load_classifier(str(weights))
    expected = classifier(str(path))
    for video in (frames, torch.from_numpy(frames)):
        torch.testing.assert_close(classifier(video), expected, atol=1e-5, rtol=0)
    assert (classifier(frames[:, ::-1]) - expected).abs().max() > 1e-3
    for wrong, said in (
        (frames.astype(np.float32), "float32"),
        (frames[0], r"\(32, 48, 3\)"),
        (frames[:0], r"\(0, 32, 48, 3\)"),
        (np.moveaxis(frames, 3, 1), r"\(30, 3, 32, 48\)"),
        ([1, 2], "a list is not a video"),
    ):
        with pytest.raises(UserError, match=f"{said}.*expected"):
            classifier(wrong)


def test_views_are_those_of_the_weights_unless_told_otherwise(tmp_path, weights):
    assert mvd_scale.load_classifier(weights).views == VIEWS
    assert mvd_scale.load_classifier(weights, clips=1, crops=1).views == ViewsConfig(stride=2, clips=1, crops=1)
    save_classifier(tmp_path / "nameless.safetensors")
    nameless = mvd_scale.load_classifier(tmp_path / "nameless.safetensors")
    assert nameless.views == ViewsConfig()
    assert nameless.classes == ("0", "1", "2")


def test_the_likeliest_classes_come_first_and_by_name(tmp_path, weights):
    path, classifier = encode(tmp_path / "video.mp4"), mvd_scale.load_classifier(weights)
    scores = classifier(path)
    assert classifier.classes == NAMES
    top = classifier.top(path, 2)
    assert top == sorted(zip(NAMES, scores.tolist(), strict=True), key=lambda pair: -pair[1])[:2]
    assert len(classifier.top(path)) == 3


def test_of_a_run_the_last_weights_are_taken_and_the_best_by_name(tmp_path, weights):
    """Published figures are of the last epoch; the best one would be chosen on the test, if that is the validation."""
    run, video = weights.parent, encode(tmp_path / "video.mp4")
    last = mvd_scale.load_classifier(weights)(video)
    for seed, name in enumerate(("best.safetensors", "average.safetensors"), start=1):
        save_classifier(run / name, seed=seed, classes=NAMES, views=VIEWS)
    assert torch.equal(mvd_scale.load_classifier(run)(video), last)
    for name in ("best.safetensors", "average.safetensors"):
        assert (mvd_scale.load_classifier(run / name)(video) - last).abs().max() > 1e-3


def test_what_cannot_be_loaded_is_one_message(tmp_path, weights):
    save_weights(tmp_path / "encoder.safetensors", Encoder(MODEL).state_dict(), MODEL)
    with pytest.raises(UserError, match="no classification head"):
        mvd_scale.load_classifier(tmp_path / "encoder.safetensors")
    with pytest.raises(UserError, match=r"clips: .*greater than 0"):
        mvd_scale.load_classifier(weights, clips=0)
    with pytest.raises(UserError, match="sampling"):
        mvd_scale.load_classifier(weights, sampling="sliding")
    with pytest.raises(UserError, match="device is 'tpu'"):
        mvd_scale.load_classifier(weights, device="tpu")
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        mvd_scale.load_classifier(weights, device="cpu", precision="fp16")


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_low_precision_names_the_same_classes(tmp_path, weights, precision):
    video = encode(tmp_path / "video.mp4")
    exact = mvd_scale.load_classifier(weights, device="cpu")(video)
    scores = mvd_scale.load_classifier(weights, device="cpu", precision=precision)(video)
    assert 0 < (scores - exact).abs().max() < 0.05
    assert scores.sum() == pytest.approx(1, abs=1e-5)


def predict(*words: object) -> Result:
    return CliRunner().invoke(cli, ["predict", *map(str, words)])


def test_the_command_names_classes_and_what_is_broken(tmp_path, weights):
    good, last = encode(tmp_path / "good.mp4"), encode(tmp_path / "last.webm", "libvpx-vp9")
    note, missing, torn = tmp_path / "note.mp4", tmp_path / "missing.mp4", tmp_path / "torn.webm"
    note.write_text("I am no video\n" * 100)
    whole = encode(torn, "libvpx-vp9").read_bytes()
    torn.write_bytes(whole[:400] + bytes(len(whole) - 400))
    classifier = mvd_scale.load_classifier(weights)

    said = predict(good, last, "--checkpoint", weights, "--top", 2)
    assert said.exit_code == 0, said.output
    lines = said.output.splitlines()
    assert [lines[0], lines[3]] == [str(good), str(last)]
    expected = [f"  {100 * value:6.2f} %  {name}" for name, value in classifier.top(good, 2)]
    assert lines[1:3] == expected

    said = predict(good, note, missing, torn, last, "--checkpoint", weights, "--json")
    assert isinstance(said.exception, UserError)
    assert "3 of 5 videos" in str(said.exception)
    told = [json.loads(line) for line in said.stdout.splitlines()]
    assert [line["video"] for line in told] == [str(path) for path in (good, note, missing, torn, last)]
    assert all(line["error"].startswith(line["video"]) for line in told[1:4])
    assert "No such file" in told[2]["error"]
    assert [entry["class"] for entry in told[4]["top"]] == [name for name, _ in classifier.top(last)]


def test_importing_the_package_costs_nothing():
    look = "import sys, mvd_scale; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", look], check=True)
    assert mvd_scale.load_classifier.__module__ == "mvd_scale.evaluation.predict"
    with pytest.raises(AttributeError, match="load_clasifier"):
        mvd_scale.load_clasifier  # noqa: B018
