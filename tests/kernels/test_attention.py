"""`attention` against the softmax written out; which release of flash-attn computes it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

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
    module = ModuleType(backend.module)
    if backend.name == "flash-attn-4":
        module._flash_attn_fwd = forward_4  # type: ignore[attr-defined]
        module._flash_attn_bwd = backward_4  # type: ignore[attr-defined]
    else:
        setattr(module, backend.function, packed)
    machine.setitem(sys.modules, backend.module, module)


def packed(qkv: Tensor) -> Tensor:
    clips, count, _, heads, channels = qkv.shape
    return reference(qkv).view(clips, count, heads, channels)


def read_memory(*tensors: Tensor) -> None:
    """Release 4 compiles kernels and gives them addresses: it cannot be traced, and a fake tensor has no address."""
    assert not torch.compiler.is_compiling()
    assert not any(isinstance(tensor, FakeTensor) for tensor in tensors)
    assert all(tensor.data_ptr() for tensor in tensors)


def forward_4(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **others: Any) -> tuple[Tensor | None, ...]:
    """`flash_attn.cute.interface._flash_attn_fwd` by the formulas; since 2026-05 it returns four values, before two."""
    assert not others
    read_memory(q, k, v)
    scores = torch.einsum("bqhc,bnhc->bhqn", q, k) / q.shape[-1] ** 0.5
    sums = scores.float().logsumexp(-1)
    attended = torch.einsum("bhqn,bnhc->bqhc", scores.softmax(-1), v).contiguous()
    return attended, sums if return_lse or q.requires_grad else None, None, None


def backward_4(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, softmax_scale: float | None = None
) -> tuple[Tensor, ...]:
    """`flash_attn.cute.interface._flash_attn_bwd` by the formulas."""
    assert softmax_scale is None
    read_memory(q, k, v, out, dout, lse)
    assert dout.shape == out.shape
    scale = q.shape[-1] ** -0.5
    weights = (torch.einsum("bqhc,bnhc->bhqn", q, k) * scale - lse[..., None]).exp()
    slopes = torch.einsum("bqhc,bnhc->bhqn", dout, v) - (dout * out).sum(-1).transpose(1, 2)[..., None]
    slopes = slopes * weights * scale
    queries, keys = torch.einsum("bhqn,bnhc->bqhc", slopes, k), torch.einsum("bhqn,bqhc->bnhc", slopes, q)
    values = torch.einsum("bhqn,bqhc->bnhc", weights, dout)
    return queries.contiguous(), keys.contiguous(), values.contiguous()


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


@pytest.mark.parametrize("queries", [None, 3])
def test_release_4_is_an_operator_of_compiled_programs(machine: pytest.MonkeyPatch, queries: int | None) -> None:
    """Fake tensors never reach its functions, and its own backward function gives the gradients."""
    install(machine, FLASH_ATTENTION_RELEASES[0])
    machine.setattr(import_module("mvd_kernels.attention"), "attention_backend", lambda *_: "flash-attn-4")
    torch.compiler.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=False)
    ours, theirs = (torch.randn(2, 5, 3, 2, 8, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    weights = torch.randn(2, queries or 5, 16)
    results = []
    for attend, qkv in ((compiled, ours), (reference, theirs)):
        output = attend(qkv.requires_grad_(), queries)
        results.append((output.detach(), *torch.autograd.grad(output, qkv, weights)))
    torch.testing.assert_close(results[0], results[1])


def test_the_operator_of_release_4_keeps_the_rules_of_torch(machine: pytest.MonkeyPatch) -> None:
    install(machine, FLASH_ATTENTION_RELEASES[0])
    module = import_module("mvd_kernels.flash_attention_4")
    parts = torch.randn(2, 5, 3, 2, 8).unbind(2)
    torch.library.opcheck(module._forward, tuple(part.requires_grad_() for part in parts))
    assert not module._forward(*parts)[1].requires_grad


class Damaged(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook of packages that fail while they are imported."""

    def __init__(self, error: Exception, *modules: str) -> None:
        self.error, self.modules = error, modules

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name in self.modules else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        raise self.error

    def exec_module(self, module: ModuleType) -> None:
        raise AssertionError("never reached")


@pytest.mark.parametrize(
    ("error", "said"),
    [(RuntimeError("no kernel for CUDA 12"), "no kernel for CUDA 12"), (AssertionError(), "AssertionError")],
)
def test_a_release_that_fails_while_it_loads_is_passed_over(
    machine: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    newest, *_, oldest = FLASH_ATTENTION_RELEASES
    machine.delitem(sys.modules, newest.module)
    machine.setattr(sys, "meta_path", [Damaged(error, "flash_attn.cute"), *sys.meta_path])
    install(machine, oldest)
    sys.modules[oldest.module].__path__ = []  # type: ignore[attr-defined]
    assert attention_backend(GPU, torch.float16) == oldest.name
    assert attention_backends(GPU, torch.float16)[newest.name] == said


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
