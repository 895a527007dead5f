"""Figures of a table: means and intervals over seeds, paired differences, verdicts, what is missing, JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from mvd_scale.config.reproduction import load_scale, load_table
from mvd_scale.pipelines.runner import stage_output
from mvd_scale.reproduction.expand import Expansion, expand
from mvd_scale.reproduction.records import StageConfigs
from mvd_scale.reproduction.report import to_text
from mvd_scale.reproduction.results import TableResults, gather

SCALE = load_scale("mini", [])
_, TABLE = load_table("table9", "mini")
HEAD = {"table": "table9", "title": "Table 9", "note": "conditions", "scale": "mini"}


def filled(folder: Path, figures: Mapping[tuple[str, str], list[float]]) -> Expansion:
    """Expansion of three seeds with the figures of fine-tuning by encoder and task, in percent."""
    expansion = expand(SCALE, TABLE, [0, 1, 2], folder, "test")
    configs = StageConfigs(expansion.pipeline)
    for cell in expansion.cells:
        values = figures.get((cell.encoder, cell.task), [])
        if cell.measure == "finetune" and cell.seed < len(values):
            file = stage_output(expansion.pipeline, cell.stage)
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps({"top1": values[cell.seed] / 100, "videos": 200}))
            configs.record(cell.stage, 0.5, "a commit")
    return expansion


def gathered(expansion: Expansion, failed: Mapping[str, str] | None = None) -> TableResults:
    return gather(HEAD, SCALE, TABLE, expansion, split="test", failed=failed or {})


def test_a_cell_has_mean_interval_and_the_origin_of_each_seed(tmp_path: Path) -> None:
    results = gathered(filled(tmp_path, {("video", "motion"): [61.0, 63.0, 65.0]}))
    cell = results.cell("video", "motion", "finetune")
    assert cell.top1 is not None
    assert cell.top1.mean == pytest.approx(63)
    assert cell.top1.half == pytest.approx(4.9687, abs=1e-3)
    assert cell.published == 71.8
    assert [figure.seed for figure in cell.seeds] == [0, 1, 2]
    assert cell.seeds[1].source == "video_motion_test_seed1/summary.json"
    assert len({figure.config_hash for figure in cell.seeds}) == 3
    assert results.cell("video", "motion", "probe").published is None


@pytest.mark.parametrize(
    ("better", "verdict"),
    [
        # Paired differences 5, 6, 7: 6 +- 2.5, though the spread of the seeds is larger than the difference.
        ([45.0, 66.0, 87.0], "holds"),
        ([35.0, 54.0, 73.0], "does not hold"),
        ([45.0, 54.0, 87.0], "cannot be told"),
        # One seed has no interval.
        ([90.0], "cannot be told"),
    ],
)
def test_a_verdict_needs_an_interval_on_one_side_of_zero(tmp_path: Path, better: list[float], verdict: str) -> None:
    than = [40.0, 60.0, 80.0]
    figures = {
        (name, task): values for task in TABLE.tasks for name, values in (("video", better), ("per_token", than))
    }
    results = gathered(filled(tmp_path, figures))
    by_finetuning = next(direction for direction in results.directions if direction.measure == "finetune")
    assert by_finetuning.verdict == verdict
    assert len(by_finetuning.comparisons[0].differences) == len(better)
    by_probe = next(direction for direction in results.directions if direction.measure == "probe")
    assert by_probe.verdict == "cannot be told"
    assert by_probe.comparisons[0].difference is None


def test_a_direction_holds_only_if_all_of_its_comparisons_do(tmp_path: Path) -> None:
    than, better = [40.0, 60.0, 80.0], [45.0, 66.0, 87.0]
    figures = {
        ("video", "appearance"): better, ("per_token", "appearance"): than,
        ("video", "motion"): [45.0, 54.0, 87.0], ("per_token", "motion"): than,
    }  # fmt: skip
    (direction,) = (told for told in gathered(filled(tmp_path / "a", figures)).directions if told.measure == "finetune")
    assert [compared.verdict for compared in direction.comparisons] == ["holds", "cannot be told"]
    assert direction.verdict == "cannot be told"
    figures["video", "motion"] = [35.0, 54.0, 73.0]
    (direction,) = (told for told in gathered(filled(tmp_path / "b", figures)).directions if told.measure == "finetune")
    assert direction.verdict == "does not hold"


def test_minutes_are_means_over_seeds_of_all_that_a_cell_needs(tmp_path: Path) -> None:
    expansion = filled(tmp_path, {("video", "motion"): [61.0, 63.0]})
    configs = StageConfigs(expansion.pipeline)
    configs.record("video_motion_classifier_seed0", 2.0, "a commit")
    configs.record("video_motion_classifier_seed1", 3.0, "a commit")
    configs.record("video_teacher_seed0", 4.0, "a commit")
    results = gathered(expansion)
    assert results.cell("video", "motion", "finetune").cpu_minutes == 3.0
    assert results.cell("per_token", "motion", "finetune").cpu_minutes is None
    (teacher,) = (cost for cost in results.encoders if cost.encoder == "video_teacher")
    assert (teacher.seeds, teacher.cpu_minutes) == (1, 4.0)
    assert results.cpu_minutes == 10.0
    assert "training: video_teacher 4.0" in to_text(results)


def test_what_is_missing_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    expansion = filled(tmp_path, {("video", "motion"): [61.0, 63.0]})
    results = gathered(expansion, {"video_motion_test_seed2": "left out, because video_seed2 failed"})
    assert results.cell("video", "motion", "finetune").missing == {2: "left out, because video_seed2 failed"}
    assert results.cell("per_token", "motion", "finetune").missing[0] == "has not been run"
    text = to_text(results)
    assert "62.0 ± 12.7 [71.8]" in text
    assert "- [70.5]" in text
    assert "missing: video, motion, fine-tuning, seed 2: left out, because video_seed2 failed" in text
    assert "minutes on CPUs for all that is there: 1.0" in text


def test_a_task_without_a_probe_leaves_directions_to_the_measures_that_they_have(tmp_path: Path) -> None:
    _, table = load_table("table1", "mini")
    scale = load_scale("mini", ["--tasks.appearance.probe", "null"])
    expansion = expand(scale, table, [0], tmp_path, "test")
    results = gather(HEAD, scale, table, expansion, split="test", failed={})
    probed = [told for told in results.directions if told.measure == "probe"]
    assert [{compared.task for compared in told.comparisons} for told in probed] == [{"motion"}]
    assert len([told for told in results.directions if told.measure == "finetune"]) == len(table.directions)
    assert "By linear probe" in to_text(results)


def test_the_file_has_the_documented_form(tmp_path: Path) -> None:
    file = gathered(filled(tmp_path, {("video", "motion"): [61.0, 63.0]})).write(tmp_path)
    values = json.loads(file.read_text())
    assert values["schema"] == 1
    assert (values["table"], values["scale"], values["split"], values["seeds"]) == ("table9", "mini", "test", [0, 1, 2])
    cell = next(cell for cell in values["cells"] if cell["encoder"] == "video" and cell["task"] == "motion")
    assert cell["top1"] == {"mean": pytest.approx(62), "half": pytest.approx(12.706, abs=1e-3), "count": 2}
    assert cell["seeds"][0].keys() == {"seed", "top1", "videos", "config_hash", "commit", "source"}
    assert cell["missing"] == {"2": "has not been run"}
    assert values["encoders"][0] == {"encoder": "video_teacher", "seeds": 0, "cpu_minutes": None}
    assert values["cpu_minutes"] == 1.0
    assert {direction["verdict"] for direction in values["directions"]} == {"cannot be told"}
