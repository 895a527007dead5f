"""`data:` - which clips a step sees.

The defaults are those of stage 2 on Kinetics-400: 16 frames at rate 4, multi-scale corner crop, tube mask 0.9.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from mvd_scale.config.section import Section

Share = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Interpolation = Literal["bilinear", "bicubic"]


class CornerCrop(Section):
    """Multi-scale corner crop: a side factor per axis, at one of 13 fixed positions."""

    kind: Literal["corner"] = "corner"

    scales: tuple[Share, ...] = Field(default=(1.0, 0.875, 0.75, 0.66), min_length=1)
    """Side factors of the short side; height and width differ by at most one step."""

    interpolation: Interpolation = "bilinear"
    """Filter that resizes the crop; it is antialiased where it shrinks."""


class RandomResizedCrop(Section):
    """A random area and aspect ratio (MAE; fine-tuning with areas from 0.08)."""

    kind: Literal["random_resized"] = "random_resized"

    area: tuple[Share, Share] = (0.2, 1.0)
    """Smallest and largest share of the frame's area."""

    aspect: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Smallest and largest width over height."""

    interpolation: Interpolation = "bicubic"
    """Filter that resizes the crop; it is antialiased where it shrinks."""


class ShortSideCrop(Section):
    """A random square of the input size, after the short side was resized to a random length (action detection)."""

    kind: Literal["short_side"] = "short_side"

    sides: tuple[PositiveInt, PositiveInt] = (256, 256)
    """Shortest and longest short side, in pixels."""

    interpolation: Interpolation = "bilinear"
    """Filter that resizes the crop; it is antialiased where it shrinks."""

    @model_validator(mode="after")
    def _check_sides(self) -> Self:
        if self.sides[0] > self.sides[1]:
            raise ValueError(f"sides {self.sides[0]}, {self.sides[1]}: the shortest comes first")
        return self


class CenterCrop(Section):
    """The largest centred square."""

    kind: Literal["center"] = "center"

    interpolation: Interpolation = "bilinear"
    """Filter that resizes the crop; it is antialiased where it shrinks."""


Crop = Annotated[CornerCrop | RandomResizedCrop | ShortSideCrop | CenterCrop, Field(discriminator="kind")]


class MaskConfig(Section):
    """Which tokens the student does not see."""

    kind: Literal["tube", "random"] = "tube"
    """`tube`: one spatial mask for all time slices; `random`: every token by itself."""

    ratio: float = Field(default=0.9, gt=0, lt=1)
    """Share of masked tokens; the count is the same in every clip."""

    decode: float = 1.0
    """Share of the masked tokens that decoders and loss compute: 0.25, 0.5 or 0.75 take it in cells of 2 x 2 patches
    that run through time (VideoMAE V2)."""

    @field_validator("decode")
    @classmethod
    def _check_decode(cls, share: float) -> float:
        if share not in (0.25, 0.5, 0.75, 1.0):
            raise ValueError("expected 0.25, 0.5, 0.75 or 1")
        return share


class RandAugment(Section):
    """Random image operations over whole clips, every frame alike (RandAugment, increasing set; fine-tuning).

    They are applied to the crop, after it was resized.
    """

    operations: int = Field(default=4, gt=0)
    """Operations drawn for a clip, one after the other."""

    magnitude: float = Field(default=7.0, ge=0, le=10)
    """Mean strength, of 10."""

    deviation: NonNegativeFloat = 0.5
    """Standard deviation of the strength."""

    probability: Probability = 0.5
    """Of each of the operations to be applied."""


class ColorJitter(Section):
    """Factors drawn from 1 - x to 1 + x, one each for a whole clip, applied in this order."""

    brightness: Probability = 0.4
    contrast: Probability = 0.4
    saturation: Probability = 0.4

    hue: float = Field(default=0.0, ge=0, le=180)
    """Degrees by which hues are turned at most, either way; after the others."""


class RandomErasing(Section):
    """A box filled with noise, the same box in every frame (fine-tuning)."""

    probability: Probability = 0.25
    """Of a clip to be erased."""

    area: tuple[Share, Share] = (0.02, 1 / 3)
    """Smallest and largest share of the frame's area."""

    aspect: tuple[PositiveFloat, PositiveFloat] = (0.3, 1 / 0.3)
    """Smallest and largest height over width."""


class AugmentConfig(Section):
    """What is done to a clip after crop and flip, in this order; nothing by default, as in pre-training."""

    rand_augment: RandAugment | None = None
    color_jitter: ColorJitter | None = None
    erasing: RandomErasing | None = None


