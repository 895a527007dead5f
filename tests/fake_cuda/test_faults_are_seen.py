"""Faults that a GPU would show fail on the fake one: each is planted in the program's own code and must be seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from mvd_scale.config import load_recipe
from mvd_scale.models import decoder, encoder

from .gpu import GPU, HostRead, fake_gpu
from .steps import pretraining_step

Change = Callable[[Tensor], object]


def step(backward: bool = True) -> None:
    with fake_gpu():
        made = pretraining_step(load_recipe("distill/b_from_b"), depth=1)
        loss = made.forward()
        if backward:
            made.backward(loss)


def plant(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Do something to the tokens that enter the encoder's norm; a tensor that comes of it replaces them."""
    norm = encoder.LayerNorm

    class Faulty(norm):  # type: ignore[misc, valid-type]
        def forward(self, input: Tensor) -> Tensor:
            changed = change(input)
            normed: Tensor = super().forward(changed if isinstance(changed, Tensor) else input)
            return normed

    monkeypatch.setattr(encoder, "LayerNorm", Faulty)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda tokens: tokens + torch.ones(tokens.shape[-1], dtype=tokens.dtype), "cuda:0 and cpu"),
        (lambda tokens: tokens + torch.ones(tokens.shape[-1], device=GPU), "scalar type"),
        (lambda tokens: float(tokens.sum()), DataDependentOutputException),
        (lambda tokens: tokens.isfinite().all().item(), DataDependentOutputException),
        (lambda tokens: tokens[tokens > 0], DynamicOutputShapeException),
        (lambda tokens: tokens.nonzero(), DynamicOutputShapeException),
        (lambda tokens: tokens.cpu(), HostRead),
    ],
    ids=["wrong device", "wider dtype", "float()", "item()", "boolean index", "nonzero()", "cpu()"],
)
def test_a_fault_of_the_forward_pass(
    change: Change, error: str | type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, change)
    if isinstance(error, str):
        with pytest.raises(Exception, match=error):
            step(backward=False)
    else:
        with pytest.raises(error):
            step(backward=False)


def test_a_tensor_that_was_left_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is no buffer, which `Module.to` does not move."""

    def unmoved(self: torch.nn.Module, name: str, table: Tensor, persistent: bool = True) -> None:
        setattr(self, name, table)

    monkeypatch.setattr(decoder.Decoder, "register_buffer", unmoved)
    with pytest.raises(Exception, match=r"meta|FakeTensor"):
        step(backward=False)


class _ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad / float(grad.abs().max())


class _LeavesTheGpuInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * torch.ones(grad.shape[-1], dtype=grad.dtype)


@pytest.mark.parametrize(
    ("function", "error"),
    [(_ReadsInBackward, "_local_scalar_dense"), (_LeavesTheGpuInBackward, "cuda:0 and cpu")],
    ids=["host read", "wrong device"],
)
def test_a_fault_of_the_backward_pass(
    function: type[torch.autograd.Function], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, function.apply)
    step(backward=False)
    with pytest.raises(Exception, match=error):
        step()
