"""Targets of a student, found for a file: from the recipe of its run, from teachers that are named, or none.

A file of weights holds no teachers: those of a run are in its recipe, those of a published student must be named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mvd_scale.analysis.subjects import Subject
from mvd_scale.checkpoints import adapt, build_encoder, read_checkpoint
from mvd_scale.config import (
    ImageTeacherTarget,
    ModelConfig,
    PixelTarget,
    Recipe,
    RunRecipe,
    TimmTarget,
    VideoTeacherTarget,
    load_any_recipe,
)
from mvd_scale.config.data import DataConfig, MaskConfig, ViewsConfig
from mvd_scale.config.target import TargetConfig, TrainedTeacherTarget
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder
from mvd_scale.run_dir import RunFolder
from mvd_scale.targets import FrozenTeacher, Target
from mvd_scale.targets.build import load_targets
from mvd_scale.targets.image_teacher import ImageTeacher
from mvd_scale.targets.load import load_teacher
from mvd_scale.targets.pixels import Pixels
from mvd_scale.targets.video_teacher import VideoTeacher

PIXELS = "pixels"
"""Name of the decoder of published MAE and VideoMAE files."""


@dataclass(frozen=True)
class PredictedTargets:
    """Targets of a student by name, and the reasons why others are missing."""

    targets: dict[str, Target]
    missing: dict[str, str]


@dataclass(frozen=True)
class RunFacts:
    """Recipe of the run that a file lies in, or the reason why it cannot be read."""

    recipe: RunRecipe | None
    """Recipe of any kind; None if the file is of no run, or if `fault` says why the recipe cannot be read."""

    fault: str | None = None

    @property
    def pretraining(self) -> Recipe | None:
        """Recipe of pre-training; None for any other run."""
        return self.recipe if isinstance(self.recipe, Recipe) else None


def read_run(subject: Subject) -> RunFacts:
    """Read the recipe of the run that a file is of; features, attention and predictions can be shown without it."""
    file = RunFolder(_folder(subject)).recipe
    try:
        return RunFacts(load_any_recipe(file) if file.is_file() else None)
    except (UserError, OSError, UnicodeDecodeError) as error:
        return RunFacts(None, str(error))


def views_of(
    subjects: Sequence[Subject], sampling: Literal["dense", "uniform"] | None, stride: int | None
) -> ViewsConfig:
    """Return the view of a clip: as given, otherwise as in the run of the first video model that has a recipe.

    Args:
        subjects: models that are shown the clip.
        sampling: sampling of the clip; that of the run if None, or dense if `stride` is given or there is no run.
        stride: stride of dense clips; that of the run if None, or 4 if there is none.
    """
    recipes = (read_run(subject).recipe for subject in subjects if not subject.is_image_model)
    data = next((recipe.data for recipe in recipes if recipe is not None), DataConfig())
    if sampling is None:
        sampling = "uniform" if data.spans_whole_videos and stride is None else "dense"
    return ViewsConfig(sampling=sampling, stride=stride or data.stride, clips=1, crops=1)


def _folder(subject: Subject) -> Path:
    return subject.path if subject.path.is_dir() else subject.path.parent


def mask_of(subject: Subject, run: RunFacts, ratio: float | None) -> MaskConfig | None:
    """Return the mask under which a student predicts: `ratio`, that of its run, or the published one.

    Published are tubes over 90 % of a clip (Sec. 3.3), and 75 % of an image (MAE). None: its run had no mask.
    """
    recipe = run.pretraining
    mask = MaskConfig(kind="random", ratio=0.75) if subject.is_image_model else MaskConfig(kind="tube", ratio=0.9)
    if recipe is not None and ratio is None and recipe.data.mask is None:
        return None
    if recipe is not None and recipe.data.mask is not None:
        # All masked tokens are shown, also where a part of them is trained.
        mask = recipe.data.mask.model_copy(update={"decode_ratio": 1.0})
    return mask if ratio is None else mask.model_copy(update={"ratio": ratio})


def find_targets(subject: Subject, run: RunFacts, teachers: Mapping[str, Path]) -> PredictedTargets:
    """Find the targets that a student predicts; those whose teachers cannot be read or do not fit it are missing.

    Args:
        subject: student with decoders or token heads.
        run: what its folder says about its run.
        teachers: files of teachers by name of the target; they take the place of those of the recipe.
    """
    targets, missing = {}, {}
    channels = {name: head.channels for name, head in subject.checkpoint.decoders.items()}
    channels |= {name: head.channels for name, head in subject.checkpoint.token_heads.items()}
    for name in channels:
        try:
            targets[name] = _find(subject, name, run, teachers.get(name))
            _check_channels(name, targets[name], channels[name])
        except (UserError, OSError) as error:
            # OSError: timm's weights cannot be downloaded.
            targets.pop(name, None)
            missing[name] = str(error)
    return PredictedTargets(targets, missing)


def _find(subject: Subject, name: str, run: RunFacts, teacher: Path | None) -> Target:
    if run.fault is not None:
        raise UserError("how it was computed is in the recipe of its run, which cannot be read")
    recipe = run.pretraining
    if recipe is not None and name in recipe.targets:
        # Only masked tokens are shown.
        config: TargetConfig = recipe.targets[name].model_copy(update={"visible_weight": 0.0})
        if teacher is not None:
            config = _with_teacher(name, config, teacher)
        alone = recipe.model_copy(update={"targets": {name: config}})
        if subject.model.frames != recipe.model.frames:
            alone = _with_frames(alone, name, subject.model)
        return load_targets(alone, _folder(subject))[name]
    decoder = subject.checkpoint.decoders.get(name)
    if name == PIXELS and decoder is not None and teacher is None:
        # As published: MAE normalises over the patch, VideoMAE each channel.
        pixels = PixelTarget(decoder=decoder.config, normalize="patch" if subject.is_image_model else "channel")
        return Pixels(pixels, subject.model)
    if teacher is None:
        raise UserError(f"the file holds no teacher of {name}: name one with `--teacher {name}=FILE`")
    if name == PIXELS or decoder is None:
        raise UserError(f"--teacher {name}={teacher}: {name} takes no file here; give the folder of the student's run")
    checkpoint = read_checkpoint(teacher)
    if checkpoint.model.is_rotary:
        raise UserError(
            f"--teacher {name}={teacher}: how the student saw this teacher (frames, norm) is in the recipe of its run: "
            "give the folder of the run"
        )
    is_image = checkpoint.model.frames == 1
    if not is_image and subject.model.frames != subject.own_frames:
        frames = _scaled(name, checkpoint.model, subject.own_frames, subject.model.frames)
        checkpoint = adapt(checkpoint, frames=frames)
    _check_grid(f"--teacher {name}={teacher}", checkpoint.model, subject.model)
    encoder = build_encoder(checkpoint, final_norm=False)
    if is_image:
        image = ImageTeacherTarget(decoder=decoder.config, checkpoint=teacher)
        return ImageTeacher(name, image, encoder, subject.model, tubes=True)
    video = VideoTeacherTarget(decoder=decoder.config, checkpoint=teacher)
    return VideoTeacher(name, video, encoder, subject.model)


def _with_frames(recipe: Recipe, name: str, shown: ModelConfig) -> Recipe:
    """Return a recipe of one target for clips of other frames; a video teacher sees the same share of them as before.

    Moving averages of the student take the clips of `recipe.model`, and image teachers any number of frames.
    """
    config = recipe.targets[name]
    if isinstance(config, VideoTeacherTarget):
        teacher = load_teacher(recipe, name)
        assert isinstance(teacher, Encoder)
        frames = _scaled(name, teacher.config, recipe.model.frames, shown.frames)
        config = config.model_copy(update={"frames": frames})
    model = recipe.model.model_copy(update={"frames": shown.frames, "positions": shown.positions})
    return recipe.model_copy(update={"model": model, "targets": {name: config}})


def _scaled(name: str, teacher: ModelConfig, before: int, after: int) -> int:
    """Compute a teacher's frames where the student's clips have `after` frames instead of `before`."""
    frames, rest = divmod(teacher.frames * after, before)
    if rest or frames % teacher.tubelet:
        raise UserError(
            f"{name}: its teacher sees {teacher.frames} frames of the student's {before}, in tubelets of "
            f"{teacher.tubelet}, and cannot see the same share of {after}: give another `--frames`, or omit it"
        )
    return frames


def _check_grid(what: str, teacher: ModelConfig, student: ModelConfig) -> None:
    """Check that a teacher has the student's tokens; an image teacher sees one frame of each time slice."""
    is_image = teacher.frames == 1
    have = (student.grid[0] if is_image else teacher.grid[0], *teacher.grid[1:])
    if have != student.grid or student.frames % teacher.frames:
        of_teacher, of_student = ("x".join(map(str, grid)) for grid in (have, student.grid))
        raise UserError(
            f"{what}: the teacher has {of_teacher} tokens (frames: {teacher.frames}), the student {of_student} "
            f"(frames: {student.frames}): name the teacher that it was taught by, or give the folder of its run"
        )


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
