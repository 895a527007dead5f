"""`attention` against the softmax written out; which release of flash-attn computes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import Tensor

from mvd_kernels import attention, attention_backend, attention_backends
from mvd_kernels.attention import FLASH_ATTENTION_RELEASES, FlashAttentionRelease
from mvd_kernels.reference.attention import attention as reference


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("clips", "tokens", "heads", "channels"), [(1, 1, 1, 8), (2, 7, 3, 32), (3, 130, 2, 24)])
def test_attention_is_softmax_attention(
    clips: int, tokens: int, heads: int, channels: int, dtype: torch.dtype, tolerance: float
) -> None:
    qkv = torch.randn(clips, tokens, 3, heads, channels, generator=torch.Generator().manual_seed(0)).to(dtype)
    fused, plain = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    q, k, v = plain.permute(2, 0, 3, 1, 4)
    expected = ((q @ k.mT) / channels**0.5).softmax(-1) @ v
    expected = expected.transpose(1, 2).reshape(clips, tokens, heads * channels)
    result = attention(fused)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)
    result.double().square().sum().backward()
    expected.square().sum().backward()
    assert fused.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(fused.grad.double(), plain.grad, atol=10 * tolerance, rtol=10 * tolerance)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine with a Hopper GPU and no flash-attn, for tests to change."""
    module = import_module("mvd_kernels.attention")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for backend in FLASH_ATTENTION_RELEASES:
        monkeypatch.setitem(sys.modules, backend.module, None)
    module._refusal.cache_clear()
    yield monkeypatch
    module._refusal.cache_clear()


def install(machine: pytest.MonkeyPatch, backend: FlashAttentionRelease) -> None:
    """Put a stand-in for a release of flash-attn there that answers as this release does."""

    def packed(qkv: Tensor) -> Tensor:
        clips, count, _, heads, channels = qkv.shape
        return reference(qkv).view(clips, count, heads, channels)

    def apart(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, None]:
        return packed(torch.stack([queries, keys, values], 2)), None

    module = ModuleType(backend.module)
    setattr(module, backend.function, apart if backend.function == "flash_attn_func" else packed)
    machine.setitem(sys.modules, backend.module, module)


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_newest_release_that_is_installed_is_taken(machine: pytest.MonkeyPatch, number: int) -> None:
    for backend in FLASH_ATTENTION_RELEASES[number:]:
        install(machine, backend)
    assert attention_backend(GPU, torch.bfloat16) == FLASH_ATTENTION_RELEASES[number].name
    reasons = attention_backends(GPU, torch.bfloat16)
    assert list(reasons) == [backend.name for backend in FLASH_ATTENTION_RELEASES[: number + 1]]
    assert reasons[FLASH_ATTENTION_RELEASES[number].name] == ""
    assert all(FLASH_ATTENTION_RELEASES[i].module in reasons[FLASH_ATTENTION_RELEASES[i].name] for i in range(number))


def test_what_no_release_computes_is_left_to_torch(machine: pytest.MonkeyPatch) -> None:
    for backend in FLASH_ATTENTION_RELEASES:
        install(machine, backend)
    assert attention_backend(GPU, torch.float32) == "sdpa"
    assert attention_backend(GPU, torch.float16, channels=20) == "sdpa"
    assert attention_backend(GPU, torch.float16, channels=160) == "flash-attn-3"
    machine.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    machine.setitem(sys.modules, "flash_attn", None)
    assert attention_backend(GPU, torch.float16) == "sdpa"


def test_release_4_alone_is_not_taken_for_release_2(machine: pytest.MonkeyPatch) -> None:
    """Its wheel brings a package `flash_attn` that holds `cute` and nothing else."""
    machine.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    assert attention_backend(GPU, torch.float16) == "sdpa"
    assert "flash_attn_qkvpacked_func" in attention_backends(GPU, torch.float16)["flash-attn-2"]


@pytest.mark.parametrize("backend", FLASH_ATTENTION_RELEASES, ids=lambda backend: backend.name)
def test_every_release_is_called_by_its_own_rules(machine: pytest.MonkeyPatch, backend: FlashAttentionRelease) -> None:
    install(machine, backend)
    qkv = torch.randn(2, 5, 3, 2, 8)
    machine.setattr(import_module("mvd_kernels.attention"), "attention_backend", lambda *_: backend.name)
    torch.testing.assert_close(attention(qkv), reference(qkv))
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(qkv), reference(qkv))


def test_a_compiled_program_chooses_as_any_other(machine: pytest.MonkeyPatch) -> None:
    install(machine, FLASH_ATTENTION_RELEASES[0])

    def chosen(tensor: Tensor) -> Tensor:
        return tensor + len(attention_backend(GPU, torch.float16))

    result = torch.compile(chosen, backend="eager", fullgraph=True)(torch.zeros(1))
    assert result.item() == len("flash-attn-4")


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 80])
@pytest.mark.parametrize("backend", FLASH_ATTENTION_RELEASES, ids=lambda backend: backend.name)
def test_flash_attention_equals_torch(backend: FlashAttentionRelease, channels: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    reason = attention_backends(GPU, torch.bfloat16, channels).get(backend.name, "an earlier release is taken")
    if reason:
        pytest.skip(f"{backend.name}: {reason}")
    qkv = torch.randn(2, 130, 3, 4, channels, device=GPU, dtype=torch.bfloat16)
    fused, plain = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    result, expected = backend.attend(fused).flatten(2), reference(plain)
    torch.testing.assert_close(result.double(), expected, atol=2e-2, rtol=2e-2)
    upstream = torch.randn_like(result)
    (gradient,) = torch.autograd.grad(result, fused, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, plain, upstream.double())
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=5e-2, rtol=5e-2)
