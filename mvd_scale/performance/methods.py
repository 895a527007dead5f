"""`mvd-scale bench step --methods` and `--checkpointing`: what ways to train cost beside the first, on one machine."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Literal, get_args

from pydantic import TypeAdapter

from mvd_scale.config.training import Checkpointing
from mvd_scale.errors import UserError
from mvd_scale.performance.reports import Report, Value
from mvd_scale.performance.step import StepReport

logger = logging.getLogger("mvd_scale")

_VISIBLE = "{head: linear, tokens: visible, decoder: null}"
METHODS: dict[str, list[str]] = {
    "co-teaching": ["--recipe", "distill/b_from_b"],
    "image teacher": ["--recipe", "ablations/image_teacher_b"],
    "video teacher": ["--recipe", "ablations/video_teacher_b"],
    "co-teaching + pixels": [
        "--recipe", "distill/b_from_b",
        "--targets.pixels", "{kind: pixels, decoder: {width: 768, depth: 2, heads: 12}}",
    ],
    "co-teaching, half decoded": ["--recipe", "ablations/decoder_mask_b"],
    "co-teaching, random mask": ["--recipe", "ablations/random_mask_b"],
    "co-teaching, cosine": ["--recipe", "ablations/distance_cosine_b"],
    "momentum teacher": ["--recipe", "ablations/momentum_b"],
    "per-token distillation": ["--recipe", "ablations/per_token_b"],
    "alignment, visible tokens": [
        "--recipe", "distill/b_from_b", "--targets.image", _VISIBLE, "--targets.video", _VISIBLE,
    ],
    "VideoMAE": ["--recipe", "pretrain/videomae_b_k400"],
}  # fmt: skip
"""Command-line words of each at size B; the first is what the others are compared with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodsReport(Report):
    """A step of each method, or by each choice of gradient checkpointing."""

    kind: Literal["methods"] = "methods"
    steps: dict[str, StepReport]

    def setting(self) -> dict[str, Any]:
        """Those of all steps."""
        return {name: step.setting() for name, step in self.steps.items()}

    def values(self) -> Iterator[tuple[str, Value]]:
        """Those of all steps, but for their parts."""
        for name, step in self.steps.items():
            yield f"{name}: step, ms", Value(step.milliseconds_per_step)
            yield f"{name}: peak memory, GiB", Value(step.peak_memory_gib)

    def to_text(self) -> str:
        """A table: time, memory, and both relative to the first."""
        first = next(iter(self.steps.values()))
        head = (
            f"{first.precision}, {first.ranks} ranks, {first.clips_per_step} clips a step, "
            f"mean of {first.steps} steps\n{self.machine.title()}\n"
            f"  {'way':<28}{'ms a step':>12}{'ratio':>8}{'peak GiB':>10}{'ratio':>8}"
        )
        rows = [
            f"  {name:<28}{step.milliseconds_per_step:>12.0f}"
            f"{step.milliseconds_per_step / first.milliseconds_per_step:>8.2f}"
            f"{step.peak_memory_gib:>10.2f}{step.peak_memory_gib / first.peak_memory_gib:>8.2f}"
            for name, step in self.steps.items()
        ]
        return "\n".join([head, *rows])


def measure_methods(names: str, words: list[str]) -> MethodsReport:
    """Time a step of several methods.

    Args:
        names: `all`, or names of `METHODS` separated by commas; co-teaching always comes first.
        words: further words of `mvd-scale bench step`.

    Raises:
        UserError: an unknown method, or one of them failed (its own message stands above).
    """
    wanted = list(METHODS) if names == "all" else [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in METHODS]
    if unknown:
        raise UserError(f"--methods {unknown[0]!r}: expected all, or some of {', '.join(METHODS)}")
    return _measure({name: [*METHODS[name], *words] for name in [next(iter(METHODS)), *wanted]})


def measure_checkpointing(words: list[str]) -> MethodsReport:
    """Time a step by each choice of `training.gradient_checkpointing`.

    Args:
        words: further words of `mvd-scale bench step`.

    Raises:
        UserError: the words make a choice themselves, or a step failed (its own message stands above).
    """
    key = "--training.gradient_checkpointing"
    if any(word.partition("=")[0] == key for word in words):
        raise UserError(f"--checkpointing does not go with {key}: it measures every choice")
    return _measure({choice: [*words, key, choice] for choice in get_args(Checkpointing)})


def _measure(ways: dict[str, list[str]]) -> MethodsReport:
    """Each in a process of its own, so that each has its own peak of memory."""
    reports = {}
    for name, words in ways.items():
        logger.info("%s", name)
        command = [sys.executable, "-m", "mvd_scale", "bench", "step", "--json", *words]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if result.returncode:
            raise UserError(f"{name} ended with exit code {result.returncode}; its own message stands above")
        reports[name] = TypeAdapter(StepReport).validate_json(result.stdout)
    return MethodsReport(machine=next(iter(reports.values())).machine, steps=reports)
