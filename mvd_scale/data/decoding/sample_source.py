"""Sample sources, which run in worker processes: plan a clip, read or decode its video, pass arrays to the DALI graph.

DALI spawns the workers, which import this module: it must not import torch, so that they start faster.

Legend: T frames, C copies, K operations, J values of jitter, V visible, M masked.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from abc import ABC, abstractmethod
from multiprocessing import parent_process
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvd_scale.config.data import ShortSideCrop
from mvd_scale.data.decoding.backends import (
    BT709_FROM_BT601,
    DecodeBackend,
    Decoders,
    count_kinds,
    decode_backend,
    decode_backends,
)
from mvd_scale.data.decoding.pyav import decode_frames
from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.data.orientation import Orientation, mirror_axes
from mvd_scale.data.sampling.crops import Box
from mvd_scale.data.sampling.regions import localize_warps, orient_warps, plan_regions
from mvd_scale.data.sampling.sampler import ClipPlan, CopyPlan, RankShard, Sampler
from mvd_scale.data.storage import DecodeError, read_bytes, run_with_timeout
from mvd_scale.data.worker_pool import exit_with_parent, keep_freed_memory

MAX_ATTEMPTS = 8
"""Videos that are tried for one clip: the video of the clip, then substitutes."""

NO_SUBSTITUTE = -1
"""Value of `row` for a clip whose video and substitutes all failed to decode; its pixels are black."""

_UNCHANGED = np.eye(3, dtype=np.float32)
"""Matrix that leaves colours as they are."""

GRACE_SECONDS = 20.0
"""Seconds that a worker continues after SIGTERM; the launcher kills the remaining processes after 30 s."""

Arrays = dict[str, NDArray[Any]]
"""Arrays of one sample, by the names of `FIELDS`."""


class DecoderInput(NamedTuple):
    """Input of the graph for one clip: encoded bytes for DALI, or decoded frames cropped to a box."""

    decoder: DecodeBackend
    data: NDArray[np.uint8]
    """Encoded bytes, uint8 (bytes,), or frames, uint8 (T, height, width, 3)."""
    top: int = 0
    left: int = 0
    """Position of the first pixel of `data` in the coded frame."""


class Field(NamedTuple):
    """Name, dtype, number of dimensions and DALI layout of an array that a source returns for every sample."""

    name: str
    dtype: type
    ndim: int
    layout: str = ""


FIELDS = {
    field.name: field
    for field in (
        Field("decoder", np.int32, 0),
        Field("encoded", np.uint8, 1),
        Field("decoded", np.uint8, 4, "FHWC"),
        Field("frames", np.int32, 1),
        Field("matrix", np.float32, 2),
        Field("row", np.int64, 0),
        Field("label", np.int64, 0),
        Field("failures", np.uint8, 1),
        Field("transpose", np.int32, 0),
        Field("anchor", np.int32, 2),
        Field("shape", np.int32, 2),
        Field("mirror", np.int32, 2),
        Field("size", np.float32, 1),
        Field("inverse", np.int32, 1),
        Field("visible", np.int64, 2),
        Field("masked", np.int64, 2),
        Field("frame_size", np.float32, 2),
        Field("operations", np.int32, 2),
        Field("values", np.float64, 3),
        Field("regions", np.int32, 3),
        Field("jitter", np.float32, 2),
        Field("erase", np.int32, 2),
        Field("noise", np.uint8, 5),
    )
}
"""All arrays that a graph may receive for a sample."""


class VideoSource(ABC):
    """Callback of a graph's `external_source`: from DALI's sample number to the arrays of one sample.

    Args:
        manifest: manifest of the videos.
        first: number of the first sample, which DALI numbers 0.
        end: number after the last sample.
        decoders: decoders of the run.
        pyav_samples: samples whose video DALI failed to decode: PyAV decodes them, or a substitute replaces them.
        timeout: seconds after which a video counts as unreadable.
        threads: threads of each worker for `pyav.THREADED_DECODERS`.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        first: int,
        end: int,
        decoders: Decoders,
        pyav_samples: frozenset[int],
        timeout: float,
        threads: int = 1,
    ) -> None:
        self.videos = VideoTable(manifest)
        self.decoders = decoders
        self.backends = decode_backends(manifest, decoders)
        self.corrects = decoders.videos == "mixed" and any(decoders.corrects(kind) for kind, _ in count_kinds(manifest))
        self.turned = any((manifest.rotation[rows] % 180).any() for rows in manifest.usable_blocks())
        self.first = first
        self.end = end
        self.pyav_samples = pyav_samples
        self.timeout = timeout
        self.threads = threads

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if parent_process() is not None:
            # This process is a worker. DALI's workers wait on shared memory and would outlive a parent that was killed.
            exit_with_parent()
            keep_freed_memory()
            # SIGTERM reaches the workers as well as their rank, which needs batches until it has saved a checkpoint.
            signal.signal(signal.SIGTERM, _exit_after_grace_period)

    def __call__(self, sample: Any) -> tuple[NDArray[Any], ...]:
        """Return the arrays of one sample, in the order of `fields`, for a `nvidia.dali.types.SampleInfo`.

        Raises:
            StopIteration: the sample is `end` or later.
        """
        n = self.first + int(sample.idx_in_epoch)
        if n >= self.end:
            raise StopIteration
        arrays = self.sample(n)
        # Clips are all over the manifest: the pages that they touch would soon be all of it.
        self.videos.manifest.release()
        return tuple(np.asarray(arrays[field.name], order="C") for field in self.fields)

    @property
    def fields(self) -> list[Field]:
        """Arrays that the graph needs; others are not copied to it."""
        used = {"decoded", "row", "label", "failures"}
        if len(self.backends) > 1:
            used |= {"decoder", "encoded"}
        if DecodeBackend.DALI_VIDEO in self.backends:
            used.add("frames")
            if self.corrects:
                used.add("matrix")
        if self.turned:
            used.add("transpose")
        return [field for name, field in FIELDS.items() if name in used | self.extra_fields]

    @property
    @abstractmethod
    def extra_fields(self) -> set[str]:
        """Names of the fields that the graph of this source needs in addition to those of decoding."""

    @abstractmethod
    def sample(self, n: int) -> Arrays:
        """Return the arrays of sample `n`, by the names of `FIELDS`."""

    @abstractmethod
    def dali_input(self, n: int) -> tuple[NDArray[np.uint8], NDArray[np.int64], Row] | None:
        """Return encoded bytes, frame numbers and video of sample `n` if DALI decodes it, else None.

        Returns:
            uint8 (bytes,), int64 (T,), and the row of the video.
        """

    def prepare(self, row: int, frames: NDArray[np.int64], box: Box | None, *, pyav_samples: bool) -> DecoderInput:
        """Read the bytes of a video for DALI, or decode its frames by PyAV and crop them to a box.

        Args:
            row: row of the manifest.
            frames: indices of the frames in display order, int64 (T,).
            box: box in the coded frame, for PyAV; None for the whole frame.
            pyav_samples: decode by PyAV even if DALI supports the codec.

        Raises:
            DecodeError: the video cannot be read or decoded, or its frames are not of the size in the manifest.
        """
        video = self.videos[row]
        decoder = DecodeBackend.PYAV if pyav_samples else decode_backend(video, self.decoders)
        return run_with_timeout(self.timeout, video.path, _prepare, video, frames, box, decoder, self.threads)

    def decoding(
        self, media: DecoderInput, frames: NDArray[np.int64], row: int, failures: list[dict[str, object]]
    ) -> Arrays:
        """Return the arrays of the fields that all sources share: input of the decoders, row, label and failures.

        Args:
            media: encoded bytes or decoded frames.
            frames: indices of the frames in display order, int64 (T,).
            row: row of the manifest, or `NO_SUBSTITUTE`.
            failures: a record for each video that failed to decode for this sample.
        """
        host = media.decoder is DecodeBackend.PYAV
        corrected = self.corrects and row != NO_SUBSTITUTE and self.decoders.corrects(self.videos[row])
        return {
            "decoder": np.array(media.decoder, dtype=np.int32),
            "encoded": np.zeros(1, np.uint8) if host else media.data,
            "decoded": media.data if host else np.zeros((1, 1, 1, 3), np.uint8),
            "frames": frames.astype(np.int32),
            "matrix": BT709_FROM_BT601 if corrected else _UNCHANGED,
            "row": np.array(row, dtype=np.int64),
            "label": np.array(-1 if row == NO_SUBSTITUTE else self.videos.label[row], dtype=np.int64),
            "failures": np.frombuffer(json.dumps(failures).encode(), dtype=np.uint8),
        }


