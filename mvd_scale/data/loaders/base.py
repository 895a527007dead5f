"""Base class of all loaders: a DALI graph over a sample source, and its recovery from videos that fail to decode."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.tensors import TensorListCPU, TensorListGPU
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from mvd_scale.config.data import DataConfig
from mvd_scale.config.launcher import local_world_size
from mvd_scale.data.decoding.backends import DecodeBackend, VideoKind, count_backends
from mvd_scale.data.decoding.dali_graph import dali_decodes
from mvd_scale.data.decoding.pyav import decode_frames
from mvd_scale.data.decoding.sample_source import NO_SUBSTITUTE, VideoSource
from mvd_scale.data.loaders.dali_failures import HORIZON, LIMIT, DaliFailures
from mvd_scale.data.loaders.decoder_choice import choose_decoders
from mvd_scale.data.loaders.quarantine import Failure, Quarantine
from mvd_scale.data.loaders.shared_memory import bytes_per_sample, check_shared_memory
from mvd_scale.data.manifest import Manifest
from mvd_scale.data.storage import DecodeError, run_with_timeout
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.distributed.health.verdict import Member
from mvd_scale.errors import UserError

MIN_CLIPS_FOR_BROKEN_LIMIT = 100
"""Number of clips of a rank from which on the share of replaced clips is compared with `data.max_broken`."""


MAX_READERS = 8
"""Largest number of worker processes by default where the GPU decodes, so that they read files and decode few.

