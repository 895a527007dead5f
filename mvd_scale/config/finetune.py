"""A recipe of fine-tuning: an encoder, a head, and how both learn to name classes.

The defaults are the published ones that all runs share.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator
from typing_extensions import Self

from mvd_scale.config.data import Probability, TestViews, ViewsConfig
from mvd_scale.config.recipe import RunRecipe
from mvd_scale.config.section import Section
from mvd_scale.config.training import Decay, TrainingConfig


class FinetuneTraining(TrainingConfig):
    """Optimisation of encoder and head under DeepSpeed."""

    min_lr: float = Field(default=1e-6, ge=0)
    """Last learning rate for a global batch of 256; scaled likewise."""

    warmup_epochs: float = Field(default=5, ge=0)
    """Epochs of linear warm-up from 0."""

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of AdamW's first and second moment."""

    layer_decay: float = Field(default=0.75, gt=0, le=1)
    """Factor on the learning rate from each layer to the one below it; the head has 1."""

    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep a moving average of the weights, of which a step keeps this share, and test that one too."""


class HeadConfig(Section):
    """The linear layer that a task puts on the encoder."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Before the head."""

    init_scale: float = Field(default=0.001, gt=0)
    """Factor on the first weights of the head."""

    from_scratch: bool = False
    """Train without pre-trained weights; otherwise `training.initial_encoder` must name them."""


class ClassifierConfig(HeadConfig):
    """The head on the mean of all tokens."""

    classes: int | None = Field(default=None, gt=0)
    """Number of classes; as many as the training videos have if left out."""

    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Share of a label that is spread over all classes."""


class MixConfig(Section):
    """Mixup and cutmix of whole micro batches, each clip with the one at the other end."""

    mixup: float = Field(default=0.8, ge=0)
    """Alpha of mixup's beta distribution; 0 for none."""

    cutmix: float = Field(default=1.0, ge=0)
    """Alpha of cutmix's beta distribution; 0 for none. The box is the same in all frames."""

    switch: Probability = 0.5
    """Probability of cutmix where both are on."""

    probability: Probability = 1.0
    """Of a micro batch to be mixed."""

    @model_validator(mode="after")
    def _check_alphas(self) -> Self:
        if not self.mixup and not self.cutmix:
            raise ValueError("mixup and cutmix are both 0: set mix to null")
        return self


class ValidationConfig(Section):
    """Labelled videos that are tested during training, each by the clip in its middle; the best weights are kept."""

    source: str
    """As `data.source`."""

    root: str | None = None
    """As `data.root`."""

    every_epochs: float = Field(default=1, gt=0)
    """Epochs between two tests."""

    batch: int = Field(default=8, gt=0)
    """Videos that a rank tests together."""


class TaskRecipe(RunRecipe):
    """What all runs have in common that teach a pre-trained encoder a task."""

    head_section: ClassVar[str]
    """Name of the section that describes the head."""

    training: FinetuneTraining
    validation: ValidationConfig | None = None

    @property
    def head(self) -> HeadConfig:
        """The section that describes the head."""
        section: HeadConfig = getattr(self, self.head_section)
        return section

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        if self.data.mask is not None:
            raise ValueError(f"data.mask hides tokens, but a {self.head_section} sees all: set it to null")
        if self.model.class_token:
            raise ValueError(f"model.class_token has no place in a {self.head_section} of clips: set it to false")
        if self.training.initial_encoder is not None and self.head.from_scratch:
            raise ValueError(f"give either training.initial_encoder or {self.head_section}.from_scratch")
        return self

    @property
    def lr_batch(self) -> int:
        """Clips of an optimizer step by which the learning rate is scaled: here copies do not count."""
        return self.training.global_batch // self.data.copies

    def _identity(self) -> dict[str, Any]:
        values = super()._identity()
        del values["validation"]
        return values


class FinetuneRecipe(TaskRecipe):
    """Everything that one run of `mvd-scale finetune` needs to know."""

    head_section = "classifier"

    classifier: ClassifierConfig
    mix: MixConfig | None = MixConfig()

    test: TestViews = ViewsConfig()
    """Views by which `mvd-scale evaluate` tests the result; the weights carry them."""

    def _identity(self) -> dict[str, Any]:
        values = super()._identity()
        del values["test"]
        return values