class ClipSource(VideoSource):
    """Source of the training clips of one rank; sample n is the rank's n-th clip.

    Args:
        manifest: manifest of the videos.
        sampler: sampler of the clips of its usable rows.
        shard: positions in the stream that belong to the rank.
        others: other arguments of `VideoSource`; `pyav_samples` are positions in the stream instead of samples.
    """

    def __init__(self, manifest: Manifest, sampler: Sampler, shard: RankShard, **others: Any) -> None:
        super().__init__(manifest, **others)
        self.sampler = sampler
        self.shard = shard

    @property
    def extra_fields(self) -> set[str]:
        augment = self.sampler.data.augment
        used = {"mirror", "visible", "masked"}
        if self._whole:
            used.add("frame_size")
        if self._whole or augment.rand_augment is None:
            used |= {"anchor", "shape"}
        if augment.rand_augment is not None:
            used |= {"operations", "values", "regions"}
        if augment.color_jitter is not None:
            used.add("jitter")
        if augment.erasing is not None:
            used |= {"erase", "noise"}
        return used

    def sample(self, n: int) -> Arrays:
        position = self.shard.position(n)
        failures: list[dict[str, object]] = []
        for attempt in range(MAX_ATTEMPTS):
            plan = self.sampler.plan(*self.shard.locate(position), attempt)
            try:
                return self._arrays(plan, self._media(plan, position), plan.row, failures)
            except DecodeError as error:
                failures.append(self.videos.failure(plan.row, error))
        black = np.zeros((len(plan.frames), *self.videos[plan.row].coded_size, 3), dtype=np.uint8)
        return self._arrays(plan, DecoderInput(DecodeBackend.PYAV, black), NO_SUBSTITUTE, failures)

    def dali_input(self, n: int) -> tuple[NDArray[np.uint8], NDArray[np.int64], Row] | None:
        position = self.shard.position(n)
        for attempt in range(MAX_ATTEMPTS):
            plan = self.sampler.plan(*self.shard.locate(position), attempt)
            try:
                media = self._media(plan, position)
            except DecodeError:
                continue  # this video never reached DALI: the worker continued with the next substitute
            return (media.data, plan.frames, self.videos[plan.row]) if media.decoder is not DecodeBackend.PYAV else None
        return None

    @property
    def _whole(self) -> bool:
        """Whether crops are cut from frames that are resized as a whole."""
        return isinstance(self.sampler.data.crop, ShortSideCrop)

    def _media(self, plan: ClipPlan, position: int) -> DecoderInput:
        # Frames decoded by PyAV are cropped to the smallest box that contains what all copies need: copying whole
        # frames through shared memory would take longer.
        video = self.videos[plan.row]
        box = _hull([CodedCopy.of(copy, video, whole=self._whole).source for copy in plan.copies])
        return self.prepare(plan.row, plan.frames, box, pyav_samples=position in self.pyav_samples)

    def _arrays(self, plan: ClipPlan, media: DecoderInput, row: int, failures: list[dict[str, object]]) -> Arrays:
        video, augments = self.videos[plan.row], [copy.augment for copy in plan.copies]
        copies = [CodedCopy.of(copy, video, whole=self._whole) for copy in plan.copies]
        origin = np.array([media.top, media.left, 0, 0], dtype=np.int32)
        # A box in resized frames does not move with the part of the frame that was decoded: it is the whole frame then.
        boxes = np.array([copy.box for copy in copies], dtype=np.int32) - origin
        return self.decoding(media, plan.frames, row, failures) | {
            "transpose": np.array(video.rotation % 180 != 0, dtype=np.int32),
            "anchor": boxes[:, :2],
            "shape": boxes[:, 2:],
            "mirror": np.array([flip_axes(copy.flip, video) for copy in plan.copies], dtype=np.int32),
            "frame_size": np.array([copy.frame for copy in copies], dtype=np.float32),
            "visible": np.stack([copy.visible for copy in plan.copies]),
            "masked": np.stack([copy.masked for copy in plan.copies]),
            "operations": np.stack([augment.operations for augment in augments]),
            "values": np.stack([copy.values for copy in copies]),
            "regions": np.stack([copy.regions for copy in copies]) - origin,
            "jitter": np.stack([augment.jitter for augment in augments]),
            "erase": np.array([augment.erase for augment in augments], dtype=np.int32),
            "noise": _stack_noise([augment.noise for augment in augments]),
        }


