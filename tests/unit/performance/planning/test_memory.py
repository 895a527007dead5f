"""Predicted memory is within 10 % of what a run on the CPU allocates, by stage, sharding and checkpointing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from torch.profiler import ProfilerActivity, profile, record_function

from mvd_scale.config import load_recipe
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.performance.planning import memory as memory_model
from mvd_scale.performance.planning.memory import predict_memory, predict_students_memory
from mvd_scale.performance.planning.parallelism import parallel_config
from mvd_scale.performance.planning.workload import build_workload
from mvd_scale.targets import FrozenTeacher, build_targets
from mvd_scale.targets.build import init_teacher
from mvd_scale.training.capabilities import make_placement
from mvd_scale.training.teachers.place import cast_teacher
from tests.fork_server import ForkServer

from .memory_ranks import clips, held_from, recipe

CASE: dict[str, Any] = {
    "world": 1, "micro": 16, "accumulation": 1, "deepspeed": "zero2", "teachers": "replicated", "checkpointing": "none",
    "batched": False, "fake": False, "students": {},
}  # fmt: skip
SMALL = {"width": 192, "heads": 3}
CASES: dict[str, dict[str, Any]] = {
    "stage 2, attention again": {"checkpointing": "attention"},
    "stage 2, decoders together": {"batched": True},
    "stage 3, blocks again": {"checkpointing": "block", "deepspeed": "zero3"},
    "two ranks, stage 3, sharded teachers": {"world": 2, "deepspeed": "zero3", "teachers": "zero3"},
    "two students": {"students": {"small": {"model": SMALL}, "large": {"training": {"deepspeed": "zero1"}}}},
    "64 ranks, stage 1": {"world": 64, "deepspeed": "zero1", "fake": True},
    "64 ranks, stage 2, sharded teachers": {"world": 64, "teachers": "zero3", "fake": True},
    "64 ranks, stage 3, sharded teachers": {"world": 64, "deepspeed": "zero3", "teachers": "zero3", "fake": True},
}


def measure(case: dict[str, Any], fork_server: ForkServer) -> int:
    """The largest peak of all ranks, each a process of its own."""
    code, output = fork_server.run(
        "tests.unit.performance.planning.memory_ranks", json.dumps(case), ranks=1 if case["fake"] else case["world"]
    )
    assert code == 0, output[-3000:]
    # Ranks share a pipe: two of their lines may come as one.
    peaks = [int(peak) for peak in re.findall(r'{"peak": (\d+)}', output)]
    assert len(peaks) == (1 if case["fake"] else case["world"])
    return max(peaks)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_traced_run_holds_what_was_predicted(name: str, fork_server: ForkServer) -> None:
    case = CASE | CASES[name]
    students = {}
    for student, alone in recipe(case).each_student().items():
        workload = build_workload(alone)
        # One batch at a time, without a loader.
        parallel = replace(parallel_config(alone, workload, case["world"]), prefetch=0)
        students[student] = (workload.in_batches_of(parallel.micro), parallel)
    memory = predict_students_memory(students)
    # Of two real ranks one holds more gathered weights while the other is late, as on a busy machine.
    late = case["world"] > 1 and not case["fake"]
    measured = min(measure(case, fork_server) for _ in range(2 if late else 1))
    assert memory.peak == pytest.approx(measured, rel=0.1)
    # No part decides alone, so one that is wrong is seen.
    assert max(memory.parts.values()) < 0.5 * measured


def test_traced_int8_teachers_hold_what_was_predicted() -> None:
    """At rest, and while they compute features."""
    made = recipe(CASE)
    made = made.model_copy(update={"teachers": made.teachers.model_copy(update={"precision": "int8"})})
    micro = 4
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        targets = build_targets(made, lambda name: init_teacher(made, name))
        placement = make_placement(made, targets, Ranks(0, 0, 1, torch.device("cpu")))
        for name, target in targets.items():
            assert isinstance(target, FrozenTeacher)
            target.teacher = cast_teacher(target.teacher, placement.teacher(name), torch.device("cpu"))
        drawn = clips(made, micro)
        with record_function("at rest"):
            pass
        for target in targets.values():
            target.features(drawn)
    rest, peak = held_from(profiler, "at rest")
    workload = build_workload(made)
    memory = predict_memory(workload, replace(parallel_config(made, workload, 1, micro=micro), prefetch=0))
    phases = [memory.phases[f"{name} teacher"] for name in targets]
    expected = phases[0]["teachers"] + phases[0]["batches"]
    assert expected == pytest.approx(rest, rel=0.03)
    assert expected + max(phase["workspace"] for phase in phases) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("world", [1, 8, 64])
def test_model_states_are_those_that_deepspeed_estimates(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    """Its estimate holds 16-bit weights and gradients, float32 gradients at the step, and the optimizer's states."""
    # Of all parameters at once, as of a single group.
    monkeypatch.setattr(memory_model, "LARGEST_GROUP", 2**40)
    made = load_recipe("distill/b_from_b", ["--training.deepspeed", "zero2"])
    workload = build_workload(made)
    parallel = parallel_config(made, workload, world)
    step = predict_memory(workload, parallel).phases["optimizer step"]
    _, estimated = estimate_zero2_model_states_mem_needs(workload.parameters, world, cpu_offload=False)
    # The estimate leaves out that gradients are flattened into a copy before they are widened.
    flattened = 2 * workload.parameters / world
    assert step["weights"] + step["optimizer"] + step["gradients"] - flattened == pytest.approx(estimated, rel=1e-3)

    made = load_recipe("distill/b_from_b", ["--training.deepspeed", "zero3"])
    parallel = parallel_config(made, workload, world)
    step = predict_memory(workload, parallel).phases["optimizer step"]
    _, estimated, _ = estimate_zero3_model_states_mem_needs(workload.parameters, 0, world, 1, False, False)
    bucket, whole = 2 * parallel.zero["reduce_bucket_size"], 2 * workload.unsharded
    # The estimate leaves out buckets, what stays whole, and one of the two widths of gradients.
    held = step["weights"] + step["optimizer"] + step["gradients"] - bucket - whole
    assert held - 2 * workload.parameters / world == pytest.approx(estimated, rel=1e-3)


