"""The schema of a recipe. Everything reads it; it reads nothing of the project but its errors."""

from mvd_scale.config.data import CenterCrop, CornerCrop, DataConfig, MaskConfig, RandomResizedCrop
from mvd_scale.config.model import SIZES, ModelConfig
from mvd_scale.config.recipe import Recipe, list_recipes, load_recipe
from mvd_scale.config.target import (
    DecoderConfig,
    HeadConfig,
    ImageTeacherTarget,
    MomentumTarget,
    PixelTarget,
    TargetConfig,
    TimmTarget,
    TokenHeadConfig,
    VideoTeacherTarget,
)
from mvd_scale.config.training import TeacherConfig, TrainingConfig

__all__ = [
    "SIZES",
    "CenterCrop",
    "CornerCrop",
    "DataConfig",
    "DecoderConfig",
    "HeadConfig",
    "ImageTeacherTarget",
    "MaskConfig",
    "ModelConfig",
    "MomentumTarget",
    "PixelTarget",
    "RandomResizedCrop",
    "Recipe",
    "TargetConfig",
    "TeacherConfig",
    "TimmTarget",
    "TokenHeadConfig",
    "TrainingConfig",
    "VideoTeacherTarget",
    "list_recipes",
    "load_recipe",
]
