"""Placement rules: each input changes the expected decisions, and engine and planner follow them."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import mvd_scale
from mvd_scale.config import (
    DetectionRecipe,
    FinetuneRecipe,
    Recipe,
    RunRecipe,
    load_detection_recipe,
    load_finetune_recipe,
)
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder, Student
from mvd_scale.models.quantization import REFUSED
from mvd_scale.performance.planning.hardware import GPUS, capabilities_of
from mvd_scale.performance.planning.parallelism import placement_on, setting_from
from mvd_scale.performance.planning.workload import build_workload
from mvd_scale.targets import MaskedDistillation, build_targets
from mvd_scale.training import compile as compilation
from mvd_scale.training import deepspeed_engine as engine
from mvd_scale.training.capabilities import make_placement, probe_capabilities, ranks_by_host, teacher_facts
from mvd_scale.training.deepspeed_engine import train_engine
from mvd_scale.training.placement import (
    CALIBRATED,
    GATHERED,
    LAYERWISE,
    Capabilities,
    Devices,
    Placement,
    Teacher,
    TeacherShards,
    decide_placement,
    needs_compiler,
)
from mvd_scale.training.teachers import place as teachers
from mvd_scale.training.teachers import prefetch
from mvd_scale.training.teachers.place import place_teachers
from mvd_scale.training.teachers.prefetch import make_prefetcher
from mvd_scale.utils import env_report as capabilities

SHAPE = {"width": 32, "depth": 2, "heads": 2, "frames": 4, "input_size": 32}
DECODER = {"width": 16, "depth": 1, "heads": 2}
VIDEO = {"kind": "video_teacher", "model": SHAPE, "decoder": DECODER}
MOMENTUM = {"kind": "momentum", "decoder": {**DECODER, "depth": 2}}
TARGETS = {"video": VIDEO, "average": MOMENTUM, "pixels": {"kind": "pixels", "decoder": DECODER}}

GPU = Devices("cuda", 8, 4, Capabilities("H100", bf16=True, fp8=True))
CPU = Devices("cpu", 8, 4, Capabilities(bf16=True))

BASE = {"precision": "fp16", "zero_stage": 2, "micro_batch": 4, "accumulation": 2, "gradient_checkpointing": "none",
        "compile": True, "batch_decoders": True, "decoder": "nvdec", "data_prefetch": 2}  # fmt: skip
"""Values of the decisions for `recipe()` on `GPU`."""

FROZEN = {"precision": "fp16", "rest": "fp16", "shards": None, "compile": True, "cuda_graph": True, "prefetch": True}
MOVING = {**FROZEN, "prefetch": False}
SHARDED = {"shards": TeacherShards("host", 4), "compile": False, "cuda_graph": False}
ON_CPU = {"compile": False, "cuda_graph": False, "prefetch": False}


def recipe(**changes: Any) -> Recipe:
    """Create the test recipe with changed values; `section__key` changes a key of a section."""
    values: dict[str, Any] = {
        "run": {"folder": "unused"},
        "model": SHAPE,
        "data": {"mask": {"ratio": 0.5}},
        "targets": TARGETS,
        "training": {"epochs": 2, "global_batch": 64, "micro_batch": 4, "base_lr": 1e-3, "warmup_epochs": 1,
                     "precision": "fp16"},
        "teachers": {},
    }  # fmt: skip
    for name, value in changes.items():
        section, _, key = name.partition("__")
        values[section] = {**values[section], key: value} if key else value
    return Recipe.model_validate(values)


def targets_of(config: Recipe) -> Any:
    return build_targets(config, lambda name: Encoder(config.model, final_norm=False))


def facts(config: Recipe) -> list[Teacher]:
    return teacher_facts(targets_of(config))


def values_of(decisions: Any, names: Any) -> dict[str, Any]:
    return {name: getattr(decisions, name).value for name in names}


def teacher_change(frozen: dict[str, Any], moving: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"video": frozen, "average": frozen if moving is None else moving}


WORLD = {**SHARDED, "shards": TeacherShards("world", 8)}
MOVED = {**SHARDED, "shards": TeacherShards("world", 8, moves=True)}
EXACT = {"precision": "bf16", "rest": "bf16"}

CASES: dict[str, tuple[dict[str, Any], Devices, dict[str, Any], dict[str, Any]]] = {
    # Changes of the recipe, devices, changed decisions of the run, and changed decisions of each teacher.
    "nothing": ({}, GPU, {}, {}),
    "decoding on the host": ({"data__decoder": "host"}, GPU, {"decoder": "host"}, {}),
    "GPU without NVDEC": (
        {}, replace(GPU, capabilities=Capabilities("H100", fp8=True, no_nvdec="no library")), {"decoder": "host"}, {},
    ),
    "student in bf16": ({"training__precision": "bf16"}, GPU, {"precision": "bf16"}, {}),
    "teachers in bf16": ({"teachers__precision": "bf16"}, GPU, {}, teacher_change(EXACT)),
    "teachers in fp8": (
        {"teachers__precision": "fp8", "targets": {"video": VIDEO}}, GPU, {"batch_decoders": False},
        {"video": {"precision": "fp8", "rest": "bf16"}},
    ),
    "teachers in fp8 are never sharded": (
        {"teachers__precision": "fp8", "teachers__auto_shard_above": 1, "targets": {"video": VIDEO}}, GPU,
        {"batch_decoders": False}, {"video": {"precision": "fp8", "rest": "bf16"}},
    ),
    "ZeRO-1": ({"training__deepspeed": "zero1"}, GPU, {"zero_stage": 1}, {}),
    "ZeRO-3": (
        {"training__deepspeed": "zero3"}, GPU, {"zero_stage": 3, "compile": False, "batch_decoders": False}, {},
    ),
    "shards required": ({"teachers__sharding": "zero3"}, GPU, {}, teacher_change(SHARDED, MOVED)),
    "shards of large teachers": ({"teachers__auto_shard_above": 1000}, GPU, {}, teacher_change(SHARDED, MOVED)),
    "no shards required": ({"teachers__auto_shard_above": 1000, "teachers__sharding": "replicated"}, GPU, {}, {}),
    "shards over all hosts": (
        {"teachers__sharding": "zero3", "teachers__shard_over": "world"}, GPU, {}, teacher_change(WORLD, MOVED),
    ),
    "shards on one host": (
        {"teachers__sharding": "zero3"}, replace(GPU, ranks_per_host=8), {}, teacher_change(WORLD, MOVED),
    ),
    "shards on hosts of one rank": (
        {"teachers__sharding": "zero3"}, replace(GPU, ranks_per_host=1), {}, teacher_change(WORLD, MOVED),
    ),
    "one rank has no automatic shards": (
        {"teachers__auto_shard_above": 1000}, replace(GPU, ranks=1, ranks_per_host=1), {"accumulation": 16}, {},
    ),
    "four ranks": ({}, replace(GPU, ranks=4), {"accumulation": 4}, {}),
    "larger micro batches": ({"training__micro_batch": 9}, GPU, {"micro_batch": 8, "accumulation": 1}, {}),
    "micro batches of any size": ({"training__micro_batch": None}, GPU, {"micro_batch": 8, "accumulation": 1}, {}),
    "global batch": ({"training__global_batch": 32}, GPU, {"accumulation": 1}, {}),
    "copies": ({"data__copies": 8, "training__micro_batch": 8}, GPU, {"micro_batch": 8, "accumulation": 1}, {}),
    "gradient checkpointing": (
        {"training__gradient_checkpointing": "block"}, GPU, {"gradient_checkpointing": "block"}, {},
    ),
    "student as it is": ({"training__compile": False}, GPU, {"compile": False}, {}),
    "teachers as they are": ({"teachers__compile": False}, GPU, {}, teacher_change({"compile": False})),
    "no graphs": ({"teachers__cuda_graphs": False}, GPU, {}, teacher_change({"cuda_graph": False})),
    "no prefetch": ({"teachers__prefetch": False}, GPU, {}, {"video": {"prefetch": False}}),
    "decoders by themselves": ({"training__batch_decoders": False}, GPU, {"batch_decoders": False}, {}),
    "decoders that differ": (
        {"targets": {"video": VIDEO, "average": MOMENTUM}}, GPU, {"batch_decoders": False}, {},
    ),
    "decoders of other tokens": (
        {"targets": {"video": VIDEO, "pixels": {**TARGETS["pixels"], "visible_weight": 0.5}}}, GPU,
        {"batch_decoders": False}, {},
    ),
    "deeper queue of clips": ({"data__prefetch": 5}, GPU, {"data_prefetch": 5}, {}),
    "no compiler": (
        {}, replace(GPU, capabilities=Capabilities("H100", fp8=True, no_compile="Triton is off")),
        {"compile": False}, teacher_change({"compile": False}),
    ),
    "GPU without bf16 and fp8": ({}, replace(GPU, capabilities=Capabilities("V100", bf16=False)), {}, {}),
    "CPU": (
        {"training__precision": "bf16"}, CPU,
        {"precision": "bf16", "compile": False, "batch_decoders": False}, teacher_change({**EXACT, **ON_CPU}),
    ),
    "CPU with required compilation": (
        {"device": "cpu", "training__precision": "fp32", "training__compile": True, "training__batch_decoders": True,
         "teachers__compile": True}, CPU, {"precision": "fp32"},
        teacher_change({"precision": "fp32", "rest": "fp32", **ON_CPU, "compile": True}),
    ),
    "int8": (
        {"training__precision": "fp32", "teachers__precision": "int8", "targets": {"video": VIDEO}}, CPU,
        {"precision": "fp32", "compile": False, "batch_decoders": False},
        {"video": {"precision": "int8", "rest": "bf16", **ON_CPU}},
    ),
    "int8 without bf16": (
        {"training__precision": "fp32", "teachers__precision": "int8", "targets": {"video": VIDEO}},
        replace(CPU, capabilities=Capabilities(bf16=False)),
        {"precision": "fp32", "compile": False, "batch_decoders": False},
        {"video": {"precision": "int8", "rest": "fp32", **ON_CPU}},
    ),
}  # fmt: skip


def expected(case: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    changes, devices, run, of_teachers = CASES[case]
    if devices.kind == "cpu":
        run = {"decoder": "host", **run}
    usual = {"video": FROZEN, "average": MOVING}
    names = [name for name in changes.get("targets", TARGETS) if name in usual]
    return BASE | run, {name: usual[name] | of_teachers.get(name, {}) for name in names}


@pytest.mark.parametrize("case", CASES)
def test_each_input_changes_the_expected_decisions(case: str) -> None:
    changes, devices, _, _ = CASES[case]
    config = recipe(**changes)
    placement = decide_placement(config, facts(config), devices)
    run, of_teachers = expected(case)
    assert values_of(placement, BASE) == run
    assert {teacher.name: values_of(teacher, FROZEN) for teacher in placement.teachers} == of_teachers
    for name, decision in placement.decisions():
        assert decision.reason, name


class Spy:
    """Recorder of the engine's calls for a placement, with substitutes for DeepSpeed, sharding and quantization."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: dict[str, Any] = {}
        self.compiled: list[nn.Module] = []
        monkeypatch.setattr(teachers, "cast_frozen", self.cast_frozen)
        monkeypatch.setattr(teachers, "shard_teacher", self.shard)
        monkeypatch.setattr(compilation, "compile_blocks", self.compiled.append)
        monkeypatch.setattr(engine, "compile_blocks", self.compiled.append)
        monkeypatch.setattr(engine, "import_deepspeed", lambda: SimpleNamespace(initialize=self.initialize))
        monkeypatch.setattr(prefetch, "PrefetchStream", lambda *_: "ahead")

    def cast_frozen(self, teacher: nn.Module, precision: str, _: Any, rest: str) -> nn.Module:
        teacher.seen = {"precision": precision, "rest": rest, "shards": None}  # type: ignore[assignment]
        return teacher

    def shard(self, teacher: nn.Module, precision: str, ranks: Ranks, *, moves: bool, over: str) -> nn.Module:
        teacher.seen = {"precision": precision, "rest": precision, "shards": (over, moves)}  # type: ignore[assignment]
        return teacher

    def initialize(self, model: nn.Module, config: dict[str, Any], **_: Any) -> tuple[SimpleNamespace]:
        self.config = config
        return (SimpleNamespace(module=model, optimizer=SimpleNamespace()),)

    def run(self, config: Recipe, placement: Placement) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Set up a run, and return the decisions that its calls amount to, for the run and by teacher."""
        ranks = Ranks(0, 0, placement.devices.ranks, torch.device("cpu"))
        targets = targets_of(config)
        student = Student(
            config.model, {name: (config.targets[name].head_config, t.channels) for name, t in targets.items()}
        )
        place_teachers(targets, placement, ranks)
        trained = train_engine(student, [{"params": list(student.parameters())}], config, placement, ranks)
        begun = make_prefetcher(MaskedDistillation(targets), [placement], ranks.device) is not None
        deepspeed = self.config
        run = {
            "precision": next((p for p in ("fp16", "bf16") if deepspeed[p]["enabled"]), "fp32"),
            "zero_stage": deepspeed["zero_optimization"]["stage"],
            "micro_batch": deepspeed["train_micro_batch_size_per_gpu"],
            "accumulation": deepspeed["gradient_accumulation_steps"],
            "gradient_checkpointing": student.encoder.blocks.gradient_checkpointing,
            "compile": any(module is trained.module for module in self.compiled),
            "batch_decoders": len(student.grouped_decoders) > 0,
        }
        of_teachers = {}
        for name in (teacher.name for teacher in placement.teachers):
            called = targets[name].teacher
            graphed = isinstance(called, compilation.CudaGraphTeacher)
            inner = called.teacher if graphed else called
            done = {"compile": any(module is inner for module in self.compiled), "cuda_graph": graphed}
            of_teachers[name] = {**inner.seen, **done, "prefetch": begun and targets[name].prefetchable}
        return run, of_teachers


@pytest.mark.parametrize("case", CASES)
def test_the_engine_follows_the_placement(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    changes, devices, _, _ = CASES[case]
    config = recipe(**changes)
    run, of_teachers = Spy(monkeypatch).run(config, decide_placement(config, facts(config), devices))
    expected_run, expected_of_teachers = expected(case)
    del expected_run["data_prefetch"], expected_run["decoder"]
    for decisions in expected_of_teachers.values():
        shards = decisions["shards"]
        decisions["shards"] = shards and (shards.over, shards.moves)
    assert run == expected_run
    assert of_teachers == expected_of_teachers


@pytest.mark.parametrize("case", CASES)
def test_the_planner_uses_the_same_placement(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    changes, devices, _, _ = CASES[case]
    config = recipe(**changes).model_copy(update={"device": devices.kind})
    monkeypatch.setattr("mvd_scale.performance.planning.parallelism.capabilities_of", lambda gpu: devices.capabilities)
    monkeypatch.setattr(
        "mvd_scale.performance.planning.parallelism.bf16_instructions", lambda: devices.capabilities.bf16
    )
    workload = build_workload(config)
    placement = placement_on(config, workload, devices.ranks, per_node=devices.ranks_per_host, gpu=GPUS["H100"])
    assert placement == decide_placement(config, facts(config), devices)
    parallel, (run, of_teachers) = setting_from(placement, config), expected(case)
    assert {
        "precision": parallel.precision,
        "zero_stage": parallel.stage,
        "micro_batch": parallel.micro,
        "accumulation": parallel.accumulation,
        "gradient_checkpointing": parallel.checkpointing,
        "compile": run["compile"],
        "batch_decoders": parallel.batched,
        "decoder": parallel.decoder,
        "data_prefetch": parallel.prefetch,
    } == run
    frozen = of_teachers["video"]
    assert (parallel.quantized or parallel.teacher_precision) == frozen["precision"]
    assert parallel.teacher_precision == frozen["rest"]
    for column, name in (
        (parallel.shards, "shards"),
        (parallel.prefetched, "prefetch"),
        (parallel.graphed, "cuda_graph"),
    ):
        assert column == tuple(decisions[name] for decisions in of_teachers.values()), name


@pytest.mark.parametrize(
    ("changes", "devices", "message"),
    [
        ({}, CPU, "precision fp16 needs a GPU: on CPUs use bf16 or fp32"),
        ({"training__precision": "fp32", "teachers__precision": "fp16"}, CPU, "precision fp16 needs a GPU"),
        (
            {"training__precision": "bf16"}, replace(GPU, capabilities=capabilities_of(GPUS["V100"])),
            "V100 has no bf16: use fp16 or fp32",
        ),
        (
            {"teachers__precision": "bf16"}, replace(GPU, capabilities=capabilities_of(GPUS["V100"])),
            "V100 has no bf16: use fp16 or fp32",
        ),
        (
            {"teachers__precision": "fp8", "targets": {"video": VIDEO}},
            replace(GPU, capabilities=capabilities_of(GPUS["A100"])), f"A100: {REFUSED['fp8']}",
        ),
        (
            {"training__precision": "fp32", "teachers__precision": "fp8", "targets": {"video": VIDEO}}, CPU,
            REFUSED["fp8"],
        ),
        ({"teachers__precision": "int8", "targets": {"video": VIDEO}}, GPU, f"H100: {REFUSED['int8']}"),
        (
            {"data__decoder": "nvdec"}, replace(GPU, capabilities=Capabilities("H100", no_nvdec="no library")),
            "data.decoder is nvdec, but there is no NVDEC: no library. Set data.decoder to auto or host",
        ),
        (
            {"training__compile": True}, replace(GPU, capabilities=Capabilities("H100", no_compile="it lacks gcc")),
            "training.compile is true, but it lacks gcc; set it to auto to run without it",
        ),
        (
            {"teachers__compile": True}, replace(GPU, capabilities=Capabilities("H100", no_compile="it lacks gcc")),
            "teachers.compile is true, but it lacks gcc; set it to auto to run without it",
        ),
        (
            {"teachers__compile": True, "teachers__auto_shard_above": 1000}, GPU,
            f"teachers.compile is true, but {GATHERED}; set it to auto to run without it",
        ),
        (
            {"teachers__cuda_graphs": True, "teachers__auto_shard_above": 1000}, GPU,
            f"teachers.cuda_graphs is true, but {GATHERED}; set it to auto to run without it",
        ),
        (
            {"training__precision": "bf16", "teachers__cuda_graphs": True}, CPU,
            "teachers.cuda_graphs is true, but there is no GPU; set it to auto to run without it",
        ),
        ({"training__compile": True, "training__deepspeed": "zero3"}, GPU, "training.compile is true, but .* stage 3"),
        (
            {"training__batch_decoders": True, "training__deepspeed": "zero3"}, GPU,
            "training.batch_decoders is true, but .* stage 3",
        ),
        ({"training__global_batch": 60}, GPU, "training.global_batch 60 cannot be split over 8 ranks"),
    ],
)  # fmt: skip
def test_unsupported_requirements_raise_an_error(changes: dict[str, Any], devices: Devices, message: str) -> None:
    config = recipe(**changes)
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
        decide_placement(config, facts(config), devices)


def test_reasons_name_the_keys_and_the_obstacles() -> None:
    config = recipe(training__deepspeed="zero3", teachers__sharding="zero3")
    placement = decide_placement(config, facts(config), GPU)
    assert str(placement.teachers[0].precision) == "fp16, because teachers.precision is auto and the device is a GPU"
    assert str(placement.compile) == f"off, because {GATHERED}"
    assert str(placement.batch_decoders) == f"off, because {LAYERWISE}"
    assert placement.teachers[0].cuda_graph.reason == GATHERED
    text = "\n".join(placement.to_lines())
    assert text.startswith("placement on 8 x H100, 4 per host (decision, value, reason)")
    assert "over 4 ranks of each host" in text
    # One row for a decision that teachers share, and one row per teacher if they differ.
    assert text.count("teachers: precision") == 1
    assert text.count("teacher: prefetch") == 2
    eight = recipe(training__precision="fp32", teachers__precision="int8", targets={"video": VIDEO})
    placed = decide_placement(eight, facts(eight), replace(CPU, capabilities=Capabilities(bf16=False)))
    assert "no instructions for bf16" in "\n".join(placed.to_lines())
    asked = eight.model_copy(update={"teachers": eight.teachers.model_copy(update={"compile": True})})
    with pytest.raises(UserError, match=CALIBRATED):
        decide_placement(asked, facts(asked), CPU)


@pytest.mark.parametrize(
    "config",
    [
        load_finetune_recipe("finetune/b_k400", ["--run.folder", "x"]),
        load_detection_recipe("detection/b_ava", ["--run.folder", "x"]),
    ],
)
def test_finetuning_and_detection_have_no_teachers(config: RunRecipe) -> None:
    assert isinstance(config, FinetuneRecipe | DetectionRecipe)
    placement = decide_placement(config, [], GPU)
    assert placement.teachers == ()
    assert placement.batch_decoders.value is False
    assert placement.compile.value is True
    assert placement.precision.value == config.training.precision


def test_a_run_logs_its_placement(caplog: pytest.LogCaptureFixture) -> None:
    config = recipe(training__precision="fp32")
    with caplog.at_level("INFO"):
        placement = make_placement(config, targets_of(config), Ranks(0, 0, 1, torch.device("cpu")))
    assert caplog.messages == placement.to_lines()
    assert len(caplog.messages) > 10


def test_the_compiler_is_checked_only_if_blocks_may_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not needs_compiler(recipe(), "cpu")
    assert needs_compiler(recipe(), "cuda")
    assert needs_compiler(recipe(teachers__compile=True), "cpu")
    assert needs_compiler(recipe(training__compile=True), "cpu")
    assert not needs_compiler(recipe(training__compile=False, teachers__compile=False), "cuda")

    def refuse() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", refuse)
    cpu = torch.device("cpu")
    assert probe_capabilities(cpu, compiler=False).no_compile == ""
    config = recipe(training__precision="fp32", training__compile=True)
    with pytest.raises(UserError, match=r"training\.compile is true, but .* install g\+\+"):
        make_placement(config, targets_of(config), Ranks(0, 0, 1, cpu))


def test_capabilities_of_a_gpu_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "_triton", lambda: capabilities.Capability("Triton", False, reason="gone"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    detected = probe_capabilities(torch.device("cuda", 0), compiler=True)
    assert detected == Capabilities("A100", bf16=True, fp8=False, no_compile="Triton is off: gone")
    config = recipe()
    placement = decide_placement(config, facts(config), replace(GPU, capabilities=detected))
    assert str(placement.compile) == "off, because Triton is off: gone"


def test_ranks_are_grouped_by_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(hosts: list[str], _: str) -> None:
        hosts[:] = ["a", "b", "a"]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    ranks = Ranks(1, 0, 3, torch.device("cpu"), host="b")
    assert ranks_by_host(ranks) == {"a": [0, 2], "b": [1]}
    config = recipe(training__precision="fp32", training__global_batch=96, teachers__sharding="zero3")
    placement = make_placement(config, targets_of(config), ranks)
    assert placement.devices.ranks_per_host == 2
    assert placement.teacher("video").shards.value == TeacherShards("host", 2)


OWNED = {
    "training": {
        "precision", "bf16_products", "deepspeed", "compile", "batch_decoders", "gradient_checkpointing", "micro_batch",
    },
    "teachers": {"precision", "sharding", "auto_shard_above", "shard_over", "compile", "cuda_graphs", "prefetch"},
    "data": {"prefetch"},
}  # fmt: skip
"""Keys of recipes that only the placement reads, by section."""

OBEDIENT = [
    "training/deepspeed_engine.py", "training/compile.py", "training/teachers/place.py",
    "training/teachers/cuda_graph.py",
    "training/teachers/prefetch.py", "training/teachers/fidelity.py", "training/capabilities.py",
    "performance/planning/parallelism.py", "performance/planning/plan.py", "performance/planning/plan_report.py",
    "performance/planning/memory.py", "performance/planning/step_time.py", "performance/planning/communication.py",
]  # fmt: skip
"""Modules of the engine and the planner, which must not contain placement rules."""


def rules_in(source: str) -> list[str]:
    """List places of a module that contain a placement rule: they read a key of `OWNED`, or compare with `auto`."""
    places = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            section = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if node.attr in OWNED.get(section, ()):
                places.append(f"{section}.{node.attr}, line {node.lineno}")
        if isinstance(node, ast.Compare) and "auto" in {getattr(part, "value", None) for part in ast.walk(node)}:
            places.append(f"auto, line {node.lineno}")
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            places += [f"{name}, line {node.lineno}" for name in names & {"TeacherConfig", "TrainingConfig"}]
    return places


@pytest.mark.parametrize("module", OBEDIENT)
def test_engine_and_planner_contain_no_placement_rule(module: str) -> None:
    assert rules_in((Path(mvd_scale.__file__).parent / module).read_text()) == []


def test_placement_rules_are_detected() -> None:
    assert rules_in("if recipe.teachers.sharding == 'auto': pass") == ["auto, line 1", "teachers.sharding, line 1"]
    assert rules_in("training = recipe.training\ntraining.compile") == ["training.compile, line 2"]
    assert rules_in("from mvd_scale.config import TeacherConfig") == ["TeacherConfig, line 1"]


def test_all_keys_of_the_placement_exist() -> None:
    config = recipe()
    for section, keys in OWNED.items():
        assert keys <= type(getattr(config, section)).model_fields.keys()


def test_the_placement_module_queries_no_device() -> None:
    source = (Path(mvd_scale.__file__).parent / "training/placement.py").read_text()
    imported = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    imported |= {
        alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for alias in node.names
    }
    assert not any(name and name.partition(".")[0] in ("torch", "deepspeed") for name in imported)
    assert "mvd_scale.distributed.process_group" not in imported
