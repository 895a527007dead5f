"""A recipe of action detection: an encoder, a head on the boxes of people, and key frames to learn from (AVA v2.2).

The defaults are the published ones that all runs share: those of VideoMAE's code for AVA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeFloat, model_validator
from typing_extensions import Self

from mvd_scale.config.data import Probability
from mvd_scale.config.finetune import HeadConfig, TaskRecipe, ValidationConfig
from mvd_scale.config.section import Section


class DetectorConfig(HeadConfig):
    """The head on what RoIAlign cuts out of the last feature map, averaged over time."""

    classes: int = Field(default=80, gt=0)
    """Actions that the head scores; they are numbered from 1 on."""

    resolution: int = Field(default=7, gt=0)
    """Cells of RoIAlign along each side of a box; the highest of all cells is taken, channel by channel."""

    widen: tuple[NonNegativeFloat, NonNegativeFloat] = (0.1, 0.05)
    """Shares of its width and height by which a box grows in the test, half of it on either side."""


class KeyFramesConfig(Section):
    """Which moments of the videos, with which boxes."""

    annotations: Path
    """Boxes with their actions, such as `ava_train_v2.2.csv`."""

    excluded: Path | None = None
    """Key frames that do not count, such as `ava_train_excluded_timestamps_v2.2.csv`."""

    starts_at: float = Field(default=0.0, ge=0)
    """Second of the annotations at which the video files start: 900 where only the annotated part was kept."""


class TrainingKeyFrames(KeyFramesConfig):
    """What training sees: the boxes of the ground truth."""

    jitter: tuple[Probability, Probability, Probability, Probability] = (0.2, 0.1, 0.1, 0.05)
    """Shares of its width by which a side of a box moves at most, outwards and inwards; then those of its height."""


class DetectionTest(KeyFramesConfig):
    """What is tested: boxes in which a detector found people, against those of the ground truth."""

    boxes: Path
    """Boxes of people with a score, such as LFB and SlowFast distribute."""

    score: Probability = 0.8
    """Boxes below it are left out."""

    actions: Path
    """The actions that count, such as `ava_action_list_v2.2_for_activitynet_2019.pbtxt`."""

    short_side: int = Field(default=256, gt=0)
    """Pixels that the short side of a frame is resized to; the whole frame is seen."""


class DetectionValidation(ValidationConfig, DetectionTest):
    """Key frames that are tested during training; the weights of the best frame mAP are kept."""


class DetectionRecipe(TaskRecipe):
    """Everything that one run of `mvd-scale detect train` needs to know."""

    head_section = "detector"

    detector: DetectorConfig
    key_frames: TrainingKeyFrames
    validation: DetectionValidation | None = None

    @model_validator(mode="after")
    def _check_clips(self) -> Self:
        if self.data.sampling != "dense":
            raise ValueError(f"data.sampling {self.data.sampling} does nothing: clips stand around key frames")
        if self.data.mixture is not None:
            raise ValueError("data.mixture does not go with key frames: they name the videos of one data.source")
        if self.data.augment.rand_augment is not None:
            raise ValueError("data.augment.rand_augment moves what is in a box, but not the box: set it to null")
        return self

    def _identity(self) -> dict[str, Any]:
        values = super()._identity()
        # Known by what they hold, as the checkpoints record.
        del values["key_frames"]["annotations"], values["key_frames"]["excluded"]
        return values
