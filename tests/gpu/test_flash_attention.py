"""flash-attn against torch's SDPA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mvd_kernels import attention, attention_backend

from .conftest import Figure

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


def sdpa(qkv: Tensor) -> Tensor:
    queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)


def milliseconds(attend: object, qkv: Tensor) -> float:
    """Forward and backward, the median of ten."""
    times = []
    for _ in range(13):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        attend(qkv).sum().backward()  # type: ignore[operator]
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[3:])[5]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("tokens", "heads"), [(37, 3), (1568, 12)], ids=["odd", "ViT-B"])
def test_flash_attn_gives_what_sdpa_gives(
    tokens: int, heads: int, dtype: torch.dtype, gpu: torch.device, figure: Figure
) -> None:
    backend = attention_backend(gpu, dtype)
    if not backend.startswith("flash"):
        pytest.skip(
            f"flash-attn is not installed, or does not know {torch.cuda.get_device_name(gpu)}: {backend} is taken"
        )
    qkv = torch.randn(4, tokens, 3, heads, 64, device=gpu, dtype=dtype)
    ours, theirs = (qkv.clone().requires_grad_() for _ in range(2))
    got, wanted = attention(ours), sdpa(theirs)
    weights = torch.randn_like(got)
    got.backward(weights)
    wanted.backward(weights)
    assert ours.grad is not None
    assert theirs.grad is not None
    for name, a, b in (("outputs", got.detach(), wanted.detach()), ("gradients", ours.grad, theirs.grad)):
        error = float((a - b).abs().max() / b.abs().max())
        figure(f"error of {name}", error)
        assert error < TOLERANCE[dtype]
    figure("backend", backend)
    figure("ms, forward and backward", milliseconds(attention, ours))
    figure("ms of SDPA", milliseconds(sdpa, theirs))
