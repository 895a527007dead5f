"""Linear layer whose products of bfloat16 a CPU makes as they are or in float32, as it is told.

CPUs without instructions for bfloat16 multiply it several times more slowly than float32, and so do CPUs with AMX where
a virtual machine hides it: their AVX512-BF16 has about half the throughput of their float32. Activations, weights and
gradients stay in bfloat16; in float32 only factors and sums are wide, which is more exact.

Legend: R rows, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ProductWay = Literal["bf16", "float32"]
"""Dtype in which a product of bfloat16 is made."""

_ROWS = 1600
"""Rows that are multiplied in float32 at a time: about a clip. The factors of more would be new pages in every call."""


@dataclass(frozen=True)
class LinearWays:
    """Way of each product of a linear layer."""

    forward: ProductWay = "bf16"
    input_gradient: ProductWay = "bf16"
    weight_gradient: ProductWay = "bf16"

    def __str__(self) -> str:
        if self.forward == self.input_gradient == self.weight_gradient:
            return self.forward
        return f"forward {self.forward}, gradient of inputs {self.input_gradient}, of weights {self.weight_gradient}"


class Linear(nn.Linear):
    """`torch.nn.Linear` that makes its products of bfloat16 in given ways."""

    ways = LinearWays()

    @classmethod
    def of(cls, layer: nn.Linear, ways: LinearWays) -> Self:
        """Create a layer with the parameters of another one, which it shares."""
        made = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        made.weight, made.bias, made.ways = layer.weight, layer.bias, ways
        return made.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: (..., I) to (..., O), same dtype."""
        return linear(input, self.weight, self.bias, self.ways)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, ways: LinearWays) -> Tensor:
    """Compute `input @ weight.T + bias`.

    Args:
        input: (..., I), any floating dtype.
        weight: (O, I), same dtype.
        bias: (O,), same dtype, or None.
        ways: ways of its products; read only for bfloat16 on a CPU.

    Returns:
        (..., O), same dtype.
    """
    if input.dtype != torch.bfloat16 or input.device.type != "cpu" or ways == LinearWays():
        return F.linear(input, weight, bias)
    product: Tensor = _Linear.apply(input, weight, bias, ways)
    return product


def product(rows: Tensor, weight: Tensor, bias: Tensor | None, way: ProductWay) -> Tensor:
    """Compute the forward product: bfloat16 (R, I), (O, I) and (O,) or None to (R, O)."""
    if way == "bf16":
        return F.linear(rows, weight, bias)
    return _wide_product(rows, weight.float().t(), None if bias is None else bias.float())


def input_gradient(gradients: Tensor, weight: Tensor, way: ProductWay) -> Tensor:
    """Compute the gradient of the inputs: bfloat16 (R, O) and (O, I) to (R, I)."""
    return gradients @ weight if way == "bf16" else _wide_product(gradients, weight.float(), None)


def weight_gradient(gradients: Tensor, rows: Tensor, way: ProductWay) -> Tensor:
    """Compute the gradient of the weights: bfloat16 (R, O) and (R, I) to (O, I)."""
    if way == "bf16":
        return gradients.t() @ rows
    total = gradients.new_zeros(gradients.shape[1], rows.shape[1], dtype=torch.float32)
    for part, factor in zip(gradients.split(_ROWS), rows.split(_ROWS), strict=True):
        total.addmm_(part.float().t(), factor.float())
    return total.to(gradients.dtype)


def _wide_product(rows: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply bfloat16 (R, I) by float32 (I, O), add float32 (O,), and round to bfloat16 (R, O)."""
    result = rows.new_empty(len(rows), factor.shape[1])
    for part, out in zip(rows.split(_ROWS), result.split(_ROWS), strict=True):
        out.copy_(part.float() @ factor if bias is None else torch.addmm(bias, part.float(), factor))
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, ways: LinearWays) -> Tensor:
        # In bfloat16: a second conversion costs less than the memory of float32.
        ctx.save_for_backward(input, weight)
        ctx.ways = ways
        made = product(input.reshape(-1, input.shape[-1]), weight, bias, ways.forward)
        return made.view(*input.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        input, weight = ctx.saved_tensors
        wanted, gradients = ctx.needs_input_grad, gradient.reshape(-1, gradient.shape[-1])
        to_input = to_weight = to_bias = None
        if wanted[0]:
            to_input = input_gradient(gradients, weight, ctx.ways.input_gradient).view(input.shape)
        if wanted[1]:
            to_weight = weight_gradient(gradients, input.reshape(-1, input.shape[-1]), ctx.ways.weight_gradient)
        if wanted[2]:
            to_bias = gradients.sum(0)
        return to_input, to_weight, to_bias, None
