"""Options that several commands share, and parameter types."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

WITH_OVERRIDES: dict[str, Any] = {"ignore_unknown_options": True}
"""Context settings of a command that takes unknown options as overrides, dotted keys of a recipe."""

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def overrides_argument(command: Decorated) -> Decorated:
    """Add the argument `overrides`: all words that are not options of the command itself."""
    return click.argument("overrides", nargs=-1, type=click.UNPROCESSED)(command)


class PartType(click.ParamType):
    """Parameter type of a part `K/N`, such as `3/64`, the third of 64 parts."""

    name = "K/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Convert `K/N` to the pair (K, N)."""
        number, _, count = str(value).partition("/")
        if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
            return int(number), int(count)
        self.fail(f"{value!r} is not K/N with 1 <= K <= N, such as 3/64", param, ctx)


class IntListType(click.ParamType):
    """Parameter type of a list of numbers, such as `8,16,32`; with `or_none`, also `none` for an empty list."""

    name = "N,N,.."

    def __init__(self, *, or_none: bool = False) -> None:
        self.or_none = or_none

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Convert the text to a list of numbers."""
        if self.or_none and value == "none":
            return []
        if re.fullmatch(r"\d+(,\d+)*", str(value)):
            return [int(number) for number in value.split(",")]
        self.fail(f"{value!r} is not a list of numbers such as 1,2,4", param, ctx)


class SizeType(click.ParamType):
    """Parameter type of a size in bytes, such as `500MB` or `1GB`; units are powers of 1000."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert the text to a number of bytes."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(value).strip(), re.IGNORECASE)
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is not a size: expected a number and a unit, such as 500MB or 1GB", param, ctx)
        return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def view_options(command: Any) -> Any:
    """Add the options of the test views of a classifier."""
    count = click.IntRange(min=1)
    for option in (
        click.option("--crops", type=count, help="Crops per clip; from the weights if omitted, or 3."),
        click.option("--clips", type=count, help="Clips in time; from the weights if omitted, or 5."),
        click.option(
            "--stride",
            type=count,
            help="For dense sampling, frames from one sampled frame to the next; from the weights if omitted, or 4.",
        ),
        click.option(
            "--sampling",
            type=click.Choice(["dense", "uniform"]),
            help="Sampling of the clips; from the weights if omitted, or dense.",
        ),
    ):
        command = option(command)
    return command


def positions_option(command: Decorated) -> Decorated:
    """Add the option `--positions` of weights that do not hold their position table."""
    return click.option(
        "--positions",
        type=click.Choice(["sincos3d", "sinusoid", "sincos2d", "rotary_vjepa2", "rotary_vjepa2_1"]),
        help="Position table of the training, for weights that hold none: sincos3d for MVD, sinusoid for VideoMAE, "
        "rotary_vjepa2 for V-JEPA 2, rotary_vjepa2_1 for V-JEPA 2.1.",
    )(command)  # fmt: skip


def device_option(command: Decorated) -> Decorated:
    """Add the option `--device`."""
    return click.option(
        "--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True,
        help="Device; auto takes the GPU if there is one.",
    )(command)  # fmt: skip


def precision_option(command: Decorated) -> Decorated:
    """Add the option `--precision` of a model that is not trained."""
    return click.option(
        "--precision", type=click.Choice(["fp32", "bf16", "fp16", "int8", "fp8"]),
        help="Precision of the model; fp16 on GPUs and fp32 on CPUs if omitted. int8 and fp8 apply to the linear "
        "layers of the blocks.",
    )(command)  # fmt: skip


def shape_options(command: Any) -> Any:
    """Add options for properties that a checkpoint may not state itself."""
    count = click.IntRange(min=1)
    for option in (
        click.option("--key", help="Entry that holds the weights, in a file of several models, such as teacher."),
        positions_option,
        click.option(
            "--input-size", type=count, help="Input side in pixels to adapt to; that of the checkpoint if omitted."
        ),
        click.option("--frames", type=count, help="Frames per clip to adapt to; those of the checkpoint if omitted."),
        click.option(
            "--decoder-heads", type=count, help="Attention heads of the decoders; derived from their width if omitted."
        ),
        click.option("--heads", type=count, help="Attention heads of the encoder; derived from its width if omitted."),
    ):
        command = option(command)
    return command


def command_line() -> str:
    """Command line of this process, to be stored with its results."""
    return shlex.join(["mvd-scale", *sys.argv[1:]])
