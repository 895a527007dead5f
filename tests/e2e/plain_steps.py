"""Prints the losses of some steps of the quickstart's student that nothing watches.

python -m tests.e2e.plain_steps STEPS SCRATCH RECIPE_WORDS...
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from mvd_scale.performance.bench_setup import bench_trainer, bench_recipe
from mvd_scale.targets.build import load_or_init_teacher
from mvd_scale.training.ranks import join_ranks, leave_ranks


class Nobody:
    """Who is told of parts and does nothing."""

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        yield

    def watch(self, name: str, module: nn.Module) -> None:
        return


def main(steps: str, scratch: str, *words: str) -> None:
    recipe = bench_recipe("quickstart/student", list(words), "fp32", batch=2)
    ranks = join_ranks("cpu", timeout_minutes=1)
    with Rehearsal(recipe, ranks, Nobody(), named_teacher, steps=int(steps), scratch=Path(scratch)) as rehearsal:
        losses = [float(rehearsal.step()) for _ in range(int(steps))]
    leave_ranks()
    print(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
