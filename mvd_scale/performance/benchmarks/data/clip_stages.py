"""Where the CPU time of a clip goes: open, seek, decode, convert, crop and resize, hand over.

The first five are timed one clip after the other in one process, as a worker and the CPU's graph do them for a video
that PyAV decodes. The decoder's time is the floor of any loader that decodes these frames by the same library.

| stage | |
|---|---|
| open | opening of the file, with FFmpeg's look at its streams |
| seek | seek to the key frame before the clip |
| decode | reading of packets and decoding |
| convert | conversion of the requested frames to RGB, and the copy of the part that the crop needs |
| resize | cut and resize of the crop, flip |
| hand over | rest of the loader's CPU time: sampling, processes, shared memory, the graph |
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any
from unittest import mock

from mvd_scale.data.decoding import pyav
from mvd_scale.data.decoding.dali_geometry import resample
from mvd_scale.performance.benchmarks.data.baselines import loaders

CLIPS = 24
"""Clips that are timed, after a quarter as many."""


@dataclass(frozen=True)
class ClipStages:
    """CPU milliseconds of one clip, by stage."""

    videos: str
    open: float
    seek: float
    decode: float
    convert: float
    resize: float
    hand_over: float

    @property
    def total(self) -> float:
        """Sum of all stages."""
        return sum(getattr(self, each.name) for each in fields(self)[1:])

    @classmethod
    def table(cls, rows: Sequence[ClipStages]) -> Iterator[str]:
        """Format as a table: a line per set of videos."""
        names = [each.name for each in fields(cls)[1:]]
        yield f"{'CPU ms of a clip':<16}" + "".join(f"{name.replace('_', ' '):>11}" for name in (*names, "total"))
        for row in rows:
            yield f"{row.videos:<16}" + "".join(f"{getattr(row, name):>11.2f}" for name in (*names, "total"))


class StageClock:
    """CPU time of this thread by stage. A stage within another one counts for itself alone."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._inner = 0.0

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its time is added to a stage."""

        def wrapped(*arguments: Any, **options: Any) -> Any:
            before, self._inner, started = self._inner, 0.0, time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                spent = time.thread_time() - started
                self.spent[stage] = self.spent.get(stage, 0.0) + spent - self._inner
                self._inner = before + spent

        return wrapped

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Context in which the functions of a clip's stages are timed."""
        open_video, clock = pyav.open_video, self

        class Container:
            """Container whose seek is timed."""

            def __init__(self, *arguments: Any) -> None:
                self._container = open_video(*arguments)
                self.seek = clock.timed("seek", self._container.seek)

            def __getattr__(self, name: str) -> Any:
                return getattr(self._container, name)

            def __enter__(self) -> Container:
                return self

            def __exit__(self, *_: object) -> None:
                self._container.close()

        convert = _method(self.timed("convert", pyav.RgbConverter.__call__))
        with (
            mock.patch.object(pyav, "open_video", self.timed("open", Container)),
            mock.patch.object(pyav.RgbConverter, "__call__", convert),
            mock.patch.object(loaders, "decode_frames", self.timed("decode", pyav.decode_frames)),
            mock.patch.object(loaders, "resample", self.timed("resize", resample)),
        ):
            yield


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: function(*arguments)


def measure_stages(videos: str, requests: loaders.Requests, loader: float) -> ClipStages:
    """Time the stages of clips.

    Args:
        videos: name of the set of videos.
        requests: the clips.
        loader: CPU seconds per clip of our loader; less than the stages where another decoder is used.
    """
    clock, warm_up = StageClock(), CLIPS // 4
    for n in range(warm_up):
        requests.reference(n)
    with clock.installed():
        for n in range(warm_up, warm_up + CLIPS):
            requests.reference(n)
    stages = {
        name: 1e3 * clock.spent.get(name, 0.0) / CLIPS for name in ("open", "seek", "decode", "convert", "resize")
    }
    return ClipStages(videos, **stages, hand_over=max(1e3 * loader - sum(stages.values()), 0.0))
