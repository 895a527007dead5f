"""Joint space-time self-attention over packed queries, keys and values.

Legend: B clips, N tokens, H heads, K channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from mvd_kernels.twins.attention import attention as twin


@dataclass(frozen=True)
class Backend:
    """A release of flash-attn, and what it computes on.

    Attributes:
        name: as `attention_backend` gives it.
        module: where its function is.
        function: its name there.
        packed: whether it takes queries, keys and values in one tensor; three views of it otherwise.
        majors: compute capabilities, by their first number.
        channels: most channels of a head.
    """

    name: str
    module: str
    function: str
    packed: bool
    majors: tuple[int, ...]
    channels: int

    def load(self) -> Callable:
        """Its function.

        Raises:
            ImportError, OSError: it is not installed, or was built for another torch.
            AttributeError: a package of that name is there, but not this release.
        """
        function: Callable = getattr(import_module(self.module), self.function)
        return function


# Newest first. All want float16 or bfloat16 and channels in eights.
BACKENDS = (
    Backend("flash-attn-4", "flash_attn.cute", "flash_attn_func", False, (9, 10, 11), 128),
    Backend("flash-attn-3", "flash_attn_interface", "flash_attn_qkvpacked_func", True, (9,), 256),
    Backend("flash-attn-2", "flash_attn", "flash_attn_qkvpacked_func", True, (8, 9, 10, 11, 12), 256),
)


@cache
def _refusal(backend: Backend, major: int) -> str | None:
    """Why a backend cannot run on GPUs of this capability here; None if it can."""
    if major not in backend.majors:
        return f"not for compute capability {major}.x"
    try:
        backend.load()
    except (ImportError, OSError, AttributeError) as error:
        return str(error)
    return None


def attention_backends(device: torch.device, dtype: torch.dtype, channels: int = 64) -> dict[str, str]:
    """Every implementation in the order of preference, with why it is not taken; the one that is has an empty reason.

    Args:
        device: where the tensors are.
        dtype: of the tensors.
        channels: K, of one head.
    """
    reasons = {}
    for backend in BACKENDS:
        if device.type != "cuda":
            reason: str | None = "needs a GPU"
        elif dtype not in (torch.float16, torch.bfloat16):
            reason = f"not for {dtype}"
        elif channels % 8 or channels > backend.channels:
            reason = f"not for heads of {channels} channels"
        else:
            reason = _refusal(backend, torch.cuda.get_device_capability(device)[0])
        reasons[backend.name] = reason or ""
        if reason is None:
            return reasons
    return {**reasons, "sdpa": ""}


def attention_backend(device: torch.device, dtype: torch.dtype, channels: int = 64) -> str:
    """Which implementation `attention` takes: `flash-attn-4`, `flash-attn-3`, `flash-attn-2` or `sdpa`, torch's own.

    The arguments are those of `attention_backends`, which says why it was not an earlier one.
    """
    return _choice(device, dtype, channels) if device.type == "cuda" else "sdpa"


@cache
def _choice(device: torch.device, dtype: torch.dtype, channels: int) -> str:
    return list(attention_backends(device, dtype, channels))[-1]


def flash_attention(qkv: Tensor, backend: Backend) -> Tensor:
    """`attention` by one release of flash-attn, which must be able to run."""
    function = backend.load()
    attended = function(qkv) if backend.packed else function(*qkv.unbind(2))
    # Release 4 and the first builds of 3 return the sums of the softmax too.
    attended = attended[0] if isinstance(attended, tuple) else attended
    flat: Tensor = attended.flatten(2)
    return flat


def attention(qkv: Tensor) -> Tensor:
    """Softmax(q k^T / sqrt(K)) v over all tokens of a clip, without mask and dropout.

    Args:
        qkv: (B, N, 3, H, K), any floating dtype.

    Returns:
        (B, N, H * K), same dtype.
    """
    name = attention_backend(qkv.device, qkv.dtype, qkv.shape[-1])
    for backend in BACKENDS:
        if backend.name == name:
            return flash_attention(qkv, backend)
    return twin(qkv)
