"""What the loader hands to the model.

Legend: B clips, T frames, H W pixels, N tokens, V visible, M masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor
from typing_extensions import Self

from mvd_scale.config.target import Tokens


@dataclass(frozen=True)
class ViewBatch:
    """The test views of some videos on the device.

    Legend: K clips in time, C crops.
    """

    pixels: Tensor
    """uint8 (B, K, C, T, H, W, 3); black where the video could not be decoded."""

    labels: Tensor
    """int64 (B,); -1 where the manifest has none."""

    video_ids: Tensor
    """int64 (B,) on the host: rows of the manifest."""

    first_clips: Tensor
    """int64 (B,) on the host: which of its video's clips the first one is; 0 but for sliding clips."""

    decoded: Tensor
    """bool (B,) on the host: whether the video could be decoded."""


@dataclass(frozen=True)
class ClipBatch:
    """One micro batch of tube-masked clips on the training device.

    Token indices are ascending and numbered time-major (t, h, w). Indices, not boolean masks: shapes are
    static and gathers need no device synchronisation.
    """

    pixels: Tensor
    """uint8 (B, T, H, W, 3), RGB as decoded and cropped."""

    visible: Tensor
    """int64 (B, V)."""

    masked: Tensor
    """int64 (B, M), of the masked tokens those to be decoded."""

    labels: Tensor
    """int64 (B,); -1 where the manifest has none."""

    video_ids: Tensor
    """int64 (B,) on the host: rows of the manifest that were decoded."""

    resized: Mapping[int, Tensor] = field(default_factory=dict)
    """The same crops at other input sides, for teachers of another input size: uint8 (B, T, side, side, 3)."""

    features: Mapping[str, Tensor] = field(default_factory=dict)
    """Of teachers, where they were computed ahead, by target: (B, M, D) in the precision of the teacher."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """A batch of what `change` makes of every tensor of this one."""

        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else {key: change(part) for key, part in value.items()}

        return replace(self, **{each.name: changed(getattr(self, each.name)) for each in fields(self)})

    def tokens(self, which: Tokens) -> Tensor | None:
        """Indices of the tokens at which a target is predicted, int64; None for all of them in order."""
        return None if which == "all" else self.masked if which == "masked" else self.visible

    def at(self, side: int) -> Tensor:
        """Pixels at an input side: uint8 (B, T, side, side, 3)."""
        return self.pixels if self.pixels.shape[2] == side else self.resized[side]
