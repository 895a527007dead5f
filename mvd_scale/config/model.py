"""`model:` - the vision transformer that is trained.

Sizes, patching and positions follow Sec. 3.3 of the paper and the settings released with it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from mvd_scale.config.section import Section

SIZES: dict[str, tuple[int, int, int]] = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "H": (1280, 32, 16),
}
"""Width, depth and heads of the published sizes."""

Positions = Literal["sincos3d", "sinusoid", "sincos2d"]


class ModelConfig(Section):
    """One vision transformer over tubelets of a clip."""

    size: Literal["S", "B", "L", "H"] | None = None
    """A published size; or leave it out and give `width`, `depth` and `heads`."""

    width: int | None = Field(default=None, gt=0)
    """Channels of a token."""

    depth: int | None = Field(default=None, gt=0)
    """Number of transformer blocks."""

    heads: int | None = Field(default=None, gt=0)
    """Attention heads; must divide `width`."""

    mlp_ratio: float = Field(default=4.0, ge=1)
    """Hidden width of a block's MLP over `width`."""

    frames: int = Field(default=16, gt=0)
    """Frames of a clip (T); 1 makes an image model."""

    input_size: int = Field(default=224, gt=0)
    """Side of the square crop in pixels."""

    patch_size: int = Field(default=16, gt=0)
    """Side of a patch in pixels."""

    tubelet: int = Field(default=2, gt=0)
    """Frames of one token."""

    positions: Positions = "sincos3d"
    """Fixed position table: `sincos3d` (MVD), `sinusoid` over the token index (VideoMAE), `sincos2d` (MAE)."""

    class_token: bool = False
    """Prepend a class token, as image models do."""

    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth of the last block; grows linearly from 0 at the first."""

    @model_validator(mode="before")
    @classmethod
    def _fill_published_size(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("size") in SIZES:
            filled = dict(zip(("width", "depth", "heads"), SIZES[values["size"]], strict=True))
            for key, published in filled.items():
                given = values.get(key)
                if given is not None and given != published:
                    raise ValueError(
                        f"{key} is {given}, but size {values['size']} has {published}; drop `size` for a free shape"
                    )
            return {**values, **filled}
        return values

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if self.width is None or self.depth is None or self.heads is None:
            raise ValueError("give `size` (S, B, L, H), or all of `width`, `depth` and `heads`")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.frames % self.tubelet:
            raise ValueError(f"frames {self.frames} is not a multiple of tubelet {self.tubelet}")
        multiple = {"sincos3d": 16, "sincos2d": 4, "sinusoid": 1}[self.positions]
        if self.width % multiple:
            raise ValueError(
                f"positions {self.positions} need a width that is a multiple of {multiple}, not {self.width}"
            )
        if self.positions == "sincos2d" and self.frames != self.tubelet:
            raise ValueError("positions sincos2d tell no time: they need frames equal to tubelet (an image model)")
        return self

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        side = self.input_size // self.patch_size
        return self.frames // self.tubelet, side, side