class ViewsConfig(Section):
    """Which views of a video are tested: several clips in time, several crops of each (5 x 3 on Kinetics-400)."""

    sampling: Literal["dense", "uniform", "sliding"] = "dense"
    """`dense`: clips of every `stride`-th frame, spread over the video. `uniform`: each clip spans the whole video.
    `sliding`: a clip of every `stride`-th frame from each `every`-th frame on, as many as the video has room for."""

    stride: int = Field(default=4, gt=0)
    """Frames between two frames of a dense or sliding clip."""

    every: int | None = Field(default=None, gt=0)
    """Frames between the starts of two sliding clips."""

    clips: int = Field(default=5, gt=0)
    """Clips in time; of sliding ones, those that are decoded together."""

    crops: int = Field(default=3, gt=0)
    """Square crops along the longer side; a single one is in the middle."""

    @model_validator(mode="after")
    def _check_every(self) -> Self:
        if (self.every is not None) != (self.sampling == "sliding"):
            raise ValueError("every, the frames between two starts, goes with sampling sliding and no other")
        return self


def _of_one_number(views: ViewsConfig) -> ViewsConfig:
    if views.sampling == "sliding":
        raise ValueError("a test takes the same number of views of every video: sampling is dense or uniform")
    return views


TestViews = Annotated[ViewsConfig, AfterValidator(_of_one_number)]
"""Views of a test."""


class MixtureSource(Section):
    """One set of videos of a mixture."""

    source: str
    """As `data.source`."""

    root: str | None = None
    """As `data.root`."""

    weight: float = Field(default=1.0, gt=0)
    """How often an epoch visits every clip of this set: 2 twice, 0.5 one half of the clips, the others next time."""

    stride: int | None = Field(default=None, gt=0)
    """As `data.stride`, for this set alone."""


class DataConfig(Section):
    """Clips: where they come from, how they are cut and masked."""

    source: str | None = None
    """A manifest (`.parquet`), a folder of videos or images, an annotation file, or whatever else
    `mvd-scale data index` takes."""

    root: str | None = None
    """Folder or URL that relative paths of an annotation file start from; its own folder if left out."""

    mixture: dict[str, MixtureSource] | None = Field(default=None, min_length=1)
    """Several sets of videos by name, in place of `source`."""

    sampling: Literal["dense", "window", "segments"] = "dense"
    """Frames of a clip. `dense`: every `stride`-th from a random start (pre-training). `window`: spread evenly over
    frames x stride of them (fine-tuning on Kinetics). `segments`: a random one of each equal part of the video
    (TSN; fine-tuning on Something-Something)."""

    stride: int = Field(default=4, gt=0)
    """Frames between two sampled frames (the "rate" of the paper); the clip spans frames x stride."""

    clips_per_video: int = Field(default=1, gt=0)
    """Clips drawn from every video in an epoch, each with its own frames, crop and mask."""

    crop: Crop = CornerCrop()
    """How the square is cut out."""

    flip: Probability = 0.0
    """Probability of a horizontal flip."""

    augment: AugmentConfig = AugmentConfig()
    """What is done to the clip after that."""

    copies: int = Field(default=1, gt=0)
    """Copies of every decoded clip, each with its own crop, flip, augmentation and mask (repeated augmentation). They
    stand side by side in the batch, and batches count them."""

    mask: MaskConfig | None = MaskConfig()
    """The mask over tokens; without one (null) the student sees them all."""

    workers: NonNegativeInt | Literal["auto"] = "auto"
    """Decoding processes per rank; `auto` takes the rank's share of the cores, 0 decodes in the rank itself."""

    threads: PositiveInt | Literal["auto"] = "auto"
    """Threads of the DALI graph per rank, for what it does on the CPU; `auto` takes the rank's share of the cores."""

    prefetch: int = Field(default=2, gt=0)
    """Batches prepared ahead."""

    max_broken: float = Field(default=0.01, ge=0, le=1)
    """Share of clips that may be replaced because their video cannot be decoded; beyond it the run stops."""

    read_timeout: PositiveFloat = 60.0
    """Seconds after which a video that has not been read, or decoded on the CPU, counts as one that cannot be."""

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        if self.mixture is not None and (self.source is not None or self.root is not None):
            raise ValueError("give either data.source (and data.root) or data.mixture, not both")
        for name in self.mixture or {}:
            if not name.isidentifier():
                raise ValueError(f"data.mixture.{name}: the name of a set must be letters, digits and underscores")
        if self.sampling == "segments" and self.mixture is not None:
            strides = [name for name, part in self.mixture.items() if part.stride is not None]
            if strides:
                raise ValueError(f"data.mixture.{strides[0]}.stride does nothing with data.sampling segments")
        return self
