"""`python -m tests.oracle.compare`: speed of training steps with the published arithmetic and with ours.

Each variant runs in a separate process and so has its own peak of memory. Ours is `mvd-scale bench step`, including
DeepSpeed and the loader; the published arithmetic gets random clips from memory, without any loading time.
"""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from typing import Any

import click
import torch

from mvd_scale.config import Recipe, load_recipe
from mvd_scale.models import Student
from mvd_scale.targets import FrozenTeacher, build_targets
from mvd_scale.targets.build import init_teacher
from tests.oracle.published import Published

PAIRS = {"b": "distill/b_from_b", "l": "distill/l_from_l"}
OURS = {
    "ours, fp32": ["--precision", "fp32"],
    "ours, bf16": ["--precision", "bf16"],
    "ours, bf16, int8 teachers": [
        *("--precision", "bf16", "--teachers.precision", "int8"),
        *("--teachers.sharding", "replicated"),
    ],
}
PUBLISHED = {"published, fp32": False, "published, bf16 autocast": True}

SHAPE = '"size": null, "width": 64, "depth": 2, "heads": 2, "input_size": 32'
SMALL = [
    "--model", f'{{{SHAPE}, "frames": 4}}',
    "--targets.image.model", f'{{{SHAPE}, "frames": 1, "tubelet": 1, "positions": "sincos2d", "class_token": true}}',
    "--targets.video.model", f'{{{SHAPE}, "frames": 4}}',
]  # fmt: skip
"""Overrides that make a recipe small enough for a test."""


def build(name: str, overrides: list[str]) -> tuple[Student, dict[str, Any]]:
    """Student and targets of a recipe with random weights, in float32."""
    recipe = load_recipe(
        name, ["--training.precision", "fp32", "--data.source", "x", "--run.folder", "x", "--device", "cpu", *overrides]
    )
    assert isinstance(recipe, Recipe)
    torch.manual_seed(0)
    targets = build_targets(recipe, lambda target: init_teacher(recipe, target))
    return Student.from_recipe(recipe, targets), dict(targets)


def time_published(name: str, batch: int, steps: int, autocast: bool) -> dict[str, float]:
    """Clips per second and peak memory of steps of the published arithmetic with AdamW."""
    student, targets = build(name, [])
    teachers = {target: found.teacher for target, found in targets.items() if isinstance(found, FrozenTeacher)}
    step = Published(student, teachers)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    frames, side = student.encoder.config.frames, student.encoder.config.input_size
    pixels = torch.randint(0, 256, (batch, frames, side, side, 3), dtype=torch.uint8)
    time_slices, height, width = student.encoder.config.grid
    patches = height * width
    hidden = torch.stack([torch.randperm(patches) < int(0.9 * patches) for _ in range(batch)]).repeat(1, time_slices)
    started = 0.0
    for number in range(1 + steps):
        if number == 1:
            started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = step(pixels, hidden)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    spent = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"clips_per_second": batch * steps / spent, "peak_memory_gib": peak}


@click.command()
@click.option("--pair", type=click.Choice(sorted(PAIRS)), multiple=True, default=("b",), show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--only", help="One of the published ways: printed as JSON, measured in this process.")
def main(pair: tuple[str, ...], batch: int, steps: int, only: str | None) -> None:
    """Clips per second, ratio to the published arithmetic, peak memory."""
    words = ["--batch", str(batch), "--steps", str(steps)]
    if only is not None:
        click.echo(json.dumps(time_published(PAIRS[pair[0]], batch, steps, PUBLISHED[only])))
        return
    for name in pair:
        click.echo(f"{PAIRS[name]}, {batch} clips a step, {torch.get_num_threads()} threads, torch {torch.__version__}")
        click.echo(f"{'way':<28}{'clips/s':>10}{'times fp32':>12}{'times autocast':>16}{'peak GiB':>10}{'share':>8}")
        rows: dict[str, dict[str, float]] = {}
        for way in (*PUBLISHED, *OURS):
            if way in OURS:
                command = ["mvd_scale", "bench", "step", "--json", "--recipe", PAIRS[name], *words, *OURS[way]]
            else:
                command = ["tests.oracle.compare", "--pair", name, *words, "--only", way]
            done = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                logging.getLogger(__name__).error("%s ended with exit code %d", way, done.returncode)
                continue
            rows[way] = json.loads(done.stdout)
            speed, memory = rows[way]["clips_per_second"], rows[way]["peak_memory_gib"]
            against = [rows[other]["clips_per_second"] if other in rows else float("nan") for other in PUBLISHED]
            first = rows[next(iter(rows))]["peak_memory_gib"]
            click.echo(
                f"{way:<28}{speed:>10.4f}{speed / against[0]:>11.2f}x{speed / against[1]:>15.2f}x"
                f"{memory:>10.2f}{memory / first:>8.0%}"
            )


if __name__ == "__main__":
    main()
