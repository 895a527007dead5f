"""Calls of the roofline: all ways of a call compute the same, and the fastest one counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from mvd_scale.performance.roofline import rates
from mvd_scale.performance.roofline.calls import AttentionCall, CopyCall, ProductCall
from mvd_scale.performance.roofline.rates import REPEATS, Rate, RateMeter

CPU = torch.device("cpu")


def results(call: ProductCall | AttentionCall) -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = {}
    for way, run in call.ways(CPU).items():
        result: Any = run()
        made[way] = (result[0] if isinstance(result, tuple) else result).float().clone()
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [1, 3])
def test_all_ways_of_a_product_have_its_shape_and_values(dtype: torch.dtype, layers: int) -> None:
    group = (layers,) if layers > 1 else ()
    shapes = {"none": (6, 16), "input": (6, 8), "weight": (16, 8)}
    for gradient, shape in shapes.items():
        made = results(ProductCall(6, 8, 16, dtype, gradient, layers))  # type: ignore[arg-type]
        if gradient == "weight":
            made = {way: product.mT if way.startswith("(") else product for way, product in made.items()}
            made = {way: product if product.shape[-2] == 16 else product.mT for way, product in made.items()}
        first = next(iter(made.values()))
        assert first.shape == (*group, *shape)
        for product in made.values():
            torch.testing.assert_close(product, first, rtol=0.02, atol=0.05)
        assert any("float32" in way for way in made) == (dtype == torch.bfloat16)


def test_products_in_8_bits_are_quantized_layers() -> None:
    made = results(ProductCall(6, 16, 32, torch.float32, eight_bit=True))
    assert {way: product.shape for way, product in made.items()} == {"onednn::qlinear": (6, 32)}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("queries", [20, 12])
def test_all_ways_of_attention_agree(queries: int, backward: bool) -> None:
    torch.manual_seed(0)
    made = results(AttentionCall(2, 20, queries, 2, 32, torch.bfloat16, backward))
    assert {"sdpa", "sdpa in float32"} <= made.keys()
    shape = (2, 20, 3, 2, 32) if backward else (2, queries, 64)
    for attended in made.values():
        assert attended.numel() == torch.Size(shape).numel()
        if not backward:
            torch.testing.assert_close(attended.view(shape), made["sdpa"].view(shape), rtol=0.02, atol=0.02)
    assert results(AttentionCall(2, 20, queries, 2, 32, torch.float32, backward)).keys() == {"sdpa"}


def test_a_copy_reads_and_writes_its_tensor() -> None:
    (run,) = CopyCall(1000).ways(CPU).values()
    copied = run()
    assert isinstance(copied, torch.Tensor)
    assert copied.sum() == 1000
    assert CopyCall(1000).work == 2000


@dataclass(frozen=True)
class FakeCall:
    names: tuple[str, ...]

    def ways(self, device: torch.device) -> dict[str, Callable[[], str]]:
        return {name: lambda name=name: name for name in self.names}  # type: ignore[misc]


def test_the_fastest_repetition_of_the_fastest_way_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"slow": [3.0, 2.0, 4.0], "fast": [5.0, 1.0, 1.5], "copy": [0.5, 0.5, 0.5]}
    asked: list[str] = []

    def seconds(run: Callable[[], str], device: torch.device) -> float:
        asked.append(run())
        return times[asked[-1]][asked.count(asked[-1]) % REPEATS]

    monkeypatch.setattr(rates, "seconds", seconds)
    either, copy = FakeCall(("slow", "fast")), FakeCall(("copy",))
    meter = RateMeter([either, copy, either], CPU)  # type: ignore[list-item]
    measured = {either: Rate("fast", 1.0), copy: Rate("copy", 0.5)}
    assert meter.round() == measured
    assert asked == ["slow"] * 3 + ["fast"] * 3 + ["copy"] * 3
    asked.clear()
    # The way is known now, and a machine that became slower is believed.
    times["fast"] = [9.0, 9.0, 9.0]
    assert meter.round() == {**measured, either: Rate("fast", 9.0)}
    assert asked == ["fast"] * 3 + ["copy"] * 3
