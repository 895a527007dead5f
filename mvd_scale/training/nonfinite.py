"""Steps whose gradients are not finite: skipped by all ranks, recorded with their clips, and the end after several."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mvd_scale.config import RunRecipe
from mvd_scale.distributed.health.verdict import Member, name_ranks
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.errors import SharedError
from mvd_scale.utils.events import EventLog

if TYPE_CHECKING:
    from mvd_scale.run_dir import RunFolder

logger = logging.getLogger("mvd_scale")

_NAMED_CLIPS = 64
"""Number of clips of a skipped step that its event names."""

MicroBatch = tuple[Tensor, Tensor]
"""Loss of a micro batch, a float32 scalar, and the rows of its videos in the manifest, int64 (B,) on the host."""


class NonfiniteError(SharedError):
    """Gradients that are not finite; DeepSpeed finds them on all ranks, which all raise this."""


class _Cause(NamedTuple):
    """Cause of gradients that are not finite, as far as the losses tell."""

    ranks: list[int]
    """Ranks whose losses are not finite."""

    text: str
    """Names of these ranks, and the phase; a sentence."""

    rows: list[int]
    """Rows in the manifest of the clips of these ranks; of all clips if all losses are finite."""


class NonfiniteSteps:
    """Count of the steps in a row that DeepSpeed skipped because gradients are not finite.

    DeepSpeed checks the gradients of all ranks, and skips on all or none. In fp16 skipped steps are normal, because it
    adjusts the loss scale by them; see `smallest_loss_scale`.

    Args:
        recipe: recipe of the run: precision, and number of steps to skip.
        ranks: this process among all.
    """

    in_a_row = 0
    """Number of skipped steps since the last step that changed the weights."""

    folder: RunFolder | None = None
    """Run folder whose event log names the clips of skipped steps; None for no log."""

    def __init__(self, recipe: RunRecipe, ranks: Ranks) -> None:
        self._counts = recipe.training.precision != "fp16"
        self._limit = recipe.training.skip_nonfinite_steps
        self._ranks = ranks
        self._skipped_before = 0

    def begin(self, engine: Any) -> None:
        """Begin a step."""
        self._skipped_before = engine.skipped_steps

    def check(self, engine: Any, step: int, micro_batches: Sequence[MicroBatch]) -> None:
        """Record a step that DeepSpeed skipped. All ranks call it after every step.

        Args:
            engine: engine of DeepSpeed.
            step: number of completed steps before this one.
            micro_batches: micro batches of this rank in this step.

        Raises:
            NonfiniteError: too many steps in a row were skipped. None of them changed any weight.
        """
        if not self._counts or engine.skipped_steps == self._skipped_before:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        cause = self._find_cause(step + 1, micro_batches)
        if self._ranks.is_main:
            self._record(step + 1, cause)
        if self.in_a_row > self._limit:
            raise NonfiniteError(
                cause.text
                + (f", nor were those of the {self._limit} steps before it" if self._limit else "")
                + "; the weights were not changed. Start the same command again to resume from the last checkpoint. If "
                "it happens again, look at the clips in events.jsonl, or start a new run with a smaller "
                "`--training.base_lr` or with `--training.clip_grad 1`",
                cause.ranks,
            )

    def _find_cause(self, number: int, micro_batches: Sequence[MicroBatch]) -> _Cause:
        """Ask all ranks for their losses and clips. All ranks call it.

        Args:
            number: number of the step, counted from 1 as in the metrics.
            micro_batches: micro batches of this rank.
        """
        finite = [bool(torch.isfinite(loss)) for loss, _ in micro_batches]
        parts: list[Any] = [None] * self._ranks.world_size
        mine = (Member.own(self._ranks.rank), finite, [rows.tolist() for _, rows in micro_batches])
        torch.distributed.all_gather_object(parts, mine)
        culprits = [rank for rank, (_, finite, _) in enumerate(parts) if not all(finite)]
        rows = [
            row
            for _, finite, lists in parts
            for good, clips in zip(finite, lists, strict=True)
            if not good or not culprits
            for row in clips
        ]
        text = f"the gradients are not finite in 'backward' of step {number}, though all losses are"
        if culprits:
            names = name_ranks(culprits, {rank: member for rank, (member, _, _) in enumerate(parts)})
            text = f"the losses of {names} are not finite in 'forward' of step {number}"
        return _Cause(culprits, text, list(dict.fromkeys(rows)))

    def _record(self, number: int, cause: _Cause) -> None:
        ranks, text, rows = cause
        if self.folder is None:
            logger.warning("a step changes no weight: %s", text)
            return
        from mvd_scale.data.manifest import Manifest

        paths = Manifest.load(self.folder.manifest).path
        clips = [str(paths[row]) for row in rows[:_NAMED_CLIPS]]
        logger.warning(
            "a step changes no weight: %s; its %d clips are in %s, the first one is %s",
            text,
            len(rows),
            self.folder.events,
            clips[0],
        )
        EventLog(self.folder.events).write(
            "skip", step=number, ranks=ranks, rows=rows[:_NAMED_CLIPS], clips=clips, clip_count=len(rows)
        )


@contextmanager
def smallest_loss_scale(step: int) -> Iterator[None]:
    """Convert the exception by which DeepSpeed ends a run in fp16 to an error with a remedy; encloses its step.

    DeepSpeed raises it on every rank, before it changes a weight, if the gradients overflow at the smallest loss scale.

    Raises:
        NonfiniteError: the gradients are not finite at the smallest loss scale.
    """
    try:
        yield
    except Exception as error:
        # DeepSpeed raises a bare `Exception`, whose text is all that tells it from others.
        if type(error) is not Exception or "loss scale already at minimum" not in str(error):
            raise
        raise NonfiniteError(
            "the gradients are not finite in fp16 even at the smallest loss scale, in 'optimizer' of step "
            f"{step + 1}; the weights were not changed. Set `--training.precision bf16` where the GPU has it, or start "
            "a new run with a smaller `--training.base_lr` or with `--training.clip_grad 1`; the last checkpoint may "
            "already have diverged"
        ) from error