By `performance.planning`, the NVDEC of a GPU decodes at most 270 clips/s: 5,100 frames/s of 1920x1080, 4 times as many
small ones, and 76 frames for a clip of 16 at stride 4 with key frames 32 apart. If a reader waits 30 ms for each file
of network storage, 8 of them read as many; from a local disk one or two do."""

MAX_PYAV_SHARE = 0.1
"""Share of videos that PyAV decodes up to which the workers count as readers: its 24 ms for a clip of 340x256
(docs/benchmarks/data_loading.md) then add 2 ms to each clip on average."""

log = logging.getLogger("mvd_scale")


Outputs = list[TensorListCPU | TensorListGPU]
"""Outputs of one run of a DALI graph, one batch per output."""


class DaliLoader(ABC):
    """Base class of loaders: a DALI graph that recovers from decode errors, and the count of videos that fail.

    Args:
        manifest: manifest of the videos.
        data: numbers of workers and threads, and limits.
        batch: samples per run of the graph.
        samples: numbers of the samples to load, consecutive.
        rank: rank that the loader serves: device of the batches, and CPUs for workers and threads.
        quarantine: record of the videos that could not be decoded; None for none.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        *,
        batch: int,
        samples: range,
        rank: DataRank,
        quarantine: Quarantine | None,
    ) -> None:
        self.clips = 0
        self.substituted = 0
        self._manifest = manifest.shared()
        self._data = data
        self._batch = batch
        self._next = samples.start
        self._end = samples.stop
        self._device = rank.device
        self._member = Member.own(rank.rank)
        self._quarantine = quarantine
        self._reported: set[Hashable] = set()
        self._pyav_samples: frozenset[int] = frozenset()
        self._decoders = choose_decoders(self._manifest, data.decoder, rank)
        self._dali_failures = self._record_failures(rank)
        self._dali_failures.advance(self._step_of(self._next))
        self._decoders = replace(self._decoders, by_pyav=self._dali_failures.kinds())
        self._workers = worker_count(data, rank, readers=self._workers_read())
        self._threads = thread_count(data, rank)
        check_shared_memory(
            bytes_per_sample(self._manifest, self._decoders, self._sample_frames, self._decoded_share),
            batch=batch,
            prefetch=data.prefetch,
            workers=self._workers,
            ranks=local_world_size(rank.world_size),
        )
        self._graph: Pipeline | None = self._build()

    _decoded_share = 1.0
    """Mean part of a decoded frame that workers hand to the graph, for the check of shared memory."""

    @property
    @abstractmethod
    def _sample_frames(self) -> int:
        """Frames of a sample."""

    @abstractmethod
    def _source(self) -> VideoSource:
        """Sample source that starts at sample `_next`."""

    @abstractmethod
    def _build(self) -> Pipeline:
        """Build the DALI graph over `_source()`."""

    @abstractmethod
    def _key(self, n: int) -> int:
        """Key of sample n in `pyav_samples`."""

    @abstractmethod
    def _step_of(self, n: int) -> int:
        """Step to which sample n belongs, of all ranks."""

    def _record_failures(self, rank: DataRank) -> DaliFailures:
        """Record of the clips that DALI fails to decode; by default this rank's alone."""
        return DaliFailures(self._decoders.videos, self._step_of(self._next))

    _failure_suffix = " and is replaced"

    @property
    def step(self) -> int:
        """Progress of the loader, which the quarantine records with each failure: number of the next sample."""
        return self._next

    def run(self) -> Outputs:
        """Run the graph once and return its outputs, without row, label and failures.

        Rows and labels are stored in `rows` and `labels`, int64 (B,); failures are counted and reported.

        Raises:
            StopIteration: the last sample has been returned.
            UserError: too many videos cannot be decoded.
        """
        outputs = None
        while outputs is None:
            if self._graph is None or self._next >= self._end:
                raise StopIteration
            self._demote_kinds()
            try:
                outputs = self._graph.run(self._stream)
            except RuntimeError as error:
                self._fall_back_to_pyav(error)
        *outputs, rows, labels, failures = outputs
        # A copy: DALI may reuse its pinned memory before an asynchronous copy of the labels to the GPU has read it.
        self.rows, self.labels = as_tensor(rows), as_tensor(labels).clone()
        failed = [json.loads(bytes(failures.at(k))) for k in range(self._batch)]
        self._count_failures(self.rows.tolist(), failed)
        self._next += self._batch
        return outputs

    def close(self) -> None:
        """End the worker processes; the loader returns no more batches."""
        self._end = self._next
        self._graph = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _workers_read(self) -> bool:
        """Whether the workers read files that the GPU decodes, and decode few themselves."""
        if self._decoders.videos != "mixed":
            return False
        counts = count_backends(self._manifest, self._decoders)
        return counts[DecodeBackend.PYAV] <= MAX_PYAV_SHARE * counts.total()

    @property
    def _decoder_threads(self) -> int:
        """Threads with which each worker, or this process without workers, decodes by PyAV."""
        return max(self._threads // max(self._workers, 1), 1)

    @property
    def _device_id(self) -> int | None:
        return (self._device.index or 0) if self._device.type == "cuda" else None

    @property
    def _stream(self) -> torch.cuda.Stream | None:
        """CUDA stream on which outputs are ordered before their use, so that the host does not wait for the decoder."""
        return torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None

    def _fall_back_to_pyav(self, error: RuntimeError) -> None:
        """Rebuild the graph so that PyAV decodes the samples that DALI failed to decode.

        The error does not name the sample, and the graph prefetches: DALI tries every sample that may have been in the
        graph alone. Only these samples go to PyAV, not all samples of their videos, so that the pixels of a sample do
        not depend on earlier errors of the run; but see `_demote_kinds`.

        Raises:
            RuntimeError: `error` itself, if DALI decodes every one of these samples.
        """
        self._graph = None
        source = self._source()
        candidates = range(self._next, min(self._next + (self._data.prefetch + 1) * self._batch, self._end))
        failed = frozenset(self._key(n) for n in candidates if not self._dali_decodes(source, n))
        if not failed:
            raise error
        self._pyav_samples = frozenset(key for key in self._pyav_samples if key >= self._key(self._next)) | failed
        log.info("DALI cannot decode %d of the next %d clips: PyAV decodes them instead", len(failed), len(candidates))
        self._graph = self._build()

    def _dali_decodes(self, source: VideoSource, n: int) -> bool:
        """Whether DALI decodes a sample; if it does not though PyAV does, the failure is recorded."""
        task = source.dali_input(n)
        if task is None or dali_decodes(*task, self._decoders, self._device_id):
            return True
        _, frames, video = task
        try:
            run_with_timeout(self._data.read_timeout, video.path, decode_frames, video, frames)
        except DecodeError:
            return False  # the video is broken, which is no fault of DALI's
        self._dali_failures.add(self._key(n), self._step_of(n), VideoKind.of(video))
        return False

    def _demote_kinds(self) -> None:
        """Let PyAV decode the kinds of videos of which DALI has failed to decode too many, see `DaliFailures`."""
        self._dali_failures.advance(self._step_of(self._next))
        kinds = self._dali_failures.kinds()
        if kinds == self._decoders.by_pyav:
            return
        log.warning(
            "PyAV decodes these kinds of videos from step %d on, because DALI failed to decode at least %d of their "
            "clips within %d steps: %s. `mvd-scale data shard --encode h264` makes files that NVDEC decodes",
            self._step_of(self._next),
            LIMIT,
            HORIZON,
            "; ".join(sorted(map(str, kinds - self._decoders.by_pyav))),
        )
        self._graph = None
        self._decoders = replace(self._decoders, by_pyav=kinds)
        self._graph = self._build()

    def _count_failures(self, rows: list[int], failures: list[list[Failure]]) -> None:
        """Count the samples of one run, and report the videos that were replaced.

        Raises:
            UserError: a sample has no substitute, or more than `data.max_broken` of the samples were replaced.
        """
        self.clips += len(rows)
        for row, failed in zip(rows, failures, strict=True):
            self.substituted += bool(failed)
            for failure in failed:
                self._report_failure(failure)
            if row == NO_SUBSTITUTE:
                self._raise_no_substitute(failed)
        if self.clips >= MIN_CLIPS_FOR_BROKEN_LIMIT and self.substituted > self._data.max_broken * self.clips:
            raise UserError(
                f"{self.substituted} of {self.clips} clips were replaced because their videos cannot be decoded, more "
                f"than data.max_broken {self._data.max_broken:g} allows. {self._advice}"
            )

    def _raise_no_substitute(self, failed: list[Failure]) -> None:
        raise UserError(
            f"{len(failed)} videos in a row cannot be decoded, the last one {failed[-1]['path']}: "
            f"{failed[-1]['error']}. {self._advice}"
        )

    def _report_failure(self, failure: Failure) -> None:
        video = self._video(failure["row"])
        if video in self._reported:
            return
        self._reported.add(video)
        log.warning(
            "video %s cannot be decoded%s: %s; found by %s in 'data wait'",
            failure["path"],
            self._failure_suffix,
            failure["error"],
            self._member.name,
        )
        if self._quarantine is not None:
            self._quarantine.add(failure, self.step)

    def _video(self, row: int) -> Hashable:
        """Key of the video of a row: each key is reported once."""
        return row

    @property
    def _advice(self) -> str:
        listed = f"The videos are listed in {self._quarantine.path}. " if self._quarantine is not None else ""
        return f"{listed}Restore the files, or index the videos again, or raise data.max_broken"


def worker_count(data: DataConfig, rank: DataRank, *, readers: bool) -> int:
    """Number of worker processes of one rank: `data.workers`, or for `auto` its CPUs less one for the rank itself.

    Args:
        data: configuration of the data.
        rank: rank that the loader serves.
        readers: whether the workers read files that a GPU decodes: then `auto` is at most `MAX_READERS`.
    """
    if data.workers != "auto":
        return data.workers
    spare = max(rank.cpu_count - 1, 0)
    return min(spare, MAX_READERS) if readers else spare


def thread_count(data: DataConfig, rank: DataRank) -> int:
    """Number of threads of one rank's graph: `data.threads`, or for `auto` its CPUs."""
    return max(rank.cpu_count, 1) if data.threads == "auto" else data.threads


def as_tensor(batch: TensorListCPU | TensorListGPU) -> Tensor:
    """Convert a DALI batch to a tensor without a copy: the dynamic executor gives every batch buffers of its own."""
    return from_dlpack(batch.as_tensor())
