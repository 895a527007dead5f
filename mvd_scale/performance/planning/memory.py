"""Prediction of the memory of a rank in bytes, by phase of the step and by part.

The rules follow the code of this project and of DeepSpeed, and were derived from traces of every allocation.
`tests/unit/performance/planning/test_memory.py` requires the prediction to be within 10 % of a traced run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mvd_scale.config.training import Checkpointing
from mvd_scale.models.quantization import QuantizedPrecision
from mvd_scale.performance.planning.layers import BlockCost, LinearCost
from mvd_scale.performance.planning.parallelism import SIZES, ParallelConfig
from mvd_scale.performance.planning.workload import ModelPart, Workload
from mvd_scale.training.optimizer import LARGEST_GROUP
from mvd_scale.training.placement import TeacherShards

CHANNEL: dict[QuantizedPrecision, int] = {"int8": 12, "fp8": 4}
"""Bytes per output channel in addition to 8-bit weights: a 32-bit scale; for int8 also a 32-bit zero point and bias."""

Bytes = dict[str, int]
"""Bytes by part."""


@dataclass(frozen=True)
class Memory:
    """Memory of one rank: bytes by phase of the step, at the peak of the phase, and by part."""

    phases: dict[str, Bytes]

    @property
    def peak_phase(self) -> str:
        """Name of the phase with the highest memory."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    def with_parts(self, parts: Bytes) -> Memory:
        """Return the memory with parts added that exist in every phase."""
        return Memory({name: _sum(phase, parts) for name, phase in self.phases.items()})

    @property
    def parts(self) -> Bytes:
        """Bytes by part, in the phase of the peak."""
        return self.phases[self.peak_phase]

    @property
    def peak(self) -> int:
        """Highest memory of a rank in a step, bytes."""
        return sum(self.parts.values())


def predict_memory(workload: Workload, parallel: ParallelConfig) -> Memory:
    """Predict the memory of one rank that trains one student; see `predict_students_memory`.

    Args:
        workload: models of the step.
        parallel: ranks, micro batch, ZeRO settings and precision.
    """
    return predict_students_memory({"": (workload, parallel)})


def predict_students_memory(students: Mapping[str, tuple[Workload, ParallelConfig]]) -> Memory:
    """Predict the memory of one rank that trains one or several students.

    Some tensors exist during the whole step (weights, optimizer states, batches, features computed in advance). Each
    phase adds others to them, and the prediction is the phase with the largest sum: a teacher's forward pass, start or
    end of the backward pass, or the optimizer step. Several students share frozen teachers and batches, and learn one
    after the other, after the teachers.

    Args:
        students: models of the step, and ranks, micro batch, ZeRO settings and precision of each student, by its name;
            an empty name for a single student.
    """
    several = len(students) > 1
    rest: Bytes = {}
    phases: dict[str, Bytes] = {}
    shared: dict[str, _Teacher] = {}
    for name, (workload, parallel) in students.items():
        label = f"{name}: " if several else ""
        teachers = _teachers_of(workload, parallel)
        own = [teacher for teacher in teachers if not several or teacher.moves]
        shared |= {teacher.part.name: teacher for teacher in teachers if teacher not in own}
        rest = _sum(rest, _sum(_student_bytes(workload, parallel), _teachers_bytes(own)))
        tensors = _student_tensors(workload, parallel, features=own if several else teachers)
        for teacher in own:
            if not teacher.early:
                phases[f"{label}{teacher.part.name}"] = _sum(tensors, teacher.working)
        student = _student_phases(workload, parallel, tensors)
        phases |= {f"{label}{phase}": parts for phase, parts in student.items()}
    workload, parallel = max(students.values(), key=lambda student: student[0].pixels)
    common = list(shared.values())
    rest = _sum(rest, {"batches": (1 + parallel.prefetch) * parallel.micro * workload.pixels})
    rest = _sum(rest, _teachers_bytes(common))
    everyone = common if several else own
    ahead = [teacher for teacher in everyone if teacher.early]
    if ahead:
        rest = _sum(rest, {"batches": parallel.micro * workload.pixels})
        # A teacher that computes the next micro batch in parallel with the student can have its peak at any time of the
        # step. Several such teachers run one after the other, so that only the largest one counts.
        rest = _sum(rest, max((teacher.working for teacher in ahead), key=lambda needs: sum(needs.values())))
    # Those of the next micro batch, and for several students those of this one, which outlive each student's pass.
    kept = sum(teacher.features for teacher in (*ahead, *(common if several else ())))
    if kept:
        rest = _sum(rest, {"prefetched features" if ahead else "features": kept})
    for teacher in common:
        if not teacher.early:
            phases[teacher.part.name] = teacher.working
    return Memory({name: _sum(rest, phase) for name, phase in phases.items()})


