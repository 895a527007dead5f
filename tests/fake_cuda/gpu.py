"""A GPU without a GPU: tensors that have a shape, a dtype and the device `cuda`, but no values.

`torch._subclasses.FakeTensorMode` checks devices and dtypes of every operator, and refuses what needs values. Without a
driver torch can run a forward pass on fake GPU tensors, but not the backward pass: autograd's engine asks the driver
whether the device is in use ("hasPrimaryContext expects a valid device index"), for `backward`, `torch.func.grad` and
AOTAutograd alike. torch for CPUs fails in the forward pass already ("not linked with support for cuda devices"), and
with a PrivateUse1 backend of Python's as accelerator the engine stops at an assertion about streams. So torch's C++ is
told here that the tensors are on the device `meta`, for which the engine needs no driver, while Python and the checks
of `FakeTensorMode` see `cuda`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn import functional as F

GPU, META = torch.device("cuda", 0), torch.device("meta")


class HostRead(Exception):
    """A tensor of the GPU was copied to the host, which makes the host wait for the device."""


class FakeGpuMode(FakeTensorMode):
    """Mode in which all new tensors are fake, and a copy from the GPU to the host is an error."""

    def dispatch(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operator on fake tensors."""
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == META:
            # C++ makes helper tensors on the device that it sees.
            kwargs["device"] = GPU
        if _copies_to_host(func, args, kwargs):
            raise HostRead(f"{func}: a tensor of the GPU is copied to the host")
        return super().dispatch(func, types, args, kwargs)


def _copies_to_host(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if func is torch.ops.aten._to_copy.default:
        return args[0].device == GPU and kwargs.get("device") == torch.device("cpu")
    return func is torch.ops.aten.copy_.default and args[0].device.type == "cpu" and args[1].device == GPU


def _device_for_cpp(tensor: FakeTensor) -> torch.device:
    """The device that C++ sees."""
    return META if tensor.fake_mode.in_kernel_invocation or tensor.fake_device.type == "cuda" else tensor.fake_device


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: None = None, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    """The implementation that torch chooses on a GPU in half precision; for C++ there is no GPU to choose for."""
    assert attn_mask is None
    assert not dropout_p
    assert not is_causal
    attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return attended


@contextmanager
def fake_gpu() -> Iterator[FakeGpuMode]:
    """Make the process believe in a GPU of the kind Hopper with Triton, and every new tensor fake."""
    dispatch = FakeTensor.__torch_dispatch__.__func__  # type: ignore[attr-defined]

    def answered(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return _device_for_cpp(args[0])
        return dispatch(cls, func, types, args, kwargs or {})

    handlers: dict[Any, Callable[..., Any]] = {torch.ops.prim.device.default: lambda args: _device_for_cpp(args[0])}
    with ExitStack() as stack:
        for replaced in (
            patch.object(FakeTensor, "__torch_dispatch__", classmethod(answered)),
            patch.object(FakeTensor, "is_cuda", property(lambda self: self.fake_device.type == "cuda"), create=True),
            patch.dict(fake_tensor._DISPATCH_META_HANDLERS, handlers),
            patch.object(F, "scaled_dot_product_attention", _flash_attention),
            patch("torch.cuda.get_device_capability", lambda device=None: (9, 0)),
            patch("mvd_kernels.dispatch._runs_triton", lambda device: True),
        ):
            stack.enter_context(replaced)
        yield stack.enter_context(FakeGpuMode())


@contextmanager
def on_meta() -> Iterator[None]:
    """Build models as the program does on the host, but without memory; constructors may read numbers there."""
    with unset_fake_temporarily(), META:
        yield


def on_gpu(module: torch.nn.Module, dtype: torch.dtype, buffers: torch.dtype | None = None) -> torch.nn.Module:
    """Move a module from the meta device to the fake GPU.

    A tensor that is neither a parameter nor a buffer stays behind, as it would on a real GPU.

    Args:
        module: module on the meta device; it is modified in place.
        dtype: dtype of its floating-point parameters.
        buffers: dtype of its floating-point buffers; `dtype` if None.
    """

    def moved(tensor: Tensor) -> Tensor:
        kind = tensor.dtype
        if tensor.is_floating_point():
            kind = dtype if isinstance(tensor, torch.nn.Parameter) or buffers is None else buffers
        return torch.empty(tensor.shape, dtype=kind, device=GPU)

    return module._apply(moved)
