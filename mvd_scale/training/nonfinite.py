"""Steps whose gradients are not finite: skipped by all ranks, recorded with their clips, and the end after several."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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
    """Cause of gradients that are not finite, as far as the losses and gradients of single ranks tell."""

    ranks: list[int]
    """Ranks whose losses are not finite; or if all are, whose gradients are not, before they are summed over ranks."""

    text: str
    """Names of these ranks, and the phase; a sentence."""

    rows: list[int]
    """Rows in the manifest of the clips of these ranks; of all clips if there are no such ranks."""


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
        self._own = _OwnGradients()

    def begin(self, engine: Any) -> None:
        """Begin a step."""
        self._skipped_before = engine.skipped_steps
        if self.in_a_row:
            self._own.watch(engine.module)

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
            self._own.stop()
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
        videos = [rows.tolist() for _, rows in micro_batches]
        mine = (Member.own(self._ranks.rank), finite, videos, self._own.finite)
        torch.distributed.all_gather_object(parts, mine)
        step = f"{number}{self._of_student}"
        members = {rank: member for rank, (member, *_) in enumerate(parts)}
        of_losses = [rank for rank, (_, finite, _, _) in enumerate(parts) if not all(finite)]
        culprits = of_losses or [rank for rank, (*_, own) in enumerate(parts) if not own]
        if of_losses:
            text = f"the losses of {name_ranks(culprits, members)} are not finite in 'forward' of step {step}"
        elif culprits:
            text = f"the gradients of {name_ranks(culprits, members)} are not finite in 'backward' of step {step}"
        else:
            text = f"the gradients are not finite in 'backward' of step {step}, though all losses are"
        rows = [
            row
            for rank, (_, finite, lists, _) in enumerate(parts)
            for good, clips in zip(finite, lists, strict=True)
            if (not good if of_losses else rank in culprits or not culprits)
            for row in clips
        ]
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
        named = {"student": self._student} if self._student else {}
        EventLog(self.folder.events).write(
            "skip", step=number, **named, ranks=ranks, rows=rows[:_NAMED_CLIPS], clips=clips, clip_count=len(rows)
        )


class _OwnGradients:
    """Whether the gradients of this rank are finite before they are summed over ranks.

    DeepSpeed looks at the sums only, which tell no rank. A look at every gradient costs time, so that only steps after
    a skipped one are watched.
    """

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []
        self._looks: list[Tensor] = []

    def watch(self, module: nn.Module) -> None:
        """Watch the gradients of the next backward passes."""
        self._looks.clear()
        if not self._hooks:
            trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
            self._hooks = [parameter.register_hook(self._look) for parameter in trained]

    def stop(self) -> None:
        """Watch no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._looks.clear()

    @property
    def finite(self) -> bool:
        """Whether all gradients since `watch` were finite; true if none were watched. Waits for the device."""
        return not self._looks or bool(torch.stack(self._looks).all())

    def _look(self, gradient: Tensor) -> None:
        self._looks.append(gradient.isfinite().all())


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
            "the gradients are not finite in fp16 even at the smallest loss scale, in 'optimizer' of step "
            f"{step + 1}{_of(student)}; the weights were not changed. Set `--training.precision bf16` where the GPU "
            "has it, or start a new run with a smaller `--training.base_lr` or with `--training.clip_grad 1`; the last "
            "checkpoint may already have diverged"
        ) from error