class CodedCopy(NamedTuple):
    """Crop and operations of one copy of a clip in the orientation in which its frames are coded."""

    frame: tuple[int, int]
    """Height and width of the frame that the crop is cut from, see `CropPlan.frame`."""

    box: Box
    """Box of the crop in that frame."""

    regions: NDArray[np.int32]
    """Regions of the decoded frame that the operations read, and the one that remains: int32 (K + 1, 4)."""

    values: NDArray[np.float64]
    """Values of the operations, with matrices of warps for positions in the regions: float64 (K, 6)."""

    @property
    def source(self) -> Box:
        """Box of the decoded frame that the copy needs."""
        top, left, height, width = self.regions[0].tolist()
        return top, left, height, width

    @classmethod
    def of(cls, copy: CopyPlan, video: Row, *, whole: bool) -> CodedCopy:
        """Convert the plan of a copy, which is in display orientation.

        Args:
            copy: plan of the copy.
            video: row of the video.
            whole: whether the crop is cut from frames that are resized as a whole.
        """
        size, augment, crop = (video.height, video.width), copy.augment, copy.crop
        box = coded_box(crop.box, crop.frame, video)
        frame = crop.frame[::-1] if video.rotation % 180 else crop.frame
        wanted = (0, 0, *video.coded_size) if whole else box
        values = orient_warps(augment.operations, augment.values, size, Orientation(video.rotation, video.mirrored))
        regions = plan_regions(augment.operations, values, wanted, video.coded_size)
        return cls(frame, box, regions, localize_warps(augment.operations, values, regions))


