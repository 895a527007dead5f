"""Program that prints the losses of some training steps of a recipe, and with `--timer` the parts that a timer saw.

python -m tests.e2e.plain_steps STEPS SCRATCH [--timer] RECIPE OVERRIDES...
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from mvd_scale.distributed.process_group import destroy_distributed, init_distributed
from mvd_scale.performance.bench_setup import bench_recipe, bench_trainer
from mvd_scale.targets.build import load_or_init_teacher


class Recorder:
    """`StepTimer` that records the names of parts in the order in which they start."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.parts.append(name)
        yield

    def watch(self, name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda *_: self.parts.append(name))


def main(steps: str, scratch: str, *words: str) -> None:
    recorder = Recorder() if words[0] == "--timer" else None
    name, *overrides = words[recorder is not None :]
    recipe = bench_recipe(name, overrides, "fp32", batch=2)
    ranks = init_distributed("cpu", timeout_minutes=1)
    with bench_trainer(recipe, ranks, load_or_init_teacher, steps=int(steps), scratch=Path(scratch)) as trainer:
        if recorder is not None:
            trainer.attach(recorder)
        metrics = [trainer.train_step() for _ in range(int(steps))]
    losses = [[float(micro.loss) for micro in step] for step in metrics]
    destroy_distributed()
    print(json.dumps({"losses": losses, "parts": recorder and recorder.parts, "names": trainer.part_names}))


if __name__ == "__main__":
    main(*sys.argv[1:])
