"""Calls an operator with its gradients. Run as a program it does so for another process, by messages of pickle.

Triton decides when a kernel is decorated whether its interpreter runs it, and its own library is decorated at import:
only a process that starts with `TRITON_INTERPRET=1` can interpret.
"""

from __future__ import annotations

import pickle
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """An operator of `mvd_kernels` by name, its arguments, and which of them want a gradient."""

    operator: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)
    gradients: tuple[int, ...] = ()
    file: str | None = None

    def function(self, room: str) -> Callable[..., Any]:
        """The operator as it stands in `twins` or `fused`."""
        return getattr(import_module(f"mvd_kernels.{room}.{self.file or self.operator}"), self.operator)

    def to(self, device: str) -> Call:
        """The same call with its tensors elsewhere."""
        moved = tuple(a.to(device) if isinstance(a, Tensor) else a for a in self.arguments)
        return replace(self, arguments=moved)


def evaluate(call: Call, room: str) -> tuple[list[Tensor], list[Tensor]]:
    """Results of the call, and gradients of their sum, each value weighed by a fixed random number."""
    arguments = list(call.arguments)
    for index in call.gradients:
        arguments[index] = arguments[index].detach().requires_grad_()
    results = call.function(room)(*arguments, **call.keywords)
    results = list(results) if isinstance(results, tuple) else [results]
    if not call.gradients:
        return results, []
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(r.shape, generator=generator).to(r.device, r.dtype) for r in results]
    gradients = torch.autograd.grad(results, [arguments[index] for index in call.gradients], upstream)
    return [result.detach() for result in results], list(gradients)


def serve() -> None:
    """Answer calls until the input ends: by results and gradients, or the traceback of what went wrong."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            call = Call(*pickle.load(sys.stdin.buffer))
        except EOFError:
            return
        try:
            answer: Any = evaluate(call, "fused")
        except Exception:
            answer = traceback.format_exc()
        answers.write(pickle.dumps(answer))
        answers.flush()


if __name__ == "__main__":
    serve()
