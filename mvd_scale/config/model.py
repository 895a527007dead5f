"""Section `model:` of a recipe: the vision transformer that is trained.

Sizes, patches and position tables follow Sec. 3.3 of the paper and the settings released with it.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mvd_scale.config.section import Section

SIZES: dict[str, tuple[int, int, int]] = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "H": (1280, 32, 16),
}
"""Width (channels), depth (blocks) and attention heads of the published sizes."""

Positions = Literal["sincos3d", "sinusoid", "sincos2d", "rotary_vjepa2", "rotary_vjepa2_1"]

WIDTH_MULTIPLES: dict[Positions, int] = {
    "sincos3d": 16,
    "sinusoid": 1,
    "sincos2d": 4,
    "rotary_vjepa2": 1,
    "rotary_vjepa2_1": 1,
}
"""Number of which the width must be a multiple, by the kind of positions."""


def is_rotary(positions: Positions) -> bool:
    """Whether positions turn queries and keys; other positions are added to the tokens."""
    return positions.startswith("rotary")


class ModelConfig(Section):
    """Vision transformer over the tubelets of a clip."""

    size: Literal["S", "B", "L", "H"] | None = None
    """Published size, which sets `width`, `depth` and `heads`; omit it to give these three."""

    width: int | None = Field(default=None, gt=0)
    """Number of channels of a token."""

    depth: int | None = Field(default=None, gt=0)
    """Number of transformer blocks."""

    heads: int | None = Field(default=None, gt=0)
    """Number of attention heads; must divide `width`."""

    mlp_ratio: float = Field(default=4.0, ge=1)
    """Hidden width of a block's MLP, as a multiple of `width`."""

    frames: int = Field(default=16, gt=0)
    """Number of frames of a clip (T); 1 for an image model."""

    input_size: int = Field(default=224, gt=0)
    """Side of the square crop in pixels."""

    patch_size: int = Field(default=16, gt=0)
    """Side of a patch in pixels."""

    tubelet: int = Field(default=2, gt=0)
    """Number of frames per token."""

    positions: Positions = "sincos3d"
    """Fixed position table: `sincos3d` (MVD), `sinusoid` over the token index (VideoMAE), or `sincos2d` (MAE); or
    rotary positions, which turn queries and keys by time slice, row and column: `rotary_vjepa2` (V-JEPA 2),
    `rotary_vjepa2_1` (V-JEPA 2.1). Rotary positions are those of frozen teachers only.

    Initial weights follow: with `sincos2d`, an image model, the patch embedding is Xavier uniform and mask tokens are
    normal, as MAE's; otherwise the patch embedding has PyTorch's default weights and mask tokens are cut at one
    standard deviation, as those of MVD and VideoMAE."""

    class_token: bool = False
    """Prepend a class token, as image models do."""

    rms_norm: bool = False
    """Blocks of InternVideo2: norms by the root mean square in place of LayerNorms, and norms of queries and keys;
    those of frozen teachers only."""

    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Drop probability of stochastic depth in the last block of the encoder, and of each decoder that gives no rate of
    its own; it grows linearly from 0 in the first block."""

    @model_validator(mode="before")
    @classmethod
    def _fill_published_size(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("size") in SIZES:
            filled = dict(zip(("width", "depth", "heads"), SIZES[values["size"]], strict=True))
            for key, published in filled.items():
                given = values.get(key)
                if given is not None and given != published:
                    raise ValueError(
                        f"{key} is {given}, but size {values['size']} has {published}: omit `size` for another shape"
                    )
            return {**values, **filled}
        return values

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if self.width is None or self.depth is None or self.heads is None:
            raise ValueError("give `size` (S, B, L, H), or all of `width`, `depth` and `heads`")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.frames % self.tubelet:
            raise ValueError(f"frames {self.frames} is not a multiple of tubelet {self.tubelet}")
        multiple = WIDTH_MULTIPLES[self.positions]
        if self.width % multiple:
            raise ValueError(
                f"positions {self.positions} require a width that is a multiple of {multiple}, not {self.width}"
            )
        if self.positions == "sincos2d" and self.frames != self.tubelet:
            raise ValueError(
                f"positions sincos2d do not encode time, but frames {self.frames} is more than tubelet {self.tubelet}: "
                "set them equal (an image model), or use sincos3d"
            )
        if self.is_rotary and (self.head_width % 2 or self.head_width < 6 or self.class_token):
            raise ValueError(
                f"positions {self.positions} turn pairs of channels along three axes: expected an even number of at "
                f"least 6 channels per head and no class token, got {self.head_width} channels and "
                f"{'a' if self.class_token else 'no'} class token"
            )
        return self

    @property
    def is_rotary(self) -> bool:
        """Whether positions turn queries and keys; other positions are added to the tokens."""
        return is_rotary(self.positions)

    @property
    def head_width(self) -> int:
        """Number of channels of an attention head."""
        assert self.width is not None
        assert self.heads is not None
        return self.width // self.heads

    @property
    def is_image_model(self) -> bool:
        """Whether this is a model of single images, with MAE's initial weights."""
        return self.positions == "sincos2d"

    @property
    def grid(self) -> tuple[int, int, int]:
        """Number of tokens along time, height and width."""
        side = self.input_size // self.patch_size
        return self.frames // self.tubelet, side, side
