"""Options that several commands share, and types of values."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

WITH_OVERRIDES: dict[str, Any] = {"ignore_unknown_options": True}
"""Context of a command whose unknown options are dotted keys of a recipe."""

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def overrides_argument(command: Decorated) -> Decorated:
    """All words that are no options of the command itself."""
    return click.argument("overrides", nargs=-1, type=click.UNPROCESSED)(command)


class Fraction(click.ParamType):
    """`3/64`: the third of 64."""

    name = "K/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """The two numbers."""
        number, _, count = str(value).partition("/")
        if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
            return int(number), int(count)
        self.fail(f"{value!r} is not K/N with 1 <= K <= N, such as 3/64", param, ctx)


class Numbers(click.ParamType):
    """`8,16,32`, or, if it may be so, `none`."""

    name = "N,N,.."

    def __init__(self, *, or_none: bool = False) -> None:
        self.or_none = or_none

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """The numbers."""
        if self.or_none and value == "none":
            return []
        if re.fullmatch(r"\d+(,\d+)*", str(value)):
            return [int(number) for number in value.split(",")]
        self.fail(f"{value!r} is no list of numbers such as 1,2,4", param, ctx)


class Bytes(click.ParamType):
    """`500MB`, `1GB`."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(value).strip(), re.IGNORECASE)
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is no size: expected a number and a unit, such as 500MB or 1GB", param, ctx)
        return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def test_views(command: Any) -> Any:
    """Which views of a video a classifier is shown."""
    count = click.IntRange(min=1)
    for option in (
        click.option("--crops", type=count, help="Crops of a clip; likewise, or 3."),
        click.option("--clips", type=count, help="Clips in time; likewise, or 5."),
        click.option("--stride", type=count, help="Of dense: frames between frames; likewise, or 4."),
        click.option(
            "--sampling", type=click.Choice(["dense", "uniform"]), help="As the weights say if left out, or dense."
        ),
    ):
        command = option(command)
    return command


def frozen_precision(command: Decorated) -> Decorated:
    """Of a model that is not trained."""
    return click.option(
        "--precision", type=click.Choice(["fp32", "bf16", "fp16", "int8", "fp8"]),
        help="fp16 on GPUs, fp32 on CPUs if left out; in 8 bits are the linear layers of the blocks.",
    )(command)  # fmt: skip


def shape_hints(command: Any) -> Any:
    """Options for what a checkpoint of weights does not tell itself."""
    count = click.IntRange(min=1)
    tables = click.Choice(["sincos3d", "sinusoid", "sincos2d"])
    for option in (
        click.option("--positions", type=tables, help="Position table it was trained with, where it holds none."),
        click.option("--input-size", type=count, help="Side of the crop it shall take; its own if left out."),
        click.option("--frames", type=count, help="Frames it shall take; its own if left out."),
        click.option("--decoder-heads", type=count, help="Heads of its decoders; by their width if left out."),
        click.option("--heads", type=count, help="Heads of its encoder; by its width if left out."),
    ):
        command = option(command)
    return command


def command_line() -> str:
    """This very command line, to be kept with what it makes."""
    return shlex.join(["mvd-scale", *sys.argv[1:]])
