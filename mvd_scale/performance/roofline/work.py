"""Work of a training step on one rank: its calls by part, pass and kind, from the planner's layers.

FLOPs are the planner's. Memory-bound work is that of norms, residual sums, activations, distances and the optimizer,
each operator reading its inputs and writing its results once. What gradient checkpointing computes again, biases,
patch extraction and the input of decoders are no needed work: their time is part of the difference.

Legend: B clips of a micro batch, N tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mvd_scale.models.blocks import sequences_per_pass
from mvd_scale.performance.planning.layers import BlockCost, ElementwiseCost, LayerCost, LinearCost
from mvd_scale.performance.planning.step_time import OPTIMIZER_BYTES
from mvd_scale.performance.planning.workload import ModelPart, Workload
from mvd_scale.performance.profiling.attribution import OUTSIDE, Place
from mvd_scale.performance.roofline.calls import AttentionCall, Call, CopyCall, ProductCall

_LARGEST_COPY = 2**28
"""Bytes of the largest tensor that is copied for a rate."""

OPTIMIZER = Place("optimizer", "", "memory")


@dataclass(frozen=True)
class Work:
    """A call that a step makes `count` times at one place; the count may be a fraction."""

    place: Place
    call: Call
    count: float

    @property
    def amount(self) -> float:
        """FLOPs of all calls, or bytes of copies."""
        return self.call.work * self.count


@dataclass(frozen=True)
class Computing:
    """Way in which one model is computed."""

    dtype: torch.dtype
    """Dtype of activations."""

    eight_bit: bool = False
    """Whether the linear layers of its blocks are quantized."""

    activation_apart: bool = True
    """Whether the activation is an operator of its own, not part of the product before it."""

    in_passes: bool = False
    """Whether its blocks compute a few sequences at a time, see `sequences_per_pass`."""


@dataclass(frozen=True)
class Conditions:
    """Circumstances of a step on one rank."""

    clips: int
    """Clips of a micro batch, B."""

    student: Computing
    teachers: Mapping[str, Computing]
    """Computing of each teacher by the name of its part."""

    groups: Mapping[str, Sequence[str]]
    """Names of the trained parts of the planner by part of the step; several decoders that are one batch are a part."""

    accumulation: int = 1
    """Micro batches of a step."""

    ranks: int = 1
    """Ranks that share the optimizer's states."""


def step_work(workload: Workload, conditions: Conditions) -> list[Work]:
    """List the work of a step of one rank.

    Args:
        workload: layers of the step, per clip.
        conditions: circumstances of the step.
    """
    workload = workload.in_batches_of(conditions.clips)
    trained = {part.name: part for part in workload.trained}
    micro: list[Work] = []
    for name, members in conditions.groups.items():
        micro += _trained(name, [trained[member] for member in members], conditions)
    for part in workload.teachers:
        micro += _teacher(part, conditions)
    for part in workload.trained:
        values = ElementwiseCost(conditions.clips, part.predicted)
        micro += _elementwise(OUTSIDE.part, values, conditions.student, trained=True)
    work = [replace(one, count=one.count * conditions.accumulation) for one in micro if one.amount]
    traffic = OPTIMIZER_BYTES * workload.parameters / conditions.ranks
    copy = CopyCall(min(round(traffic / 2), _LARGEST_COPY))
    return [*work, Work(OPTIMIZER, copy, traffic / copy.work)]


def _trained(name: str, members: list[ModelPart], conditions: Conditions) -> Iterator[Work]:
    """Yield the work of parts of one shape that are one batch, but for their last layers, which are apart."""
    for layer in members[0].layers[:-1]:
        yield from _layer(name, layer, conditions.clips, conditions.student, layers=len(members))
    for member in members:
        yield from _layer(name, member.layers[-1], conditions.clips, conditions.student)


def _teacher(part: ModelPart, conditions: Conditions) -> Iterator[Work]:
    computing, clips = conditions.teachers[part.name], conditions.clips
    if part.counted:
        # A model of another library, of which only sums are known: as products of the first layer of an MLP.
        tokens = part.products // (2 * part.linear)
        call = ProductCall(clips * tokens, part.width, 4 * part.width, computing.dtype, eight_bit=computing.eight_bit)
        yield Work(Place(part.name, "forward", "products"), call, clips * part.counted / call.work)
    for layer in part.layers:
        yield from _layer(part.name, layer, clips, computing, trained=False)


def _layer(
    part: str, layer: LayerCost, clips: int, computing: Computing, *, layers: int = 1, trained: bool = True
) -> Iterator[Work]:
    if isinstance(layer, BlockCost):
        whole = replace(layer, sequences=layer.sequences * clips)
        for size, count in _passes(whole, computing):
            for work in _block(part, replace(whole, sequences=size), computing, layers, trained):
                yield replace(work, count=work.count * count)
    elif isinstance(layer, LinearCost):
        scaled = replace(layer, rows=layer.rows * clips)
        yield from _products(part, scaled, replace(computing, eight_bit=False), layers, trained)
    else:
        scaled_rows = replace(layer, rows=layer.rows * clips * layers)
        yield from _elementwise(part, scaled_rows, computing, trained=trained)


def _passes(block: BlockCost, computing: Computing) -> list[tuple[int, int]]:
    """Return the numbers of sequences that a block computes at a time, each with the number of such passes."""
    size = sequences_per_pass(block.keys) if computing.in_passes else block.sequences
    whole, rest = divmod(block.sequences, size)
    return [(count, times) for count, times in ((size, whole), (rest, 1)) if count and times]


def _block(part: str, block: BlockCost, computing: Computing, layers: int, trained: bool) -> Iterator[Work]:
    for linear in block.linear_layers:
        yield from _products(part, linear, computing, layers, trained)
    shape = block.attention
    call = AttentionCall(
        shape.sequences * layers, shape.keys, shape.queries, shape.heads, shape.width // shape.heads, computing.dtype
    )
    yield Work(Place(part, "forward", "attention"), call, 1)
    if trained:
        yield Work(Place(part, "backward", "attention"), replace(call, backward=True), 1)
    first, second, activation, last = block.elementwise_layers
    for elementwise in (first, second, *([activation] if computing.activation_apart else []), last):
        rows = replace(elementwise, rows=elementwise.rows * layers)
        yield from _elementwise(part, rows, computing, trained=trained)


def _products(part: str, linear: LinearCost, computing: Computing, layers: int, trained: bool) -> Iterator[Work]:
    call = ProductCall(
        round(linear.rows), linear.inputs, linear.outputs, computing.dtype, layers=layers, eight_bit=computing.eight_bit
    )
    yield Work(Place(part, "forward", "products"), call, 1)
    if trained:
        backward = Place(part, "backward", "products")
        yield Work(backward, replace(call, gradient="weight"), 1)
        if linear.input_grad:
            yield Work(backward, replace(call, gradient="input"), 1)


def _elementwise(part: str, layer: ElementwiseCost, computing: Computing, *, trained: bool) -> Iterator[Work]:
    call = CopyCall(round(layer.rows * layer.width * computing.dtype.itemsize))
    yield Work(Place(part, "forward", "memory"), call, layer.passed / 2)
    if trained:
        yield Work(Place(part, "backward", "memory"), call, layer.passed_back / 2)