def test_what_a_stage_shards_shrinks_with_the_ranks() -> None:
    shares = {}
    for stage in (1, 2, 3):
        made = load_recipe("distill/l_from_l", ["--training.deepspeed", f"zero{stage}", "--training.micro_batch", "2"])
        workload = build_workload(made)
        shares[stage] = [predict_memory(workload, parallel_config(made, workload, world)).phases for world in (1, 64)]
    for stage, (alone, many) in shares.items():
        for phase, parts in alone.items():
            assert parts["optimizer"] == pytest.approx(64 * many[phase]["optimizer"], rel=1e-3)
            whole = many[phase]["weights"] / parts["weights"]
            assert (whole < 0.05) == (stage == 3), phase
    # With accumulation, stage 1 keeps gradients whole.
    gradients = {stage: many["optimizer step"]["gradients"] for stage, (_, many) in shares.items()}
    assert gradients[1] > 10 * gradients[2]


def test_checkpointing_and_smaller_micro_batches_save_activations() -> None:
    made = load_recipe("distill/h_from_h")
    workload = build_workload(made)
    parallel = parallel_config(made, workload, 32)
    phase = "start of the backward pass"
    checkpointed = predict_memory(workload, parallel).phases[phase]["activations"]
    stored, without_attention = (
        predict_memory(workload, replace(parallel, checkpointing=policy)).phases[phase]["activations"]
        for policy in ("none", "attention")
    )
    assert checkpointed < 0.1 * stored
    assert 0.6 * stored < without_attention < 0.75 * stored
    half = predict_memory(workload, replace(parallel, micro=parallel.micro // 2)).phases[phase]["activations"]
    assert 2 * half == checkpointed


def test_teachers_that_work_ahead_hold_memory_at_any_time_of_the_step() -> None:
    made = load_recipe("distill/b_from_b", ["--training.micro_batch", "32"])
    workload = build_workload(made)
    graphed = parallel_config(made, workload, 8)
    assert graphed.graphed == (True, True)
    parallel = replace(graphed, graphed=(False, False))
    micro, masked = parallel.micro, 1408
    ahead, alone = (
        predict_memory(workload, parallel),
        predict_memory(workload, replace(parallel, prefetched=(False, False))),
    )
    assert parallel.prefetched == (True, True)
    assert set(alone.phases) - set(ahead.phases) == {"image teacher", "video teacher"}
    for phase, parts in ahead.phases.items():
        without = alone.phases[phase]
        assert parts["prefetched features"] == 2 * micro * masked * 2 * 768
        assert parts["batches"] - without["batches"] == micro * 16 * 224 * 224 * 3
        workspace = max(alone.phases[teacher]["workspace"] for teacher in ("image teacher", "video teacher"))
        assert parts["workspace"] - without.get("workspace", 0) == workspace
    # Each recording keeps what its teacher needs, and its own batch, whichever works.
    recorded = predict_memory(workload, graphed).phases["optimizer step"]["CUDA graphs"]
    needs = sum(alone.phases[teacher]["workspace"] for teacher in ("image teacher", "video teacher"))
    assert recorded == needs + 2 * micro * 16 * 224 * 224 * 3


def test_only_teachers_that_stay_as_they_are_work_ahead_and_only_on_gpus() -> None:
    made = load_recipe("ablations/momentum_b")
    assert parallel_config(made, build_workload(made), 8).prefetched == (False,)
    for words in (["--device", "cpu", "--training.precision", "bf16"], ["--teachers.prefetch", "false"]):
        made = load_recipe("distill/b_from_b", words)
        assert parallel_config(made, build_workload(made), 8).prefetched == (False, False)


def test_decoders_together_hold_their_stacked_weights_wherever_they_stand() -> None:
    other = "{kind: pixels, decoder: {width: 384, depth: 4, heads: 6}}"
    made = load_recipe("distill/b_from_b", ["--targets.pixels", other])
    workload = build_workload(made)
    parallel = parallel_config(made, workload, 8)
    assert parallel.batched
    phase = "start of the backward pass"
    together, apart = (predict_memory(workload, replace(parallel, batched=on)).phases[phase] for on in (True, False))
    # Of two decoders: the embedding and two blocks of width 768, in 16 bits.
    assert together["stacked weights"] == 2 * 2 * (768 * 768 + 2 * 12 * 768 * 768)
    assert "stacked weights" not in apart
    assert together["workspace"] > apart["workspace"]


@pytest.mark.parametrize(
    ("words", "batched"),
    [
        ([], True),
        (["--training.batch_decoders", "false"], False),
        (["--training.deepspeed", "zero3"], False),
        (["--device", "cpu", "--training.precision", "bf16"], False),
        (["--device", "cpu", "--training.precision", "bf16", "--training.batch_decoders", "true"], True),
    ],
)
def test_decoders_are_together_on_gpus_that_have_their_weights(words: list[str], batched: bool) -> None:
    made = load_recipe("distill/b_from_b", words)
    assert parallel_config(made, build_workload(made), 8).batched == batched


def test_offloaded_states_are_not_on_the_gpu() -> None:
    made = load_recipe("distill/b_from_b", ["--training.deepspeed", "zero3_offload"])
    workload = build_workload(made)
    parts = predict_memory(workload, parallel_config(made, workload, 8)).parts
    assert parts["optimizer"] == 0
    assert parts["weights"] == 2 * workload.unsharded
