"""Every rule of placement: from a recipe and what its devices can do to precision, sharding, compilation and prefetch.

Nothing is asked of a device or of another rank here. The engine does as a `Placement` says, after asking the devices at
hand (`training.device`); the planner reads the same of devices that are not at hand (`performance.hardware`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from mvd_scale.config import Recipe, RunRecipe, TeacherConfig
from mvd_scale.config.deepspeed import check_stage, zero_stage
from mvd_scale.config.training import Checkpointing, FrozenPrecision, Precision
from mvd_scale.errors import UserError
from mvd_scale.models.precision import refusal
from mvd_scale.models.quantization import REFUSED, unquantized_precision

DeviceKind = Literal["cuda", "cpu"]

GATHERED = "ZeRO-3 gathers parameters inside of every block, which torch.compile cannot follow"
LAYERWISE = "ZeRO-3 gathers the weights of one layer at a time"
CALIBRATED = "int8 layers choose their range while they run"

_LABELS = {
    "precision": "precision",
    "zero_stage": "ZeRO stage",
    "micro_batch": "micro batch",
    "accumulation": "accumulation",
    "gradient_checkpointing": "gradient checkpointing",
    "compile": "compile",
    "batch_decoders": "batched decoders",
    "data_prefetch": "data prefetch",
}
"""Names of the decisions of a run, in the order in which they are shown."""

_TEACHER_LABELS = {
    "precision": "precision",
    "rest": "precision outside of blocks' linear layers",
    "shards": "ZeRO-3 shards",
    "compile": "compile",
    "cuda_graph": "CUDA graph",
    "prefetch": "prefetch",
}
"""Names of the decisions of a teacher."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Decision(Generic[Value]):
    """A choice, and why it was made."""

    value: Value

    reason: str
    """It follows "because"."""

    @property
    def shown(self) -> str:
        """The value in words."""
        if self.value is None or isinstance(self.value, bool):
            return "on" if self.value else "off"
        return str(self.value)

    def __str__(self) -> str:
        return f"{self.shown}, because {self.reason}"


@dataclass(frozen=True)
class Capabilities:
    """Abilities of the device of every rank, which the caller finds out."""

    gpu: str = ""
    """Name of the GPU; empty for CPUs."""

    bf16: bool = True
    """Whether a GPU computes bf16, or a CPU has instructions for it."""

    fp8: bool = False
    """Whether the GPU has tensor cores for fp8."""

    no_compile: str = ""
    """Why torch.compile makes no programs for the device; empty where it does. Read only if `needs_compiler`."""


@dataclass(frozen=True)
class Devices:
    """The ranks of a run, one device each."""

    kind: DeviceKind
    ranks: int

    ranks_per_host: int
    """The most of any host."""

    capabilities: Capabilities

    def __str__(self) -> str:
        of_host = f", {self.ranks_per_host} a host" if self.ranks_per_host < self.ranks else ""
        return f"{self.ranks} x {self.capabilities.gpu or self.kind}{of_host}"


@dataclass(frozen=True)
class Teacher:
    """The facts of a frozen teacher that its placement depends on."""

    name: str
    """Of its target."""

    parameters: int

    moves: bool
    """Whether its weights follow the student's."""


@dataclass(frozen=True)
class TeacherShards:
    """How ranks share the weights of a teacher by ZeRO-3."""

    over: Literal["host", "world"]
    """Whose ranks share them: those of each host, or all."""

    ranks: int
    """Number of them; of the largest host."""

    whole_vectors: bool
    """Whether vectors stay whole on every rank, which spares their gathers."""

    def __str__(self) -> str:
        return f"over {self.ranks} ranks of {'each host' if self.over == 'host' else 'the world'}"


@dataclass(frozen=True)
class TeacherPlacement:
    """The decisions of one frozen teacher."""

    name: str

    precision: Decision[FrozenPrecision]

    rest: Decision[Precision]
    """Precision of the layers that are not in 8 bits; of all layers where none is."""

    shards: Decision[TeacherShards | None]
    """None where every rank holds the whole teacher."""

    compile: Decision[bool]
    cuda_graph: Decision[bool]

    prefetch: Decision[bool]
    """Whether it computes the features of the next micro batch beside the student."""


