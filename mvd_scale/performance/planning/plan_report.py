"""Formatting of a plan as text for a terminal, and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

from mvd_scale.performance.planning.hardware import FRAGMENTED, GIB, LINK_SHARE, RESERVED, sustained_flops
from mvd_scale.performance.planning.plan import Plan
from mvd_scale.performance.planning.step_time import HOOK, LAUNCH
from mvd_scale.performance.planning.video_decoding import CACHED, CREATION, OUTPUTS, POOL, SURFACES


def to_json(plan: Plan) -> str:
    """Format all fields and derived values as one JSON object."""
    values = dataclasses.asdict(plan)
    values["memory"] |= {"peak_phase": plan.memory.peak_phase, "peak": plan.memory.peak, "parts": plan.memory.parts}
    values["best"] = dataclasses.asdict(plan.best)
    for fields, part in zip(values["flops"], plan.flops, strict=True):
        fields["total"] = part.total
    for fields, phase in zip(values["phases"], plan.phases, strict=True):
        fields["seconds"] = phase.seconds
    return json.dumps(values, indent=2)


def to_text(plan: Plan) -> str:
    """Format as tables, one per resource, followed by the assumptions."""
    sections = (
        _head, _placement, _flops, _memory, _communication, _decoding, _time, _micro_batches, _policies, _published,
        _assumptions,
    )  # fmt: skip
    return "\n".join(line for section in sections for line in section(plan))


def _head(plan: Plan) -> Iterator[str]:
    cluster, parallel = plan.cluster, plan.parallel
    nodes, sharded = cluster.gpus // cluster.per_node, sum(parallel.sharded)
    teachers = f"{sharded} of {len(parallel.sharded)} teachers sharded"
    if parallel.quantized is not None:
        teachers = f"teachers in {parallel.quantized}"
    yield (
        f"{plan.recipe} on {cluster.gpus} {cluster.gpu.name} ({nodes} x {cluster.per_node}), "
        f"{parallel.precision}, ZeRO {parallel.stage}, {teachers}; "
        f"{parallel.micro} clips x {parallel.accumulation} accumulation steps per rank"
    )
    if parallel.micro != plan.recipe_micro:
        yield f"  the recipe's micro batch of {plan.recipe_micro} does not fit"


def _placement(plan: Plan) -> Iterator[str]:
    for student, placement in (plan.students or {"": plan.placement}).items():
        yield ""
        title, *lines = placement.to_lines()
        yield from (f"  {line}" for line in (f"{student}: {title}" if student else title, *lines))


def _flops(plan: Plan) -> Iterator[str]:
    whole = sum(part.total for part in plan.flops)
    yield f"\n  {'GFLOPs per clip':<26}{'forward':>10}{'backward':>10}{'recomputed':>12}{'share':>8}"
    for part in plan.flops:
        yield (
            f"  {part.part:<26}{part.forward / 1e9:>10.1f}{part.backward / 1e9:>10.1f}{part.recomputed / 1e9:>12.1f}"
            f"{part.total / whole:>8.1%}"
        )
    sums = [
        sum(column) / 1e9 for column in zip(*((p.forward, p.backward, p.recomputed) for p in plan.flops), strict=True)
    ]
    yield f"  {'all':<26}{sums[0]:>10.1f}{sums[1]:>10.1f}{sums[2]:>12.1f}{whole / 1e9:>10.1f} GFLOPs"


def _memory(plan: Plan) -> Iterator[str]:
    yield f"\n  {'GiB per rank':<26}{'peak':>10}   at its peak: {plan.memory.peak_phase}"
    for part, held in plan.memory.parts.items():
        if held:
            yield f"  {part:<26}{held / GIB:>10.2f}"
    yield f"  {'all':<26}{plan.memory.peak / GIB:>10.2f} of {plan.memory_usable / GIB:.1f} for tensors"


def _communication(plan: Plan) -> Iterator[str]:
    if not plan.messages:
        return
    yield f"\n  {'messages per step':<26}{'collective':>16}{'times':>7}{'GB sent':>10}{'ms':>10}"
    for message in plan.messages:
        yield (
            f"  {message.name:<26}{message.kind:>16}{message.times:>7}{message.sent / 1e9:>10.2f}"
            f"{1000 * message.seconds:>10.1f}"
        )


def _decoding(plan: Plan) -> Iterator[str]:
    gpu, video = plan.cluster.gpu, plan.cluster.video
    needed = f"\n  decoding: {plan.decoded_frames:.0f} frames per clip; needed {plan.decode_needed:.0f} clips/s, "
    if plan.decode_capacity is not None:
        yield f"{needed}NVDEC decodes {plan.decode_capacity:.0f} ({gpu.decoders} engines per GPU)"
        if not video.is_whole:
            yield (
                f"  {video.width}x{video.height} pixels are no multiples of 16: each clip gets a new decoder, in "
                f"{1000 * CREATION:.0f} ms"
            )
    elif plan.parallel.decoder == "host":
        yield f"{needed}which the CPUs must decode: their rate is not predicted"


def _time(plan: Plan) -> Iterator[str]:
    yield f"\n  {'ms per step':<14}{'arithmetic':>12}{'launches':>12}{'messages':>12}{'total':>12}"
    for phase in plan.phases:
        columns = (phase.arithmetic, phase.launching, phase.communication, phase.seconds)
        yield f"  {phase.label:<14}" + "".join(f"{1000 * seconds:>12.1f}" for seconds in columns)
    yield (
        f"  step {plan.step_seconds:.3f} s, {plan.clips_per_second:.0f} clips/s "
        f"({plan.clips_per_second / plan.cluster.gpus:.1f} per GPU), epoch {plan.epoch_seconds / 60:.1f} min, "
        f"run {plan.run_hours:.1f} h"
    )
    yield f"  the limit is {plan.limit}; {plan.arithmetic_share:.1%} of the peak arithmetic is used"


def _micro_batches(plan: Plan) -> Iterator[str]:
    yield f"\n  {'micro batch':<14}{'GiB per rank':>14}{'clips/s':>12}"
    for candidate in plan.candidates:
        note = "" if candidate.fits else "  does not fit"
        best = "  best" if candidate == plan.best else ""
        yield f"  {candidate.micro:<14}{candidate.memory / GIB:>14.2f}{candidate.clips_per_second:>12.0f}{note}{best}"


def _policies(plan: Plan) -> Iterator[str]:
    yield f"\n  {'checkpointing':<14}{'recomputed':>14}{'activations':>13}{'GiB per rank':>14}{'clips/s':>10}"
    for name, policy in plan.policies.items():
        note = "" if policy.fits else "  does not fit"
        chosen = "  the recipe's" if name == plan.parallel.checkpointing else ""
        yield (
            f"  {name:<14}{policy.recomputed / 1e9:>14.1f}{policy.activations / GIB:>13.2f}{policy.memory / GIB:>14.2f}"
            f"{policy.clips_per_second:>10.0f}{note}{chosen}"
        )


def _published(plan: Plan) -> Iterator[str]:
    if plan.comparison is not None:
        yield "\n  compared with the paper"
        yield from plan.comparison.to_lines()


def _assumptions(plan: Plan) -> Iterator[str]:
    cluster, parallel = plan.cluster, plan.parallel
    widths = sorted({part.width for part in plan.flops})
    peak = cluster.gpu.peak[parallel.precision]
    rates = {
        width: sustained_flops(cluster.gpu, parallel.precision, cluster.kernel, width, cluster.efficiency)
        for width in widths
    }
    shares = ", ".join(f"{rate / peak:.0%} at D {width}" for width, rate in rates.items())
    yield "\n  assumptions, none of them measured on these GPUs"
    yield f"  share of {peak / 1e12:.0f} TFLOP/s by {cluster.kernel}: {shares} (--efficiency sets one for all)"
    if parallel.quantized is not None:
        yield (
            f"  the same shares of {cluster.gpu.peak[parallel.quantized] / 1e12:.0f} TFLOP/s for the teachers' linear "
            f"layers in {parallel.quantized}; the time for quantizing their inputs is not counted"
        )
    yield (
        f"  {LINK_SHARE:.0%} of links; {LAUNCH * 1e6:.0f} us to launch a kernel; {RESERVED / GIB:.1f} GiB and "
        f"{FRAGMENTED:.0%} of memory lost"
    )
    yield (
        f"  {HOOK[parallel.stage] * 1e6:.0f} us of host time for DeepSpeed's hook on each of {plan.tensors} parameter "
        "tensors in every backward pass, as measured on a CPU"
    )
    if any(parallel.prefetched):
        yield "  phases are added up: the time saved by teachers that run in parallel with the student is not counted"
    yield (
        f"  {cluster.videos} videos of {cluster.video.width}x{cluster.video.height} pixels and {cluster.video.frames} "
        f"frames, a key frame every {cluster.video.keyframes} "
        "(--videos, --height, --width, --video-frames, --keyframes)"
    )
    yield (
        f"  DALI: {POOL} frames for each clip that is decoded, {OUTPUTS} batches of whole clips, {SURFACES} frames for "
        f"each of up to {CACHED} NVDEC decoders"
    )
    yield f"  {cluster.gpu.name}: {cluster.gpu.source}"
