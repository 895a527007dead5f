"""Linear layers in 8 bits: close to the float ones, for any leading shape, with GELU in the same pass."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mvd_kernels import Int8Linear


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 33)])
def test_it_is_near_the_float_layer(shape: tuple[int, ...], dtype: torch.dtype, gelu: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(33, 17)
    tokens = torch.randn(shape) * 3 + 1
    expected = linear(tokens).detach()
    expected = F.gelu(expected) if gelu else expected
    result = Int8Linear(linear.weight, linear.bias, gelu=gelu)(tokens.to(dtype))
    assert result.dtype == dtype
    assert result.shape == expected.shape
    assert (result.float() - expected).norm() / expected.norm() < 0.03


def test_without_a_bias_and_with_tokens_of_one_sign() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 8, bias=False)
    for tokens in (torch.rand(4, 16) + 5, -torch.rand(4, 16) - 5):
        expected = linear(tokens).detach()
        result = Int8Linear(linear.weight, None)(tokens)
        assert (result - expected).norm() / expected.norm() < 0.03


LARGEST = """
import torch
from mvd_kernels import Int8Linear
weight = torch.ones(8, 64)
print((Int8Linear(weight, None)(torch.ones(2, 64)) / 64 - 1).abs().max().item())
"""


@pytest.mark.parametrize("instructions", ["AVX2", "DEFAULT"])
def test_the_largest_products_do_not_overflow_whatever_instructions_onednn_may_use(instructions: str) -> None:
    """Without VNNI it sums two products in 16 bits; two of 8 bits lose half of the sum."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}
    done = subprocess.run([sys.executable, "-c", LARGEST], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1e-6


def test_zeros_give_the_bias() -> None:
    linear = nn.Linear(16, 8)
    for tokens in (torch.zeros(3, 16), torch.full((3, 16), 1e-40)):
        torch.testing.assert_close(Int8Linear(linear.weight, linear.bias)(tokens), linear.bias.expand(3, -1))


def test_a_sequence_does_not_depend_on_those_beside_it() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 8)
    layer, tokens = Int8Linear(linear.weight, linear.bias), torch.randn(3, 5, 16)
    tokens[1] *= 100
    torch.testing.assert_close(layer(tokens)[0], layer(tokens[0]), rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_in_the_result_of_its_sequence(value: float) -> None:
    linear = nn.Linear(16, 8)
    tokens = torch.ones(2, 5, 16)
    tokens[1, 2, 3] = value
    result = Int8Linear(linear.weight, linear.bias)(tokens)
    assert result[0].isfinite().all()
    assert result[1].isnan().all()


def test_its_scales_stay_float_in_a_model_of_16_bits() -> None:
    linear = nn.Linear(16, 8)
    layer = nn.Sequential(Int8Linear(linear.weight, linear.bias)).to(torch.bfloat16)
    assert layer[0].scales.dtype == torch.float32  # type: ignore[union-attr]
    assert layer(torch.ones(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
