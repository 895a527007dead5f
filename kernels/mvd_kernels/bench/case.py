"""What a benchmark of an operator is: one call, and the ways to compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mvd_kernels.dispatch import takes_kernel


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Attributes:
        shape: its sizes, for people.
        dtype: of the tensors it works on.
        ways: the call without arguments, by the name of who computes it.
        inputs: leaves that want a gradient; without any there is no backward pass to time.
    """

    shape: str
    dtype: torch.dtype
    ways: dict[str, Callable[[], Any]]
    inputs: tuple[Tensor, ...] = field(default=())


def precision(device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs, float32 on CPUs: what runs use there."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def clips(device: torch.device) -> int:
    """A micro batch of the device."""
    return 32 if device.type == "cuda" else 2


def ways(operator: str, device: torch.device, *arguments: Any, **keywords: Any) -> dict[str, Callable[[], Any]]:
    """A call of an operator by its twin and, on GPUs, by its Triton kernel."""
    rooms = {"twin": "twins"}
    if takes_kernel(torch.empty(0, device=device)):
        rooms["triton"] = "fused"
    functions = {way: getattr(import_module(f"mvd_kernels.{room}.{operator}"), operator) for way, room in rooms.items()}
    return {way: partial(function, *arguments, **keywords) for way, function in functions.items()}


def leaf(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random values that want a gradient."""
    return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)


def split_tokens(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Visible and masked tokens of 1568 under the published mask of 90 %: int64 (B, 160) and (B, 1408)."""
    order = torch.rand(count, 1568, device=device).argsort(1)
    return order[:, :160].sort(1).values, order[:, 160:].sort(1).values