class VideoTable:
    """Properties of the videos that decoding needs, from a manifest whose columns processes share."""

    _COLUMNS = (
        *("path", "offset", "size", "height", "width", "rotation", "mirrored", "still", "stream", "first_pts"),
        *("pts_step", "label", "plain", "codec", "pixel_format", "colour", "access"),
    )

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest.shared()

    @property
    def label(self) -> NDArray[np.int64]:
        """Class of each video, or -1: int64 (videos,)."""
        return self.manifest.label

    def __getitem__(self, row: int) -> Row:
        return self.manifest.row_with(row, self._COLUMNS, name="")

    def failure(self, row: int, error: DecodeError) -> dict[str, object]:
        """Create the record of a video that could not be decoded: row, path and reason."""
        return {"row": row, "path": self.manifest.path[row], "error": error.reason}


def coded_box(box: Box, size: tuple[int, int], video: Row) -> Box:
    """Convert a box of a displayed frame to the coded frame, which is transposed and mirrored to be displayed.

    Args:
        box: box in the displayed frame.
        size: height and width of the displayed frame, which may have been resized.
        video: row of the video, of which the orientation counts.
    """
    top, left, height, width = box
    left_right, up_down = mirror_axes(video.rotation, video.mirrored)
    if left_right:
        left = size[1] - left - width
    if up_down:
        top = size[0] - top - height
    return (left, top, width, height) if video.rotation % 180 else (top, left, height, width)


def flip_axes(flip: bool, video: Row) -> tuple[bool, bool]:
    """Whether to mirror a frame left-right and up-down, after transposing it, to get the displayed frame, flipped.

    Only videos rotated by 90 or 270 degrees are transposed, see `orientation`.
    """
    left_right, up_down = mirror_axes(video.rotation, video.mirrored)
    return flip ^ left_right, up_down


def _prepare(
    video: Row, frames: NDArray[np.int64], box: Box | None, decoder: DecodeBackend, threads: int
) -> DecoderInput:
    if decoder is not DecodeBackend.PYAV:
        return DecoderInput(decoder, read_bytes(video.path, video.offset, video.size))
    top, left = box[:2] if box is not None else (0, 0)
    return DecoderInput(decoder, decode_frames(video, frames, box, threads), top, left)


def _stack_noise(noises: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Stack the noise of all copies, padded with 0 to the largest box: uint8 (C, T, height, width, 3)."""
    height, width = (max(1, *(noise.shape[axis] for noise in noises)) for axis in (1, 2))
    stacked = np.zeros((len(noises), len(noises[0]), height, width, 3), np.uint8)
    for copy, noise in enumerate(noises):
        stacked[copy, :, : noise.shape[1], : noise.shape[2]] = noise
    return stacked


def _hull(boxes: list[Box]) -> Box:
    """Smallest box that contains all given boxes."""
    top, left = min(box[0] for box in boxes), min(box[1] for box in boxes)
    bottom, right = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    return top, left, bottom - top, right - left


def _exit_after_grace_period(number: int, frame: object) -> None:
    """Handle a signal: exit after `GRACE_SECONDS` with the exit code of that signal."""
    timer = threading.Timer(GRACE_SECONDS, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()
