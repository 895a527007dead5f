"""What a worker process does: plan a clip, read or decode its video, hand arrays to the DALI graph.

DALI starts workers by spawn; they import this module, so it must not import torch.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import wait
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mvd_scale.data.decode import decode_frames
from mvd_scale.data.manifest import Manifest
from mvd_scale.data.sampling import ClipPlan, Sampler, Share
from mvd_scale.data.storage import DecodeError, read_bytes

ATTEMPTS = 8
"""Videos tried for one clip before it is given up."""

GIVEN_UP = -1
"""Row of a clip for which no video could be decoded; its pixels are black."""

GRACE_SECONDS = 20.0
"""How long a worker goes on after SIGTERM; the launcher kills whoever is left after 30."""

FIELDS = (
    "by_dali",
    "encoded",
    "decoded",
    "frames",
    "anchor",
    "shape",
    "flip",
    "visible",
    "masked",
    "label",
    "row",
    "failures",
)
"""Names of the arrays of one clip, in the order in which they enter the graph."""

DALI_CODECS: dict[Literal["cpu", "mixed"], frozenset[str]] = {
    "cpu": frozenset({"vp8", "vp9", "mjpeg"}),
    "mixed": frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mpeg4"}),
}
"""Codecs that DALI 2.4 decodes on the CPU and by NVDEC ("mixed"); PyAV decodes the rest."""


@dataclass(frozen=True)
class Prepared:
    """One clip on its way into the graph: its bytes for DALI, or its frames already cropped."""

    plan: ClipPlan
    encoded: NDArray[np.uint8] | None
    decoded: NDArray[np.uint8] | None


class ClipSource:
    """The callback of the graph's `external_source`: DALI's sample number -> the arrays of one clip.

    Args:
        manifest: the videos.
        sampler: plans over its usable rows.
        share: the rank's places in the stream.
        first: the rank's clip that DALI's sample 0 is.
        end: the rank's clip at which training ends.
        backend: where DALI decodes.
        by_host: places in the stream whose video DALI failed to decode: PyAV tries them, or finds the substitute.
    """

    def __init__(
        self,
        manifest: Manifest,
        sampler: Sampler,
        share: Share,
        *,
        first: int,
        end: int,
        backend: Literal["cpu", "mixed"],
        by_host: frozenset[int],
    ) -> None:
        self.path = manifest.path
        self.codec = manifest.codec
        self.label = manifest.label
        self.size = np.stack([manifest.height, manifest.width], axis=1)
        self.sampler = sampler
        self.share = share
        self.first = first
        self.end = end
        self.backend = backend
        self.by_host = by_host

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Unpickled in a worker. DALI's workers wait on shared memory and would outlive a parent that was killed.
        parent = parent_process()
        if parent is not None:
            # Both reach workers as well as their rank, which still needs batches until it has saved.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, _exit_later)
            threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()

    def __call__(self, sample: Any) -> tuple[NDArray[Any], ...]:
        """Arrays of one clip, in the order of `FIELDS`, for a `nvidia.dali.types.SampleInfo`.

        Raises:
            StopIteration: training has ended.
        """
        n = self.first + int(sample.idx_in_epoch)
        if n >= self.end:
            raise StopIteration
        position = self.share.position(n)
        failures: list[dict[str, object]] = []
        for attempt in range(ATTEMPTS):
            plan = self.sampler.plan(*self.share.locate(position), attempt)
            try:
                return self._arrays(self.prepare(plan, position), int(self.label[plan.row]), plan.row, failures)
            except DecodeError as error:
                failures.append({"row": plan.row, "path": error.path, "error": error.reason})
        black = np.zeros((len(plan.frames), 1, 1, 3), dtype=np.uint8)
        return self._arrays(Prepared(plan, None, black), -1, GIVEN_UP, failures)

    def prepare(self, plan: ClipPlan, position: int) -> Prepared:
        """Read a clip's video for DALI, or decode and crop it here.

        Raises:
            DecodeError: the video cannot be read or decoded, or is not of the size that the manifest says.
        """
        path = self.path[plan.row]
        if self.codec[plan.row] in DALI_CODECS[self.backend] and position not in self.by_host:
            return Prepared(plan, read_bytes(path), None)
        frames = decode_frames(path, plan.frames)
        height, width = self.size[plan.row].tolist()
        if frames.shape[1:3] != (height, width):
            raise DecodeError(
                path, f"frames are {frames.shape[1]} x {frames.shape[2]}, the manifest says {height} x {width}"
            )
        y, x, h, w = plan.crop
        return Prepared(plan, None, np.ascontiguousarray(frames[:, y : y + h, x : x + w]))

    def _arrays(
        self, clip: Prepared, label: int, row: int, failures: list[dict[str, object]]
    ) -> tuple[NDArray[Any], ...]:
        plan, encoded, decoded = clip.plan, clip.encoded, clip.decoded
        # Frames decoded here are cropped already: whole ones would only make the way through shared memory longer.
        y, x, h, w = plan.crop if decoded is None else (0, 0, *decoded.shape[1:3])
        return (
            np.array(decoded is None),
            np.zeros(1, np.uint8) if encoded is None else encoded,
            np.zeros((1, 1, 1, 3), np.uint8) if decoded is None else decoded,
            plan.frames.astype(np.int32),
            np.array([y, x], dtype=np.int32),
            np.array([h, w], dtype=np.int32),
            np.array(plan.flip, dtype=np.int32),
            plan.visible,
            plan.masked,
            np.array(label, dtype=np.int64),
            np.array(row, dtype=np.int64),
            np.frombuffer(json.dumps(failures).encode(), dtype=np.uint8),
        )


def _exit_later(number: int, frame: object) -> None:
    timer = threading.Timer(GRACE_SECONDS, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()


def _exit_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
