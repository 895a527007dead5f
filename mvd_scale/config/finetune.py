"""Recipe of fine-tuning: an encoder with a classification head, and their optimisation.

The defaults are the values that all published runs share.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from mvd_scale.config.data import DataConfig, Probability, TestViews, ViewsConfig
from mvd_scale.config.recipe import RunRecipe
from mvd_scale.config.section import Section
from mvd_scale.config.training import Decay, TrainingConfig


class FinetuneTraining(TrainingConfig):
    """Optimisation of the encoder and the head under DeepSpeed."""

    min_lr: float = Field(default=1e-6, ge=0)
    """Final learning rate for a global batch of 256; scaled linearly with the batch."""

    warmup_epochs: float = Field(default=5, ge=0)
    """Number of epochs of linear warm-up from 0."""

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of AdamW's first and second moment."""

    initial_scale_power: int = Field(default=7, ge=0)
    """Loss scale of fp16 at the first step, as a power of two."""

    loss_scale_window: int = Field(default=128, gt=0)
    """Number of optimizer steps without overflow after which the loss scale of fp16 doubles."""

    hysteresis: int = Field(default=2, gt=0)
    """Number of overflows, counted since the loss scale of fp16 last doubled, from which on each halves it. With 1
    every overflow halves it; with 2 the first one only skips its optimizer step, as all do."""

    layer_decay: float = Field(default=0.75, gt=0, le=1)
    """Factor on the learning rate from each layer to the layer below it; the head has factor 1."""

    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, or null for no average. It is written to
    `average.safetensors`, and the validation judges by it. A run folder as a checkpoint still means the weights
    themselves, as in the published test: name the file to test the average."""


class TaskHeadConfig(Section):
    """Linear layer that a task adds to the encoder."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability before the head."""

    init_scale: float = Field(default=0.001, gt=0)
    """Factor on the initial weights of the head."""

    from_scratch: bool = False
    """Train without pre-trained weights; if false, `training.initial_encoder` must name them."""


class ClassifierConfig(TaskHeadConfig):
    """Classification head: a linear layer on the mean of all tokens."""

    classes: int | None = Field(default=None, gt=0)
    """Number of classes; the number of classes of the training videos if omitted."""

    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Share of a label that is distributed over all classes."""


class MixConfig(Section):
    """Mixup and cutmix of whole micro batches: clip i is mixed with clip i from the end."""

    mixup: float = Field(default=0.8, ge=0)
    """Alpha of mixup's beta distribution; 0 turns mixup off."""

    cutmix: float = Field(default=1.0, ge=0)
    """Alpha of cutmix's beta distribution; 0 turns cutmix off. The box is the same in all frames."""

    switch: Probability = 0.5
    """Probability of cutmix instead of mixup, if both are on."""

    probability: Probability = 1.0
    """Probability with which a micro batch is mixed."""

    @model_validator(mode="after")
    def _check_alphas(self) -> Self:
        if not self.mixup and not self.cutmix:
            raise ValueError("mixup and cutmix are both 0: set mix to null to turn mixing off")
        return self


class ValidationConfig(Section):
    """Labelled videos to test during training, one clip from the middle of each.

    The weights of the highest figure are kept in `best.safetensors`, beside the last ones, and are tested where that
    file is named. If these videos are those of the test too, the best weights were chosen on the test.
    """

    source: str
    """Labelled videos, as `data.source`."""

    root: str | None = None
    """Folder or URL of relative paths, as `data.root`."""

    every_epochs: float = Field(default=1, gt=0)
    """Number of epochs from one test to the next."""

    batch: int = Field(default=8, gt=0)
    """Number of videos per batch of a rank."""


class TaskRecipe(RunRecipe):
    """Base of the recipes that fine-tune a pre-trained encoder for a task."""

    head_section: ClassVar[str]
    """Name of the section of the recipe that describes the head."""

    training: FinetuneTraining
    """Optimisation of the encoder and the head."""

    validation: ValidationConfig | None = None
    """Videos to test during training; null for none."""

    @property
    def head(self) -> TaskHeadConfig:
        """Section of the recipe that describes the head."""
        section: TaskHeadConfig = getattr(self, self.head_section)
        return section

    @field_validator("data")
    @classmethod
    def _resize_without_antialiasing(cls, data: DataConfig) -> DataConfig:
        """Set `crop.antialias` to false where the recipe does not set it: the published code of all tasks has none."""
        if "antialias" in data.crop.model_fields_set:
            return data
        return data.model_copy(update={"crop": data.crop.model_copy(update={"antialias": False})})

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        if self.data.mask is not None:
            raise ValueError(f"data.mask hides tokens, but a {self.head_section} needs all of them: set it to null")
        if self.model.class_token:
            raise ValueError(f"model.class_token is not supported by a {self.head_section} of clips: set it to false")
        if self.training.initial_encoder is not None and self.head.from_scratch:
            raise ValueError(f"give either training.initial_encoder or {self.head_section}.from_scratch, not both")
        return self

    @property
    def lr_batch(self) -> int:
        """Number of clips per optimizer step by which the learning rate is scaled; here copies do not count."""
        return self.training.global_batch // self.data.copies

    def _identity(self) -> dict[str, Any]:
        values = super()._identity()
        del values["validation"]
        return values


class FinetuneRecipe(TaskRecipe):
    """Recipe of one run of `mvd-scale finetune`."""

    head_section = "classifier"

    classifier: ClassifierConfig
    """The classification head."""

    mix: MixConfig | None = MixConfig()
    """Mixup and cutmix; null for none."""

    test: TestViews = ViewsConfig()
    """Default views of `mvd-scale evaluate` for the result; they are stored with the weights."""

    def _identity(self) -> dict[str, Any]:
        values = super()._identity()
        del values["test"]
        return values
