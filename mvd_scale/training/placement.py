"""Placement rules: from a recipe and the capabilities of its devices to precision, sharding, compilation and prefetch.

The functions of this module are pure: they query no device and no other rank. The engine carries out a `Placement` for
the devices of the run, which `training.capabilities` queries. The planner computes the same placement for devices that
this machine lacks, from the table in `performance.planning.hardware`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from mvd_scale.config import Recipe, RunRecipe, TeacherConfig
from mvd_scale.config.data import VideoDecoder
from mvd_scale.config.deepspeed import check_stage, zero_stage
from mvd_scale.config.training import Checkpointing, FrozenPrecision, Precision
from mvd_scale.data.loaders.decoder_choice import choose_video_decoder
from mvd_scale.errors import UserError
from mvd_scale.models.bf16_ways import AS_THEY_ARE, IN_FLOAT32, Bf16Trial, Bf16Ways
from mvd_scale.models.precision import refusal
from mvd_scale.models.quantization import REFUSED, unquantized_precision

DeviceKind = Literal["cuda", "cpu"]

GATHERED = "ZeRO-3 gathers parameters inside each block, which torch.compile and CUDA graphs cannot capture"
LAYERWISE = "ZeRO-3 gathers the weights of one layer at a time, and a batched pass needs those of several decoders"
CALIBRATED = "int8 layers compute their quantization range at run time, which torch.compile cannot capture"
COMPILED = "torch.compile makes the products of compiled blocks in its own way"

_LABELS = {
    "precision": "precision",
    "bf16_ways": "products of bf16",
    "zero_stage": "ZeRO stage",
    "micro_batch": "micro batch",
    "accumulation": "accumulation",
    "gradient_checkpointing": "gradient checkpointing",
    "compile": "compile",
    "batch_decoders": "batched decoders",
    "decoder": "video decoder",
    "data_prefetch": "data prefetch",
}
"""Labels of the decisions of a run by field of `Placement`, in the order in which they are shown."""

_TEACHER_LABELS = {
    "precision": "precision",
    "rest": "precision of the other layers",
    "shards": "ZeRO-3 shards",
    "compile": "compile",
    "cuda_graph": "CUDA graph",
    "prefetch": "prefetch",
}
"""Labels of the decisions of a teacher by field of `TeacherPlacement`, in the order in which they are shown."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Decision(Generic[Value]):
    """A chosen value with its reason."""

    value: Value

    reason: str
    """Reason of the choice, phrased to follow the word "because"."""

    @property
    def shown(self) -> str:
        """The value as text; booleans are `on` and `off`, and None is `off`."""
        if self.value is None or isinstance(self.value, bool):
            return "on" if self.value else "off"
        return str(self.value)

    def __str__(self) -> str:
        return f"{self.shown}, because {self.reason}"


@dataclass(frozen=True)
class Capabilities:
    """Features that the device of every rank supports; `training.capabilities` detects them."""

    gpu: str = ""
    """Name of the GPU; empty for CPUs."""

    bf16: bool = True
    """Whether the GPU supports bf16, or the CPU has instructions for it."""

    fp8: bool = False
    """Whether the GPU has tensor cores for fp8."""

    no_compile: str = ""
    """Reason why torch.compile does not work on the device; empty if it does. Read only if `needs_compiler`."""

    no_nvdec: str = ""
    """Reason why the GPUs have no NVDEC; empty if they do, and for CPUs."""

    bf16_trial: Bf16Trial | None = None
    """Times of the ways in which the CPU of rank 0 computes bf16; None if there was no trial. Read only if
    `needs_bf16_trial`."""


@dataclass(frozen=True)
class Devices:
    """The devices of a run, one per rank."""

    kind: DeviceKind
    ranks: int

    ranks_per_host: int
    """Largest number of ranks on one host."""

    capabilities: Capabilities

    def __str__(self) -> str:
        per_host = f", {self.ranks_per_host} per host" if self.ranks_per_host < self.ranks else ""
        return f"{self.ranks} x {self.capabilities.gpu or self.kind}{per_host}"


