"""`mvd-scale bench step --methods` and `--checkpointing`: cost of training variants relative to the first one."""

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
from mvd_scale.performance.benchmarks.step import StepReport
from mvd_scale.performance.report import Metric, Report

logger = logging.getLogger("mvd_scale")

_VISIBLE = "{head: linear, tokens: visible, decoder: null}"
_LAYERS = "{layers: [3, 6, 9, 12], norm: true}"
_DENSE = "{visible_weight: 0.5}"
_STANDARDIZED = "{standardize: layer}"
METHODS: dict[str, list[str]] = {
    "co-teaching": ["--recipe", "distill/b_from_b"],
    "image teacher": ["--recipe", "ablations/image_teacher_b"],
    "video teacher": ["--recipe", "ablations/video_teacher_b"],
    "co-teaching + pixels": [
        "--recipe", "distill/b_from_b",
        "--targets.pixels", "{kind: pixels, decoder: {width: 768, depth: 2, heads: 12}}",
    ],
    "co-teaching (half decoded)": ["--recipe", "ablations/decoder_mask_b"],
    "co-teaching (random mask)": ["--recipe", "ablations/random_mask_b"],
    "co-teaching (cosine)": ["--recipe", "ablations/distance_cosine_b"],
    "momentum teacher": ["--recipe", "ablations/momentum_b"],
    "per-token distillation": ["--recipe", "ablations/per_token_b"],
    "alignment (visible tokens)": [
        "--recipe", "distill/b_from_b", "--targets.image", _VISIBLE, "--targets.video", _VISIBLE,
    ],
    "four layers": [
        "--recipe", "distill/b_from_b", "--targets.image", _LAYERS, "--targets.video", _LAYERS,
    ],
    "visible tokens too": [
        "--recipe", "distill/b_from_b", "--targets.image", _DENSE, "--targets.video", _DENSE,
    ],
    "standardised teachers": [
        "--recipe", "distill/b_from_b", "--targets.image", _STANDARDIZED, "--targets.video", _STANDARDIZED,
    ],
    "DINOv3-L and V-JEPA 2-L": ["--recipe", "distill/b_from_dinov3_l_and_vjepa2_l"],
    "VideoMAE": ["--recipe", "pretrain/videomae_b_k400"],
}  # fmt: skip
"""Command-line arguments of each method for a student of size B; the first method is the reference of the others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodsReport(Report):
    """Step reports of several methods, or of all choices of gradient checkpointing."""

    kind: Literal["methods"] = "methods"
    steps: dict[str, StepReport]

    def setting(self) -> dict[str, Any]:
        """Return the settings of all steps."""
        return {name: step.setting() for name, step in self.steps.items()}

    def values(self) -> Iterator[tuple[str, Metric]]:
        """Yield time and memory of every step, without the times of its parts."""
        for name, step in self.steps.items():
            yield f"{name}: step, ms", Metric(step.milliseconds_per_step)
            yield f"{name}: peak memory, GiB", Metric(step.peak_memory_gib)

    def to_text(self) -> str:
        """Format as a table: time, memory, and both relative to the first."""
        first = next(iter(self.steps.values()))
        head = (
            f"{first.precision}, {first.ranks} ranks, {first.clips_per_step} clips per step, "
            f"mean of {first.steps} steps\n{self.machine.title()}\n"
            f"  {'variant':<28}{'ms per step':>12}{'ratio':>8}{'peak GiB':>10}{'ratio':>8}"
        )
        rows = [
            f"  {name:<28}{step.milliseconds_per_step:>12.0f}"
            f"{step.milliseconds_per_step / first.milliseconds_per_step:>8.2f}"
            f"{step.peak_memory_gib:>10.2f}{step.peak_memory_gib / first.peak_memory_gib:>8.2f}"
            for name, step in self.steps.items()
        ]
        return "\n".join([head, *rows])


def measure_methods(names: str, words: list[str]) -> MethodsReport:
    """Time a training step of several methods.

    Args:
        names: `all`, or names of `METHODS` separated by commas; co-teaching always comes first.
        words: further arguments of `mvd-scale bench step`.

    Raises:
        UserError: a method is unknown, or one failed (its own message was printed before).
    """
    wanted = list(METHODS) if names == "all" else [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in METHODS]
    if unknown:
        raise UserError(f"--methods {unknown[0]!r}: expected all, or some of {', '.join(METHODS)}")
    return _measure({name: [*METHODS[name], *words] for name in [next(iter(METHODS)), *wanted]})


def measure_checkpointing(words: list[str]) -> MethodsReport:
    """Time a training step with each choice of `training.gradient_checkpointing`.

    Args:
        words: further arguments of `mvd-scale bench step`.

    Raises:
        UserError: the arguments set the choice themselves, or a step failed (its own message was printed before).
    """
    key = "--training.gradient_checkpointing"
    if any(word.partition("=")[0] == key for word in words):
        raise UserError(f"--checkpointing cannot be combined with {key}: it measures every choice; give one of them")
    return _measure({choice: [*words, key, choice] for choice in get_args(Checkpointing)})


def _measure(ways: dict[str, list[str]]) -> MethodsReport:
    """Measure each variant in a separate process, so that each has its own peak of memory."""
    reports = {}
    for name, words in ways.items():
        logger.info("%s", name)
        command = [sys.executable, "-m", "mvd_scale", "bench", "step", "--json", *words]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if result.returncode:
            raise UserError(f"{name} ended with exit code {result.returncode}; see its own message above")
        reports[name] = TypeAdapter(StepReport).validate_json(result.stdout)
    return MethodsReport(machine=next(iter(reports.values())).machine, steps=reports)
