"""apex's LayerNorm: used by blocks that are not compiled."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mvd_kernels import LayerNorm, norm

from .gpu import GPU, fake_gpu, on_gpu, on_meta


@pytest.mark.parametrize("compiling", [False, True])
def test_compiled_blocks_do_without_apex(compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []

    def fused(tokens: Tensor, *_: object) -> Tensor:
        calls.append(tokens)
        return tokens

    module = SimpleNamespace(fused_layer_norm_affine=fused)
    monkeypatch.setitem(sys.modules, "apex.normalization.fused_layer_norm", module)  # type: ignore[arg-type]
    monkeypatch.setattr(norm, "_apex_installed", lambda: True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    with fake_gpu():
        with on_meta():
            layer = LayerNorm(16)
        on_gpu(layer, torch.float32)
        normed = layer(torch.empty(2, 3, 16, device=GPU))
    assert normed.shape == (2, 3, 16)
    assert len(calls) == (not compiling)