@dataclass(frozen=True)
class Placement:
    """Every decision of a run."""

    devices: Devices
    precision: Decision[Precision]
    zero_stage: Decision[int]

    micro_batch: Decision[int]
    """Clips of a rank in one forward pass."""

    accumulation: Decision[int]
    """Micro batches of an optimizer step."""

    gradient_checkpointing: Decision[Checkpointing]
    compile: Decision[bool]
    batch_decoders: Decision[bool]

    data_prefetch: Decision[int]
    """Batches that are decoded before they are asked for."""

    teachers: tuple[TeacherPlacement, ...]

    def teacher(self, name: str) -> TeacherPlacement:
        """The decisions of the teacher of a target."""
        return next(teacher for teacher in self.teachers if teacher.name == name)

    def decisions(self) -> Iterator[tuple[str, Decision[Any]]]:
        """Every decision by its name; one for all teachers where they agree, else one for each teacher."""
        for name, label in _LABELS.items():
            yield label, getattr(self, name)
        for name, label in _TEACHER_LABELS.items():
            if name == "rest" and all(teacher.rest == teacher.precision for teacher in self.teachers):
                continue
            found = {f"{teacher.name} teacher": getattr(teacher, name) for teacher in self.teachers}
            if len(set(found.values())) == 1:
                found = {"teachers": next(iter(found.values()))}
            for whose, decision in found.items():
                yield f"{whose}: {label}", decision

    def to_lines(self) -> list[str]:
        """A table: decision, value and reason."""
        rows = [(name, decision.shown, decision.reason) for name, decision in self.decisions()]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return [
            f"placement on {self.devices}",
            *(f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {reason}" for name, value, reason in rows),
        ]


def decide_placement(recipe: RunRecipe, teachers: Sequence[Teacher], devices: Devices) -> Placement:
    """Decide how a recipe runs on its devices.

    Args:
        recipe: of pre-training, fine-tuning or detection.
        teachers: the frozen teachers of its targets, in their order.
        devices: of the run.

    Raises:
        UserError: the global batch cannot be split over the ranks, the DeepSpeed file names no stage, or something is
            asked for by name that the devices or the other choices do not allow.
    """
    micro, accumulation = recipe.micro_batch_and_accumulation(devices.ranks)
    check_stage(recipe)
    training, stage = recipe.training, zero_stage(recipe)
    _refuse(training.precision, devices)
    share = f"a rank's share of training.global_batch is {micro * accumulation} clips"
    limit = f"training.micro_batch is {training.micro_batch or 'not set'}"
    return Placement(
        devices=devices,
        precision=_named("training.precision", training.precision),
        zero_stage=Decision(stage, f"training.deepspeed is {training.deepspeed}"),
        micro_batch=Decision(micro, f"{share} and {limit}"),
        accumulation=Decision(accumulation, f"{share}, in micro batches of {micro}"),
        gradient_checkpointing=_named("training.gradient_checkpointing", training.gradient_checkpointing),
        compile=_switch(
            "training.compile",
            training.compile,
            devices.kind,
            GATHERED if stage == 3 else devices.capabilities.no_compile,
            on_cpu="where compiled blocks are hardly faster",
        ),
        batch_decoders=_batch_decoders(recipe, stage, devices.kind),
        data_prefetch=_named("data.prefetch", recipe.data.prefetch),
        teachers=tuple(_place_teacher(recipe, teacher, devices) for teacher in teachers),
    )


def needs_compiler(recipe: RunRecipe, kind: DeviceKind) -> bool:
    """Whether blocks are compiled if torch.compile works on the device: to find that out takes seconds."""
    asked = [recipe.training.compile, *([recipe.teachers.compile] if isinstance(recipe, Recipe) else [])]
    return any(choice is True or (choice == "auto" and kind == "cuda") for choice in asked)


def teacher_precision(recipe: Recipe, kind: DeviceKind) -> Decision[FrozenPrecision]:
    """The precision of frozen teachers: fp16 on GPUs, the student's on CPUs, unless the recipe names one."""
    asked = recipe.teachers.precision
    if asked != "auto":
        return Decision(asked, f"teachers.precision is {asked}")
    if kind == "cuda":
        return Decision("fp16", "teachers.precision is auto and the device is a GPU")
    return Decision(
        recipe.training.precision, "teachers.precision is auto and the device is a CPU: it is that of the student"
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
            on_cpu="where compiled blocks are hardly faster",
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
    """Refuse a precision that the devices do not compute."""
    gpu = devices.capabilities.gpu
    if precision == "int8" or precision == "fp8":
        computed = devices.kind == "cpu" if precision == "int8" else devices.capabilities.fp8
        reason = "" if computed else f"{gpu}{': ' if gpu else ''}{REFUSED[precision]}"
    else:
        reason = refusal(precision, devices.kind, gpu, bf16=devices.capabilities.bf16)
    if reason:
        raise UserError(reason)


def _rest(precision: Decision[FrozenPrecision], devices: Devices) -> Decision[Precision]:
    """The precision of the layers that are not in 8 bits."""
    kind = precision.value
    if kind != "int8" and kind != "fp8":
        return Decision(kind, precision.reason)
    rest = unquantized_precision(kind, bf16=devices.capabilities.bf16)
    if rest == "fp32":
        return Decision(rest, f"only linear layers of blocks are in {kind}, and the CPU has no instructions for bf16")
    return Decision(rest, f"only linear layers of blocks are in {kind}")


def _shards(
    config: TeacherConfig, precision: FrozenPrecision, teacher: Teacher, devices: Devices
) -> Decision[TeacherShards | None]:
    """Whether ranks keep shards of a teacher, and which: memory at rest against the time of gathers."""
    if precision in ("int8", "fp8"):
        return Decision(None, f"shards are made of floats, and teachers.precision is {precision}")
    reason = f"teachers.sharding is {config.sharding}"
    if config.sharding == "replicated":
        return Decision(None, reason)
    if config.sharding == "auto":
        if devices.ranks == 1:
            return Decision(None, f"{reason} and there is one rank")
        above = teacher.parameters > config.auto_shard_above
        reason += (
            f" and {teacher.parameters:,} parameters are {'more than' if above else 'at most'} "
            f"teachers.auto_shard_above, {config.auto_shard_above:,}"
        )
        if not above:
            return Decision(None, reason)
    over, because = _shard_group(config, teacher, devices)
    ranks = devices.ranks if over == "world" else devices.ranks_per_host
    # An average that moves has no use for vectors that are whole: it is updated by its shares.
    return Decision(TeacherShards(over, ranks, whole_vectors=not teacher.moves), f"{reason}; {because}")


def _shard_group(config: TeacherConfig, teacher: Teacher, devices: Devices) -> tuple[Literal["host", "world"], str]:
    """The ranks that share a teacher, and why."""
    if teacher.moves:
        return "world", "its weights move, and their shares are those of the student, which is cut over all ranks"
    if config.shard_over == "world":
        return "world", "teachers.shard_over is world"
    if devices.ranks_per_host == devices.ranks:
        return "world", "there is one host"
    if devices.ranks_per_host == 1:
        return "world", "each host has one rank"
    return "host", "teachers.shard_over is node"


def _prefetch(config: TeacherConfig, teacher: Teacher, kind: DeviceKind) -> Decision[bool]:
    if teacher.moves:
        return Decision(False, "its weights move with every optimizer step")
    if not config.prefetch:
        return Decision(False, "teachers.prefetch is false")
    if kind == "cpu":
        return Decision(False, "the device is a CPU, which has no streams")
    return Decision(True, "teachers.prefetch is true and the device is a GPU")


def _batch_decoders(recipe: RunRecipe, stage: int, kind: DeviceKind) -> Decision[bool]:
    if not isinstance(recipe, Recipe):
        return Decision(False, "the model has no decoders")
    shapes = [target.decoder for target in recipe.targets.values() if target.decoder is not None]
    if len(set(shapes)) == len(shapes):
        return Decision(False, "no two targets have decoders of one shape")
    return _switch(
        "training.batch_decoders",
        recipe.training.batch_decoders,
        kind,
        LAYERWISE if stage == 3 else "",
        on_cpu="where the tokens of a decoder are more than a cache holds",
    )


def _named(key: str, value: Value) -> Decision[Value]:
    return Decision(value, f"{key} is {value}")


def _switch(key: str, asked: bool | Literal["auto"], kind: DeviceKind, obstacle: str, *, on_cpu: str) -> Decision[bool]:
    """Whether something is on that `auto` turns on on GPUs, where nothing stands in its way.

    Args:
        key: of the recipe.
        asked: its value.
        kind: of the device.
        obstacle: why it cannot be on; empty if it can.
        on_cpu: why `auto` leaves it off on CPUs; it follows "the device is a CPU, ".

    Raises:
        UserError: it is asked for by name and cannot be on.
    """
    if asked is False:
        return Decision(False, f"{key} is false")
    if asked == "auto" and kind == "cpu":
        return Decision(False, f"{key} is auto and the device is a CPU, {on_cpu}")
    if obstacle and asked is True:
        raise UserError(f"{key} is true, but {obstacle}; leave it at auto to go on without")
    if obstacle:
        return Decision(False, obstacle)
    return Decision(True, f"{key} is true" if asked is True else f"{key} is auto and the device is a GPU")