@dataclass(frozen=True)
class _Teacher:
    """A frozen teacher and its memory on a rank."""

    part: ModelPart
    moves: bool
    """Whether it is a moving average of one student."""

    early: bool
    """Whether it computes the next micro batch in parallel with the student."""

    at_rest: Bytes
    """Weights, and the recording of a CUDA graph."""

    working: Bytes
    """Bytes that a forward pass adds; none in a CUDA graph, which keeps them."""

    features: int


def _teachers_of(workload: Workload, parallel: ParallelConfig) -> list[_Teacher]:
    teachers, clips = [], parallel.micro
    for part, shards, early, graphed in zip(
        workload.teachers, parallel.shards, parallel.prefetched, parallel.graphed, strict=True
    ):
        working = _teacher_forward_bytes(part, shards is not None, parallel)
        at_rest = {"teachers": _persistent_teacher_bytes(part, parallel, shards)}
        if graphed:
            at_rest["CUDA graphs"] = sum(working.values()) + clips * workload.pixels
        teachers.append(
            _Teacher(
                part,
                part.teacher is not None and part.teacher.moves,
                early,
                at_rest,
                {} if graphed else working,
                clips * SIZES[parallel.teacher_precision] * part.predicted,
            )
        )
    return teachers


def _teachers_bytes(teachers: Sequence[_Teacher]) -> Bytes:
    total: Bytes = {"teachers": 0}
    for teacher in teachers:
        total = _sum(total, teacher.at_rest)
    return total


def _student_tensors(workload: Workload, parallel: ParallelConfig, features: Sequence[_Teacher]) -> Bytes:
    """Compute the bytes of a student's forward pass that its backward pass needs.

    Args:
        workload: models of the step.
        parallel: settings of the student.
        features: teachers whose features the student's own pass computes and keeps.
    """
    size, clips = SIZES[parallel.precision], parallel.micro
    kept = clips * sum(activations(part, size, checkpointing=parallel.checkpointing) for part in workload.trained)
    live = _gathered(workload.parameters, parallel.zero, size) if parallel.stage == 3 and parallel.world > 1 else 0
    compared = clips * _compared(workload, parallel, [teacher.part for teacher in features])
    student = {"activations": kept, "predictions and targets": compared, "gathered weights": live}
    together = [part for group in _groups(workload, batched=parallel.batched) if len(group) > 1 for part in group]
    if together:
        student["stacked weights"] = size * sum(_stacked(part, parallel.checkpointing) for part in together)
    return student


def _student_phases(workload: Workload, parallel: ParallelConfig, student: Bytes) -> dict[str, Bytes]:
    """Compute the bytes that each phase of a student adds; `student` is the result of `_student_tensors`."""
    size, clips = SIZES[parallel.precision], parallel.micro
    predicted = sum(part.predicted for part in workload.trained)
    # Loss: the gradients of all predictions exist before the first head uses its own. Start of the backward pass: all
    # activations still exist, and the heads' last blocks need their workspace first. End: the activations are gone, but
    # the gradients exist.
    first = max(
        sum(backward_workspace(part, size, checkpointing=parallel.checkpointing) for part in group)
        for group in _groups(workload, batched=parallel.batched)
    )
    gradients = workload.parameters * size
    buckets = _buckets(parallel, size)
    return {
        "loss": student | {"gradients": buckets, "workspace": clips * size * predicted},
        "start of the backward pass": student
        | {"predictions and targets": 0, "gradients": buckets, "workspace": clips * first},
        "end of the backward pass": {
            "gathered weights": student["gathered weights"],
            "gradients": buckets + _gradients_after_backward(gradients, parallel, size),
            "workspace": clips * backward_workspace(workload.trained[0], size, checkpointing=parallel.checkpointing),
        },
        "optimizer step": {"gradients": _gradients_in_optimizer_step(gradients, parallel, size)},
    }


