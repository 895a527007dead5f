"""Calls whose time is measured for the roofline, with the ways in which torch and this package can make them.

Every way gets its inputs in memory and, where torch offers it, writes to memory that exists: a limit pays no page
faults. Weights are stored as modules store them, (out, in).

Legend: R rows, I inputs, O outputs of a linear layer, G linear layers of one batched product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mvd_kernels import Int8Linear
from mvd_kernels.bench.attention import attention_implementations
from mvd_kernels.linear import input_gradient, product, weight_gradient
from mvd_scale.performance.profiling.attribution import Kind

Ways = dict[str, Callable[[], object]]
"""Functions that make the same call, by the name of the way."""


@dataclass(frozen=True)
class ProductCall:
    """Product of a linear layer: of the forward pass, or for one of the two gradients."""

    rows: int
    inputs: int
    outputs: int
    dtype: torch.dtype

    gradient: Literal["none", "input", "weight"] = "none"
    """Gradient that it computes; `none` for the forward pass."""

    layers: int = 1
    """Layers of one shape that a batched product computes, each for its own rows."""

    eight_bit: bool = False
    """Whether weights and activations are quantized: to int8 on CPUs, fp8 on GPUs."""

    kind: ClassVar[Kind] = "products"

    @property
    def work(self) -> int:
        """FLOPs."""
        return 2 * self.layers * self.rows * self.inputs * self.outputs

    def __str__(self) -> str:
        passes = "forward" if self.gradient == "none" else f"{self.gradient}'s gradient"
        group = f"{self.layers} x " if self.layers > 1 else ""
        precision = "8 bits" if self.eight_bit else _short(self.dtype)
        return f"{group}{self.rows} x {self.inputs} x {self.outputs}, {precision}, {passes}"

    def ways(self, device: torch.device) -> Ways:
        """Make the inputs, and return the ways to multiply them."""
        if self.eight_bit:
            return _eight_bit_ways(self, device)
        group = (self.layers,) if self.layers > 1 else ()
        inputs = _random(*group, self.rows, self.inputs, device=device, dtype=self.dtype)
        weights = _random(*group, self.outputs, self.inputs, device=device, dtype=self.dtype)
        gradients = _random(*group, self.rows, self.outputs, device=device, dtype=self.dtype)
        wide = not group and device.type == "cpu" and self.dtype == torch.bfloat16
        if self.gradient == "weight":
            ways = _product_ways("G' X", gradients.mT, inputs) | _product_ways("(X' G)'", inputs.mT, gradients)
            if wide:
                ways |= {"linear in float32": partial(weight_gradient, gradients, inputs, "float32")}
        elif self.gradient == "input":
            ways = _product_ways("G W", gradients, weights)
            if wide:
                ways |= {"linear in float32": partial(input_gradient, gradients, weights, "float32")}
        else:
            ways = _product_ways("X W'", inputs, weights.mT)
            if not group:
                ways |= {"linear": partial(F.linear, inputs, weights)}
            if wide:
                ways |= {"linear in float32": partial(product, inputs, weights, None, "float32")}
        return ways


@dataclass(frozen=True)
class AttentionCall:
    """Attention of several sequences over packed queries, keys and values."""

    sequences: int
    keys: int
    queries: int
    heads: int
    channels: int
    dtype: torch.dtype
    backward: bool = False

    kind: ClassVar[Kind] = "attention"

    @property
    def work(self) -> int:
        """FLOPs as the planner counts them: a backward pass recomputes the scores."""
        forward = 4 * self.sequences * self.heads * self.queries * self.keys * self.channels
        return forward * 5 // 2 if self.backward else forward

    def __str__(self) -> str:
        shape = f"{self.sequences} x {self.heads} heads of {self.channels}, {self.queries} x {self.keys} tokens"
        return f"{shape}, {_short(self.dtype)}, {'backward' if self.backward else 'forward'}"

    def ways(self, device: torch.device) -> Ways:
        """Make the inputs, and return the ways to attend."""
        shape = (self.sequences, self.keys, 3, self.heads, self.channels)
        qkv = _random(*shape, device=device, dtype=self.dtype).requires_grad_(self.backward)
        calls = attention_implementations(qkv, self.queries)
        return {way: _backward(attend, qkv) if self.backward else attend for way, attend in calls.items()}


@dataclass(frozen=True)
class CopyCall:
    """Copy of a tensor, which reads and writes it once."""

    size: int
    """Bytes of the tensor."""

    kind: ClassVar[Kind] = "memory"

    @property
    def work(self) -> int:
        """Bytes read and written."""
        return 2 * self.size

    def __str__(self) -> str:
        return f"copy of {self.size / 2**20:.3g} MiB"

    def ways(self, device: torch.device) -> Ways:
        """Make both tensors, and return the way to copy."""
        source = torch.ones(self.size, dtype=torch.uint8, device=device)
        return {"copy_": partial(torch.empty_like(source).copy_, source)}


Call = ProductCall | AttentionCall | CopyCall


def _product_ways(name: str, left: Tensor, right: Tensor) -> Ways:
    """Product of two matrices or batches of them, in their dtype and, on CPUs, in float32.

    Some CPUs multiply bfloat16 more slowly than float32.
    """
    product = torch.bmm if left.dim() == 3 else torch.mm
    out = left.new_empty(*left.shape[:-1], right.shape[-1])
    ways: Ways = {name: partial(product, left, right, out=out)}
    if left.device.type == "cpu" and left.dtype != torch.float32:
        ways[f"{name} in float32"] = lambda: out.copy_(product(left.float(), right.float()))
    return ways


def _eight_bit_ways(call: ProductCall, device: torch.device) -> Ways:
    inputs = _random(call.rows, call.inputs, device=device, dtype=call.dtype)
    weights = _random(call.outputs, call.inputs, device=device, dtype=call.dtype)
    if device.type == "cpu":
        return {"onednn::qlinear": partial(Int8Linear(weights, None), inputs)}
    rows, columns = (torch.ones(count, 1, device=device) for count in (call.rows, call.outputs))
    left, right = inputs.to(torch.float8_e4m3fn), weights.to(torch.float8_e4m3fn)
    return {"_scaled_mm": lambda: torch._scaled_mm(left, right.mT, rows, columns.mT, out_dtype=torch.bfloat16)}


def _backward(attend: Callable[[], Tensor], qkv: Tensor) -> Callable[[], object]:
    attended = attend()
    return partial(torch.autograd.grad, attended, qkv, torch.randn_like(attended), retain_graph=True)


def _random(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
