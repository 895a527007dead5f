"""`linear`: bfloat16 multiplied in float32 has the values and gradients of a linear layer, and a trial chooses it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mvd_kernels import Linear
from mvd_kernels import linear as layer
from mvd_kernels.linear import float32_products_pay

module = import_module("mvd_kernels.linear")


@pytest.fixture(params=[True, False])
def pays(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(module, "float32_products_pay", lambda: request.param)
    return bool(request.param)


def made(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32).bfloat16().requires_grad_()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16), (0, 16), (0, 3, 16)])
def test_values_and_gradients_are_those_of_a_linear_layer(pays: bool, shape: tuple[int, ...], biased: bool) -> None:
    torch.manual_seed(0)
    tensors = [made(*shape), made(24, 16), *([made(24)] if biased else [])]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    upstream = torch.randn(*shape[:-1], 24).bfloat16()
    product, expected = layer(*tensors), F.linear(*exact)
    assert product.dtype == torch.bfloat16
    torch.testing.assert_close(product.double(), expected, rtol=2**-7, atol=2**-6)
    gradients = torch.autograd.grad(product, tensors, upstream)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.double(), wanted, rtol=2**-7, atol=2**-5)


def test_products_in_float32_round_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "float32_products_pay", lambda: True)
    torch.manual_seed(0)
    tokens, linear = made(2, 3, 16), Linear(16, 24).bfloat16()
    assert linear.bias is not None
    exact = F.linear(tokens.float(), linear.weight.float(), linear.bias.float()).bfloat16()
    assert torch.equal(linear(tokens), exact)
    # Rows with strides, as of a patch embedding.
    rows = made(4, 32)[:, :16]
    assert torch.equal(linear(rows), linear(rows.contiguous()))
    # Frozen weights and inputs that need no gradient.
    linear.requires_grad_(False)
    linear(tokens).sum().backward()
    assert tokens.grad is not None
    assert linear.weight.grad is None
    assert not linear(tokens.detach()).requires_grad


def test_other_dtypes_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> bool:
        raise AssertionError("no trial is needed")

    monkeypatch.setattr(module, "float32_products_pay", asked)
    tokens, linear = torch.randn(3, 16), Linear(16, 24)
    assert torch.equal(linear(tokens), F.linear(tokens, linear.weight, linear.bias))
    assert linear.bfloat16().to("meta")(torch.empty(3, 16, dtype=torch.bfloat16, device="meta")).shape == (3, 24)


@pytest.mark.parametrize(("plain", "converted", "pays"), [(2.0, 1.0, True), (1.0, 2.0, False)])
def test_the_faster_way_of_a_trial_is_chosen(
    monkeypatch: pytest.MonkeyPatch, plain: float, converted: float, pays: bool
) -> None:
    def seconds(run: Callable[[], Tensor]) -> float:
        assert run().shape == (256, 768)
        assert torch.get_num_threads() == 1
        return times.pop(0)

    threads, times = torch.get_num_threads(), [plain, converted]
    monkeypatch.setattr(module, "_cpu_seconds", seconds)
    assert float32_products_pay.__wrapped__() == pays
    assert not times
    assert torch.get_num_threads() == threads
