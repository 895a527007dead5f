"""Linear layer that multiplies bfloat16 in float32 on CPUs where that is faster.

CPUs without instructions for bfloat16 multiply it several times more slowly than float32. So do CPUs with AMX where a
virtual machine hides it: their AVX512-BF16 has half the throughput of their float32. Activations and weights stay in
bfloat16; only the factors and sums of products are float32, which is also more exact.

Legend: I inputs, O outputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_TRIALS = 3
"""Number of timed products of a trial; the fastest counts."""


class Linear(nn.Linear):
    """`torch.nn.Linear` that computes by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: (..., I) to (..., O), same dtype."""
        return linear(input, self.weight, self.bias)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `input @ weight.T + bias`.

    Args:
        input: (..., I), any floating dtype.
        weight: (O, I), same dtype.
        bias: (O,), same dtype, or None.

    Returns:
        (..., O), same dtype. Bfloat16 on a CPU is multiplied in float32 if `float32_products_pay`.
    """
    if input.dtype != torch.bfloat16 or input.device.type != "cpu" or torch.compiler.is_compiling():
        return F.linear(input, weight, bias)
    if not float32_products_pay():
        return F.linear(input, weight, bias)
    product: Tensor = _Float32Linear.apply(input, weight, bias)
    return product


@cache
def float32_products_pay() -> bool:
    """Whether this CPU multiplies bfloat16 in float32, conversions included, faster than as it is.

    A trial decides: neither the flags of the CPU nor those of oneDNN tell throughputs.
    """
    rows, weights = (torch.ones(size, 768, dtype=torch.bfloat16) for size in (256, 768))
    threads = torch.get_num_threads()
    # One thread waits for no other, so that its CPU time hardly depends on other processes.
    torch.set_num_threads(1)
    try:
        plain = _cpu_seconds(lambda: rows @ weights.t())
        return _cpu_seconds(lambda: (rows.float() @ weights.float().t()).to(rows.dtype)) < plain
    finally:
        torch.set_num_threads(threads)


def _cpu_seconds(run: Callable[[], object]) -> float:
    """CPU seconds of this thread in the fastest of some calls, after one that is not timed."""
    run()
    times = []
    for _ in range(_TRIALS):
        started = time.thread_time()
        run()
        times.append(time.thread_time() - started)
    return min(times)


class _Float32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # The factors are saved in bfloat16: a second conversion costs less than the memory of float32.
        ctx.save_for_backward(input, weight)
        rows = input.reshape(-1, input.shape[-1]).float()
        factor = weight.float().t()
        product = rows @ factor if bias is None else torch.addmm(bias.float(), rows, factor)
        return product.to(input.dtype).view(*input.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        wanted, gradients = ctx.needs_input_grad, gradient.reshape(-1, gradient.shape[-1]).float()
        to_input = to_weight = to_bias = None
        if wanted[0]:
            to_input = (gradients @ weight.float()).to(input.dtype).view(input.shape)
        if wanted[1]:
            rows = input.reshape(-1, input.shape[-1]).float()
            to_weight = (gradients.t() @ rows).to(weight.dtype)
        if wanted[2]:
            to_bias = gradients.sum(0).to(weight.dtype)
        return to_input, to_weight, to_bias
