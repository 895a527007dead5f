"""Training loader: micro batches of one rank, in a stream of clips that depends only on the seed.

    RankShard (which clips) -> ClipSource in workers -> DALI graph -> ClipBatch
                                                          |
                                  decode error: find the clips, pass them to PyAV, rebuild the graph, continue;
                                  many errors: pass all videos of the kind to PyAV

Legend: B clips, T frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from nvidia.dali.pipeline import Pipeline

from mvd_scale.config.data import DataConfig, MaskConfig
from mvd_scale.config.model import ModelConfig
from mvd_scale.config.recipe import RunRecipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.data.decoding.dali_graph import build_pipeline, training_graph_body
from mvd_scale.data.decoding.sample_source import ClipSource
from mvd_scale.data.loaders.base import DaliLoader, as_tensor
from mvd_scale.data.loaders.dali_failures import FAILURES_FILE, DaliFailures
from mvd_scale.data.loaders.quarantine import Quarantine
from mvd_scale.data.manifest import Manifest
from mvd_scale.data.sampling.masks import count_tokens
from mvd_scale.data.sampling.sampler import RankShard, Sampler, steps_per_epoch
from mvd_scale.distributed.data_rank import DataRank


@dataclass(frozen=True)
class BatchPlan:
    """Optimizer steps to load, their batch sizes, and masks of students. Sizes count every copy of a clip."""

    global_batch: int
    """Clips of one optimizer step over all ranks."""

    micro_batch: int
    """Clips of one batch of a rank (B); divides its share of the global batch."""

    steps: range
    """Optimizer steps to load, in steps of one."""

    masks: Mapping[str, MaskConfig | None] = field(default_factory=dict)
    """Masks of students in the place of `data.mask`, by name, see `ClipBatch.own_visible`."""

    @classmethod
    def for_run(cls, recipe: RunRecipe, world_size: int, steps: range) -> BatchPlan:
        """Plan the batches of a recipe on `world_size` ranks for the optimizer steps `steps`.

        Raises:
            UserError: the global batch cannot be split over the ranks.
        """
        micro, _ = recipe.micro_batch_and_accumulation(world_size)
        return cls(recipe.training.global_batch, micro, steps, recipe.own_masks)

    @classmethod
    def one_batch(cls, clips: int) -> BatchPlan:
        """Plan a single batch of `clips` clips, from the first optimizer step."""
        return cls(clips, clips, range(1))


class ClipLoader(DaliLoader):
    """Iterator over the micro batches of one rank, from the start of an optimizer step to the end of training.

    Clip k of optimizer step s is the same for any numbers of ranks, workers and micro batches: the whole state of the
    loader is the step. A clip whose video cannot be decoded is replaced by a deterministic substitute; `substituted`
    counts these clips, and `quarantine` lists each video once. All batch sizes count every copy of a clip
    (`data.copies`).

    Args:
        manifest: manifest of the videos.
        data: sampling, crop, augmentation and mask of clips.
        model: model config, which sets the shape of a clip.
        seed: seed of order, frames, crops and masks.
        plan: batch sizes, and the optimizer steps to load.
        rank: rank that the loader serves: its part of each global batch, device, and CPUs for workers and threads.
        sides: further input sides, in pixels, to resize each crop to (`ClipBatch.at`).
        quarantine: record of the videos that could not be decoded; None for none.

    Raises:
        ValueError: the batch sizes of `plan` do not divide over ranks, micro batches and copies.
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
        quarantine: Quarantine | None = None,
    ) -> None:
        total, micro = plan.global_batch, plan.micro_batch
        if total % (rank.world_size * micro) or micro % data.copies:
            raise ValueError(
                f"global batch {total} is not a multiple of micro batch {micro} x {rank.world_size} ranks, or "
                f"the micro batch is not a multiple of {data.copies} copies"
            )
        manifest = manifest.shared()
        steps_per_epoch(manifest, data, total)
        self.sides = (model.input_size, *(side for side in sides if side != model.input_size))
        self._model = model
        self._masks = plan.masks
        every = (data.mask, *plan.masks.values())
        self._tokens = list(zip(*(count_tokens(mask, model.grid) for mask in every), strict=True))
        self._sampler = self._make_sampler(manifest, data, model, seed)
        self._shard = RankShard(self._sampler.clips, total // data.copies, rank.rank, rank.world_size)
        each = self._shard.clips_per_step
        samples = range(plan.steps.start * each, plan.steps.stop * each)
        super().__init__(manifest, data, batch=micro // data.copies, samples=samples, rank=rank, quarantine=quarantine)

    @classmethod
    def for_run(
        cls,
        manifest: Manifest,
        recipe: RunRecipe,
        rank: DataRank,
        steps: range,
        *,
        sides: tuple[int, ...] = (),
        quarantine: Quarantine | None = None,
    ) -> ClipLoader:
        """Create the loader of a training run.

        Args:
            manifest: manifest of the training videos.
            recipe: recipe of the run, with the settings of sampling, masks and batches.
            rank: see `ClipLoader`.
            steps: optimizer steps to load, from the first one that is not completed to the last.
            sides: see `ClipLoader`.
            quarantine: see `ClipLoader`.

        Raises:
            UserError: see `ClipLoader`; or the global batch cannot be split over the ranks.
        """
        plan = BatchPlan.for_run(recipe, rank.world_size, steps)
        return ClipLoader(
            manifest,
            recipe.data,
            recipe.model,
            recipe.seed,
            plan=plan,
            rank=rank,
            sides=sides,
            quarantine=quarantine,
        )

    @property
    def step(self) -> int:
        """Number of optimizer steps whose clips have all been returned; it is the whole state of the loader."""
        return self._step_of(self._next)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ClipBatch:
        *pixels, visible, masked = self.run()
        copies = self._data.copies
        (seen, *own_seen), (hidden, *own_hidden) = (
            [part.contiguous() for part in as_tensor(tokens).flatten(0, 1).split(counts, dim=1)]
            for tokens, counts in zip((visible, masked), self._tokens, strict=True)
        )
        first, *others = (as_tensor(side) if copies == 1 else as_tensor(side).flatten(0, 1) for side in pixels)
        return ClipBatch(
            pixels=first,
            visible=seen,
            masked=hidden,
            labels=self.labels.to(self._device, non_blocking=True).repeat_interleave(copies),
            video_ids=self.rows.repeat_interleave(copies),
            resized=dict(zip(self.sides[1:], others, strict=True)),
            own_visible=dict(zip(self._masks, own_seen, strict=True)),
            own_masked=dict(zip(self._masks, own_hidden, strict=True)),
        )

    _decoded_share = 0.4  # workers hand over the box of the crop, which takes a third of a frame or more

    @property
    def _sample_frames(self) -> int:
        return self._model.frames

    def _make_sampler(self, manifest: Manifest, data: DataConfig, model: ModelConfig, seed: int) -> Sampler:
        return Sampler(manifest, data, model, seed, tuple(self._masks.values()))

    def _build(self) -> Pipeline:
        source = self._source()
        return build_pipeline(
            source,
            training_graph_body(
                self._data,
                self.sides,
                turned=source.turned,
                on_gpu=self._device_id is not None,
                threads=self._threads,
            ),
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
            self._shard,
            first=self._next,
            end=self._end,
            decoders=self._decoders,
            pyav_samples=self._pyav_samples,
            timeout=self._data.read_timeout,
            threads=self._decoder_threads,
        )

    def _key(self, n: int) -> int:
        return self._shard.position(n)

    def _step_of(self, n: int) -> int:
        return n // self._shard.clips_per_step

    def _record_failures(self, rank: DataRank) -> DaliFailures:
        return DaliFailures(
            self._decoders.videos,
            self._step_of(self._next),
            None if self._quarantine is None else self._quarantine.path.with_name(FAILURES_FILE),
            rank.open_exchange() if rank.open_exchange is not None else None,
        )
