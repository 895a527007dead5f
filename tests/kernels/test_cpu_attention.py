"""Attention of bfloat16 on CPUs: the backward pass of every way goes on from the forward pass of every other."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from mvd_kernels import AttentionWays, attention
from mvd_kernels.cpu_attention import AttentionWay, cpu_attention, possible_ways
from mvd_kernels.cpu_trial import time_attention, time_products
from mvd_kernels.native import attention as native
from tests.kernels.checks import check_attention


@pytest.mark.parametrize(("forward", "backward"), list(product(possible_ways(64), repeat=2)))
@pytest.mark.parametrize(("clips", "tokens", "queries"), [(2, 37, 37), (3, 900, 500)])
def test_ways_can_be_mixed(
    clips: int, tokens: int, queries: int, forward: AttentionWay, backward: AttentionWay
) -> None:
    ways = AttentionWays(forward, backward)
    check_attention(lambda qkv: attention(qkv, queries, ways), (clips, tokens, 3, 2, 64), queries)


@pytest.mark.parametrize("channels", [48, 64])
def test_heads_and_cpus_that_the_native_kernel_does_not_know_take_that_of_torch(
    channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "can_compute", lambda channels: False)
    torch.manual_seed(0)
    results = []
    for way in ("native", "sdpa"):
        qkv = torch.linspace(-1, 1, 7 * 3 * 2 * channels).view(1, 7, 3, 2, channels).bfloat16().requires_grad_()
        result = attention(qkv, None, AttentionWays(way, way))
        results.append((result, *torch.autograd.grad(result.float().square().sum(), qkv)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert 48 not in native.CHANNELS


@pytest.mark.parametrize("way", possible_ways(32))
def test_no_clips_no_tokens_and_too_many_queries(way: AttentionWay) -> None:
    ways = AttentionWays(way, way)
    for shape in ((0, 5, 3, 2, 32), (2, 0, 3, 2, 32)):
        qkv = torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)
        cpu_attention(qkv, 5, ways).sum().backward()
        assert qkv.grad is not None
    qkv = torch.randn(1, 5, 3, 2, 32).bfloat16()
    assert torch.equal(cpu_attention(qkv, 9, ways), cpu_attention(qkv, 5, ways))


def test_ways_of_a_cpu_are_for_bfloat16_alone() -> None:
    qkv = torch.randn(2, 5, 3, 2, 32)
    assert torch.equal(attention(qkv, None, AttentionWays("sdpa in float32", "sdpa in float32")), attention(qkv))


def test_a_trial_times_every_way_of_every_direction_and_leaves_no_trace() -> None:
    threads, drawn = torch.get_num_threads(), torch.get_rng_state()
    products, passes = time_products(), time_attention()
    assert {name: list(times) for name, times in products.items()} == {
        name: ["bf16", "float32"] for name in ("forward", "input_gradient", "weight_gradient")
    }
    assert {name: list(times) for name, times in passes.items()} == {
        name: possible_ways(64) for name in ("forward", "backward")
    }
    assert all(took > 0 for times in (*products.values(), *passes.values()) for took in times.values())
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), drawn)
