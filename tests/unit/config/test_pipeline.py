"""Tests of the pipeline schema: references between stages, and messages that name faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvd_scale.config.pipeline import EvaluateStage, TrainStage, list_pipelines, load_pipeline, references
from mvd_scale.errors import UserError
from mvd_scale.pipelines.runner import run_pipeline, stage_recipe

TWO = """
folder: out
stages:
  videos: {kind: index, sources: [clips]}
  teacher: {kind: pretrain, recipe: {base: quickstart/video_teacher, data: {source: "{videos}/manifest.parquet"}}}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(text)
    return path


def test_names_in_braces_are_the_folders_of_earlier_stages(tmp_path: Path) -> None:
    pipeline = load_pipeline(written(tmp_path, TWO), ["--folder", "elsewhere"])
    assert references(pipeline.stages["teacher"]) == ["videos"]
    recipe = pipeline.resolved("teacher")["recipe"]
    assert recipe["data"]["source"] == "elsewhere/videos/manifest.parquet"
    assert recipe["base"] == "quickstart/video_teacher"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("{videos}", "{video}"), r"stages.teacher: \{video\} is not an earlier stage: expected one of .*\{videos\}"),
        (("kind: index", "kind: indices"), "indices"),
        (("sources:", "source:"), "stages.videos.source: unknown key"),
        (("folder: out", "folders: out"), "folder: missing"),
        (("videos: {", "vid eos: {"), "the name of a stage must consist of letters"),
        (("{base:", "{run: {folder: x}, base:"), "recipe.run is set by the pipeline"),
        (("stages:", "ranks: 2\nhostfile: hosts\nstages:"), "either ranks or hostfile"),
    ],
)
def test_a_fault_is_named(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_pipeline(written(tmp_path, TWO.replace(*change)))


@pytest.mark.parametrize("name", list_pipelines())
def test_the_recipes_of_a_shipped_pipeline_describe_runs(name: str) -> None:
    pipeline = load_pipeline(name)
    recipes = [stage for stage in pipeline.stages if isinstance(pipeline.stages[stage], TrainStage)]
    assert recipes
    for stage in recipes:
        recipe = stage_recipe(pipeline, stage)
        assert recipe.run.folder == pipeline.folder / stage
        recipe.micro_batch_and_accumulation(pipeline.ranks or 64)


def test_an_unknown_pipeline_lists_the_known() -> None:
    with pytest.raises(UserError, match="give the path of a YAML file or one of mvd_b, quickstart"):
        load_pipeline("quickstrat")


def test_views_of_a_test_change_only_what_they_name(tmp_path: Path) -> None:
    text = TWO + '  test: {kind: evaluate, checkpoint: "{teacher}", source: clips, views: {crops: 1}}\n'
    stage = EvaluateStage.model_validate(load_pipeline(written(tmp_path, text)).resolved("test"))
    assert stage.views is not None
    assert stage.views.model_dump(exclude_unset=True) == {"crops": 1}


@pytest.mark.parametrize(
    ("hosts", "said"),
    [
        ("a slots=2\nb\n", r"hostfile .*hosts:2: 'b' is malformed"),
        ("a slots=5\nb slots=2\n", r"cannot be split over 7 ranks"),
    ],
)
def test_a_hostfile_is_read_before_the_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hosts: str, said: str
) -> None:
    monkeypatch.setattr("mvd_scale.pipelines.runner.signal.signal", lambda *_: None)
    (tmp_path / "hosts").write_text(hosts)
    text = TWO.replace("folder: out", f"folder: {tmp_path}/out\nhostfile: {tmp_path}/hosts")
    with pytest.raises(UserError, match=said):
        run_pipeline(load_pipeline(written(tmp_path, text)))
    assert not (tmp_path / "out").exists()
