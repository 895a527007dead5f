"""Batches that the loaders hand to the model.

Legend: B clips, T frames, H W pixels, N tokens, V visible, M masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mvd_scale.config.target import Tokens


@dataclass(frozen=True)
class ViewBatch:
    """Test views of B videos on the device.

    Legend: K clips in time, C crops.
    """

    pixels: Tensor
    """RGB, uint8 (B, K, C, T, H, W, 3); black where the video could not be decoded."""

    labels: Tensor
    """Classes, int64 (B,); -1 where the manifest has none."""

    video_ids: Tensor
    """Rows of the manifest, int64 (B,) on the host."""

    first_clips: Tensor
    """Index, within its video, of the first of the K clips: int64 (B,) on the host; 0 except for sliding clips."""

    decoded: Tensor
    """Whether the video could be decoded, bool (B,) on the host."""


@dataclass(frozen=True)
class ClipBatch:
    """One micro batch of tube-masked clips on the training device.

    Token indices are ascending and numbered time-major (t, h, w). Indices, not boolean masks: shapes are
    static and gathers need no device synchronisation.
    """

    pixels: Tensor
    """uint8 (B, T, H, W, 3), RGB as decoded and cropped."""

    visible: Tensor
    """Indices of the visible tokens, int64 (B, V)."""

    masked: Tensor
    """Indices of the masked tokens that decoders predict, int64 (B, M): all masked tokens, unless
    `data.mask.decode_ratio` is below 1."""

    labels: Tensor
    """Classes, int64 (B,); -1 where the manifest has none."""

    video_ids: Tensor
    """Rows of the manifest that were decoded, int64 (B,) on the host."""

    resized: Mapping[int, Tensor] = field(default_factory=dict)
    """The same crops by input side in pixels, for teachers of another input size: uint8 (B, T, side, side, 3)."""

    features: Mapping[str, Tensor] = field(default_factory=dict)
    """Teacher features that were prefetched, by name of the target: (B, M, D) in the precision of the teacher; at all
    tokens, (B, N, D), if students have masks of their own."""

    own_visible: Mapping[str, Tensor] = field(default_factory=dict)
    """Visible tokens of each student that has a mask of its own, by its name: int64 (B, V) of the student."""

    own_masked: Mapping[str, Tensor] = field(default_factory=dict)
    """Masked tokens of each of these students: int64 (B, M) of the student."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Apply `change` to every tensor of the batch, and return the results as a new batch."""

        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else {key: change(part) for key, part in value.items()}

        return replace(self, **{each.name: changed(getattr(self, each.name)) for each in fields(self)})

    def tokens(self, which: Tokens) -> Tensor | None:
        """Indices of the tokens at which a target is predicted, int64 (B, M) or (B, V); None for all in order."""
        if self.is_unmasked or which == "all":
            return None
        return self.masked if which == "masked" else self.visible

    @property
    def is_unmasked(self) -> bool:
        """Whether no token is masked, so that features are at all tokens in order."""
        return self.masked.shape[1] == 0

    def seen_by(self, student: str) -> Self:
        """Batch of one student alone: the tokens of its own mask if it has one, and no features."""
        visible, masked = self.own_visible.get(student, self.visible), self.own_masked.get(student, self.masked)
        return replace(self, visible=visible, masked=masked, own_visible={}, own_masked={}, features={})

    def unmasked(self, tokens: int) -> Self:
        """Batch of which all `tokens` of a clip are visible, for features at all of them."""
        every = torch.arange(tokens, device=self.visible.device).expand(len(self.visible), -1)
        return replace(self, visible=every, masked=every[:, :0], own_visible={}, own_masked={})

    def at(self, side: int) -> Tensor:
        """Pixels at an input side of `side` pixels: uint8 (B, T, side, side, 3)."""
        return self.pixels if self.pixels.shape[2] == side else self.resized[side]
