"""Wrapper of a vision transformer of timm as a frozen image model.

Legend: B frames, H W pixels, N patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mvd_kernels import max_pixel_value
from mvd_scale.errors import UserError

_ANY_SIZE = "naflexvit_"
"""Beginning of the names of timm's models that take images of any size."""

_SIGLIP = "_siglip"
"""Part of the names of SigLIP and SigLIP 2, which were trained with the tanh form of GELU. timm builds some of them,
such as B and L of 256 pixels, with the exact one."""


class TimmViT(nn.Module):
    """Image model that returns the patch features of its last block; class and register tokens are dropped.

    Models of timm's `naflexvit_*`, which take images of any shape, are given square ones.
    """

    def __init__(
        self, name: str, grid: int, *, final_norm: bool, pretrained: bool, input_size: int | None = None
    ) -> None:
        """Build a model at an input size, or at the one at which its patches form a grid of `grid` x `grid`.

        Args:
            name: name of a model of timm.
            grid: patches along a side, without an input size.
            final_norm: keep the norm after the last block.
            pretrained: download timm's weights; otherwise the weights are random.
            input_size: side of the frames in pixels.

        Raises:
            UserError: timm has no such model, the model is no plain vision transformer, or the input size is not a
                multiple of its patches.
        """
        super().__init__()
        if not timm.is_model(name):
            close = ", ".join(get_close_matches(name, timm.list_models())) or "none"
            raise UserError(f"timm has no model {name!r}; close to it: {close}")
        self.patch_size = _patch_size(name)
        self.input_size = grid * self.patch_size if input_size is None else input_size
        if self.input_size % self.patch_size:
            raise UserError(
                f"input_size {input_size} is not a multiple of the patch of {name}, {self.patch_size} pixels"
            )
        # If the weights are for another input size, timm resamples their positions: here, or for each image.
        given: dict[str, Any] = {} if name.startswith(_ANY_SIZE) else {"img_size": self.input_size}
        if _SIGLIP in name:
            given["act_layer"] = "gelu_tanh"
        self.vit = timm.create_model(name, pretrained=pretrained, num_classes=0, **given)
        if not final_norm:
            self.vit.norm = nn.Identity()
        elif isinstance(self.vit.norm, nn.Identity):
            raise UserError(
                f"timm's {name} has no norm after its last block, but one of the mean of its tokens: set final_norm to "
                "false, since true would change nothing"
            )
        self.mean, self.std = self.vit.pretrained_cfg["mean"], self.vit.pretrained_cfg["std"]
        self.width: int = self.vit.num_features
        self.layers: tuple[int, ...] = ()
        """Blocks, ascending and counted from 1, whose outputs are the features; the last one if empty."""

    def load(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Load weights by timm's names; positions for another input size are resampled.

        Raises:
            UserError: names or shapes do not fit; the message names each tensor, and nothing was loaded.
        """
        from timm.models import naflexvit, vision_transformer

        module = naflexvit if isinstance(self.vit, naflexvit.NaFlexVit) else vision_transformer
        fitted = module.checkpoint_filter_fn(dict(tensors), self.vit)
        expected = self.vit.state_dict()
        heads = tuple(name for name in fitted if name.startswith(("head.", "fc_norm.")) and name not in expected)
        fitted = {name: tensor for name, tensor in fitted.items() if name not in heads}
        if isinstance(self.vit.norm, nn.Identity):
            fitted = {name: tensor for name, tensor in fitted.items() if not name.startswith("norm.")}
        faults = [f"missing {name}" for name in expected.keys() - fitted.keys()]
        faults += [f"surplus {name}" for name in fitted.keys() - expected.keys()]
        faults += [
            f"{name} is {tuple(fitted[name].shape)}, expected {tuple(expected[name].shape)}"
            for name in expected.keys() & fitted.keys()
            if fitted[name].shape != expected[name].shape
        ]
        if faults:
            raise UserError(f"{source} does not fit the model:\n  " + "\n  ".join(sorted(faults)))
        self.vit.load_state_dict(fitted)

    def forward(self, frames: Tensor) -> Tensor:
        """Compute the patch features of single frames.

        Args:
            frames: (B, 1, H, W, 3), uint8 in 0..255 or floating in 0..1.

        Returns:
            (B, N, D) in the dtype of the weights, patches in row-major order; (B, N, L D) with L `layers`.
        """
        if self.layers:
            outputs: list[Tensor] = self.vit.forward_intermediates(
                self._normalized(frames[:, 0]),
                [layer - 1 for layer in self.layers],
                norm=True,
                stop_early=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
            return torch.cat(outputs, dim=-1)
        features: Tensor = self.vit.forward_features(self._normalized(frames[:, 0]))
        return features[:, self.vit.num_prefix_tokens :]

    def _normalized(self, images: Tensor) -> Tensor:
        """Normalise the colours of images (B, H, W, 3): (B, 3, H, W) in the dtype of the weights."""
        dtype, white = next(self.vit.parameters()).dtype, max_pixel_value(images)
        # One colour after the other: a tensor of the statistics would have to be copied to the GPU.
        colours = [
            colour.float() / (white * std) - mean / std
            for colour, mean, std in zip(images.unbind(-1), self.mean, self.std, strict=True)
        ]
        return torch.stack(colours, dim=1).to(dtype)


def _patch_size(name: str) -> int:
    with torch.device("meta"):
        shape = timm.create_model(name, num_classes=0)
    embedding = getattr(shape, "embeds" if name.startswith(_ANY_SIZE) else "patch_embed", None)
    patch = getattr(embedding, "patch_size", None)
    if patch is None or not hasattr(shape, "num_prefix_tokens") or patch[0] != patch[1]:
        raise UserError(f"timm's {name} is no plain vision transformer with square patches: expected one like vit_*")
    side: int = patch[0]
    return side
