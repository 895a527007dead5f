"""Section `data:` of a recipe: sources, sampling, crop, augmentation and mask of clips.

The defaults are those of stage 2 on Kinetics-400: 16 frames at stride 4, multi-scale corner crop, tube mask of 0.9.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

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

from mvd_scale.config.section import Section

Share = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Interpolation = Literal["bilinear", "bicubic"]
VideoDecoder = Literal["nvdec", "host"]


class CropSection(Section):
    """Base of the rules for the crop: how it is resized to the model's input."""

    interpolation: Interpolation = "bilinear"
    """Filter that resizes the crop."""

    antialias: bool = True
    """Whether the filter widens where the crop shrinks, as PIL's does, which the published pre-training uses. If
    omitted: true in recipes of pre-training; false in those of fine-tuning and action detection, whose published code
    resizes by torch and OpenCV without antialiasing."""


class CornerCrop(CropSection):
    """Multi-scale corner crop: one scale for each of height and width, at one of 13 fixed positions."""

    kind: Literal["corner"] = "corner"

    scales: tuple[Share, ...] = Field(default=(1.0, 0.875, 0.75, 0.66), min_length=1)
    """Height and width of the crop as shares of the frame's short side; the two differ by at most one list entry."""


class RandomResizedCrop(CropSection):
    """Crop of random area and aspect ratio, torchvision's rule (MAE; fine-tuning with areas from 0.08)."""

    kind: Literal["random_resized"] = "random_resized"

    area: tuple[Share, Share] = (0.2, 1.0)
    """Smallest and largest area of the crop, as shares of the frame's area."""

    aspect: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio, width divided by height."""

    interpolation: Interpolation = "bicubic"
    """Filter that resizes the crop."""


class ShortSideCrop(CropSection):
    """Random square of the input size from frames that are resized as a whole, their short side to a random length
    (action detection)."""

    kind: Literal["short_side"] = "short_side"

    sides: tuple[PositiveInt, PositiveInt] = (256, 256)
    """Smallest and largest length of the resized short side, in pixels."""

    @model_validator(mode="after")
    def _check_sides(self) -> Self:
        if self.sides[0] > self.sides[1]:
            raise ValueError(f"sides {self.sides[0]}, {self.sides[1]}: expected the smaller number first")
        return self


class CenterCrop(CropSection):
    """Largest centred square of the frame."""

    kind: Literal["center"] = "center"


Crop = Annotated[CornerCrop | RandomResizedCrop | ShortSideCrop | CenterCrop, Field(discriminator="kind")]


class MaskConfig(Section):
    """Mask of tokens that the student does not see."""

    kind: Literal["tube", "random"] = "tube"
    """`tube`: one spatial mask for all time slices of a clip; `random`: tokens are drawn independently."""

    ratio: float = Field(default=0.9, gt=0, lt=1)
    """Share of the tokens that are masked; every clip has the same number of masked tokens."""

    decode_ratio: float = 1.0
    """Share of the masked tokens that decoders predict and the loss includes: 0.25, 0.5, 0.75 or 1. Below 1, it is a
    share of each cell of 2 x 2 patches, which advances through the cell with each time slice (VideoMAE V2)."""

    @field_validator("decode_ratio")
    @classmethod
    def _check_decode(cls, share: float) -> float:
        if share not in (0.25, 0.5, 0.75, 1.0):
            raise ValueError("expected 0.25, 0.5, 0.75 or 1")
        return share


class RandAugment(Section):
    """Random image operations, the same for every frame of a clip (RandAugment, increasing set; fine-tuning).

    They come before the crop, as in the published code: warps turn and shift whole frames and bring in a grey of 128
    from beyond the frame's border; contrast, autocontrast and equalize use the statistics of the whole frame. On CPUs
    the pixels are those of PIL with bicubic warps. On GPUs DALI warps bilinearly, which changes a crop with one warp by
    1 level of 255 on average.
    """

    operations: int = Field(default=4, gt=0)
    """Number of operations that are drawn for a clip and applied one after the other."""

    magnitude: float = Field(default=7.0, ge=0, le=10)
    """Mean strength of an operation, from 0 to 10."""

    deviation: NonNegativeFloat = 0.5
    """Standard deviation of the strength."""

    probability: Probability = 0.5
    """Probability with which each drawn operation is applied."""


class ColorJitter(Section):
    """Random brightness, contrast, saturation and hue of the resized crop, one factor each for a whole clip, applied in
    this order."""

    brightness: Probability = 0.4
    """Largest change x of the brightness: the factor is drawn from 1 - x to 1 + x."""

    contrast: Probability = 0.4
    """Largest change x of the contrast: the factor is drawn from 1 - x to 1 + x."""

    saturation: Probability = 0.4
    """Largest change x of the saturation: the factor is drawn from 1 - x to 1 + x."""

    hue: float = Field(default=0.0, ge=0, le=180)
    """Largest rotation of the hue in degrees, in either direction."""


class RandomErasing(Section):
    """Random box of the resized crop that is filled with noise, the same box in every frame (fine-tuning).

    The noise is standard normal after the normalisation of the pixels, cut at black and white.
    """

    probability: Probability = 0.25
    """Probability with which a clip gets a box."""

    area: tuple[Share, Share] = (0.02, 1 / 3)
    """Smallest and largest area of the box, as shares of the frame's area."""

    aspect: tuple[PositiveFloat, PositiveFloat] = (0.3, 1 / 0.3)
    """Smallest and largest aspect ratio, height divided by width."""