@dataclass(frozen=True)
class Teacher:
    """Properties of a frozen teacher that its placement depends on."""

    name: str
    """Name of the target that the teacher belongs to."""

    parameters: int
    """Number of parameters."""

    moves: bool
    """Whether the weights are a moving average of the student's."""


@dataclass(frozen=True)
class TeacherShards:
    """Sharding of a teacher's weights by ZeRO-3."""

    over: Literal["host", "world"]
    """Group of ranks that share the weights: the ranks of each host, or all ranks."""

    ranks: int
    """Number of ranks in the group; the largest host's if hosts differ."""

    moves: bool = False
    """Whether the weights are a moving average, which is updated shard by shard."""

    @property
    def whole_vectors(self) -> bool:
        """Whether every rank keeps whole vectors (biases, norms), which avoids gathering them."""
        return not self.moves

    def __str__(self) -> str:
        return f"over {self.ranks} ranks of each host" if self.over == "host" else f"over all {self.ranks} ranks"


@dataclass(frozen=True)
class TeacherPlacement:
    """The decisions for one frozen teacher."""

    name: str
    """Name of the target that the teacher belongs to."""

    precision: Decision[FrozenPrecision]
    """Precision of the linear layers in the blocks."""

    rest: Decision[Precision]
    """Precision of all other layers; equal to `precision` unless that is an 8-bit one."""

    shards: Decision[TeacherShards | None]
    """Sharding of the weights; None if every rank holds the whole teacher."""

    compile: Decision[bool]
    cuda_graph: Decision[bool]

    prefetch: Decision[bool]
    """Whether the teacher computes the features of the next micro batch in parallel with the student's step."""


