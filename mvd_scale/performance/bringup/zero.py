"""Stage (d): ZeRO 1 to 3, overflows of fp16 and sharded teachers, on all GPUs. Needs DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import isfinite
from typing import Any

import torch

from mvd_scale.performance.bringup.rank_group import RankGroup
from mvd_scale.performance.bringup.session import Check, Session
from mvd_scale.performance.bringup.zero_ranks import GLOBAL_BATCH, POISONED, jobs_of

Results = Sequence[Any]
"""Results of a job, of all ranks."""

_FIRST = 20.0
"""Expected seconds until the first result: imports, and the compilation of blocks."""

_STUCK = 60.0
"""Seconds without a result after which ranks wait for each other in vain."""


def run(session: Session) -> None:
    """Make the checks of the stage."""
    ranks = rank_count(session.device)
    here, there = (session.folder / name for name in ("ranks", "reference"))
    here.mkdir()
    there.mkdir()
    names = jobs_of(session.device)
    with (
        RankGroup(session.device, ranks, here, names) as group,
        RankGroup("cpu", 1, there, ["fp32, zero1"]) as reference,
    ):
        expected: list[float] = []

        def reference_losses() -> list[float]:
            if not expected:
                expected.extend(reference.wait_for("fp32, zero1")[0])
            return expected

        for number, name in enumerate(names):
            judge = judge_of(name, reference_losses)
            session.check(
                f"{name}, {ranks} rank{'s' if ranks > 1 else ''}",
                partial(_wait_and_judge, group=group, name=name, judge=judge),
                seconds=5 if number > 1 else _FIRST,
                limit=_STUCK,
            )


def rank_count(device: str) -> int:
    """Return the number of ranks: one per GPU as far as a step has clips for them, or two on a CPU."""
    return min(torch.cuda.device_count(), GLOBAL_BATCH) if device == "cuda" else 2


def judge_of(name: str, reference_losses: Callable[[], Sequence[float]]) -> Callable[[Check, Results], None]:
    """Return the function that checks the results of a job.

    Args:
        name: name of the job.
        reference_losses: function that returns the losses in float32 on the CPU.
    """
    kind = name.partition(", ")[0]
    if kind == "sum over ranks":
        return judge_sum
    if kind == "sharded teachers":
        return judge_teachers
    if kind == "overflow":
        return judge_overflow
    tolerance = {"fp16": 3e-2}.get(kind, 1e-4)
    return lambda check, results: judge_losses(check, results, reference_losses(), tolerance)


def judge_sum(check: Check, results: Results) -> None:
    """Check the sum of rank + 1 over all ranks."""
    expected = len(results) * (len(results) + 1) / 2
    check.figure("sum", float(results[0]))
    check.expect(all(value == expected for value in results), f"the sum on every rank is {expected:g}: {results}")


def judge_losses(check: Check, results: Results, reference: Sequence[float], tolerance: float) -> None:
    """Check that the losses of all ranks are those of a reference, and that they fall."""
    apart = max(
        abs(loss / expected - 1) for losses in results for loss, expected in zip(losses, reference, strict=True)
    )
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


def _wait_and_judge(check: Check, group: RankGroup, name: str, judge: Callable[[Check, Results], None]) -> None:
    results = group.wait_for(name)
    check.figure("ranks", len(results))
    judge(check, results)
