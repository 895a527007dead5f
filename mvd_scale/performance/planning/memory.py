"""Prediction of the memory of a rank in bytes, by phase of the step and by part.

The rules follow the code of this project and of DeepSpeed, and were derived from traces of every allocation.
`tests/unit/performance/planning/test_memory.py` requires the prediction to be within 10 % of a traced run.
"""

from __future__ import annotations

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
    """Predict the memory of one rank.

    Some tensors exist during the whole step (weights, optimizer states, batches, features computed in advance). Each
    phase adds others to them, and the prediction is the phase with the largest sum: a teacher's forward pass, start or
    end of the backward pass, or the optimizer step.

    Args:
        workload: models of the step.
        parallel: ranks, micro batch, ZeRO settings and precision.
    """
    size, clips = SIZES[parallel.precision], parallel.micro
    teachers = list(zip(workload.teachers, parallel.sharded, parallel.prefetched, parallel.graphed, strict=True))
    rest = _persistent_bytes(workload, parallel)
    for part, sharded, _, graphed in teachers:
        if graphed:
            recorded = sum(_teacher_forward_bytes(part, sharded, parallel).values()) + clips * workload.pixels
            rest = _sum(rest, {"CUDA graphs": recorded})
    ahead = [(part, sharded, graphed) for part, sharded, early, graphed in teachers if early]
    if ahead:
        features = clips * SIZES[parallel.teacher_precision] * sum(part.predicted for part, *_ in ahead)
        rest = _sum(rest, {"prefetched features": features, "batches": clips * workload.pixels})
    # A teacher that computes the next micro batch in parallel with the student can have its peak at any time of the
    # step. Several such teachers run one after the other, so that only the largest one counts.
    working = [_teacher_forward_bytes(part, sharded, parallel) for part, sharded, graphed in ahead if not graphed]
    if working:
        rest = _sum(rest, max(working, key=lambda needs: sum(needs.values())))
    kept = clips * sum(activations(part, size, checkpointing=parallel.checkpointing) for part in workload.trained)
    predicted = sum(part.predicted for part in workload.trained)
    compared = clips * _compared(workload, parallel)
    live = _gathered(workload.parameters, parallel.zero, size) if parallel.stage == 3 and parallel.world > 1 else 0
    student = {"activations": kept, "predictions and targets": compared, "gathered weights": live}
    groups = _groups(workload, batched=parallel.batched)
    together = [part for group in groups if len(group) > 1 for part in group]
    if together:
        student["stacked weights"] = size * sum(_stacked(part, parallel.checkpointing) for part in together)
    # Loss: the gradients of all predictions exist before the first head uses its own. Start of the backward pass: all
    # activations still exist, and the heads' last blocks need their workspace first. End: the activations are gone, but
    # the gradients exist.
    first = max(
        sum(backward_workspace(part, size, checkpointing=parallel.checkpointing) for part in group) for group in groups
    )

    phases = {}
    for part, sharded, early, graphed in teachers:
        if not early:
            phases[part.name] = student if graphed else _sum(student, _teacher_forward_bytes(part, sharded, parallel))
    gradients = workload.parameters * size
    buckets = _buckets(parallel, size)
    phases["loss"] = student | {"gradients": buckets, "workspace": clips * size * predicted}
    phases["start of the backward pass"] = student | {
        "predictions and targets": 0,
        "gradients": buckets,
        "workspace": clips * first,
    }
    phases["end of the backward pass"] = {
        "gathered weights": live,
        "gradients": buckets + _gradients_after_backward(gradients, parallel, size),
        "workspace": clips * backward_workspace(workload.trained[0], size, checkpointing=parallel.checkpointing),
    }
    phases["optimizer step"] = {"gradients": _gradients_in_optimizer_step(gradients, parallel, size)}
    return Memory({name: _sum(rest, phase) for name, phase in phases.items()})


def _compared(workload: Workload, parallel: ParallelConfig) -> int:
    """Compute the bytes per clip of predictions and true features, which exist until the loss is differentiated.

    GPUs read both as they are: features of teachers in the teachers' precision, pixels in float32. CPUs convert both to
    float32.
    """
    predicted = sum(part.predicted for part in workload.trained)
    if parallel.device == "cpu":
        return 8 * predicted
    of_teachers = sum(part.predicted for part in workload.teachers)
    features = SIZES[parallel.teacher_precision] * of_teachers + 4 * (predicted - of_teachers)
    return SIZES[parallel.precision] * predicted + features


def activations(part: ModelPart, size: int, *, checkpointing: Checkpointing) -> int:
    """Compute the bytes that a trained part saves per clip for its backward pass."""
    blocks = part.blocks
    others = sum(layer.saved(size) for layer in part.layers if layer not in blocks)
    return others + sum(block.saved(size, checkpointing) for block in blocks)


def inference(part: ModelPart, size: int) -> int:
    """Compute the bytes of a teacher's forward pass per clip: rows of the patch embedding, input, and largest block."""
    rows = [layer.rows * layer.inputs * size for layer in part.layers if isinstance(layer, LinearCost)]
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


def _persistent_bytes(workload: Workload, parallel: ParallelConfig) -> Bytes:
    """Compute the bytes that exist during the whole step, by part."""
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
    teachers = sum(
        _persistent_teacher_bytes(part, parallel, shards)
        for part, shards in zip(workload.teachers, parallel.shards, strict=True)
    )
    return {
        "weights": weights,
        # 12 bytes: a float32 copy of the weights and AdamW's two moments.
        "optimizer": 0 if offloaded else 12 * share,
        "gradients": gradients,
        "teachers": teachers,
        "batches": (1 + parallel.prefetch) * parallel.micro * workload.pixels,
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
    # With accumulation, `_persistent_bytes` counts the gradients.
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
