"""`data:` - which clips a step sees.

The defaults are those of stage 2 on Kinetics-400: 16 frames at rate 4, multi-scale corner crop, tube mask 0.9.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat

from mvd_scale.config.section import Section

Share = Annotated[float, Field(gt=0, le=1)]


class CornerCrop(Section):
    """Multi-scale corner crop: a side factor per axis, at one of 13 fixed positions, resized bilinearly."""

    kind: Literal["corner"] = "corner"

    scales: tuple[Share, ...] = Field(default=(1.0, 0.875, 0.75, 0.66), min_length=1)
    """Side factors of the short side; height and width differ by at most one step."""


class RandomResizedCrop(Section):
    """A random area and aspect ratio, resized bicubically (MAE)."""

    kind: Literal["random_resized"] = "random_resized"

    area: tuple[Share, Share] = (0.2, 1.0)
    """Smallest and largest share of the frame's area."""

    aspect: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Smallest and largest width over height."""


class CenterCrop(Section):
    """The largest centred square."""

    kind: Literal["center"] = "center"


Crop = Annotated[CornerCrop | RandomResizedCrop | CenterCrop, Field(discriminator="kind")]


class MaskConfig(Section):
    """Which tokens the student does not see."""

    kind: Literal["tube", "random"] = "tube"
    """`tube`: one spatial mask for all time slices; `random`: every token by itself."""

    ratio: float = Field(default=0.9, gt=0, lt=1)
    """Share of masked tokens; the count is the same in every clip."""


class DataConfig(Section):
    """Clips: where they come from, how they are cut and masked."""

    source: Path | None = None
    """A manifest (`.parquet`), a folder of videos, or an annotation file of `path label` lines."""

    root: Path | None = None
    """Folder that relative paths of an annotation file start from; its own folder if left out."""

    stride: int = Field(default=4, gt=0)
    """Frames between two sampled frames (the "rate" of the paper); the clip spans frames x stride."""

    clips_per_video: int = Field(default=1, gt=0)
    """Clips drawn from every video in an epoch, each with its own frames, crop and mask."""

    crop: Crop = CornerCrop()
    """How the square is cut out."""

    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a horizontal flip."""

    mask: MaskConfig = MaskConfig()
    """The mask over tokens."""

    workers: NonNegativeInt | Literal["auto"] = "auto"
    """Decoding processes per rank; `auto` takes the rank's share of the cores, 0 decodes in the rank itself."""

    threads: int = Field(default=1, gt=0)
    """Threads of the DALI graph per rank, for CPU operators."""

    prefetch: int = Field(default=2, gt=0)
    """Batches prepared ahead."""

    max_broken: float = Field(default=0.01, ge=0, le=1)
    """Share of clips that may be replaced because their video cannot be decoded; beyond it the run stops."""