def _compared(workload: Workload, parallel: ParallelConfig, teachers: Sequence[ModelPart]) -> int:
    """Compute the bytes per clip of predictions and true features, which exist until the loss is differentiated.

    GPUs read both as they are: features of teachers in the teachers' precision, pixels in float32. CPUs convert both to
    float32. Standardised features are a further copy in float32. Features of teachers that are not among `teachers` are
    counted elsewhere.
    """
    predicted = sum(part.predicted for part in workload.trained)
    standardized = 4 * sum(part.predicted for part in workload.teachers if part.standardized)
    if parallel.device == "cpu":
        return 8 * predicted + standardized
    of_teachers = sum(part.predicted for part in teachers)
    of_pixels = predicted - sum(part.predicted for part in workload.teachers)
    features = SIZES[parallel.teacher_precision] * of_teachers + 4 * of_pixels
    return SIZES[parallel.precision] * predicted + features + standardized


def activations(part: ModelPart, size: int, *, checkpointing: Checkpointing) -> int:
    """Compute the bytes that a trained part saves per clip for its backward pass."""
    blocks = part.blocks
    others = sum(layer.saved(size) for layer in part.layers if layer not in blocks)
    return others + sum(block.saved(size, checkpointing) for block in blocks)


def inference(part: ModelPart, size: int) -> int:
    """Compute the bytes of a teacher's forward pass per clip: rows of the patch embedding, input, and largest block."""
    rows = [round(layer.rows * layer.inputs * size) for layer in part.layers if isinstance(layer, LinearCost)]
    blocks = part.blocks
    if not blocks:
        return part.opaque * size
    return sum(rows) + max(block.entry(size) + block.inference(size) for block in blocks)


def backward_workspace(part: ModelPart, size: int, *, checkpointing: Checkpointing) -> int:
    """Compute the bytes per clip that the backward pass of a part needs in addition to the saved activations.

    A checkpointed block is recomputed first, so its activations exist once more. A checkpointed attention half is
    recomputed after the tensors saved by its MLP are released, which are as large, so it adds nothing.
    """
    block = part.blocks[-1]
    return block.gradients(size) + (block.saved(size) if checkpointing == "block" else 0)


def _groups(workload: Workload, *, batched: bool) -> list[list[ModelPart]]:
    """Group the parts that run at the same time at the start of the backward pass.

    These parts are decoders: decoders of the same shape form a group if they are batched; otherwise the last decoder
    runs alone. Without decoders, the encoder runs first.
    """
    encoder, *heads = workload.trained
    decoders = [part for part in heads if part.blocks]
    if not decoders:
        return [[encoder]]
    if not batched:
        return [decoders[-1:]]
    groups: dict[tuple[BlockCost, ...], list[ModelPart]] = {}
    for part in decoders:
        groups.setdefault(tuple(part.blocks), []).append(part)
    return list(groups.values())


def _stacked(part: ModelPart, checkpointing: Checkpointing) -> int:
    """Count a decoder's weights that are stacked for the batched pass and saved for the backward pass."""
    embed = part.layers[0]
    assert isinstance(embed, LinearCost)
    return embed.inputs * embed.outputs + sum(block.weights(checkpointing) for block in part.blocks)


