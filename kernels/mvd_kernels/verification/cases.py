"""Inputs of every kernel: odd sizes, and those of ViT-B.

Legend: B clips, N tokens, V visible, M masked, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

Inputs = dict[str, Tensor]
Sizes = dict[str, Any]
"""Arguments of a function below, by name."""
COLOURS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class Case:
    """One call of a kernel."""

    kernel: str
    title: str
    inputs: Callable[[torch.Generator], Inputs]
    """Float32 and integers, on the CPU."""
    call: Callable[[Any, Inputs, torch.dtype], Tensor | tuple[Tensor, ...]]
    """From the function, its inputs and the dtype of the floating ones."""
    gradients: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kernel}, {self.title}"


def _tokens(generator: torch.Generator, clips: int, tokens: int, chosen: int) -> tuple[Tensor, Tensor]:
    """Chosen tokens and the others, ascending."""
    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(clips)])
    return order[:, :chosen].sort(1).values, order[:, chosen:].sort(1).values


def _qkv(generator: torch.Generator, *, clips: int, tokens: int, heads: int, channels: int) -> Inputs:
    return {"qkv": torch.randn(clips, tokens, 3, heads, channels, generator=generator)}


def _frames(generator: torch.Generator, *, clips: int, frames: int, side: int, patch: int, tubelet: int) -> Inputs:
    pixels = torch.randint(0, 256, (clips, frames, side, side, 3), dtype=torch.uint8, generator=generator)
    count = frames // tubelet * (side // patch) ** 2
    return {"pixels": pixels, "tokens": _tokens(generator, clips, count, max(count // 10, 1))[0]}


def _features(generator: torch.Generator, *, clips: int, tokens: int, masked: int, width: int) -> Inputs:
    return {
        "predictions": torch.randn(clips, masked, width, generator=generator),
        "features": 2 * torch.randn(clips, tokens, width, generator=generator) + 1,
        "masked": _tokens(generator, clips, tokens, masked)[0],
    }


def _sums(generator: torch.Generator, *, rows: int, width: int, norms: tuple[int, ...] = ()) -> Inputs:
    inputs = {name: torch.randn(2, rows, width, generator=generator) for name in ("residual", "update")}
    return inputs | {name: torch.randn(*norms, width, generator=generator) for name in ("weight", "bias")}


def _decoded(
    generator: torch.Generator, *, clips: int, extra: int, visible: int, tokens: int, width: int, decoders: int = 1
) -> Inputs:
    seen, hidden = _tokens(generator, clips, tokens, visible)
    return {
        "embedded": torch.randn(decoders * clips, extra + visible, width, generator=generator),
        "mask_token": torch.randn(decoders, 1, width, generator=generator),
        "positions": torch.randn(tokens, width, generator=generator),
        "visible": seen,
        "masked": hidden,
    }


def _norm(layer: Any, inputs: Inputs, _: torch.dtype) -> Tensor:
    module = layer(inputs["weight"].numel()).to(inputs["weight"].device)
    weights = {name: inputs[name] for name in ("weight", "bias")}
    return functional_call(module, weights, (inputs["residual"],))


def _rows(f: Any, inputs: Inputs, dtype: torch.dtype, *, patch: int, tubelet: int, chosen: bool = True) -> Tensor:
    tokens = inputs["tokens"] if chosen else None
    return f(inputs["pixels"], tokens, tubelet=tubelet, patch=patch, dtype=dtype, **COLOURS)


def _tubes(f: Any, inputs: Inputs, _: torch.dtype, *, patch: int, tubelet: int, **normalize: str) -> Tensor:
    return f(inputs["pixels"], inputs["tokens"], tubelet=tubelet, patch=patch, **normalize)


def _distance(f: Any, inputs: Inputs, _: torch.dtype, *, distance: str, norm: bool, gathers: bool = True) -> Tensor:
    if gathers:
        return f(inputs["predictions"], inputs["features"], inputs["masked"], distance=distance, norm=norm)
    return f(
        inputs["predictions"], inputs["features"][:, : inputs["masked"].shape[1]], None, distance=distance, norm=norm
    )


def _by_name(f: Any, inputs: Inputs, _: torch.dtype) -> Tensor | tuple[Tensor, ...]:
    return f(**inputs)


ODD: Sizes = {"clips": 3, "frames": 6, "side": 42, "patch": 14, "tubelet": 2}
OF_B: Sizes = {"clips": 2, "frames": 16, "side": 224, "patch": 16, "tubelet": 2}
ODD_FEATURES: Sizes = {"clips": 3, "tokens": 37, "masked": 23, "width": 50}
FEATURES_OF_B: Sizes = {"clips": 2, "tokens": 1568, "masked": 1408, "width": 768}
DECODED: dict[str, Sizes] = {
    "odd": {"clips": 3, "extra": 0, "visible": 5, "tokens": 19, "width": 50},
    "class token": {"clips": 3, "extra": 1, "visible": 5, "tokens": 19, "width": 50},
    "ViT-B": {"clips": 2, "extra": 0, "visible": 160, "tokens": 1568, "width": 384},
    "odd, three": {"clips": 3, "extra": 1, "visible": 5, "tokens": 19, "width": 51, "decoders": 3},
    "two decoders": {"clips": 2, "extra": 0, "visible": 160, "tokens": 1568, "width": 768, "decoders": 2},
}
SHAPES: dict[str, Sizes] = {"odd": {"patch": 14, "tubelet": 2}, "ViT-B": {"patch": 16, "tubelet": 2}}

CASES = [
    Case("attention", "odd", partial(_qkv, clips=3, tokens=37, heads=3, channels=24), _by_name, ("qkv",)),
    Case("attention", "ViT-B", partial(_qkv, clips=2, tokens=1568, heads=12, channels=64), _by_name, ("qkv",)),
    *(
        Case("tube_rows", title, partial(_frames, **size), partial(_rows, **SHAPES[title]))
        for title, size in (("odd", ODD), ("ViT-B", OF_B))
    ),
    Case("tube_rows", "all tokens", partial(_frames, **ODD), partial(_rows, **SHAPES["odd"], chosen=False)),
    Case("tube_pixels", "odd", partial(_frames, **ODD), partial(_tubes, **SHAPES["odd"])),
    *(
        Case("tube_targets", way, partial(_frames, **OF_B), partial(_tubes, **SHAPES["ViT-B"], normalize=way))
        for way in ("none", "channel", "patch")
    ),
    *(
        Case(
            "masked_distance", f"{distance}{', norm' if norm else ''}, {title}",
            partial(_features, **size), partial(_distance, distance=distance, norm=norm), ("predictions",),
        )
        for distance in ("smooth_l1", "l1", "l2", "cosine")
        for norm in (False, True)
        for title, size in (("odd", ODD_FEATURES), ("ViT-B", FEATURES_OF_B))
    ),
    Case(
        "masked_distance", "nothing gathered", partial(_features, **ODD_FEATURES),
        partial(_distance, distance="smooth_l1", norm=True, gathers=False), ("predictions",),
    ),
    *(
        Case("add_layer_norm", title, partial(_sums, rows=rows, width=width), _by_name,
             ("residual", "update", "weight", "bias"))
        for title, rows, width in (("odd", 7, 50), ("ViT-B", 784, 768), ("ViT-H", 784, 1280))
    ),
    *(
        Case("add_layer_norm", f"{title}, two norms", partial(_sums, rows=rows, width=width, norms=(2,)), _by_name,
             ("residual", "update", "weight", "bias"))
        # Each norm's part of the odd one begins at an address of its own alignment.
        for title, rows, width in (("odd", 7, 51), ("ViT-B", 784, 768))
    ),
    Case("LayerNorm", "ViT-B", partial(_sums, rows=784, width=768), _norm, ("residual", "weight", "bias")),
    *(
        Case("decoder_input", title, partial(_decoded, **size), _by_name, ("embedded", "mask_token"))
        for title, size in DECODED.items()
    ),
]  # fmt: skip