@dataclass(frozen=True)
class Placement:
    """All placement decisions of a run."""

    devices: Devices
    precision: Decision[Precision]

    bf16_ways: Decision[Bf16Ways] | None
    """Ways in which models compute bf16 on CPUs; None if nothing is computed in bf16 on a CPU."""

    zero_stage: Decision[int]

    micro_batch: Decision[int]
    """Clips per forward pass of a rank."""

    accumulation: Decision[int]
    """Micro batches per optimizer step."""

    gradient_checkpointing: Decision[Checkpointing]
    compile: Decision[bool]
    batch_decoders: Decision[bool]

    decoder: Decision[VideoDecoder]
    """Where videos are decoded: by NVDEC as far as it takes them, or on the CPUs."""

    data_prefetch: Decision[int]
    """Number of batches that are decoded in advance."""

    teachers: tuple[TeacherPlacement, ...]
    """Decisions for the frozen teachers, in the order of their targets."""

    def teacher(self, name: str) -> TeacherPlacement:
        """Return the decisions for the teacher of the target `name`.

        Raises:
            StopIteration: the target has no frozen teacher.
        """
        return next(teacher for teacher in self.teachers if teacher.name == name)

    def decisions(self) -> Iterator[tuple[str, Decision[Any]]]:
        """Yield every decision with its label; a decision on which all teachers agree is yielded once for all."""
        for name, label in _LABELS.items():
            if (decision := getattr(self, name)) is not None:
                yield label, decision
        for name, label in _TEACHER_LABELS.items():
            if name == "rest" and all(teacher.rest == teacher.precision for teacher in self.teachers):
                continue
            decisions = {f"{teacher.name} teacher": getattr(teacher, name) for teacher in self.teachers}
            if len(set(decisions.values())) == 1:
                decisions = {"teachers": next(iter(decisions.values()))}
            for owner, decision in decisions.items():
                yield f"{owner}: {label}", decision

    def to_lines(self) -> list[str]:
        """Format the decisions as a table with columns decision, value and reason, below a title line."""
        rows = [(name, decision.shown, decision.reason) for name, decision in self.decisions()]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return [
            f"placement on {self.devices} (decision, value, reason)",
            *(f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {reason}" for name, value, reason in rows),
        ]


def decide_placement(recipe: RunRecipe, teachers: Sequence[Teacher], devices: Devices) -> Placement:
    """Decide how a recipe runs on its devices.

    Args:
        recipe: recipe of pre-training, fine-tuning or detection.
        teachers: frozen teachers of the recipe's targets, in the order of the targets; empty without targets.
        devices: devices of the run.

    Raises:
        UserError: the global batch cannot be split over the ranks, the DeepSpeed file names no ZeRO stage, or the
            recipe requires a precision or an option that the devices or other options do not support.
    """
    micro, accumulation = recipe.micro_batch_and_accumulation(devices.ranks)
    check_stage(recipe)
    training, stage = recipe.training, zero_stage(recipe)
    _refuse(training.precision, devices)
    share = f"training.global_batch gives each rank {micro * accumulation} clips per step"
    limit = f"training.micro_batch is {training.micro_batch or 'not set'}"
    return Placement(
        devices=devices,
        precision=_named("training.precision", training.precision),
        bf16_ways=_bf16_ways(recipe, devices),
        zero_stage=Decision(stage, f"training.deepspeed is {training.deepspeed}"),
        micro_batch=Decision(micro, f"{share}, and {limit}"),
        accumulation=Decision(accumulation, f"{share}, processed in micro batches of {micro}"),
        gradient_checkpointing=_named("training.gradient_checkpointing", training.gradient_checkpointing),
        compile=_switch(
            "training.compile",
            training.compile,
            devices.kind,
            GATHERED if stage == 3 else devices.capabilities.no_compile,
            on_cpu="on which compiled blocks are hardly faster",
        ),
        batch_decoders=_batch_decoders(recipe, stage, devices.kind),
        decoder=_decoder(recipe, devices),
        data_prefetch=_named("data.prefetch", recipe.data.prefetch),
        teachers=tuple(_place_teacher(recipe, teacher, devices) for teacher in teachers),
    )


def _decoder(recipe: RunRecipe, devices: Devices) -> Decision[VideoDecoder]:
    chosen, reason = choose_video_decoder(
        recipe.data.decoder, on_gpu=devices.kind == "cuda", no_nvdec=devices.capabilities.no_nvdec
    )
    return Decision(chosen, reason)


def needs_compiler(recipe: RunRecipe, kind: DeviceKind) -> bool:
    """Whether the placement depends on `Capabilities.no_compile`, which takes seconds to detect."""
    asked = [recipe.training.compile, *([recipe.teachers.compile] if isinstance(recipe, Recipe) else [])]
    return any(choice is True or (choice == "auto" and kind == "cuda") for choice in asked)


def needs_bf16_trial(recipe: RunRecipe, kind: DeviceKind, *, bf16: bool) -> bool:
    """Whether the placement depends on `Capabilities.bf16_trial`.

    Args:
        recipe: recipe of the run.
        kind: kind of the devices.
        bf16: see `Capabilities.bf16`.
    """
    asked = recipe.training.bf16_products == "auto"
    return asked and not _compiles(recipe) and _computes_bf16(recipe, kind, bf16=bf16)


def _computes_bf16(recipe: RunRecipe, kind: DeviceKind, *, bf16: bool) -> bool:
    """Whether students or teachers compute in bf16 on a CPU."""
    used = [recipe.training.precision]
    if isinstance(recipe, Recipe):
        used.append(_unquantized(teacher_precision(recipe, kind).value, bf16=bf16))
    return kind == "cpu" and "bf16" in used


def _compiles(recipe: RunRecipe) -> bool:
    """Whether blocks on a CPU are compiled, which `auto` does not do."""
    return recipe.training.compile is True or (isinstance(recipe, Recipe) and recipe.teachers.compile is True)


def _bf16_ways(recipe: RunRecipe, devices: Devices) -> Decision[Bf16Ways] | None:
    asked, trial = recipe.training.bf16_products, devices.capabilities.bf16_trial
    if not _computes_bf16(recipe, devices.kind, bf16=devices.capabilities.bf16):
        return None
    named = f"training.bf16_products is {asked}"
    if _compiles(recipe):
        if asked == "float32":
            raise UserError(f"training.bf16_products is float32, but {COMPILED}; set it or compile to auto")
        return Decision(AS_THEY_ARE, COMPILED)
    if asked == "float32":
        return Decision(IN_FLOAT32, named)
    if asked == "bf16":
        return Decision(AS_THEY_ARE, named)
    if trial is None:
        return Decision(AS_THEY_ARE, f"{named} and this CPU was not tried")
    return Decision(trial.choose(), f"{named} and one thread took, in ms: {trial}")


def teacher_precision(recipe: Recipe, kind: DeviceKind) -> Decision[FrozenPrecision]:
    """Decide the precision of frozen teachers: the recipe's, or for `auto` fp16 on GPUs and the student's on CPUs."""
    asked = recipe.teachers.precision
    if asked != "auto":
        return Decision(asked, f"teachers.precision is {asked}")
    if kind == "cuda":
        return Decision("fp16", "teachers.precision is auto and the device is a GPU")
    return Decision(
        recipe.training.precision,
        "teachers.precision is auto and the device is a CPU, on which teachers use the student's precision",
    )


def _place_teacher(recipe: RunRecipe, teacher: Teacher, devices: Devices) -> TeacherPlacement:
    assert isinstance(recipe, Recipe)
    config, kind = recipe.teachers, devices.kind
    precision = teacher_precision(recipe, kind)
    _refuse(precision.value, devices)
    shards = _shards(config, precision.value, teacher, devices)
    gathered = GATHERED if shards.value else ""
    calibrated = CALIBRATED if precision.value == "int8" else ""
    return TeacherPlacement(
        name=teacher.name,
        precision=precision,
        rest=_rest(precision, devices),
        shards=shards,
        compile=_switch(
            "teachers.compile",
            config.compile,
            kind,
            gathered or calibrated or devices.capabilities.no_compile,
            on_cpu="on which compiled blocks are hardly faster",
        ),
        cuda_graph=_switch(
            "teachers.cuda_graphs",
            config.cuda_graphs,
            kind,
            ("" if kind == "cuda" else "there is no GPU") or gathered,
            on_cpu="which has no CUDA graphs",
        ),
        prefetch=_prefetch(config, teacher, kind),
    )


def _refuse(precision: FrozenPrecision, devices: Devices) -> None:
    """Raise a `UserError` if the devices do not support a precision."""
    gpu = devices.capabilities.gpu
    if precision == "int8" or precision == "fp8":
        computed = devices.kind == "cpu" if precision == "int8" else devices.capabilities.fp8
        reason = "" if computed else f"{gpu}{': ' if gpu else ''}{REFUSED[precision]}"
    else:
        reason = refusal(precision, devices.kind, gpu, bf16=devices.capabilities.bf16)
    if reason:
        raise UserError(reason)


def _rest(precision: Decision[FrozenPrecision], devices: Devices) -> Decision[Precision]:
    """Decide the precision of the layers that are not quantized to 8 bits."""
    kind, rest = precision.value, _unquantized(precision.value, bf16=devices.capabilities.bf16)
    if kind != "int8" and kind != "fp8":
        return Decision(rest, precision.reason)
    if rest == "fp32":
        return Decision(
            rest, f"only the linear layers of blocks are in {kind}, and the CPU has no instructions for bf16"
        )
    return Decision(rest, f"only the linear layers of blocks are in {kind}")


def _unquantized(precision: FrozenPrecision, *, bf16: bool) -> Precision:
    """Precision of the layers of a teacher that are not quantized to 8 bits."""
    return unquantized_precision(precision, bf16=bf16) if precision == "int8" or precision == "fp8" else precision


def _shards(
    config: TeacherConfig, precision: FrozenPrecision, teacher: Teacher, devices: Devices
) -> Decision[TeacherShards | None]:
    """Decide whether and how ranks shard a teacher: shards save memory and cost the time of gathers."""
    if precision in ("int8", "fp8"):
        return Decision(None, f"ZeRO-3 shards only floating-point weights, and teachers.precision is {precision}")
    reason = f"teachers.sharding is {config.sharding}"
    if config.sharding == "replicated":
        return Decision(None, reason)
    if config.sharding == "auto":
        if devices.ranks == 1:
            return Decision(None, f"{reason} and there is one rank")
        above = teacher.parameters > config.auto_shard_above
        reason += (
            f" and the {teacher.parameters:,} parameters of the teacher {'' if above else 'do not '}exceed "
            f"teachers.auto_shard_above, {config.auto_shard_above:,}"
        )
        if not above:
            return Decision(None, reason)
    over, group_reason = _shard_group(config, teacher, devices)
    ranks = devices.ranks if over == "world" else devices.ranks_per_host
    return Decision(TeacherShards(over, ranks, moves=teacher.moves), f"{reason}; {group_reason}")


def _shard_group(config: TeacherConfig, teacher: Teacher, devices: Devices) -> tuple[Literal["host", "world"], str]:
    """Choose the group of ranks that share a teacher, and state the reason."""
    if teacher.moves:
        return "world", "its weights are updated from the student's shards, which are split over all ranks"
    if config.shard_over == "world":
        return "world", "teachers.shard_over is world"
    if devices.ranks_per_host == devices.ranks:
        return "world", "there is one host"
    if devices.ranks_per_host == 1:
        return "world", "each host has one rank"
    return "host", "teachers.shard_over is node"


def _prefetch(config: TeacherConfig, teacher: Teacher, kind: DeviceKind) -> Decision[bool]:
    if teacher.moves:
        return Decision(False, "its weights change with every optimizer step")
    if not config.prefetch:
        return Decision(False, "teachers.prefetch is false")
    if kind == "cpu":
        return Decision(False, "the device is a CPU, which has no CUDA streams")
    return Decision(True, "teachers.prefetch is true and the device is a GPU")


def _batch_decoders(recipe: RunRecipe, stage: int, kind: DeviceKind) -> Decision[bool]:
    if not isinstance(recipe, Recipe):
        return Decision(False, "the model has no decoders")
    if not recipe.decoder_groups:
        return Decision(False, "no two decoders have the same shape and predict the same tokens")
    return _switch(
        "training.batch_decoders",
        recipe.training.batch_decoders,
        kind,
        LAYERWISE if stage == 3 else "",
        on_cpu="on which the tokens of several decoders do not fit in the cache",
    )


def _named(key: str, value: Value) -> Decision[Value]:
    return Decision(value, f"{key} is {value}")


def _switch(key: str, asked: bool | Literal["auto"], kind: DeviceKind, obstacle: str, *, on_cpu: str) -> Decision[bool]:
    """Decide an option that `auto` enables on GPUs unless an obstacle prevents it.

    Args:
        key: key of the option in the recipe.
        asked: value of the option in the recipe.
        kind: kind of the devices.
        obstacle: reason why the option cannot be enabled; empty if it can.
        on_cpu: reason why `auto` disables the option on CPUs, phrased to follow "the device is a CPU, ".

    Raises:
        UserError: the recipe sets the option to true and an obstacle prevents it.
    """
    if asked is False:
        return Decision(False, f"{key} is false")
    if asked == "auto" and kind == "cpu":
        return Decision(False, f"{key} is auto and the device is a CPU, {on_cpu}")
    if obstacle and asked is True:
        raise UserError(f"{key} is true, but {obstacle}; set it to auto to run without it")
    if obstacle:
        return Decision(False, obstacle)
    return Decision(True, f"{key} is true" if asked is True else f"{key} is auto and the device is a GPU")
