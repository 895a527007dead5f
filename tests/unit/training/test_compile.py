"""Compiled blocks give the same results and share one program; impossible requests are refused with a reason."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from mvd_scale.config import DecoderConfig, Recipe
from mvd_scale.config.deepspeed import check_deepspeed_config
from mvd_scale.config.training import Checkpointing
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder, Student
from mvd_scale.models.blocks import Blocks, set_gradient_checkpointing
from mvd_scale.models.layers.drop_path import DropPath
from mvd_scale.targets import build_targets
from mvd_scale.training import capabilities as device
from mvd_scale.training import deepspeed_engine as engine
from mvd_scale.training.capabilities import make_placement, teacher_facts
from mvd_scale.training.compile import compile_blocks
from mvd_scale.training.deepspeed_engine import train_engine
from mvd_scale.training.optimizer import parameter_groups
from mvd_scale.training.placement import Capabilities, Decision, Devices, decide_placement
from mvd_scale.training.teachers import cuda_graph
from mvd_scale.training.teachers.cuda_graph import CudaGraphTeacher
from mvd_scale.training.teachers.place import place_teachers
from mvd_scale.utils import env_report as capabilities

CPU = torch.device("cpu")
CAN_COMPILE = capabilities.torch_compile("cpu")


@pytest.fixture(autouse=True)
def programs() -> Iterator[dict[str, int]]:
    """Counters of torch.compile: `unique_graphs` is the number of programs."""
    torch.compiler.reset()
    counters.clear()
    yield counters["stats"]
    torch.compiler.reset()


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are traced, cut and differentiated as they are for a GPU, but no code is made of them."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def results(blocks: Blocks, tokens: Tensor) -> list[Tensor]:
    """The output and all gradients."""
    tokens = tokens.clone().requires_grad_()
    output = blocks(tokens)
    output.square().sum().backward()
    return [output.detach(), *(leaf.grad for leaf in (tokens, *blocks.parameters()))]  # type: ignore[list-item]


@pytest.mark.slow
@pytest.mark.skipif(not CAN_COMPILE.on, reason=CAN_COMPILE.reason)
def test_compiled_blocks_give_the_same_output_and_gradients(programs: dict[str, int]) -> None:
    torch.manual_seed(0)
    blocks = Blocks(32, 3, 2)
    blocks.gradient_checkpointing = "block"
    tokens = torch.randn(2, 12, 32)
    expected = results(copy.deepcopy(blocks), tokens)
    compile_blocks(nn.ModuleDict({"blocks": blocks}))
    for ours, theirs in zip(results(blocks, tokens), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert programs["unique_graphs"] == 1


def test_blocks_of_all_rates_of_stochastic_depth_are_one_program(traced_only: None, programs: dict[str, int]) -> None:
    model = nn.ModuleDict({"blocks": Blocks(32, 5, 2, drop_path=0.3)})
    compile_blocks(model)
    for _ in range(2):
        model["blocks"](torch.randn(2, 12, 32, requires_grad=True)).sum().backward()
    # The first block has no stochastic depth.
    assert programs["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_long_clips_of_bf16_are_one_program_too(traced_only: None, programs: dict[str, int]) -> None:
    model = nn.ModuleDict({"blocks": Blocks(64, 2, 2).bfloat16().requires_grad_(False)})
    compile_blocks(model)
    model["blocks"](torch.randn(1, 600, 64).bfloat16())
    assert programs["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("has_argument", [True, False])
def test_more_shapes_than_torchs_own_limit_are_compiled(
    has_argument: bool, monkeypatch: pytest.MonkeyPatch, programs: dict[str, int]
) -> None:
    """`torch.compile` has the argument `recompile_limit` from torch 2.12 on."""
    compile_any = torch.compile
    if has_argument and "recompile_limit" not in inspect.signature(torch.compile).parameters:
        pytest.skip("this torch has no such argument")

    def without_argument(model: Any, *, dynamic: bool) -> Any:
        return compile_any(model, backend="aot_eager", dynamic=dynamic)

    def with_argument(model: Any, *, dynamic: bool, recompile_limit: int) -> Any:
        return compile_any(model, backend="aot_eager", dynamic=dynamic, recompile_limit=recompile_limit)

    monkeypatch.setattr(torch, "compile", with_argument if has_argument else without_argument)
    model = nn.ModuleDict({"blocks": Blocks(32, 1, 2)}).requires_grad_(False)
    with torch._dynamo.config.patch(recompile_limit=2):
        compile_blocks(model)
        assert torch._dynamo.config.recompile_limit == (2 if has_argument else 64)
        for clips in range(1, 11):
            model["blocks"](torch.randn(clips, 4, 32))
    assert programs["unique_graphs"] == 10


def test_decoders_together_are_programs_of_their_own(traced_only: None, programs: dict[str, int]) -> None:
    made = recipe()
    student = two_decoders(made, depth=3)
    student.batch_decoders()
    compile_blocks(student)
    pixels = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    tokens = torch.arange(4).expand(2, 4)
    for _ in range(2):
        sum(predicted.sum() for predicted in student(pixels, tokens, tokens + 4).values()).backward()
    # The encoder's, and those that give all tokens or the masked ones alone.
    assert programs["unique_graphs"] == 3
    assert not counters["graph_break"]


@pytest.mark.parametrize("again", ["block", "attention"])
def test_compiled_decoders_together_drop_the_same_updates_when_recomputed(
    again: Checkpointing, traced_only: None, programs: dict[str, int]
) -> None:
    pixels = torch.randint(0, 256, (4, 4, 32, 32, 3), dtype=torch.uint8)
    tokens = torch.arange(4).expand(4, 4)
    results = []
    for checkpointing in ("none", again):
        torch.manual_seed(0)
        student = two_decoders(recipe(), depth=2, drop_path=0.5)
        student.batch_decoders()
        set_gradient_checkpointing(student, checkpointing)  # type: ignore[arg-type]
        compile_blocks(student.grouped_decoders)
        torch.manual_seed(1)
        predicted = student(pixels, tokens, tokens + 4)
        sum(values.square().sum() for values in predicted.values()).backward()
        gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
        results.append((predicted, gradients))
    torch.testing.assert_close(results[1], results[0])
    assert not counters["graph_break"]


def two_decoders(made: Recipe, depth: int = 1, drop_path: float | None = None) -> Student:
    shape = DecoderConfig(width=16, depth=depth, heads=2, drop_path=drop_path)
    return Student(made.model, {"image": (shape, 8), "video": (shape, 32)})


def recipe(**training: Any) -> Recipe:
    shape = {"width": 32, "depth": 2, "heads": 2, "frames": 4, "input_size": 32}
    decoder = {"width": 16, "depth": 1, "heads": 2}
    return Recipe.model_validate(
        {
            "run": {"folder": "unused"},
            "device": "cpu",
            "model": shape,
            "data": {"mask": {"ratio": 0.5}},
            "targets": {"video": {"kind": "video_teacher", "decoder": decoder, "model": shape}},
            "training": {"epochs": 2, "global_batch": 2, "base_lr": 1e-3, "warmup_epochs": 1, **training},
            "teachers": {"compile": True},
        }
    )


def test_what_the_recipe_asks_for_is_compiled(
    traced_only: None, programs: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "torch_compile", lambda kind: capabilities.Capability("compiler", True))
    made, ranks = recipe(compile=True), Ranks(0, 0, 1, CPU)
    targets = build_targets(made, lambda name: Encoder(made.model, final_norm=False))
    student = Student(made.model, {"video": (made.targets["video"].head_config, 32)})
    placement = make_placement(made, targets, ranks)
    place_teachers(targets, placement, ranks)
    pixels = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        targets["video"].teacher(pixels)  # type: ignore[attr-defined]
    of_teacher = programs["unique_graphs"]
    assert of_teacher == 1

    def initialize(model: nn.Module, **others: Any) -> tuple[SimpleNamespace]:
        return (SimpleNamespace(module=model, optimizer=SimpleNamespace()),)

    monkeypatch.setattr(engine, "import_deepspeed", lambda: SimpleNamespace(initialize=initialize))
    trained = train_engine(student, parameter_groups(student, 0.05), made, placement, ranks)
    tokens = torch.arange(4).expand(2, 4)
    trained.module(pixels, tokens, tokens + 4)["video"].sum().backward()
    # The encoder's blocks, and the decoder's.
    assert programs["unique_graphs"] == of_teacher + 2


def test_weights_that_move_in_place_are_seen(traced_only: None) -> None:
    teacher = nn.ModuleDict({"blocks": Blocks(32, 2, 2)}).eval().requires_grad_(False)
    compile_blocks(teacher)
    tokens = torch.randn(2, 12, 32)
    before = teacher["blocks"](tokens)
    for parameter in teacher.parameters():
        parameter.data.copy_(torch.randn_like(parameter))
    after = teacher["blocks"](tokens)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, copy.deepcopy(teacher)["blocks"](tokens))


def test_what_gathers_its_parameters_is_not_compiled() -> None:
    with pytest.raises(UserError, match=r"training\.compile is true, .* ZeRO stage 3"):
        check_deepspeed_config(recipe(compile=True, deepspeed="zero3"), 1)
    made = recipe(deepspeed="zero3")
    together = made.model_copy(update={"training": made.training.model_copy(update={"batch_decoders": True})})
    with pytest.raises(UserError, match=r"training\.batch_decoders is true, .* ZeRO stage 3"):
        check_deepspeed_config(together, 1)


class Recorded:
    """Stands in for a CUDA graph: fixed buffers, written again by every replay."""

    made = 0

    def __init__(self, function: Any, inputs: list[Tensor]) -> None:
        Recorded.made += 1
        self.function, self.shapes = function, [given.shape for given in inputs]
        self.replays = 0

    def fits(self, inputs: list[Tensor]) -> bool:
        return [given.shape for given in inputs] == self.shapes

    def replay(self, inputs: list[Tensor]) -> Tensor:
        self.replays += 1
        return self.function(*inputs)


def test_a_teacher_is_recorded_once_and_runs_other_shapes_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "CapturedGraph", Recorded)
    monkeypatch.setattr(Recorded, "made", 0)
    made = recipe()
    teacher = Encoder(made.model, final_norm=False).eval()
    graphed = CudaGraphTeacher(teacher)
    pixels = torch.randint(0, 256, (3, 4, 32, 32, 3), dtype=torch.uint8)
    output_tokens = torch.arange(3).expand(3, 3)
    for clips in (2, 2, 3, 2):
        torch.testing.assert_close(
            graphed(pixels[:clips], output_tokens=output_tokens[:clips]),
            teacher(pixels[:clips], output_tokens=output_tokens[:clips]).detach(),
        )
    torch.testing.assert_close(graphed(pixels), teacher(pixels).detach())
    assert Recorded.made == 1
    assert graphed._captured is not None
    assert graphed._captured.replays == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("recorded", [False, True])
def test_a_recorded_teacher_is_given_pixels(recorded: bool) -> None:
    made = recipe()
    targets = build_targets(made, lambda name: Encoder(made.model, final_norm=False))
    assert targets["video"].rows_key is not None  # type: ignore[attr-defined]
    placement = decide_placement(made, teacher_facts(targets), Devices("cpu", 1, 1, Capabilities()))
    placed = replace(placement.teacher("video"), compile=Decision(False, ""), cuda_graph=Decision(recorded, ""))
    place_teachers(targets, replace(placement, teachers=(placed,)), Ranks(0, 0, 1, CPU))
    assert isinstance(targets["video"].teacher, CudaGraphTeacher) == recorded  # type: ignore[attr-defined]
    assert (targets["video"].rows_key is None) == recorded  # type: ignore[attr-defined]


def test_compiled_stochastic_depth_leaves_out_its_share_and_keeps_the_mean(traced_only: None) -> None:
    torch.manual_seed(0)
    path = DropPath(0.25)
    seen = torch.compile(path)(torch.ones(4000, 1, 2))[:, 0]
    assert set(seen.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(seen[:, 0], seen[:, 1])
    assert abs(seen.mean() - 1) < 0.05
    assert torch.equal(torch.compile(path.eval())(seen), seen)
