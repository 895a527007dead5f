"""DeepSpeed configurations: a JSON file whose "auto" values come from the recipe.

A value in the file that contradicts the recipe is an error.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvd_scale.config.recipe import RunRecipe
from mvd_scale.config.training import Precision, TrainingConfig
from mvd_scale.errors import UserError

if TYPE_CHECKING:
    from importlib.abc import Traversable

_TEACHER = "teacher_zero3"


def student_deepspeed_config(recipe: RunRecipe, world_size: int) -> dict[str, Any]:
    """Build the student's DeepSpeed configuration for `world_size` ranks.

    Raises:
        UserError: the file does not exist or is not valid JSON, a value contradicts the recipe, the global batch cannot
            be split over the ranks, or the recipe asks for an option that ZeRO stage 3 does not support.
    """
    micro, accumulation = recipe.micro_batch_and_accumulation(world_size)
    training = recipe.training
    check_stage(recipe)
    return _resolve(
        training.deepspeed,
        {
            "train_batch_size": training.global_batch,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": training.clip_grad or 0.0,
            **_precision(training.precision),
            **_loss_scale(training),
        },
    )


def check_deepspeed_config(recipe: RunRecipe, world_size: int) -> None:
    """Check that a recipe and its DeepSpeed file fit each other and the number of ranks.

    Raises:
        UserError: see `student_deepspeed_config`; or the file keeps optimizer states on NVMe.
    """
    config = student_deepspeed_config(recipe, world_size)
    # DeepSpeed's tensors of states on NVMe are empty between steps: resumed weights cannot be published from them.
    if _section(config["zero_optimization"], "offload_optimizer", recipe.training.deepspeed).get("device") == "nvme":
        raise UserError(
            f"training.deepspeed {recipe.training.deepspeed}: zero_optimization.offload_optimizer.device is 'nvme', "
            "but no run can be resumed from states there: expected 'cpu', or no offload_optimizer"
        )


def check_stage(recipe: RunRecipe) -> None:
    """Refuse at ZeRO stage 3, which gathers weights layer by layer, a choice that needs whole weights.

    Raises:
        UserError: `training.compile` or `training.batch_decoders` is true at stage 3.
    """
    training = recipe.training
    for key in ("compile", "batch_decoders"):
        if zero_stage(recipe) == 3 and getattr(training, key, False) is True:
            raise UserError(
                f"training.{key} is true, but training.deepspeed {training.deepspeed} is ZeRO stage 3, which gathers "
                f"parameters layer by layer: use stage 1 or 2, or set training.{key} to auto"
            )


def teacher_deepspeed_config(precision: Precision, world_size: int, *, moves: bool = False) -> dict[str, Any]:
    """Build the DeepSpeed configuration of a frozen teacher that ZeRO-3 shards over `world_size` ranks.

    Args:
        precision: precision of the weights.
        world_size: number of ranks.
        moves: whether the weights are a moving average that is written after every step. Then every tensor has shards,
            whole vectors too, and gathers start on the current stream: DeepSpeed's own stream for gathers does not
            wait for the current one, so that a gather on it could read shards while they are written.
    """
    batch = {"train_batch_size": world_size, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    config = _resolve(_TEACHER, {**batch, **_precision(precision)})
    if moves:
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "overlap_comm": False}
    return config


def zero_stage(recipe: RunRecipe) -> int:
    """ZeRO stage (1 to 3) in the student's DeepSpeed file.

    Raises:
        UserError: the file cannot be read, or its stage is not 1, 2 or 3.
    """
    stage = _section(_read(recipe.training.deepspeed), "zero_optimization", recipe.training.deepspeed).get("stage")
    if stage not in (1, 2, 3):
        raise UserError(
            f"training.deepspeed {recipe.training.deepspeed}: zero_optimization.stage is {stage!r}, expected 1, 2 or 3"
        )
    return int(stage)


def _section(values: dict[str, Any], name: str, file: str) -> dict[str, Any]:
    section = values.setdefault(name, {})
    if not isinstance(section, dict):
        raise UserError(f"training.deepspeed {file}: {name} is {section!r}, expected a JSON object")
    return section


def _precision(precision: Precision) -> dict[str, Any]:
    return {"fp16.enabled": precision == "fp16", "bf16.enabled": precision == "bf16"}


def _loss_scale(training: TrainingConfig) -> dict[str, Any]:
    keys = ("initial_scale_power", "loss_scale_window", "hysteresis")
    return {f"fp16.{key}": getattr(training, key) for key in keys}


def _shipped_files() -> Traversable:
    """Return the folder of the shipped files: the package's, or of a checkout that was not installed, its own."""
    try:
        return resources.files("mvd_scale.ds_configs")
    except ModuleNotFoundError:
        return Path(__file__).parents[2] / "ds_configs"


def _read(name_or_path: str) -> dict[str, Any]:
    folder = _shipped_files()
    shipped = {entry.name.removesuffix(".json"): entry for entry in folder.iterdir() if entry.name.endswith(".json")}
    file = shipped.get(name_or_path) or Path(name_or_path)
    if not file.is_file():
        raise UserError(
            f"training.deepspeed {name_or_path}: expected the path of a DeepSpeed JSON "
            f"or one of {', '.join(sorted(shipped.keys() - {_TEACHER}))}"
        )
    try:
        values = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"training.deepspeed {name_or_path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"training.deepspeed {name_or_path}: expected a JSON object")
    return values


def _resolve(name_or_path: str, resolved: dict[str, Any]) -> dict[str, Any]:
    """Read a DeepSpeed file, and set the recipe's values, given by dotted key, where it has "auto" or no value."""
    values = _read(name_or_path)
    for foreign in ("optimizer", "scheduler"):
        if foreign in values:
            raise UserError(
                f"training.deepspeed {name_or_path}: the recipe configures the {foreign}; remove `{foreign}` from the "
                "file"
            )
    for key, value in resolved.items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = _section(section, parent, name_or_path)
        current = section.get(last, "auto")
        if current not in ("auto", value):
            raise UserError(
                f"training.deepspeed {name_or_path}: {key} is {current!r}, but the recipe requires {value!r}; "
                'write "auto"'
            )
        section[last] = value
    return values
