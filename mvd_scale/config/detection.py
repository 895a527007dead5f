"""Recipe of action detection: an encoder, a head on the boxes of people, and annotated key frames (AVA v2.2).

The defaults are the values that all published runs share, from VideoMAE's code for AVA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import Field, NonNegativeFloat, model_validator

from mvd_scale.config.data import Probability
from mvd_scale.config.finetune import FinetuneTraining, TaskHeadConfig, TaskRecipe, ValidationConfig
from mvd_scale.config.section import Section


class DetectionTraining(FinetuneTraining):
    """Optimisation of the encoder and the head under DeepSpeed; the loss scale is that of torch, as published."""

    initial_scale_power: int = Field(default=16, ge=0)
    """Loss scale of fp16 at the first step, as a power of two."""

    loss_scale_window: int = Field(default=2000, gt=0)
    """Number of optimizer steps without overflow after which the loss scale of fp16 doubles."""

    hysteresis: int = Field(default=1, gt=0)
    """Number of overflows, counted since the loss scale of fp16 last doubled, from which on each halves it. With 1
    every overflow halves it; with 2 the first one only skips its optimizer step, as all do."""


class DetectorConfig(TaskHeadConfig):
    """Detection head: RoIAlign on the last feature map, averaged over time, and a linear layer."""

    classes: int = Field(default=80, gt=0)
    """Number of actions that the head scores; actions are numbered from 1."""

    resolution: int = Field(default=7, gt=0)
    """RoIAlign cells along each side of a box; the maximum over all cells is taken in each channel."""

    widen: tuple[NonNegativeFloat, NonNegativeFloat] = (0.1, 0.05)
    """Growth of a box in the test, as shares of its width and height; half of it is added on either side."""


class KeyFramesConfig(Section):
    """Annotated key frames of the videos, with their boxes."""

    annotations: Path
    """File of boxes with their actions, such as `ava_train_v2.2.csv`."""

    excluded: Path | None = None
    """File of key frames to exclude, such as `ava_train_excluded_timestamps_v2.2.csv`."""

    starts_at: float = Field(default=0.0, ge=0)
    """Time of the annotations, in seconds, at which the video files start: 900 for files of the annotated part only."""


class TrainingKeyFrames(KeyFramesConfig):
    """Key frames of the training, with the boxes of the ground truth."""

    jitter: tuple[Probability, Probability, Probability, Probability] = (0.2, 0.1, 0.1, 0.05)
    """Largest random shift of a side of a box: outwards and inwards as shares of the width of the box, for its left and
    right side; then outwards and inwards as shares of its height, for its top and bottom."""


class DetectionTest(KeyFramesConfig):
    """Key frames of a test: boxes of people from a detector are scored against the boxes of the ground truth."""

    boxes: Path
    """File of boxes of people with a score, such as LFB and SlowFast distribute."""

    score: Probability = 0.8
    """Smallest score of a box; boxes with a lower score are ignored."""

    actions: Path
    """File of the actions that count, such as `ava_action_list_v2.2_for_activitynet_2019.pbtxt`."""

    short_side: int = Field(default=256, gt=0)
    """Length in pixels to which the short side of a frame is resized; the model sees the whole frame."""


class DetectionValidation(ValidationConfig, DetectionTest):
    """Key frames that are tested during training; `best.safetensors` keeps the weights of the highest frame mAP."""


class DetectionRecipe(TaskRecipe):
    """Recipe of one run of `mvd-scale detect train`."""

    head_section = "detector"

    training: DetectionTraining
    """Optimisation of the encoder and the head."""

    detector: DetectorConfig
    """The detection head."""

    key_frames: TrainingKeyFrames
    """Key frames to train on."""

    validation: DetectionValidation | None = None
    """Key frames to test during training; null for none."""

    @model_validator(mode="after")
    def _check_clips(self) -> Self:
        if self.data.sampling != "dense":
            raise ValueError(
                f"data.sampling {self.data.sampling} has no effect: clips are centred on key frames; set it to dense"
            )
        if self.data.mixture is not None:
            raise ValueError(
                "data.mixture cannot be combined with key frames, which name the videos of one source: use data.source"
            )
        if self.data.augment.rand_augment is not None:
            raise ValueError(
                "data.augment.rand_augment moves the content of a box, but not the box itself: set it to null"
            )
        return self

    def _identity(self) -> dict[str, Any]:
        values = super()._identity()
        # The checkpoints record the contents of these files, so that their paths may change between runs.
        del values["key_frames"]["annotations"], values["key_frames"]["excluded"]
        return values
