"""Cases of the forms `videos`, `encodes` and `pictures`: the right frames, upright, in the right colours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from mvd_scale.config.data import DataConfig
from mvd_scale.config.model import ModelConfig
from mvd_scale.data.decoding.backends import DALI_CODECS, DecodeBackend, Decoders, decode_backend
from mvd_scale.data.decoding.dali_graph import decode_video
from mvd_scale.data.decoding.pyav import decode_frames
from mvd_scale.data.indexing.transcode import TranscodeOptions
from mvd_scale.data.loaders.clip_loader import BatchPlan, ClipLoader
from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.data.orientation import orient
from mvd_scale.data.storage import read_bytes
from mvd_scale.distributed.data_rank import DataRank
from tests.cases import ways
from tests.cases.barcodes import read_barcode
from tests.cases.collect import cases

Case = dict[str, Any]
Way = Callable[[Manifest], Iterator[ways.Read]]


@pytest.mark.parametrize("verify", [False, True], ids=["", "verify"])
@pytest.mark.parametrize(("folder", "case"), cases("videos"))
def test_the_index_counts_the_frames_that_a_player_shows(folder: Path, case: Case, verify: bool) -> None:
    for file, expected in case["videos"].items():
        assert ways.index(folder / file, verify=verify).frames.tolist() == [len(expected["shows"])], file


@pytest.mark.parametrize(
    "way",
    [ways.read_all_at_once, ways.read_singly, ways.read_strides, ways.read_training_clips, ways.read_views],
    ids=lambda way: way.__name__,
)
@pytest.mark.parametrize(("folder", "case"), cases("videos"))
def test_every_frame_is_the_one_that_a_player_shows(folder: Path, case: Case, way: Way) -> None:
    for file, expected in case["videos"].items():
        for places, numbers in way(ways.index(folder / file)):
            assert numbers == [expected["shows"][place] for place in places], (file, places)


@pytest.mark.parametrize(("folder", "case"), cases("videos"))
def test_a_shard_gives_the_same_frames(folder: Path, case: Case, tmp_path: Path) -> None:
    for number, (file, expected) in enumerate(case["videos"].items()):
        for places, numbers in ways.read_shard(ways.index(folder / file), tmp_path / str(number)):
            assert numbers == [expected["shows"][place] for place in places], (file, places)


@pytest.mark.parametrize(("folder", "case"), cases("encodes"))
def test_a_transcoded_shard_gives_the_same_frames(folder: Path, case: Case, tmp_path: Path) -> None:
    for number, file in enumerate(case["encodes"]):
        original = ways.index(folder / file)
        packed = ways.shard(original, tmp_path / str(number), TranscodeOptions("h264"))
        assert packed.access == ["packets"], file
        ((_, shows),) = ways.read_all_at_once(original)
        shows = case.get("videos", {}).get(file, {"shows": shows})["shows"]
        for way in (ways.read_all_at_once, ways.read_strides, ways.read_training_clips):
            for places, numbers in way(packed):
                assert numbers == [shows[place] for place in places], (file, places)


@pytest.mark.parametrize(("folder", "case"), cases("pictures"))
def test_the_first_frame_is_the_picture_that_a_player_shows(folder: Path, case: Case) -> None:
    for file, expected in case["pictures"].items():
        picture = np.asarray(Image.open(folder / expected["png"]).convert("RGB"))
        manifest = ways.index(folder / file)
        video = manifest.row(0)
        for decoder, frame in first_frames(manifest).items():
            upright = orient(frame, video.rotation, video.mirrored)
            assert upright.shape == picture.shape, (file, decoder)
            assert difference(upright, picture) <= expected["within"], (file, decoder)
        assert (video.height, video.width) == picture.shape[:2]
        assert difference(loaded(manifest), resized(picture)) <= expected["within"], file


def first_frames(manifest: Manifest) -> dict[str, NDArray[np.uint8]]:
    """The first frame as coded, by PyAV, and by DALI on the CPU if it may get the file on some device."""
    video = manifest.row(0)
    frames = {"PyAV": decode_frames(video, np.array([0]))[0]}
    if decode_backend(video, Decoders()) is DecodeBackend.DALI_VIDEO:
        assert video.codec in DALI_CODECS["cpu"]
        frames["DALI"] = by_dali(video)
    return frames


def by_dali(video: Row) -> NDArray[np.uint8]:
    from nvidia.dali import fn, pipeline_def, types

    encoded = read_bytes(video.path)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)  # type: ignore[untyped-decorator]
    def clip() -> Any:
        return decode_video(fn.external_source(lambda: [encoded], dtype=types.UINT8, ndim=1), [0], "cpu")

    (clips,) = clip().run()
    return np.asarray(clips[0])[0]


SIDE = 64


def loaded(manifest: Manifest) -> NDArray[np.uint8]:
    """First frame of a training clip of the loader, cropped to the whole frame: uint8 (SIDE, SIDE, 3)."""
    aspect = float(manifest.width[0] / manifest.height[0])
    crop = {"kind": "random_resized", "area": [1, 1], "aspect": [aspect, aspect], "interpolation": "bilinear"}
    model = ModelConfig(width=16, depth=1, heads=1, frames=4, input_size=SIDE, patch_size=8)
    # Frames 0, 1, 2 ... of a clip that is as long as the video or longer begin with the first one.
    data = DataConfig.model_validate({"stride": max(int(manifest.frames[0]) // 2, 1), "workers": 0, "crop": crop})
    plan, rank = BatchPlan.one_batch(1), DataRank(torch.device("cpu"))
    with ClipLoader(manifest, data, model, 1, plan=plan, rank=rank) as loader:
        frame: NDArray[np.uint8] = next(loader).pixels[0, 0].numpy()
    return frame


def resized(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def difference(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> float:
    """Mean absolute difference in levels of 255."""
    return float(np.abs(ours.astype(np.int16) - theirs).mean())


def test_a_barcode_is_read_as_it_is_drawn() -> None:
    from tests.cases.barcodes import draw_barcode

    assert [read_barcode(draw_barcode(number)) for number in range(256)] == list(range(256))
