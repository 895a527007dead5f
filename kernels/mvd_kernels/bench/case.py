"""`BenchmarkCase`: one call of an operator, and the implementations to time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mvd_kernels.dispatch import uses_triton


@dataclass(frozen=True)
class BenchmarkCase:
    """One call of an operator.

    Attributes:
        shape: sizes of the inputs as text.
        dtype: dtype of the inputs.
        ways: the call as a function without arguments, by the name of the implementation.
        inputs: leaves that require a gradient; if there are none, no backward pass is timed.
        read: bytes that the forward pass must read, each input once and of gathered inputs the chosen rows; 0 where
            arithmetic limits the operator.
        written: bytes that it must write.
        flops: FLOPs of the matrix products of the forward pass; 0 where memory limits the operator.
    """

    shape: str
    dtype: torch.dtype
    implementations: dict[str, Callable[[], Any]]
    inputs: tuple[Tensor, ...] = field(default=())
    read: int = 0
    written: int = 0
    flops: int = 0


def precision(device: torch.device) -> torch.dtype:
    """Precision of training on the device: bfloat16 on GPUs, float32 on CPUs."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def clips(device: torch.device) -> int:
    """Clips of a micro batch on the device."""
    return 32 if device.type == "cuda" else 2


def implementations(
    operator: str, device: torch.device, *arguments: Any, **keywords: Any
) -> dict[str, Callable[[], Any]]:
    """Make the calls of an operator by its reference and, on GPUs, by its Triton kernel; {implementation: call}."""
    rooms = {"reference": "reference"}
    if uses_triton(torch.empty(0, device=device)):
        rooms["triton"] = "triton_ops"
    functions = {way: getattr(import_module(f"mvd_kernels.{room}.{operator}"), operator) for way, room in rooms.items()}
    return {way: partial(function, *arguments, **keywords) for way, function in functions.items()}


def leaf(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Make a tensor of random values that requires a gradient."""
    return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)


def split_tokens(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw visible and masked tokens of 1568 at the published ratio of 90 %: int64 (B, 160) and (B, 1408)."""
    order = torch.rand(count, 1568, device=device).argsort(1)
    return order[:, :160].sort(1).values, order[:, 160:].sort(1).values
