"""`linear`: products of bfloat16 made in float32 have the values and gradients of a linear layer."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mvd_kernels import Linear, LinearWays
from mvd_kernels import linear as layer

module = import_module("mvd_kernels.linear")
WIDE = LinearWays("float32", "float32", "float32")
MIXED = (LinearWays("float32", "bf16", "float32"), LinearWays("bf16", "float32", "bf16"))


def made(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16().requires_grad_()


@pytest.mark.parametrize("ways", [LinearWays(), WIDE, *MIXED])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16), (0, 16), (0, 3, 16)])
def test_values_and_gradients_are_those_of_a_linear_layer(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], biased: bool, ways: LinearWays
) -> None:
    # Several parts of rows, the last one smaller.
    monkeypatch.setattr(module, "_ROWS", 4)
    torch.manual_seed(0)
    tensors = [made(*shape), made(24, 16), *([made(24)] if biased else [])]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    upstream = torch.randn(*shape[:-1], 24).bfloat16()
    product = layer(tensors[0], tensors[1], tensors[2] if biased else None, ways)
    expected = F.linear(*exact)
    assert product.dtype == torch.bfloat16
    torch.testing.assert_close(product.double(), expected, rtol=2**-7, atol=2**-6)
    gradients = torch.autograd.grad(product, tensors, upstream)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.double(), wanted, rtol=2**-7, atol=2**-5)


def test_each_product_goes_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    for name in ("product", "input_gradient", "weight_gradient"):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, name=name, real=real: [seen.update({name: args[-1]}), real(*args)][1]
        )
    ways = LinearWays("bf16", "float32", "bf16")
    layer(made(3, 16), made(24, 16), None, ways).sum().backward()
    assert seen == {"product": "bf16", "input_gradient": "float32", "weight_gradient": "bf16"}


def test_products_in_float32_round_once() -> None:
    torch.manual_seed(0)
    tokens, linear = made(2, 3, 16), Linear.of(torch.nn.Linear(16, 24).bfloat16(), WIDE)
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


def test_other_dtypes_and_devices_are_left_to_torch() -> None:
    tokens, plain = torch.randn(3, 16), torch.nn.Linear(16, 24)
    wide = Linear.of(plain, WIDE)
    assert wide.weight is plain.weight
    assert torch.equal(wide(tokens), plain(tokens))
    assert wide.bfloat16().to("meta")(torch.empty(3, 16, dtype=torch.bfloat16, device="meta")).shape == (3, 24)
