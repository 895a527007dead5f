"""Targets of a student, found for a file: from the recipe of its run, from teachers that are named, or none.

A file of weights holds no teachers: those of a run are in its recipe, those of a published student must be named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mvd_scale.analysis.subjects import Subject
from mvd_scale.checkpoints import load_encoder
from mvd_scale.config import ImageTeacherTarget, PixelTarget, Recipe, TimmTarget, VideoTeacherTarget, load_any_recipe
from mvd_scale.config.data import MaskConfig
from mvd_scale.config.target import TargetConfig, TrainedTeacherTarget
from mvd_scale.errors import UserError
from mvd_scale.run_dir import RunFolder
from mvd_scale.targets import FrozenTeacher, Target
from mvd_scale.targets.build import load_targets
from mvd_scale.targets.image_teacher import ImageTeacher
from mvd_scale.targets.pixels import Pixels
from mvd_scale.targets.video_teacher import VideoTeacher

PIXELS = "pixels"
"""Name of the decoder of published MAE and VideoMAE files."""


@dataclass(frozen=True)
class PredictedTargets:
    """Targets of a student by name, and the reasons why others are missing."""

    targets: dict[str, Target]
    missing: dict[str, str]


def run_recipe(subject: Subject) -> Recipe | None:
    """Return the recipe of the pre-training run that a file is of; None if it is of no such run."""
    folder = subject.path if subject.path.is_dir() else subject.path.parent
    file = RunFolder(folder).recipe
    recipe = load_any_recipe(file) if file.is_file() else None
    return recipe if isinstance(recipe, Recipe) else None


def mask_of(subject: Subject, ratio: float | None) -> MaskConfig | None:
    """Return the mask under which a student predicts: `ratio`, that of its run, or the published one.

    Published are tubes over 90 % of a clip (Sec. 3.3), and 75 % of an image (MAE). None: its run had no mask.
    """
    recipe = run_recipe(subject)
    mask = MaskConfig(kind="random", ratio=0.75) if subject.is_image_model else MaskConfig(kind="tube", ratio=0.9)
    if recipe is not None and ratio is None and recipe.data.mask is None:
        return None
    if recipe is not None and recipe.data.mask is not None:
        # All masked tokens are shown, also where a part of them is trained.
        mask = recipe.data.mask.model_copy(update={"decode_ratio": 1.0})
    return mask if ratio is None else mask.model_copy(update={"ratio": ratio})


def find_targets(subject: Subject, teachers: Mapping[str, Path]) -> PredictedTargets:
    """Find the targets that a student predicts.

    Args:
        subject: student with decoders or token heads.
        teachers: files of teachers by name of the target; they take the place of those of the recipe.

    Raises:
        UserError: a teacher that was named cannot be read, or does not fit the student.
    """
    recipe, targets, missing = run_recipe(subject), {}, {}
    channels = {name: head.channels for name, head in subject.checkpoint.decoders.items()}
    channels |= {name: head.channels for name, head in subject.checkpoint.token_heads.items()}
    for name in channels:
        try:
            targets[name] = _find(subject, name, recipe, teachers.get(name))
            _check_channels(name, targets[name], channels[name])
        except (UserError, OSError) as error:
            # OSError: timm's weights cannot be downloaded.
            if name in teachers:
                raise
            targets.pop(name, None)
            missing[name] = str(error)
    return PredictedTargets(targets, missing)


def _find(subject: Subject, name: str, recipe: Recipe | None, teacher: Path | None) -> Target:
    if recipe is not None and name in recipe.targets:
        # Only masked tokens are shown.
        config: TargetConfig = recipe.targets[name].model_copy(update={"visible_weight": 0.0})
        if teacher is not None:
            config = _with_teacher(name, config, teacher)
        folder = subject.path if subject.path.is_dir() else subject.path.parent
        target = load_targets(recipe.model_copy(update={"targets": {name: config}}), folder)[name]
        resampled = isinstance(target, FrozenTeacher) and target.resampler is not None
        if resampled and subject.model.grid != recipe.model.grid:
            raise UserError(f"its features are resampled for clips of {recipe.model.frames} frames: omit `--frames`")
        return target
    decoder = subject.checkpoint.decoders.get(name)
    if name == PIXELS and decoder is not None and teacher is None:
        # As published: MAE normalises over the patch, VideoMAE each channel.
        pixels = PixelTarget(decoder=decoder.config, normalize="patch" if subject.is_image_model else "channel")
        return Pixels(pixels, subject.model)
    if teacher is None:
        raise UserError(f"the file holds no teacher of {name}: name one with `--teacher {name}=FILE`")
    if name == PIXELS or decoder is None:
        raise UserError(f"--teacher {name}={teacher}: {name} takes no file here; give the folder of the student's run")
    encoder = load_encoder(teacher, final_norm=False)
    if encoder.config.is_rotary:
        raise UserError(
            f"--teacher {name}={teacher}: how the student saw this teacher (frames, norm) is in the recipe of its run: "
            "give the folder of the run"
        )
    if encoder.config.frames == 1:
        image = ImageTeacherTarget(decoder=decoder.config, checkpoint=teacher)
        return ImageTeacher(name, image, encoder, subject.model, tubes=True)
    video = VideoTeacherTarget(decoder=decoder.config, checkpoint=teacher)
    return VideoTeacher(name, video, encoder, subject.model)


def _with_teacher(name: str, target: TargetConfig, teacher: Path) -> TargetConfig:
    if isinstance(target, TrainedTeacherTarget):
        return target.model_copy(update={"checkpoint": teacher, "model": None})
    if isinstance(target, TimmTarget):
        return target.model_copy(update={"checkpoint": teacher})
    raise UserError(f"--teacher {name}={teacher}: {name} is a target of kind {target.kind}, which takes no file")


def _check_channels(name: str, target: Target, predicted: int) -> None:
    if target.channels != predicted:
        raise UserError(
            f"the student predicts {predicted} channels of {name}, but the teacher has {target.channels}: name the "
            f"teacher that it was taught by with `--teacher {name}=FILE`"
        )
    if isinstance(target, FrozenTeacher):
        target.teacher.float()
