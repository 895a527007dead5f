"""Tables as data: the published figures, valid recipes at both scales, and rows that are the shipped recipes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mvd_scale.config import load_recipe
from mvd_scale.config.pipeline import TrainStage
from mvd_scale.config.reproduction import list_tables, load_scale, load_table
from mvd_scale.errors import UserError
from mvd_scale.pipelines.runner import stage_arguments, stage_recipe
from mvd_scale.reproduction.compute import Costs
from mvd_scale.reproduction.expand import expand
from mvd_scale.reproduction.reproduce import reproduce

REPOSITORY = Path(__file__).resolve().parents[3]

PUBLISHED = {
    "table1": [(80.4, 69.4), (80.1, 70.0), (80.6, 70.7), (82.3, 71.4), (82.1, 71.8), (82.7, 72.5)],
    "table2": [
        (79.0, 66.4), (80.6, 70.7), (81.0, 70.9), (81.5, 69.7), (82.7, 72.5), (83.4, 73.7), (85.2, 74.0), (86.0, 76.1)
    ],
    "table6": [(81.0, None), (81.5, None), (81.9, None)],
    "table7": [(None, 68.7), (None, 67.9), (None, 70.1), (None, 69.0)],
    "table8": [(80.5, 70.4), (81.8, 70.8), (82.3, 71.4), (82.1, 71.8), (82.7, 72.5)],
    "table9": [(80.9, 70.5), (82.1, 71.8)],
}  # fmt: skip
"""K400 and SSv2 top-1 of the rows of each table, typed from the paper."""

MINI, FULL = load_scale("mini", []), load_scale("full", [])

RECIPES = {
    "mae_b": "pretrain/mae_b", "videomae_s": "pretrain/videomae_s_k400", "s_image": "ablations/image_teacher_s",
    "b_both": "distill/b_from_b", "s_both_from_l": "distill/s_from_l", "l_both": "distill/l_from_l",
    "s_both_pixels_300": "ablations/co_teaching_pixels_s", "b_per_token": "ablations/per_token_b",
    "b_momentum_in1k": "ablations/momentum_b_from_in1k",
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_have_the_figures_of_the_paper(name: str) -> None:
    _, table = load_table(name, "full")
    assert [(row.published.get("k400"), row.published.get("ssv2")) for row in table.rows] == PUBLISHED[name]


@pytest.mark.parametrize("name", list_tables())
@pytest.mark.parametrize("scale", [MINI, FULL], ids=["mini", "full"])
def test_a_table_expands_to_stages_in_order_with_valid_recipes(name: str, scale: object, tmp_path: Path) -> None:
    chosen = FULL if scale is FULL else MINI
    _, table = load_table(name, "full" if chosen is FULL else "mini")
    expansion = expand(chosen, table, [3], tmp_path, "test")
    pipeline = expansion.pipeline
    measures = 2 if chosen is MINI else 1
    assert len(expansion.cells) == len(table.rows) * len(table.tasks) * measures
    for stage in pipeline.stages:
        if isinstance(pipeline.stages[stage], TrainStage):
            recipe = stage_recipe(pipeline, stage)
            assert recipe.seed == 3
            recipe.micro_batch_and_accumulation(1 if chosen is MINI else 32)
    for cell in expansion.cells:
        assert not re.search(r"\{\w+\}", " ".join(stage_arguments(pipeline, cell.stage)))


@pytest.mark.parametrize(("encoder", "recipe"), RECIPES.items())
def test_an_encoder_at_full_scale_is_the_shipped_recipe(encoder: str, recipe: str, tmp_path: Path) -> None:
    _, table = load_table("study", "full")
    pipeline = expand(FULL, table, [0], tmp_path, "test").pipeline
    made, shipped = stage_recipe(pipeline, f"{encoder}_seed0").identity(), load_recipe(recipe).identity()
    differing = {key for key in made.keys() | shipped.keys() if made.get(key) != shipped.get(key)}
    assert {key for key in differing if not re.fullmatch(r"targets\.\w+\.checkpoint", key)} == set()


def test_seeds_share_indexed_data_and_nothing_else(tmp_path: Path) -> None:
    _, table = load_table("table9", "full")
    stages = expand(FULL, table, [0, 1], tmp_path, "test").pipeline.stages
    # No encoder of this table needs images.
    assert {name for name in stages if not re.search(r"_seed[01]$", name)} == FULL.data.keys() - {"imagenet"}
    _, table = load_table("table9", "mini")
    stages = expand(MINI, table, [0, 1], tmp_path, "test").pipeline.stages
    assert all(re.search(r"_seed[01]$", name) for name in stages)
    drawn = [stage for name, stage in stages.items() if name.startswith("motion_seed")]
    assert [stage.seed for stage in drawn] == [0, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("split", ["test", "validation"])
def test_all_are_judged_on_the_split_that_was_asked_for(split: str, tmp_path: Path) -> None:
    _, table = load_table("table7", "mini")
    expansion = expand(MINI, table, [0], tmp_path, split)  # type: ignore[arg-type]
    for cell in expansion.cells:
        words = " ".join(stage_arguments(expansion.pipeline, cell.stage))
        assert f"{cell.task}_seed0/{split}" in words
        assert ("validation" in words) == (split == "validation")


def test_the_study_has_the_rows_and_directions_of_all_tables_once() -> None:
    _, study = load_table("study", "mini")
    tables = [load_table(name, "mini")[1] for name in PUBLISHED]
    assert {row.encoder for row in study.rows} == {row.encoder for table in tables for row in table.rows}
    assert len(study.rows) == len({row.encoder for row in study.rows})
    assert len(study.directions) == sum(len(table.directions) for table in tables)


@pytest.mark.parametrize(("pixels", "taught"), [("pixels_as_video", "video"), ("pixels_as_both", "both")])
def test_a_pixel_student_of_equal_cost_pays_for_the_teachers_too(pixels: str, taught: str) -> None:
    costs = Costs(MINI.encoders)
    teachers = {"video": ["video_teacher"], "both": ["image_teacher", "video_teacher"]}[taught]
    whole = costs.training(taught) + sum(costs.training(name) for name in teachers)
    assert costs.total(taught) == whole
    epochs = costs.recipe_values(pixels)["training"]["epochs"]
    epoch = costs.training(pixels) / epochs
    # At least as much, by less than an epoch.
    assert 0 <= costs.training(pixels) - whole < epoch
    assert costs.training("pixels") == epoch * MINI.encoders["pixels"].recipe["training"]["epochs"]


def test_the_documented_epochs_are_those_of_the_scale() -> None:
    text = (REPOSITORY / "docs/study.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (pixels[^|]*) \|[^|]*\| ([\d, ]+) \|$", text, re.MULTILINE))
    costs = Costs(MINI.encoders)
    epochs = [costs.recipe_values(name)["training"]["epochs"] for name in ("pixels_as_video", "pixels_as_both")]
    assert rows["pixels as video, pixels as both"] == ", ".join(map(str, epochs))
    assert rows["pixels (VideoMAE)"] == str(costs.recipe_values("pixels")["training"]["epochs"])


def test_data_that_no_stage_refers_to_are_left_out(tmp_path: Path) -> None:
    scale = load_scale("mini", ["--data.more", "{kind: synth, label: motion}"])
    _, table = load_table("table9", "mini")
    stages = expand(scale, table, [0], tmp_path, "test").pipeline.stages
    # Videos are needed by way of an index too.
    assert {"motion_seed0", "motion_index_seed0", "appearance_seed0"} <= stages.keys()
    assert "more_seed0" not in stages


def test_a_seed_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"seeds: \[1, 0, 1\] has a seed twice"):
        load_scale("mini", ["--seeds", "[1, 0, 1]"])
    with pytest.raises(UserError, match=r"seeds: \[0, 0\] has a seed twice"):
        reproduce("table9", "mini", seeds=[0, 0], output=tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_unknown_table_is_named() -> None:
    with pytest.raises(UserError, match=r"no table 'table3': expected one of .*table1, .*table9"):
        load_table("table3", "mini")


def test_a_fault_of_an_override_is_named() -> None:
    with pytest.raises(UserError, match=r"encoders.video.recipes: unknown key"):
        load_scale("mini", ["--encoders.video.recipes.seed", "1"])
    with pytest.raises(UserError, match=r"encoders.video: teacher is not one of"):
        load_scale("mini", ["--encoders.video.recipe.targets.video.checkpoint", "'{teacher}/encoder.safetensors'"])
    with pytest.raises(UserError, match=r"data.motion_index: motions is not one of .*motion_unlabelled"):
        load_scale("mini", ["--data.motion_index.sources", '["{motions}/train"]'])
    with pytest.raises(UserError, match=r"tasks.motion: motions is not one of .*, encoder, split"):
        load_scale("mini", ["--tasks.motion.evaluate.source", "'{motions}/test'"])
