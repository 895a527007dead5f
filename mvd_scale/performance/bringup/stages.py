"""The stages of a bring-up in their order of value, with their time budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A group of checks that runs in a process of its own."""

    letter: str
    title: str

    module: str
    """Module whose function `run(session)` makes the checks."""

    seconds: float
    """Budget of a whole bring-up; what a stage leaves is available to those after it."""

    needs: tuple[str, ...] = ()
    """Packages beyond torch, Triton and numpy; without one of them the stage is left out."""

    needs_gpu: bool = True
    """Whether the stage is left out where torch finds no GPU, unless it is a dry run."""


_DEEPSPEED = ("pydantic", "yaml", "safetensors", "rich", "psutil", "timm", "deepspeed")
_DECODING = (*_DEEPSPEED, "pyarrow", "av", "nvidia.dali")

STAGES = tuple(
    Stage(letter, title, f"mvd_scale.performance.bringup.checks.{module}", seconds, needs, letter != "a")
    for letter, title, module, seconds, needs in (
        ("a", "What is there", "machine", 40, ()),
        ("b", "Kernels", "kernels", 60, ()),
        ("c", "Blocks", "blocks", 65, ()),
        ("d", "ZeRO and sharded teachers", "zero", 85, _DEEPSPEED),
        ("e", "Steps", "steps", 170, _DEEPSPEED),
        ("f", "Decoding", "decoding", 90, _DECODING),
        ("g", "Quickstart", "quickstart", 90, (*_DECODING, "click")),
    )
)
"""All stages: (a) to (e) take 7 minutes, all of them 10."""


def choose_stages(letters: str | None) -> tuple[Stage, ...]:
    """Return the stages of some letters, in the order of `STAGES`; all if None.

    Raises:
        ValueError: a letter is unknown.
    """
    known = "".join(stage.letter for stage in STAGES)
    chosen = known if letters is None else letters
    if unknown := sorted(set(chosen) - set(known)) or ("none" if not chosen else ""):
        raise ValueError(f"--stages {letters}: unknown {''.join(unknown)}; expected some of {known}")
    return tuple(stage for stage in STAGES if stage.letter in chosen)


def budgets(stages: Sequence[Stage], minutes: float | None) -> list[float]:
    """Divide a time over stages in proportion to their own budgets: seconds of each; its own budget if None."""
    total = sum(stage.seconds for stage in stages)
    scale = 1.0 if minutes is None else 60 * minutes / total
    return [scale * stage.seconds for stage in stages]
