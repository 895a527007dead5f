"""Roofline of made-up rates and times: rows, sums and the share are those computed by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from mvd_scale.cli import cli
from mvd_scale.performance.profiling.attribution import Place
from mvd_scale.performance.roofline import measure
from mvd_scale.performance.roofline.calls import AttentionCall, Call, CopyCall, ProductCall
from mvd_scale.performance.roofline.rates import Rate
from mvd_scale.performance.roofline.report import RooflineReport, make_rates, make_rows
from mvd_scale.performance.roofline.work import Work

from ..test_compare import ROOFLINE

FORWARD, BACKWARD = (Place("encoder", passes, "products") for passes in ("forward", "backward"))
NORMS, OPTIMIZER, WAIT = (
    Place("encoder", "forward", "memory"), Place("optimizer", "", "memory"), Place("data wait", "", "rest"),
)  # fmt: skip
PRODUCT, COPY = ProductCall(10, 20, 30, torch.float32), CopyCall(500)
WORK = [Work(FORWARD, PRODUCT, 4), Work(BACKWARD, PRODUCT, 8), Work(NORMS, COPY, 2.5), Work(FORWARD, COPY, 1)]


def test_rows_have_work_limit_time_and_difference_largest_first() -> None:
    rates: Mapping[Call, Rate] = {PRODUCT: Rate("a way", 0.010), COPY: Rate("copy_", 0.002)}
    measured = {FORWARD: 0.050, BACKWARD: 0.200, WAIT: 0.030}
    rows = make_rows(WORK[:3], rates, measured)
    assert [(row.label, row.kind, row.work, row.limit_milliseconds, row.milliseconds) for row in rows] == [
        ("encoder, backward", "products", 8 * 12000, pytest.approx(80), pytest.approx(200)),
        ("data wait", "rest", 0, 0, pytest.approx(30)),
        ("encoder, forward", "products", 4 * 12000, pytest.approx(40), pytest.approx(50)),
        # Fused with something else, so that it took no time of its own.
        ("encoder, forward", "memory", 2500, pytest.approx(5), 0),
    ]
    assert [row.difference for row in rows] == pytest.approx([120, 30, 10, -5])


def test_rates_are_listed_by_their_share_of_the_limit() -> None:
    rates: Mapping[Call, Rate] = {COPY: Rate("copy_", 0.002), PRODUCT: Rate("a way", 0.010)}
    rows = make_rates(WORK, rates)
    assert [(row.call, row.way, row.work, row.milliseconds, row.calls_per_step) for row in rows] == [
        ("10 x 20 x 30, float32, forward", "a way", 12000, 10.0, 12),
        ("copy of 0.000477 MiB", "copy_", 1000, 2.0, 3.5),
    ]


def test_the_round_with_the_median_share_is_reported_whole() -> None:
    def done(plain: float, product: float) -> measure.Round:
        rates: Mapping[Call, Rate] = {PRODUCT: Rate("a way", product), COPY: Rate("copy_", 0.0)}
        return measure.Round(plain, 2 * plain, {FORWARD: 2 * plain}, rates)

    # The machine became slower by half, in the step and in the product; then only in the step.
    rounds = [done(1.0, 0.02), done(2.0, 0.05), done(4.0, 0.05)]
    shares = [0.24, 0.30, 0.15]
    assert [one.share(WORK) for one in rounds] == pytest.approx(shares)
    assert measure.median_round(rounds, WORK) is rounds[0]
    assert measure.median_round(rounds[1:], WORK) is rounds[2]


def test_the_page_adds_up() -> None:
    text = ROOFLINE.to_text()
    assert all(len(line) <= 120 for line in text.splitlines())
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "share of the limit 40.0%: 400 of 1000 ms (rounds: 39.0%, 40.0%, 45.0%)" in lines
    assert "under the profiler 1010 ms (+1.0%)" in lines
    start = lines.index("part GFLOP GB limit ms ms difference of step")
    assert lines[start + 1 : start + 6] == [
        "encoder, backward: products 60 300.0 600.0 300.0 59.4%",
        "data wait: rest 0.0 250.0 250.0 24.8%",
        "optimizer: memory 2 60.0 157.0 97.0 15.5%",
        "1 shorter ones 10 40.0 3.0 -37.0 0.3%",
        "step 70 2 400.0 1010.0 610.0 100.0%",
    ]
    assert "products 70 340.0 603.0 263.0 59.7%" in lines
    assert "encoder 70 340.0 603.0 263.0 59.7%" in lines
    assert "products G W 2 shapes 150 to 200 GFLOP/s" in lines
    assert "memory copy_ 1 shape 20 to 20 GB/s" in lines


class Decoders(nn.Module):
    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.decoders = tuple((name, None) for name in names)


class FakeStudent(nn.Module):
    def __init__(self, batched: Iterator[tuple[str, ...]] | tuple[tuple[str, ...], ...]) -> None:
        super().__init__()
        self.encoder = nn.Identity()
        self.decoders = nn.ModuleDict({name: nn.Identity() for name in ("image", "video", "pixels")})
        self.heads = nn.ModuleDict({"clip": nn.Identity()})
        self.grouped_decoders = nn.ModuleList(Decoders(names) for names in batched)


def test_decoders_that_are_one_batch_are_one_part() -> None:
    def parts(*batched: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        student: Any = FakeStudent(batched)
        return {name: members for name, (_, members) in measure.part_groups(student).items()}

    assert parts() == {
        "encoder": ("encoder",),
        "image decoder": ("image decoder",),
        "video decoder": ("video decoder",),
        "pixels decoder": ("pixels decoder",),
        "clip head": ("clip head",),
    }
    assert parts(("image", "video")) == {
        "encoder": ("encoder",),
        "image and video decoders": ("image decoder", "video decoder"),
        "pixels decoder": ("pixels decoder",),
        "clip head": ("clip head",),
    }


def test_attention_is_written_out() -> None:
    call = AttentionCall(4, 20, 12, 2, 32, torch.bfloat16, backward=True)
    assert str(call) == "4 x 2 heads of 32, 12 x 20 tokens, bfloat16, backward"
    assert str(ProductCall(4, 5, 6, torch.bfloat16, "weight", 2)) == "2 x 4 x 5 x 6, bfloat16, weight's gradient"
    assert str(ProductCall(4, 5, 6, torch.bfloat16, eight_bit=True)) == "4 x 5 x 6, 8 bits, forward"


def test_the_command_measures_as_many_rounds_as_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def fake(name: str, overrides: list[str], **settings: Any) -> RooflineReport:
        asked.update(name=name, overrides=overrides, **settings)
        return ROOFLINE

    monkeypatch.setattr(measure, "measure_roofline", fake)
    words = ["bench", "step", "--roofline", "--recipe", "quickstart/student", "--steps", "3", "--precision", "bf16"]
    result = CliRunner().invoke(cli, [*words, "--data.stride", "2"], catch_exceptions=False)
    assert result.output.strip() == ROOFLINE.to_text().strip()
    assert asked == {
        "name": "quickstart/student",
        "overrides": ["--data.stride", "2"],
        "precision": "bf16",
        "batch": 4,
        "rounds": 3,
    }
    for other in (["--checkpointing"], ["--methods", "all"]):
        result = CliRunner().invoke(cli, ["bench", "step", "--roofline", *other])
        assert result.exit_code == 2
        assert "--roofline cannot be combined with" in result.output
