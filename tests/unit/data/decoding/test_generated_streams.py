"""Every frame of generated streams, by every way of reading: the one that decoding from the start of the file gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import pytest

from mvd_scale.data.indexing.media_probe import probe_video
from mvd_scale.data.manifest import Manifest, Row
from tests import streams
from tests.cases import ways

ALL = list(streams.streams())
QUICK = ALL[3::8]
"""One of every eight combinations; all codings, containers and cuts are among them."""

PARAMETERS = [
    pytest.param(*stream, id="-".join(stream), marks=[] if stream in QUICK else [pytest.mark.slow]) for stream in ALL
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """FFmpeg reports every frame whose references are lost."""
    av.logging.set_level(None)
    yield
    av.logging.restore_default_callback()


def test_the_quick_streams_are_of_all_kinds() -> None:
    for place in range(3):
        assert {stream[place] for stream in QUICK} == {stream[place] for stream in ALL}


@pytest.mark.parametrize(("coding", "container", "cut"), PARAMETERS)
def test_every_frame_of_a_file(coding: str, container: str, cut: str, tmp_path: Path) -> None:
    path = streams.write(coding, container, cut, tmp_path)
    shown = streams.decode_all(path)
    row = probe_video(Row(name=path.name, path=str(path)), timeout=60, verify=True)
    if not shown:
        assert "can be decoded" in str(row.left_out)
        return
    assert row.left_out is None
    assert row.frames == len(shown)
    manifest = Manifest.from_rows([row])
    for way in (ways.read_all_at_once, ways.read_singly, ways.read_strides):
        for places, numbers in way(manifest):
            assert numbers == [shown[place] for place in places], (way.__name__, places)


@pytest.mark.parametrize("stream", [stream for stream in QUICK if stream[2] != "amid"][::6], ids="-".join)
def test_every_frame_of_the_loaders_and_of_a_shard(stream: tuple[str, str, str], tmp_path: Path) -> None:
    path = streams.write(*stream, tmp_path)
    shown = streams.decode_all(path)
    manifest = Manifest.from_rows([probe_video(Row(name=path.name, path=str(path)), timeout=60)])
    reads = [*ways.read_training_clips(manifest), *ways.read_views(manifest), *ways.read_shard(manifest, tmp_path)]
    for places, numbers in reads:
        assert numbers == [shown[place] for place in places]