def _student_bytes(workload: Workload, parallel: ParallelConfig) -> Bytes:
    """Compute the bytes of a student that exist during the whole step, by part."""
    size, share = SIZES[parallel.precision], -(-workload.parameters // parallel.world)
    offloaded = parallel.zero.get("offload_optimizer", {}).get("device") in ("cpu", "nvme")
    weights_offloaded = parallel.zero.get("offload_param", {}).get("device") in ("cpu", "nvme")
    weights = workload.parameters * size
    gradients = 0
    if parallel.stage == 3:
        weights = 0 if weights_offloaded else share * size
        weights += workload.unsharded * size
        gradients = size * parallel.zero["reduce_bucket_size"] + (0 if offloaded else share * size)
    elif parallel.accumulation > 1:
        # Stage 1 keeps all gradients until the last micro batch; stage 2 reduces after each and keeps a share.
        gradients = size * (workload.parameters if parallel.stage == 1 else share)
    return {
        "weights": weights,
        # 12 bytes: a float32 copy of the weights and AdamW's two moments.
        "optimizer": 0 if offloaded else 12 * share,
        "gradients": gradients,
    }


def _persistent_teacher_bytes(part: ModelPart, parallel: ParallelConfig, shards: TeacherShards | None) -> int:
    size = SIZES[parallel.teacher_precision]
    if parallel.quantized is not None:
        quantized = part.linear + CHANNEL[parallel.quantized] * part.channels
        return quantized + size * (part.parameters - part.linear)
    if shards is None:
        return size * part.parameters
    return size * (-(-part.parameters // shards.ranks) + (part.unsharded if shards.whole_vectors else 0))


def _teacher_forward_bytes(part: ModelPart, sharded: bool, parallel: ParallelConfig) -> Bytes:
    """Compute the bytes that a forward pass of a teacher adds, by part."""
    size = SIZES[parallel.teacher_precision]
    gathered = _teacher_gathered(part, parallel.teacher_zero, size) if sharded and parallel.world > 1 else 0
    return {"gathered weights": gathered, "workspace": parallel.micro * inference(part, size)}


def _gathered(parameters: int, zero: dict[str, Any], size: int) -> int:
    """Compute the bytes of gathered weights at stage 3: live parameters between the passes, and a prefetch bucket.

    If all parameters stay live after the forward pass, nothing is gathered any more.
    """
    live, ahead = zero["stage3_max_live_parameters"], zero["stage3_prefetch_bucket_size"]
    return size * (parameters if parameters <= live else live + min(parameters, ahead))


def _teacher_gathered(part: ModelPart, zero: dict[str, Any], size: int) -> int:
    """Compute the bytes of a teacher's gathered weights: largest block, prefetched blocks, and their gather bucket."""
    ahead = min(part.parameters, zero["stage3_prefetch_bucket_size"])
    return size * (min(part.parameters, part.largest + ahead) + ahead)


def _buckets(parallel: ParallelConfig, size: int) -> int:
    """Compute the bytes of gradient buckets at stages 1 and 2: two if reduction overlaps with the backward pass."""
    if parallel.stage == 3 or not parallel.zero["contiguous_gradients"]:
        return 0
    return size * parallel.zero["reduce_bucket_size"] * (2 if parallel.zero["overlap_comm"] else 1)


def _gradients_after_backward(gradients: int, parallel: ParallelConfig, size: int) -> int:
    """Compute the bytes of gradients after the backward pass: a rank's share, or at stage 3 two copies of a bucket."""
    if parallel.stage == 3:
        return 2 * min(gradients, size * parallel.zero["reduce_bucket_size"])
    # With accumulation, `_student_bytes` counts the gradients.
    return 0 if parallel.accumulation > 1 else -(-gradients // parallel.world)


def _gradients_in_optimizer_step(gradients: int, parallel: ParallelConfig, size: int) -> int:
    """Compute the bytes of gradients in the optimizer step: a rank's share.

    Stages 1 and 2 process one parameter group after the other, each flattened and converted to float32.
    """
    share = -(-gradients // parallel.world)
    if parallel.stage == 3:
        return share // size * 4
    parts = 0 if parallel.accumulation > 1 and parallel.stage == 2 else share
    group = -(-min(gradients, size * LARGEST_GROUP) // parallel.world)
    return parts + (group if size == 4 else group + group // size * 4)


def _sum(rest: Bytes, phase: Bytes) -> Bytes:
    return {part: rest.get(part, 0) + phase.get(part, 0) for part in {**rest, **phase}}