class AugmentConfig(Section):
    """Augmentations of a clip, applied in this order; none by default, as in pre-training."""

    rand_augment: RandAugment | None = None
    """Random image operations on whole frames before the crop; null for none."""

    color_jitter: ColorJitter | None = None
    """Random changes of brightness, contrast, saturation and hue after crop and flip; null for none."""

    erasing: RandomErasing | None = None
    """Random box filled with noise, last of all; null for none."""


class ViewsConfig(Section):
    """Test views of a video: several clips in time, and several crops of each clip (5 x 3 on Kinetics-400)."""

    sampling: Literal["dense", "uniform", "sliding"] = "dense"
    """`dense`: clips of every `stride`-th frame, spread evenly over the video. `uniform`: each clip spans the whole
    video. `sliding`: clips of every `stride`-th frame that start `every` frames apart, until the end of the video."""

    stride: int = Field(default=4, gt=0)
    """Frames from one frame of a dense or sliding clip to the next."""

    every: int | None = Field(default=None, gt=0)
    """Frames from the start of one sliding clip to the start of the next; only with `sampling: sliding`."""

    clips: int = Field(default=5, gt=0)
    """Number of clips in time; with `sampling: sliding`, the number of clips that are decoded in one batch item."""

    crops: int = Field(default=3, gt=0)
    """Number of square crops along the longer side; a single crop lies in the middle."""

    @model_validator(mode="after")
    def _check_every(self) -> Self:
        if (self.every is not None) != (self.sampling == "sliding"):
            raise ValueError(
                f"every is {self.every} with sampling {self.sampling}: give every, the frames between two starts, "
                "with sampling sliding only"
            )
        return self


def _of_one_number(views: ViewsConfig) -> ViewsConfig:
    if views.sampling == "sliding":
        raise ValueError(
            "sampling sliding gives videos different numbers of views, but a test needs the same number for every "
            "video: expected dense or uniform"
        )
    return views


TestViews = Annotated[ViewsConfig, AfterValidator(_of_one_number)]
"""Views of a test, which has the same number of views for every video."""


class MixtureSource(Section):
    """One data set of a mixture."""

    source: str
    """Videos of the data set, as `data.source`."""

    root: str | None = None
    """Folder or URL of relative paths, as `data.root`."""

    weight: float = Field(default=1.0, gt=0)
    """Factor on the clips of this data set in an epoch: with 2 every clip is drawn twice; with 0.5 half of the clips
    are drawn, and the other half in the next epoch."""

    stride: int | None = Field(default=None, gt=0)
    """Stride for this data set, instead of `data.stride`."""


