"""Steps whose gradients are not finite: skipped by all ranks, recorded with their clips, and the end after several."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mvd_scale.config import RunRecipe
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.errors import UserError
from mvd_scale.utils.events import EventLog

if TYPE_CHECKING:
    from mvd_scale.run_dir import RunFolder

logger = logging.getLogger("mvd_scale")

_NAMED_CLIPS = 64
"""Number of clips of a skipped step that its event names."""

MicroBatch = tuple[Tensor, Tensor]
"""Loss of a micro batch, a float32 scalar, and the rows of its videos in the manifest, int64 (B,) on the host."""


class NonfiniteError(UserError):
    """Gradients that are not finite; DeepSpeed finds them on all ranks, which all raise this."""


class NonfiniteSteps:
    """Count of the steps in a row that DeepSpeed skipped because gradients are not finite.

    DeepSpeed checks the gradients of all ranks, and skips on all or none. In fp16 skipped steps are normal, because it
    adjusts the loss scale by them; see `smallest_loss_scale`. Of several students, only those whose own gradients are
    not finite skip a step, as each would alone.

    Args:
        recipe: recipe of the run: precision, and number of steps to skip.
        ranks: this process among all.
        student: name of the student, if there are several.
    """

    in_a_row = 0
    """Number of skipped steps since the last step that changed the weights."""

    folder: RunFolder | None = None
    """Run folder whose event log names the clips of skipped steps; None for no log."""

    def __init__(self, recipe: RunRecipe, ranks: Ranks, student: str = "") -> None:
        self._counts = recipe.training.precision != "fp16"
        self._limit = recipe.training.skip_nonfinite_steps
        self._ranks = ranks
        self._student, self._of_student = student, _of(student)
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
        culprits, rows = self._find_clips(micro_batches)
        if self._ranks.is_main:
            self._record(step, culprits, rows)
        if self.in_a_row > self._limit:
            raise NonfiniteError(
                f"the gradients of step {step}{self._of_student} are not finite on at least one rank"
                + (f", nor those of the {self._limit} steps before it" if self._limit else "")
                + f"; the weights{self._of_student} were not changed. Start the same command again to resume from the "
                "last checkpoint. If it happens again, look at the clips in events.jsonl, or start a new run with a "
                "smaller `--training.base_lr` or with `--training.clip_grad 1`"
            )

    def _find_clips(self, micro_batches: Sequence[MicroBatch]) -> tuple[list[int], list[int]]:
        """Ranks whose losses are not finite, and the rows of their clips; of all clips if all losses are finite."""
        mine = ([bool(torch.isfinite(loss)) for loss, _ in micro_batches], [rows.tolist() for _, rows in micro_batches])
        parts: list[Any] = [None] * self._ranks.world_size
        torch.distributed.all_gather_object(parts, mine)
        culprits = [rank for rank, (finite, _) in enumerate(parts) if not all(finite)]
        rows = [
            row
            for finite, lists in parts
            for good, clips in zip(finite, lists, strict=True)
            if not good or not culprits
            for row in clips
        ]
        return culprits, list(dict.fromkeys(rows))

    def _record(self, step: int, culprits: list[int], rows: list[int]) -> None:
        cause = f"the loss of rank {', '.join(map(str, culprits))} is" if culprits else "gradients are"
        if self.folder is None:
            logger.warning("step %d changes no weight%s: %s not finite", step, self._of_student, cause)
            return
        from mvd_scale.data.manifest import Manifest

        paths = Manifest.load(self.folder.manifest).path
        clips = [str(paths[row]) for row in rows[:_NAMED_CLIPS]]
        logger.warning(
            "step %d changes no weight%s: %s not finite; its %d clips are in %s, the first one is %s",
            step,
            self._of_student,
            cause,
            len(rows),
            self.folder.events,
            clips[0],
        )
        named = {"student": self._student} if self._student else {}
        EventLog(self.folder.events).write(
            "skip", step=step, **named, ranks=culprits, rows=rows[:_NAMED_CLIPS], clips=clips, clip_count=len(rows)
        )


def _of(student: str) -> str:
    return f" of students.{student}" if student else ""


@contextmanager
def smallest_loss_scale(step: int, student: str = "") -> Iterator[None]:
    """Convert the exception by which DeepSpeed ends a run in fp16 to an error with a remedy; encloses its step.

    DeepSpeed raises it on every rank, before it changes a weight, if the gradients overflow at the smallest loss scale.

    Args:
        step: number of completed steps before this one.
        student: name of the student, if there are several.

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
            f"the gradients of step {step}{_of(student)} are not finite in fp16 even at the smallest loss scale; the "
            f"weights{_of(student)} were not changed. Set `--training.precision bf16` where the GPU has it, or start a "
            "new run with a smaller `--training.base_lr` or with `--training.clip_grad 1`; the last checkpoint may "
            "already have diverged"
        ) from error
