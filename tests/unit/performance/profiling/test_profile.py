"""Reading of a trace for a profile, and counting of FLOPs."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mvd_scale.config import Recipe, load_recipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.models import Student
from mvd_scale.performance.batches import random_batch
from mvd_scale.performance.profiling.flops import count_flops, module_table, peak_flops
from mvd_scale.performance.profiling.memory_plot import plot_memory
from mvd_scale.performance.profiling.report import Operator, PartFigures, ProfileReport
from mvd_scale.performance.profiling.trace import Span, Trace, covered_seconds, read_trace
from mvd_scale.performance.report import Machine
from mvd_scale.targets import build_targets
from mvd_scale.targets.build import init_teacher

PARTS = ["data wait", "student forward", "backward"]


def event(cat: str, name: str, start: float, milliseconds: float, **args: Any) -> dict[str, Any]:
    """`start` and length in milliseconds after a moment."""
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "ts": 1e9 + 1000 * start,
        "dur": 1000 * milliseconds,
        "args": args,
    }


def allocation(device: int, moment: float, total: int) -> dict[str, Any]:
    args = {"Device Type": device, "Total Allocated": total, "Bytes": 1}
    return {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": 1e9 + 1000 * moment, "args": args}


HOST = [
    event("user_annotation", "step", 0, 100),
    event("user_annotation", "data wait", 0, 10),
    event("user_annotation", "student forward", 10, 30),
    event("user_annotation", "backward", 40, 50),
    event("user_annotation", "someone else's", 0, 100),
    event("cpu_op", "aten::mm", 12, 5),
    allocation(0, 50, 300),
    allocation(0, 20, 200),
]
GPU = [
    # Launched by the thread of autograd during `backward`, and run after it.
    event("cuda_runtime", "cudaLaunchKernel", 15, 1, correlation=1),
    event("cuda_runtime", "cudaLaunchKernel", 45, 1, correlation=2),
    event("cuda_runtime", "cudaLaunchKernel", 95, 1, correlation=3),
    event("kernel", "gemm", 20, 7, correlation=1),
    event("kernel", "gemm", 91, 20, correlation=2),
    event("kernel", "ncclDevKernel_AllReduce", 111, 4, correlation=2),
    event("kernel", "adam", 115, 3, correlation=3),
    allocation(1, 30, 5000),
]


def written(folder: Path, events: list[dict[str, Any]]) -> Trace:
    path = folder / "trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    return read_trace(path, PARTS)


def test_parts_of_a_trace_of_the_host(tmp_path):
    trace = written(tmp_path, [*HOST, event("user_annotation", "gloo:all_reduce", 60, 20)])
    assert [span.name for span in trace.parts] == PARTS
    assert [trace.seconds_of(part) for part in PARTS] == pytest.approx([0.01, 0.03, 0.05])
    assert trace.device_seconds == {}
    assert [(span.name, pytest.approx(span.seconds)) for span in trace.communication] == [("gloo:all_reduce", 0.02)]
    assert trace.memory == [(pytest.approx(0.02), 200), (pytest.approx(0.05), 300)]
    assert [trace.part_at(moment) for moment in (0.005, 0.05, 0.095)] == ["data wait", "backward", "between parts"]


def test_a_kernel_counts_for_the_part_that_launched_it(tmp_path):
    trace = written(tmp_path, [*HOST, *GPU])
    assert trace.device_seconds == pytest.approx({"student forward": 0.007, "backward": 0.024})
    assert [span.name for span in trace.communication] == ["ncclDevKernel_AllReduce"]
    assert trace.memory == [(pytest.approx(0.03), 5000)]


def test_time_covered_by_overlapping_spans_counts_once():
    spans = [Span("a", 0, 3), Span("b", 1, 2), Span("c", 2, 5), Span("d", 7, 8)]
    assert covered_seconds(spans) == 6


def clips_of(recipe: Recipe, clips: int, visible: int) -> ClipBatch:
    model = recipe.model
    time, rows, columns = model.grid
    tokens = torch.arange(time * rows * columns).expand(clips, -1)
    pixels = torch.zeros(clips, model.frames, model.input_size, model.input_size, 3, dtype=torch.uint8)
    return ClipBatch(pixels, tokens[:, :visible], tokens[:, visible:], torch.zeros(clips), torch.zeros(clips))


def by_hand(tokens: int, width: int, depth: float, rows_of_patch: int, embedded: int) -> float:
    """FLOPs of an encoder over one clip: linear layers 24 N D^2 and attention 4 N^2 D a block, and the embedding."""
    return 2 * embedded * rows_of_patch * width + depth * (24 * tokens * width**2 + 4 * tokens**2 * width)


def test_arithmetic_is_what_is_counted_by_hand_attention_included():
    recipe = load_recipe("quickstart/student", [])
    flops = count_flops(recipe, clips_of(recipe, clips=3, visible=48))
    assert flops.keys() == {"student forward", "image teacher", "video teacher", "backward"}
    # The FLOPs of prefetched teachers are counted too.
    prefetched = replace(clips_of(recipe, clips=3, visible=48), features={"image": torch.zeros(3, 1, 1)})
    assert count_flops(recipe, prefetched) == flops
    time, rows, columns = recipe.model.grid
    cells, tokens, patch = rows * columns, time * rows * columns, 3 * 8**2

    def image(depth: float) -> float:
        return 3 * time * by_hand(1 + cells, 128, depth, patch, cells)

    def video(depth: float) -> float:
        return 3 * by_hand(tokens, 128, depth, 2 * patch, tokens)

    def student(depth: float) -> float:
        ends = 2 * 48 * 128 * 96 + 2 * (tokens - 48) * 96 * 128
        return 3 * (by_hand(48, 128, 4, 2 * patch, 48) + 2 * (by_hand(tokens, 96, depth, 0, 0) + ends))

    # Of its last block, a model that is asked for some tokens only need not compute all.
    assert image(3.3) <= flops["image teacher"] <= image(4)
    assert video(3.3) <= flops["video teacher"] <= video(4)
    decoder = recipe.targets["image"].decoder
    assert decoder is not None
    assert student(decoder.depth - 0.7) <= flops["student forward"] <= student(decoder.depth)
    # Each product twice; pixels want no gradient.
    assert flops["backward"] == 2 * flops["student forward"] - 3 * 2 * 48 * 2 * patch * 128


def test_a_student_with_a_mask_of_its_own_is_counted_at_its_own_tokens():
    students = "{own: {data: {mask: {ratio: 0.5}}}, shared: {}}"
    recipe = load_recipe("quickstart/student", ["--students", students])
    clips = random_batch(recipe, 2, torch.device("cpu"))
    flops = count_flops(recipe, clips)
    for name in recipe.students:
        alone = count_flops(recipe.alone(name), clips.seen_by(name))
        for part in ("student forward", "backward"):
            assert flops[f"{name}: {part}"] == alone[part]
        # At all tokens, once for all masks.
        assert flops["video teacher"] > alone["video teacher"]
    assert flops["own: student forward"] > flops["shared: student forward"]


def test_arithmetic_of_teachers_of_timm_is_counted():
    recipe = load_recipe("align/b_from_dinov2_g_and_videomae_l", ["--targets.dinov2.vit", "vit_tiny_patch16_224"])
    flops = count_flops(recipe, clips_of(recipe, clips=1, visible=300))
    images, tokens = recipe.model.grid[0], 1 + 14**2
    assert flops["dinov2 teacher"] == pytest.approx(images * by_hand(tokens, 192, 12, 3 * 16**2, tokens - 1), rel=0.01)


def test_deepspeed_and_torch_agree_on_the_forward_pass_and_torch_is_left_as_it_was(tmp_path):
    recipe = load_recipe("quickstart/student", [])
    targets = build_targets(recipe, lambda name: init_teacher(recipe, name))
    student, clips = Student.from_recipe(recipe, targets), clips_of(recipe, clips=2, visible=48)
    before = torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention
    with module_table(student, tmp_path / "modules.txt", write=True):
        student(clips.pixels, clips.visible, clips.masked)
    assert before == (torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention)
    table = (tmp_path / "modules.txt").read_text()
    said = float(table.split("fwd flops per GPU:")[1].split()[0]) * 1e6
    # Its count has norms and activations besides the products.
    assert said == pytest.approx(count_flops(recipe, clips)["student forward"], rel=0.02)


def test_the_peak_of_a_cpu_is_measured():
    peak = peak_flops(torch.device("cpu"), "fp32")
    assert 1e9 < peak.flops_per_second < 1e14
    assert "timed in this run" in peak.source


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "fp32", 67e12),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312e12),
        ("Tesla V100-SXM2-32GB", "fp16", 125e12),
    ],
)
def test_the_peak_of_a_gpu_is_known_by_its_name(monkeypatch, name, precision, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda"), precision).flops_per_second == peak


@pytest.mark.parametrize("name", ["NVIDIA H100 PCIe", "NVIDIA GH200 480GB", "NVIDIA GeForce RTX 4090"])
def test_the_peak_of_a_gpu_that_is_not_in_the_table_is_measured(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(torch, "randn", lambda *size, device: torch.ones(2, 2))
    assert "timed in this run" in peak_flops(torch.device("cuda"), "fp32").source


@pytest.mark.parametrize("device", ["cpu", "NVIDIA H100"])
def test_the_page_says_what_was_measured(device):
    on_gpu = 30.0 if device != "cpu" else None
    report = ProfileReport(
        machine=Machine(device, "A CPU", 2, 2, {"torch": "2.9.0"}),
        recipe="distill/b_from_b",
        overrides=["--seed", "1"],
        precision="fp32",
        teacher_sharding="auto",
        ranks=2,
        clips_per_step=2,
        steps=2,
        milliseconds_per_step=100.0,
        profiled_milliseconds_per_step=110.0,
        clips_per_second=20.0,
        parts={"backward": PartFigures(60.0, on_gpu, 3_000_000_000)},
        flops_per_step=5_000_000_000,
        peak_flops_per_second=100e9,
        peak_source="a data sheet",
        utilisation=0.5,
        data_wait_share=0.02,
        communication_milliseconds=11.0,
        collectives=[Operator("gloo:all_reduce", 4, 11.0)],
        operators=[Operator("aten::a_name_that_is_too_long_for_its_column", 4, 30.0)],
        peak_memory_gib=5.0,
        highest_tensors_gib=2.0,
        highest_in="backward",
        losses=[1.0],
    )
    text = report.to_text()
    assert all(len(line) <= 120 for line in text.splitlines())
    for said in ("50.0% of 0.1 TFLOP/s (a data sheet)", "110.0 ms (+10.0%)", "11.0 ms per step, 10.0%", "in: backward"):
        assert said in text
    # The rate is over the time of the device that computes.
    (row,) = [line for line in text.splitlines() if line.startswith("backward ")]
    assert row.split()[-1] == ("50" if on_gpu is None else "100")
    assert dict(report.values())["backward, ms"].value == (60.0 if on_gpu is None else 30.0)


def test_the_picture_is_drawn_of_any_trace(tmp_path):
    parts = [Span("data wait", 0, 0.01), Span("backward", 0.01, 0.03), Span("backward", 0.04, 0.05)]
    for memory in ([], [(0.0, 2**20), (0.02, 2**21)]):
        out = tmp_path / f"{len(memory)}.png"
        plot_memory(Trace([Span("step", 0, 0.05)], parts, {}, [], memory), "a title", "tensors", out)
        assert out.read_bytes().startswith(b"\x89PNG")
