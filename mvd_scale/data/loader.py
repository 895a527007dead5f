"""Training loader: micro batches of one rank, in a stream of clips that depends on the seed alone.

    Share (which clips) -> ClipSource in workers -> DALI graph -> ClipBatch
                                                      |
                              decode error: find the clips, pass them to PyAV, rebuild the graph, continue

Legend: B clips, T frames.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypedDict

import torch
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.tensors import TensorListCPU, TensorListGPU
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from typing_extensions import Self

from mvd_scale.config.data import DataConfig
from mvd_scale.config.model import ModelConfig
from mvd_scale.config.recipe import RunRecipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.data.manifest import Manifest
from mvd_scale.data.pipeline import build_pipeline, dali_decodes, training_graph_body
from mvd_scale.data.sampling import Sampler, Share, steps_per_epoch
from mvd_scale.data.source import GIVEN_UP, ClipSource, DaliDevice, VideoSource
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.errors import UserError

MIN_CLIPS_FOR_BROKEN_LIMIT = 100
"""Number of clips of a rank from which on the share of replaced clips is compared with `data.max_broken`."""

log = logging.getLogger("mvd_scale")

Outputs = list[TensorListCPU | TensorListGPU]
"""Outputs of one run of a DALI graph, one batch per output."""


class Failure(TypedDict):
    """Record of a video that could not be decoded: row of the manifest, path, and reason."""

    row: int
    path: str
    error: str


class Feed(ABC):
    """Base class of loaders: a DALI graph that recovers from decode errors, and the count of videos that fail.

    Args:
        manifest: the videos.
        data: workers, threads and limits.
        batch: samples of one run of the graph.
        samples: numbers of the samples to give, in steps of one.
        rank: where batches live, and the CPUs of workers and threads.
        report: file to append a JSON line (row, path, error, step) to for each video that could not be decoded.
    """

    def __init__(
        self, manifest: Manifest, data: DataConfig, *, batch: int, samples: range, rank: DataRank, report: Path | None
    ) -> None:
        self.clips = 0
        self.substituted = 0
        self._manifest = manifest
        self._data = data
        self._batch = batch
        self._next = samples.start
        self._end = samples.stop
        self._device = rank.device
        self._report = report
        self._reported: set[Hashable] = set()
        self._by_host: frozenset[int] = frozenset()
        self._workers = worker_count(data, rank)
        self._threads = thread_count(data, rank)
        self._graph: Pipeline | None = self._build()

    @abstractmethod
    def _source(self) -> VideoSource:
        """Sample source that starts at sample `_next`."""

    @abstractmethod
    def _build(self) -> Pipeline:
        """Build the DALI graph over `_source()`."""

    @abstractmethod
    def _key(self, n: int) -> int:
        """Key of sample n in `by_host`."""

    _failure_suffix = " and is replaced"

    @property
    def step(self) -> int:
        """Progress of the loader, which the report records with each failure: number of the next sample."""
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
            try:
                outputs = self._graph.run(self._stream)
            except RuntimeError as error:
                self._route_around(error)
        *outputs, rows, labels, failures = outputs
        self.rows, self.labels = as_tensor(rows), as_tensor(labels)
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

    @property
    def _device_id(self) -> int | None:
        return (self._device.index or 0) if self._device.type == "cuda" else None

    @property
    def _dali_device(self) -> DaliDevice:
        return "cpu" if self._device_id is None else "mixed"

    @property
    def _stream(self) -> torch.cuda.Stream | None:
        """CUDA stream on which outputs are ordered before their use, so that the host does not wait for the decoder."""
        return torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None

    def _route_around(self, error: RuntimeError) -> None:
        """Rebuild the graph so that PyAV decodes the samples that DALI failed to decode.

        The error does not name the sample, and the graph prefetches: DALI tries every sample that may have been in the
        graph alone. Only these samples go to PyAV, not all samples of their videos, so that the pixels of a sample do
        not depend on earlier errors of the run.

        Raises:
            RuntimeError: `error` itself, if DALI decodes every one of these samples.
        """
        self._graph = None
        source = self._source()
        candidates = range(self._next, min(self._next + (self._data.prefetch + 1) * self._batch, self._end))
        failed = frozenset(self._key(n) for n in candidates if not self._dali_decodes(source, n))
        if not failed:
            raise error
        self._by_host = frozenset(key for key in self._by_host if key >= self._key(self._next)) | failed
        log.info("DALI cannot decode %d of the next %d clips: PyAV decodes them instead", len(failed), len(candidates))
        self._graph = self._build()

    def _dali_decodes(self, source: VideoSource, n: int) -> bool:
        task = source.dali_input(n)
        return task is None or dali_decodes(*task, self._device_id)

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
            if row == GIVEN_UP:
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
        log.warning("video %s cannot be decoded%s: %s", failure["path"], self._failure_suffix, failure["error"])
        if self._report is not None:
            with self._report.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**failure, "step": self.step}) + "\n")

    def _video(self, row: int) -> Hashable:
        """Key of the video of a row: each key is reported once."""
        return row

    @property
    def _advice(self) -> str:
        listed = f"The videos are listed in {self._report}. " if self._report is not None else ""
        return f"{listed}Restore the files, or index the videos again, or raise data.max_broken"


@dataclass(frozen=True)
class BatchPlan:
    """The optimizer steps of a run and the batches that they are made of. Sizes count every copy of a clip."""

    global_batch: int
    """Clips of one optimizer step over all ranks."""

    micro_batch: int
    """Clips of one batch of a rank (B); divides its share of the global batch."""

    steps: range
    """Optimizer steps to load, in steps of one."""

    @classmethod
    def for_run(cls, recipe: RunRecipe, world_size: int, steps: range) -> BatchPlan:
        """The batches of a recipe on a number of ranks.

        Raises:
            UserError: the global batch cannot be split over the ranks.
        """
        return cls(recipe.training.global_batch, recipe.micro_batch_and_accumulation(world_size)[0], steps)

    @classmethod
    def one_batch(cls, clips: int) -> BatchPlan:
        """A single batch of the first optimizer step."""
        return cls(clips, clips, range(1))


class ClipLoader(Feed):
    """Iterator over the micro batches of one rank, from the start of an optimizer step to the end of training.

    Clip k of optimizer step s is the same for any numbers of ranks, workers and micro batches: the whole state of the
    loader is the step. A clip whose video cannot be decoded is replaced by a deterministic substitute; `substituted`
    counts these clips, and the report lists each video once. All batch sizes count every copy of a clip
    (`data.copies`).

    Args:
        manifest: the videos.
        data: sampling, crop, augmentation and mask of clips.
        model: shape of a clip.
        seed: of order, frames, crops and masks.
        plan: sizes of batches, and the optimizer steps to load.
        rank: which part of each global batch to load, where to, and the CPUs of workers and threads.
        sides: further input sides, in pixels, to resize each crop to (`ClipBatch.at`).
        report: file to append a JSON line (row, path, error, step) to for each video that could not be decoded.

    Raises:
        UserError: an epoch has fewer clips than one global batch. During iteration: more than `data.max_broken` of the
            clips were replaced, or a clip had no decodable substitute.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        model: ModelConfig,
        seed: int,
        *,
        plan: BatchPlan,
        rank: DataRank,
        sides: tuple[int, ...] = (),
        report: Path | None = None,
    ) -> None:
        total, micro = plan.global_batch, plan.micro_batch
        if total % (rank.world_size * micro) or micro % data.copies:
            raise ValueError(
                f"global batch {total} is not a multiple of micro batch {micro} x {rank.world_size} ranks, or "
                f"the micro batch is not a multiple of {data.copies} copies"
            )
        steps_per_epoch(manifest, data, total)
        self.sides = (model.input_size, *(side for side in sides if side != model.input_size))
        self._model = model
        self._sampler = self._make_sampler(manifest, data, model, seed)
        self._share = Share(self._sampler.clips, total // data.copies, rank.rank, rank.world_size)
        each = self._share.clips_per_step
        samples = range(plan.steps.start * each, plan.steps.stop * each)
        super().__init__(manifest, data, batch=micro // data.copies, samples=samples, rank=rank, report=report)

    @classmethod
    def for_run(
        cls,
        manifest: Manifest,
        recipe: RunRecipe,
        rank: DataRank,
        steps: range,
        *,
        sides: tuple[int, ...] = (),
        report: Path | None = None,
    ) -> ClipLoader:
        """The loader of a training run.

        Args:
            manifest: its videos.
            recipe: says how clips are cut, masked and batched.
            rank: as of `ClipLoader`.
            steps: optimizer steps from those that are done to the last.
            sides: as of `ClipLoader`.
            report: as of `ClipLoader`.

        Raises:
            UserError: as `ClipLoader`, or the global batch cannot be split over the ranks.
        """
        plan = BatchPlan.for_run(recipe, rank.world_size, steps)
        return ClipLoader(
            manifest, recipe.data, recipe.model, recipe.seed, plan=plan, rank=rank, sides=sides, report=report
        )

    @property
    def step(self) -> int:
        """Number of optimizer steps whose clips have all been returned: the whole state of the loader."""
        return self._next // self._share.clips_per_step

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ClipBatch:
        *pixels, visible, masked = self.run()
        copies = self._data.copies
        first, *others = (as_tensor(side) if copies == 1 else as_tensor(side).flatten(0, 1) for side in pixels)
        return ClipBatch(
            pixels=first,
            visible=as_tensor(visible).flatten(0, 1),
            masked=as_tensor(masked).flatten(0, 1),
            labels=self.labels.to(self._device, non_blocking=True).repeat_interleave(copies),
            video_ids=self.rows.repeat_interleave(copies),
            resized=dict(zip(self.sides[1:], others, strict=True)),
        )

    def _make_sampler(self, manifest: Manifest, data: DataConfig, model: ModelConfig, seed: int) -> Sampler:
        return Sampler(manifest, data, model, seed)

    def _build(self) -> Pipeline:
        source = self._source()
        return build_pipeline(
            source,
            training_graph_body(self._data, self.sides, turned=source.turned, on_gpu=self._device_id is not None),
            frames=self._model.frames,
            batch=self._batch,
            device_id=self._device_id,
            threads=self._threads,
            workers=self._workers,
            prefetch=self._data.prefetch,
        )

    def _source(self) -> ClipSource:
        return ClipSource(
            self._manifest,
            self._sampler,
            self._share,
            first=self._next,
            end=self._end,
            dali_device=self._dali_device,
            by_host=self._by_host,
            timeout=self._data.read_timeout,
        )

    def _key(self, n: int) -> int:
        return self._share.position(n)


def worker_count(data: DataConfig, rank: DataRank) -> int:
    """Worker processes of one rank: `data.workers`, or its CPUs, less one for itself."""
    return max(rank.cpu_count - 1, 0) if data.workers == "auto" else data.workers


def thread_count(data: DataConfig, rank: DataRank) -> int:
    """Threads of one rank's graph: `data.threads`, or its CPUs."""
    return max(rank.cpu_count, 1) if data.threads == "auto" else data.threads


def as_tensor(batch: TensorListCPU | TensorListGPU) -> Tensor:
    """Convert a DALI batch to a tensor without a copy: the dynamic executor gives every batch buffers of its own."""
    return from_dlpack(batch.as_tensor())
