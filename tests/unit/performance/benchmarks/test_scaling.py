"""Growth of a step's cost: the power is fitted to the points, and each point changes one quantity of the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from mvd_scale.cli import cli
from mvd_scale.errors import UserError
from mvd_scale.performance.bench_setup import bench_recipe
from mvd_scale.performance.benchmarks import scaling as growth
from mvd_scale.performance.benchmarks.scaling import PowerLaw

from ..test_compare import STEP

SMALL = ["--recipe", "distill/h_from_h", "--precision", "fp32", "--batch", "2"]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.7])
def test_the_power_of_made_up_points_is_found(power: float) -> None:
    counts = [49, 100, 196, 324]
    found = PowerLaw.of(counts, [3 * count**power for count in counts])
    assert (found.power, found.factor) == pytest.approx((power, 3))
    assert found.at(1000) == pytest.approx(3 * 1000**power)
    # What does not lie on a line of the logarithms is met in the middle.
    assert PowerLaw.of([1, 2, 4], [1, 4, 4]).power == pytest.approx(1)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The recipes that would be measured; a step costs its tokens squared times its clips, and one GiB a block."""
    recipes = []

    def cost(work: Any, name: str, overrides: list[str], precision: Any, batch: int, steps: int) -> Any:
        recipe = bench_recipe(name, overrides, precision, batch)
        recipes.append(recipe)
        milliseconds = recipe.tokens**2 * batch
        step = STEP.__class__(**vars(STEP) | {"milliseconds_per_step": milliseconds, "peak_memory_gib": 3.0})
        return step, 3.0 - recipe.model.depth

    monkeypatch.setattr(growth, "run_in_subprocess", cost)
    return recipes


def test_all_points_are_measured_and_drawn(measured: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "growth.png"
    words = ["--sides", "112,224", "--frames", "16,32", "--batches", "2,1,8", "--depths", "8,32", "--png", str(out)]
    result = CliRunner().invoke(cli, ["bench", "growth", *SMALL, *words])
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for start in (
        "power of tokens 2.00", "power of frames 2.00", "power of batch 1.00", "power of depth 0.00 1.00",
        "clips 1 2458.624 32.000", "blocks 8 4917.248 8.000",
    ):  # fmt: skip
        assert any(line.startswith(start) for line in lines), result.stdout
    # The recipe itself is a point of all of them and measured once.
    assert len(measured) == 6
    with Image.open(out) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_a_point_is_the_recipe_but_for_one_quantity(measured: list[Any]) -> None:
    words = ["--sides", "112,224", "--frames", "8,16", "--batches", "none", "--depths", "8,32"]
    result = CliRunner().invoke(cli, ["bench", "growth", *SMALL, *words])
    assert result.exit_code == 0, result.output
    small, base, short, shallow = measured
    # The image teacher of ViT-H has patches of 14 pixels and the student's grid.
    assert (small.model.grid, small.targets["image"].model.grid) == ((8, 7, 7), (1, 7, 7))
    assert (short.model.frames, short.targets["video"].model.frames, short.targets["image"].model.frames) == (8, 8, 1)
    models = [shallow.model, shallow.targets["image"].model, shallow.targets["video"].model]
    assert [(model.depth, model.width, model.heads) for model in models] == 3 * [(8, 1280, 16)]
    for recipe in measured:
        assert recipe.training.global_batch == base.training.global_batch == 2
        assert recipe.targets["video"].decoder == base.targets["video"].decoder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sides", "100,224"], "input_size 100 is not a multiple of patch_size 16"),
        (["--frames", "8,9"], "frames 9 is not a multiple of tubelet 2"),
        (["--batches", "4,4"], "batch has a single point"),
        (["--depths", "1,x"], "'1,x' is not a list of numbers"),
        ([], "nothing varies"),
    ],
)
def test_what_gives_no_power_is_refused_before_anything_is_measured(
    measured: list[Any], words: list[str], said: str
) -> None:
    none = [word for name in ("--sides", "--frames", "--batches", "--depths") for word in (name, "none")]
    result = CliRunner().invoke(cli, ["bench", "growth", *SMALL, *none, *words])
    assert said in (str(result.exception) if isinstance(result.exception, UserError) else result.output)
    assert not measured
