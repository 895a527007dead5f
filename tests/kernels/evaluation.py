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
    """A call of an operator.

    Attributes:
        operator: its name in `mvd_kernels`.
        gradients: positions of the arguments that require a gradient.
        used: positions of the results that the loss depends on; all by default.
        compiled: the kernel is called from a program of `torch.compile`.
    """

    operator: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)
    gradients: tuple[int, ...] = ()
    used: tuple[int, ...] | None = None
    compiled: bool = False

    def function(self, room: str) -> Callable[..., Any]:
        """The operator as it stands in `reference` or `triton_ops`."""
        function = getattr(import_module(f"mvd_kernels.{room}.{self.operator}"), self.operator)
        if self.compiled and room == "triton_ops":
            return torch.compile(function, backend="aot_eager", fullgraph=True)
        return function

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
    used = results if call.used is None else [results[index] for index in call.used]
    upstream = [torch.randn(r.shape, generator=generator).to(r.device, r.dtype) for r in used]
    inputs = [arguments[index] for index in call.gradients]
    gradients = torch.autograd.grad(used, inputs, upstream, materialize_grads=True)
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
            answer: Any = evaluate(call, "triton_ops")
        except Exception:
            answer = traceback.format_exc()
        answers.write(pickle.dumps(answer))
        answers.flush()


if __name__ == "__main__":
    serve()
