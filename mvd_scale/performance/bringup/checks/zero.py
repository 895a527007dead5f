"""Stage (d): ZeRO 1 to 3, overflows of fp16 and sharded teachers, on all GPUs. Needs DeepSpeed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import isfinite, isnan
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from mvd_scale.performance.bringup.checks.rank_group import RankGroup
from mvd_scale.performance.bringup.checks.tiny import GLOBAL_BATCH
from mvd_scale.performance.bringup.checks.zero_ranks import POISONED, jobs_of
from mvd_scale.performance.bringup.session import Check, Session

Results = Sequence[Any]
"""Results of a job, of all ranks."""

TOLERANCE = {"fp32": 1e-4, "ahead": 1e-4, "fp16": 3e-2}
"""Largest relative difference of losses from those in float32 on the CPU, by kind of job."""

_FIRST = 20.0
"""Expected seconds until the first result: imports, and the compilation of blocks."""

_JOB = 5.0
"""Expected seconds until every other one."""

_STUCK = 100.0
"""Seconds without a result after which ranks wait for each other in vain."""


def run(session: Session) -> None:
    """Make the checks of the stage."""
    ranks = rank_count(session.device)
    title = f"{ranks} rank{'s' if ranks > 1 else ''}"
    names = [name for name in jobs_of(session.device) if not session.made(f"{name}, {title}")]
    with ReferenceLosses(session) as reference:
        while names:
            # Ranks that ended take the remaining jobs with them: others are started for these.
            with RankGroup(session.device, ranks, _folder(session), names) as group:
                for number, name in enumerate(tuple(names)):
                    work = partial(_wait_and_judge, group=group, name=name, reference=reference)
                    session.check(f"{name}, {title}", work, _JOB if number else _FIRST, _STUCK)
                    names.remove(name)
                    if group.broken:
                        break


class ReferenceLosses:
    """Losses of the tiny student in float32 on the CPU, which are computed beside the other ranks.

    Args:
        session: stage in progress.
    """

    def __init__(self, session: Session) -> None:
        self._group = RankGroup("cpu", 1, _folder(session), ["fp32, zero1"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._group.close()

    def __call__(self) -> list[float]:
        """Wait for the losses and return them."""
        losses: list[float] = self._group.wait_for("fp32, zero1")[0]
        return losses


def _folder(session: Session) -> Path:
    return Path(tempfile.mkdtemp(dir=session.folder))


def rank_count(device: str) -> int:
    """Return the number of ranks: the GPUs, or as many of them as divide the clips of a step; two on a CPU."""
    if device == "cpu":
        return 2
    return max(ranks for ranks in range(1, torch.cuda.device_count() + 1) if GLOBAL_BATCH % ranks == 0)


def judge(check: Check, name: str, results: Results, reference: Callable[[], Sequence[float]]) -> None:
    """Check the results of a job.

    Args:
        check: check in progress.
        name: name of the job.
        results: its results, of all ranks.
        reference: function that returns the losses in float32 on the CPU.
    """
    kind = name.partition(", ")[0]
    if kind == "sum over ranks":
        judge_sum(check, results)
    elif kind == "sharded teachers":
        judge_teachers(check, results)
    elif kind == "overflow":
        judge_overflow(check, results)
    else:
        judge_losses(check, results, reference(), TOLERANCE[kind])


def judge_sum(check: Check, results: Results) -> None:
    """Check the sum of rank + 1 over all ranks."""
    expected = len(results) * (len(results) + 1) / 2
    check.figure("sum", float(results[0]))
    check.expect(all(value == expected for value in results), f"the sum on every rank is {expected:g}: {results}")


def judge_losses(check: Check, results: Results, reference: Sequence[float], tolerance: float) -> None:
    """Check that the losses of all ranks are those of a reference, and that they fall."""
    differences = [
        abs(loss / expected - 1) for losses in results for loss, expected in zip(losses, reference, strict=True)
    ]
    apart = max(differences, key=lambda difference: float("inf") if isnan(difference) else difference)
    check.figure("largest relative difference", apart)
    check.figure("first loss", float(results[0][0]))
    check.figure("last loss", float(results[0][-1]))
    check.expect(max(reference) - min(reference) > 0.05, "the reference learns, so that a comparison says something")
    check.expect(apart < tolerance, f"losses are within {tolerance:g} of the reference")


def judge_overflow(check: Check, results: Results) -> None:
    """Check that gradients that are not finite skip the step and halve the loss scale."""
    for seen in results:
        scales = seen["scales"]
        check.figure("loss scales", " ".join(f"{scale:g}" for scale in scales))
        check.figure("skipped steps", seen["skipped"])
        check.expect(seen["skipped"] == POISONED, f"{POISONED} steps are skipped")
        check.expect(not seen["moved by overflows"], "a skipped step moves no weight")
        # DeepSpeed lets the first overflow pass (its hysteresis); from the second one on each halves the scale.
        check.expect(scales[1] in (scales[0], scales[0] / 2), "the first overflow halves the loss scale or keeps it")
        halved = all(after == before / 2 for before, after in pairwise(scales[1:]))
        check.expect(halved, "later overflows halve the loss scale")
        check.expect(seen["moves afterwards"], "the next finite step moves the weights")
        check.expect(isfinite(seen["loss afterwards"]), "the loss is finite afterwards")


def judge_teachers(check: Check, results: Results) -> None:
    """Check features of sharded teachers, and that each rank keeps its share of the weights only."""
    for seen in results:
        for name, teacher in seen.items():
            check.figure(f"{name}: cosine", teacher["cosine"])
            check.figure(f"{name}: relative error", teacher["error"])
            check.expect(teacher["cosine"] > 0.999, f"features of {name} keep their direction")
            check.expect(teacher["error"] < 1e-2, f"features of {name} are within 1e-2")
            # Vectors stay on every rank beside their shard.
            share = teacher["held"] / teacher["whole"]
            check.figure(f"{name}: share at rest", share)
            check.expect(share <= 1 / len(results) + 0.02, f"a rank keeps its share of {name} only")


def _wait_and_judge(check: Check, group: RankGroup, name: str, reference: Callable[[], Sequence[float]]) -> None:
    results = group.wait_for(name)
    check.figure("ranks", len(results))
    if len(results) == 1:
        check.figure("between GPUs", "nothing: one rank")
    judge(check, name, results, reference)
