"""Frozen teachers from checkpoints: loading, digests of their weights, and their input sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from mvd_scale.checkpoints.adapt import adapt
from mvd_scale.checkpoints.checkpoint import Hints
from mvd_scale.checkpoints.reading import read_raw_checkpoint, tensors_digest
from mvd_scale.checkpoints.weights import load_encoder, map_encoder, read_checkpoint
from mvd_scale.config import ModelConfig, MomentumTarget, Recipe, TimmTarget, VideoTeacherTarget
from mvd_scale.config.target import TrainedTeacherTarget
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder
from mvd_scale.models.timm_vit import TimmViT
from mvd_scale.targets.target import FrozenTeacher, Target


def ema_file(folder: Path, name: str) -> Path:
    """Return the path of the moving average of a momentum target in the folder of a run or checkpoint."""
    return folder / f"momentum_{name}.safetensors"


def statistics_file(folder: Path, name: str) -> Path:
    """Return the path of the statistics of a target's features in the folder of a run."""
    return folder / f"statistics_{name}.safetensors"


def build_ema_encoder(recipe: Recipe) -> Encoder:
    """Build the encoder of a momentum target in the student's shape, with random weights and no stochastic depth."""
    return Encoder(recipe.model.model_copy(update={"drop_path": 0.0}), final_norm=False)


def load_teacher(recipe: Recipe, name: str, averages: Path | None = None) -> Encoder | TimmViT:
    """Load the frozen model of a target on the CPU, memory-mapped if the file format allows it.

    Args:
        recipe: recipe with the teacher's file; a timm teacher without a file gets timm's pretrained weights.
        name: name of the target.
        averages: folder with the moving averages of momentum targets; None for random weights.

    Raises:
        UserError: the checkpoint is missing, unreadable or of another shape than in the recipe.
    """
    config = recipe.targets[name]
    if isinstance(config, MomentumTarget):
        if averages is None:
            return build_ema_encoder(recipe)
        # It takes the student's clips, also where an analysis shows others than the run had.
        hints = Hints(frames=recipe.model.frames, input_size=recipe.model.input_size)
        return load_encoder(ema_file(averages, name), final_norm=False, hints=hints)
    if isinstance(config, TimmTarget):
        return _load_timm(config, recipe.model)
    assert isinstance(config, TrainedTeacherTarget)
    if config.checkpoint is None:
        raise UserError(
            f"targets.{name}.checkpoint is missing: give the teacher's weights with `--targets.{name}.checkpoint PATH`"
        )
    hints = Hints()
    if config.model is not None:
        shape = config.model
        hints = Hints(shape.heads, None, shape.frames, shape.input_size, shape.positions)
    checkpoint = read_checkpoint(config.checkpoint, hints)
    if config.model is not None:
        # `size` is a name of width, depth and heads, which files of others do not state.
        shapes = (model.model_dump(exclude={"drop_path", "size"}) for model in (checkpoint.model, config.model))
        actual, expected = shapes
        differing = ", ".join(
            f"{key} {value} (recipe: {expected[key]})" for key, value in actual.items() if value != expected[key]
        )
        if differing:
            raise UserError(f"{config.checkpoint} is not the teacher of targets.{name}.model: it has {differing}")
    depth, positions = checkpoint.model.depth, checkpoint.model.positions
    if config.final_norm and positions == "rotary_vjepa2_1" and set(config.layers) - {depth}:
        raise UserError(
            f"targets.{name}: V-JEPA 2.1 has a norm of its own for each of its layers, of which the last one alone is "
            "read: with `layers` set `final_norm: false` and `norm: true`"
        )
    runs = running_shape(name, config, checkpoint.model, recipe.model)
    checkpoint = adapt(checkpoint, frames=runs.frames, input_size=runs.input_size)
    return map_encoder(checkpoint, final_norm=config.final_norm)


def running_shape(name: str, config: TrainedTeacherTarget, model: ModelConfig, student: ModelConfig) -> ModelConfig:
    """Return the shape in which a teacher sees the student's clips: its own, with the frames and size of the recipe.

    Args:
        name: name of the target, for messages.
        config: settings of the target.
        model: shape of the teacher's checkpoint.
        student: shape of the student's encoder.

    Raises:
        UserError: the frames are not a multiple of the teacher's tubelet, or the size not one of its patch.
    """
    frames = config.frames if isinstance(config, VideoTeacherTarget) else model.frames
    if frames is None:
        frames = student.frames if model.is_rotary else model.frames
    side = config.input_size or model.input_size
    for key, value, unit in (("frames", frames, model.tubelet), ("input_size", side, model.patch_size)):
        if value % unit:
            part = "tubelet" if key == "frames" else "patch"
            raise UserError(f"targets.{name}.{key} {value} is not a multiple of the teacher's {part} of {unit}")
    return model.model_copy(update={"frames": frames, "input_size": side})


def build_timm(config: TimmTarget, student: ModelConfig, *, pretrained: bool) -> TimmViT:
    """Build a teacher of timm at its input size; see `TimmViT`."""
    return TimmViT(
        config.vit,
        student.grid[1],
        final_norm=config.final_norm,
        pretrained=pretrained,
        input_size=config.input_size,
    )


def _load_timm(config: TimmTarget, student: ModelConfig) -> TimmViT:
    teacher = build_timm(config, student, pretrained=config.checkpoint is None)
    if config.checkpoint is not None:
        teacher.load(read_raw_checkpoint(config.checkpoint).tensors, str(config.checkpoint))
    return teacher


def weight_digests(recipes: Iterable[Recipe]) -> list[dict[str, str]]:
    """Compute SHA-256 (first 16 hex digits) of the weights of each teacher and of the initial encoder, by name.

    A resumed run compares them with the stored digests to ensure that it continues with the same weights.

    Args:
        recipes: recipe of each student; a file that several of them name is read once.
    """
    known: dict[Path, str] = {}
    digests: list[dict[str, str]] = []
    for recipe in recipes:
        paths = {name: getattr(config, "checkpoint", None) for name, config in recipe.targets.items()}
        paths["initial encoder"] = recipe.training.initial_encoder
        given = {name: path for name, path in paths.items() if path is not None}
        for path in given.values():
            if path not in known:
                known[path] = tensors_digest(read_raw_checkpoint(path).tensors)
        digests.append({name: known[path] for name, path in given.items()})
    return digests


def teacher_input_sizes(recipe: Recipe, targets: Mapping[str, Target]) -> tuple[int, ...]:
    """List the teachers' input sides in pixels, ascending, without the student's."""
    sides = {target.input_size for target in targets.values() if isinstance(target, FrozenTeacher)}
    return tuple(sorted(sides - {recipe.model.input_size}))
