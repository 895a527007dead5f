"""Schema of recipes and pipelines. All other packages import it; it imports nothing of the project but its errors."""

from mvd_scale.config.data import CenterCrop, CornerCrop, DataConfig, MaskConfig, RandomResizedCrop, ShortSideCrop
from mvd_scale.config.detection import DetectionRecipe, DetectorConfig
from mvd_scale.config.finetune import FinetuneRecipe, TaskRecipe
from mvd_scale.config.loading import (
    finetune_recipe_from_dict,
    list_recipes,
    load_any_recipe,
    load_detection_recipe,
    load_finetune_recipe,
    load_recipe,
    recipe_from_dict,
)
from mvd_scale.config.model import SIZES, ModelConfig
from mvd_scale.config.recipe import Recipe, RunRecipe
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
    "DetectionRecipe",
    "DetectorConfig",
    "FinetuneRecipe",
    "HeadConfig",
    "ImageTeacherTarget",
    "MaskConfig",
    "ModelConfig",
    "MomentumTarget",
    "PixelTarget",
    "RandomResizedCrop",
    "Recipe",
    "RunRecipe",
    "ShortSideCrop",
    "TargetConfig",
    "TaskRecipe",
    "TeacherConfig",
    "TimmTarget",
    "TokenHeadConfig",
    "TrainingConfig",
    "VideoTeacherTarget",
    "finetune_recipe_from_dict",
    "list_recipes",
    "load_any_recipe",
    "load_detection_recipe",
    "load_finetune_recipe",
    "load_recipe",
    "recipe_from_dict",
]