class DataConfig(Section):
    """Clips: sources, sampling, crop, augmentation, mask, and the processes that decode them."""

    source: str | None = None
    """Videos: a manifest (`.parquet`), a folder of videos or images, an annotation file, or any other source that
    `mvd-scale data index` accepts."""

    root: str | None = None
    """Folder or URL to which the paths of an annotation file are relative; the folder of that file if omitted."""

    mixture: dict[str, MixtureSource] | None = Field(default=None, min_length=1)
    """Several data sets by name, instead of `source`."""

    upright_stills: bool = False
    """Show still images, of training and validation, as their orientation tags (EXIF) say. By default they stand as
    they are coded, as in the published image recipes. Videos are always shown as a player shows them. Other commands
    take upright images from a manifest of `mvd-scale data index --upright-stills`."""

    sampling: Literal["dense", "window", "segments", "whole_segments"] = "dense"
    """Frames of a clip. `dense`: every `stride`-th frame from a random start (pre-training). `window`: frames spread
    evenly over a window of frames x stride frames (fine-tuning on Kinetics). `segments`: a random frame of each of
    equal segments from the first frame to the last (TSN; MVD's fine-tuning on Something-Something V2).
    `whole_segments`: segments of whole numbers of frames, without the frames that remain at the end; a video of fewer
    frames than segments gives its first frame only (VideoMAE's fine-tuning on Something-Something V2)."""

    stride: int = Field(default=4, gt=0)
    """Frames from one sampled frame to the next (the "rate" of the paper); a clip spans frames x stride frames."""

    clips_per_video: int = Field(default=1, gt=0)
    """Number of clips drawn from every video in an epoch, each with its own frames, crop and mask."""

    crop: Crop = CornerCrop()
    """Rule for the square crop."""

    flip: Probability = 0.0
    """Probability of a horizontal flip."""

    augment: AugmentConfig = AugmentConfig()
    """Augmentations of the clip: RandAugment before the crop, the others after crop and flip."""

    copies: int = Field(default=1, gt=0)
    """Number of copies of every decoded clip, each with its own crop, flip, augmentation and mask (repeated
    augmentation). The copies of a clip are neighbours in the batch, and all batch sizes count them."""

    mask: MaskConfig | None = MaskConfig()
    """Mask over the tokens; null for none: then the student sees all tokens."""

    decoder: VideoDecoder | Literal["auto"] = "auto"
    """Where videos are decoded in a run on GPUs. `nvdec`: by the GPUs' video decoders, as far as these take a video,
    else on the CPUs; an error where there are none. `host`: videos and images on the CPUs, all else of the data path on
    the GPUs. `auto`: `nvdec` where the GPUs have it, else `host`."""

    workers: NonNegativeInt | Literal["auto"] = "auto"
    """Number of processes per rank that read and decode. `auto`: the rank's share of the CPUs of its machine or
    container, minus one for the rank itself; at most 8 where the GPU decodes. 0: the rank reads and decodes in its own
    process."""

    threads: PositiveInt | Literal["auto"] = "auto"
    """Number of CPU threads of each rank's DALI graph. `auto`: the rank's share of the CPUs."""

    prefetch: int = Field(default=2, gt=0)
    """Number of batches that the loader prepares in advance."""

    max_broken: float = Field(default=0.01, ge=0, le=1)
    """Largest share of clips that may be replaced because their videos cannot be decoded; above it, the run stops."""

    read_timeout: PositiveFloat = 60.0
    """Seconds after which a video that is not yet read, or not yet decoded on the CPU, counts as unreadable."""

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        if self.mixture is not None and (self.source is not None or self.root is not None):
            raise ValueError("give either data.source (and data.root) or data.mixture, not both")
        for name in self.mixture or {}:
            if not name.isidentifier():
                raise ValueError(
                    f"data.mixture.{name}: the name of a data set must consist of letters, digits and underscores, and "
                    "must not begin with a digit"
                )
        if self.spans_whole_videos and self.mixture is not None:
            strides = [name for name, part in self.mixture.items() if part.stride is not None]
            if strides:
                raise ValueError(
                    f"data.mixture.{strides[0]}.stride has no effect with data.sampling {self.sampling}: remove it"
                )
        return self

    @property
    def spans_whole_videos(self) -> bool:
        """Whether a clip spans its whole video, so that `stride` has no effect."""
        return self.sampling in ("segments", "whole_segments")
