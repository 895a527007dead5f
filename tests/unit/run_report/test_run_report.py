"""The report of runs shows what hand-made folders hold, names the rest, and stands alone."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from markupsafe import Markup
from PIL import Image

from mvd_scale.cli import cli
from mvd_scale.errors import UserError
from mvd_scale.evaluation.comparison import wilson_interval
from mvd_scale.run_report.charts import SERIES, in_bins, loss_charts, machine_charts, optimizer_charts
from mvd_scale.run_report.page import _scale, write_run_report
from mvd_scale.run_report.records import RunRecord, Series, read_record, series_by_name
from mvd_scale.run_report.results import Figure, read_study, read_test
from mvd_scale.run_report.settings import compare_settings, flatten
from mvd_scale.run_report.sources import Sources, find_sources
from mvd_scale.run_status import RunStatus

EVIL = '<script>alert("$x$")</script>'

Write = Callable[..., Path]


class Page(HTMLParser):
    """Parser that collects tags, links, ids and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.unnamed = 0
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        assert not [key for key in named if key.startswith("on")]
        self.tags.append(tag)
        self.links += [named[key] or "" for key in ("src", "href", "xlink:href", "action") if key in named]
        self.ids += [named["id"] or ""] if "id" in named else []
        self.unnamed += tag in ("img", "svg") and not (named.get("alt") or named.get("aria-label"))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] != "style":
            self.text += f" {data.strip()}" if data.strip() else ""


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def readings(steps: int, targets: list[str], prefix: str = "") -> list[dict[str, Any]]:
    """Readings of a run: losses that fall, a schedule with warm-up, and an overflow at step 3."""
    draw = np.random.default_rng(len(targets))
    lines = []
    for step in range(1, steps + 1):
        losses = {f"loss/{name}": 0.3 + 0.2 * k + math.exp(-3 * step / steps) + draw.normal(0, 0.01)
                  for k, name in enumerate(targets)}  # fmt: skip
        model = {"loss": sum(losses.values()) or 1.0, **losses, "lr": 1e-3 * min(step / 10, math.cos(step / steps)),
                 "grad_norm": None if step == 3 else 40 / step + draw.uniform(0.2, 0.3), "loss_scale": 1.0}  # fmt: skip
        lines.append({"step": step, **{f"{prefix}{name}": value for name, value in model.items()},
                      "clips_per_second": 40 + draw.normal(), "seconds_per_step": 0.4, "data_wait_share": 0.05,
                      "memory_gib": 1.5, "clips_replaced": 0.0})  # fmt: skip
    return lines


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writer of the folder of a run."""

    def written(
        name: str = "student",
        steps: int = 30,
        targets: tuple[str, ...] = ("image", "video"),
        *,
        total: int | None = None,
        pictures: int = 0,
        settings: dict[str, Any] | None = None,
        kind: dict[str, Any] | None = None,
    ) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        section = {"targets": {target: {"weight": 1.0} for target in targets}} if kind is None else kind
        recipe = {"run": {"folder": str(folder)}, "training": {"base_lr": 1e-3}, **section, **(settings or {})}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        write_lines(folder / "metrics.jsonl", readings(steps, list(targets)))
        write_lines(folder / "events.jsonl", [{"event": "start", "steps": total or steps, "ranks": 2}])
        (folder / "summary.json").write_text(json.dumps({"steps": total or steps, "origin": {}}))
        (folder / "environment.txt").write_text("python 3.11\ntorch 2.14\n")
        for number in range(pictures):
            (folder / "pictures").mkdir(exist_ok=True)
            shade = np.full((40, 60, 3), 25 * number, np.uint8)
            Image.fromarray(shade).save(folder / "pictures" / f"step_{10 * (number + 1):08d}.png")
        return folder

    return written


@pytest.fixture
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts without their pictures, which take a tenth of a second each."""
    monkeypatch.setattr("mvd_scale.run_report.charts._picture", lambda *_, **__: Markup("<svg aria-label='a'></svg>"))


undrawn = pytest.mark.usefixtures("_undrawn")


def report(*words: Path | str) -> Result:
    return CliRunner().invoke(cli, ["report", *map(str, words)])


def page_of(*folders: Path, out: Path) -> Page:
    write_run_report(folders, out)
    return Page(out.read_text())


def record(name: str, series: dict[str, list[float]], folder: str = "", kind: str = "pre-training") -> RunRecord:
    held = {key: Series(np.arange(1, len(values) + 1), np.array(values)) for key, values in series.items()}
    return RunRecord(name, RunStatus(Path(folder or f"/runs/{name}"), "finished"), kind, series=held)


def test_a_page_stands_alone(write: Write, tmp_path: Path) -> None:
    write("a", pictures=2)
    write("b", steps=400)
    page = page_of(tmp_path / "runs", out=tmp_path / "page.html")
    assert page.tags.count("img") == 2
    assert all(link.startswith(("data:image/", "#")) for link in page.links), page.links
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert len(page.ids) == len(set(page.ids))
    assert not page.unnamed
    # Every chart has its figures as a table too.
    assert page.tags.count("svg") == page.text.count("Figures")
    for heading in ("Loss of image", "Loss of video", "Learning rate", "Gradient norm", "Throughput", "Peak memory"):
        assert heading in page.text


def test_the_same_folders_give_the_same_page(write: Write, tmp_path: Path) -> None:
    write("a", pictures=3)
    write("b")
    pages = [tmp_path / "deep" / name for name in ("one.html", "two.html")]
    for page in pages:
        write_run_report([tmp_path / "runs"], page)
    assert pages[0].read_text() == pages[1].read_text()


def test_names_are_text(write: Write, tmp_path: Path) -> None:
    folder = write("a", targets=(EVIL.replace("/", ""),), settings={EVIL: EVIL})
    write_lines(
        folder / "events.jsonl", [{"event": "start", "steps": 99, "ranks": 1}, {"event": "end", "message": EVIL}]
    )
    (folder / "environment.txt").write_text(EVIL)
    write("b")
    text = (tmp_path / "page.html", write_run_report([tmp_path / "runs"], tmp_path / "page.html"))[0].read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "script" not in Page(text).tags


@undrawn
def test_runs_of_other_lengths_states_and_targets(write: Write, tmp_path: Path) -> None:
    write("long", steps=50)
    write("short", steps=10, total=50, targets=("image",))
    text = page_of(tmp_path / "runs", out=tmp_path / "page.html").text
    assert "finished 50/50" in text
    assert "unknown 10/50" in text
    assert "there is no lease.json" in text
    assert "Not measured in short." in text


@undrawn
@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("metrics.jsonl", "no metrics.jsonl, so no curves"),
        ("recipe.yaml", "recipe.yaml is missing, so no settings"),
        ("environment.txt", "no environment.txt"),
    ],
)
def test_a_missing_file_is_named(write: Write, tmp_path: Path, missing: str, told: str) -> None:
    (write("a") / missing).unlink()
    write("b")
    assert f"a: {told}" in page_of(tmp_path / "runs", out=tmp_path / "page.html").text


@undrawn
def test_partial_files_are_named(write: Write, tmp_path: Path) -> None:
    folder = write("a", pictures=2)
    (folder / "recipe.yaml").write_text("run: {folder: [")
    (folder / "pictures" / "step_00000020.png").write_bytes(b"\x89PNG\r\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')
    text = page_of(folder, out=tmp_path / "page.html").text
    assert "a: recipe.yaml cannot be read" in text
    assert "a: step_00000020.png cannot be read" in text
    assert "unknown 30 " not in text
    assert "Loss" in text


@undrawn
def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    text = page_of(tmp_path / "run", out=tmp_path / "page.html").text
    assert "run: no readings yet" in text
    assert "run: recipe.yaml is missing" in text


@undrawn
def test_fine_tuning_and_detection_have_charts_of_their_own(write: Write, tmp_path: Path) -> None:
    write("student")
    tuned = write("classifier", targets=("accuracy",), kind={"classifier": {"drop_path": 0.1}})
    write("detector", targets=(), kind={"detector": {"classes": 3}})
    write_lines(tuned / "validation.jsonl", [{"step": 10, "top1": 0.25, "judged": 0.25}, {"step": 20, "top1": 0.5}])
    text = page_of(tmp_path / "runs", out=tmp_path / "page.html").text
    for words in ("Loss: pre-training", "Loss: fine-tuning", "Loss: detection", "Validation top1, %"):
        assert words in text
    assert "Accuracy" in text
    assert "Loss of accuracy" not in text
    assert "judged" not in text


@undrawn
def test_students_of_one_run_share_its_machine(write: Write, tmp_path: Path) -> None:
    folder = write("run")
    write_lines(folder / "metrics.jsonl", readings(9, ["image"], "students/small/"))
    write("run/students/small", steps=9)
    runs = find_sources([tmp_path / "runs"])
    assert [runs.name(path) for path in runs.runs] == ["run", "run/students/small"]
    records = [read_record(runs.name(path), RunStatus(path, "finished")) for path in runs.runs]
    assert [[line.name for line in chart.lines] for chart in machine_charts(records)] == [["run"]] * 3
    assert {line.name for chart in loss_charts(records, "pre-training") for line in chart.lines} == {
        "run/students/small"
    }


def test_differences_of_settings() -> None:
    first = flatten({"run": {"folder": "a"}, "model": {"size": "S"}, "data": {"scales": [1, 2]}, "targets": {}})
    second = flatten({"run": {"folder": "b"}, "model": {"size": "B"}, "data": {"scales": [1, 2]}, "seed": None})
    compared = compare_settings([first, second])
    assert compared.differing == [("model.size", ["S", "B"]), ("seed", [None, "null"]), ("targets", ["{}", None])]
    assert compared.equal == [("data.scales", "[1, 2]")]


def test_settings_hold_no_credentials() -> None:
    signed = "https://me:pw@host/x.parquet?X-Amz-Signature=0a1b"
    told = flatten({"data": {"source": signed, "more": [signed]}})
    assert told == {"data.source": "https://host/x.parquet", "data.more": '["https://host/x.parquet"]'}


def test_a_curve_has_the_readings(write: Write) -> None:
    charts = optimizer_charts([record("a", {"lr": [0.5, 0.25], "grad_norm": [90.0, math.nan, 1.0]})])
    assert [chart.title for chart in charts] == ["Learning rate", "Gradient norm before clipping"]
    assert charts[0].lines[0].figures == ("0.5", "0.25", "0.5", "0.25")
    assert charts[1].lines[0].figures == ("90", "1", "90", "1")
    assert [chart.logarithmic for chart in charts] == [False, True]
    # The scale of the loss is shown where it changes.
    changing = optimizer_charts([record("a", {"loss_scale": [8.0, 4.0]}), record("b", {"loss_scale": [1.0, 1.0]})])
    assert [chart.title for chart in changing] == ["Loss scale"]
    assert not optimizer_charts([record("a", {"loss_scale": [1.0, 1.0]})])
    assert not charts[0].averaged


def test_a_metric_without_a_finite_value(tmp_path: Path) -> None:
    (chart,) = loss_charts([record("a", {"loss": [math.nan, math.nan]})], "pre-training")
    assert chart.lines[0].figures == ("", "", "", "")


def test_long_runs_are_averaged() -> None:
    values = np.arange(100_000, dtype=np.float64)
    values[7] = np.nan
    steps, mean, low, high = in_bins(Series(np.arange(1, 100_001), values))
    assert len(steps) == len(mean) == 300
    assert (low < mean).all()
    assert (mean < high).all()
    assert low[0] == 0
    assert high[-1] == 99_999
    assert np.abs(mean - (steps - 1)).max() < 1


@undrawn
def test_more_runs_than_colours(write: Write, tmp_path: Path) -> None:
    for number in range(len(SERIES) + 1):
        write(f"run{number}", steps=3)
    text = (write_run_report([tmp_path / "runs"], tmp_path / "page.html"), (tmp_path / "page.html").read_text())[1]
    assert len(set(re.findall(r'class="key" style="([^"]+)"', text))) == len(SERIES) + 1


def test_of_two_readings_of_a_step_the_later_counts() -> None:
    series = series_by_name(
        [{"step": 2, "loss": 5}, {"step": 1, "loss": 3}, {"step": 2, "loss": 4, "x": "no"}, {"loss": 9}]
    )
    assert list(series) == ["loss"]
    assert series["loss"].steps.tolist() == [1, 2]
    assert series["loss"].values.tolist() == [3, 4]


@undrawn
def test_pictures_are_chosen_over_time(write: Write, tmp_path: Path) -> None:
    folder = write("a", pictures=9)
    shutil.copy(folder / "pictures" / "step_00000090.png", folder / "predictions.png")
    text = page_of(folder, out=tmp_path / "page.html").text
    assert "4 of 10 pictures." in text
    for words in ("After step 10", "After step 40", "After step 70", "At the end"):
        assert words in text


@undrawn
def test_results_have_intervals(write: Write, tmp_path: Path) -> None:
    folder = write("classifier", kind={"classifier": {}}, targets=())
    (folder / "test").mkdir()
    summary = {"videos": 50, "top1": 0.6, "top5": 0.9}
    (folder / "test" / "summary.json").write_text(json.dumps(summary))
    figure = read_test("classifier/test", folder / "test")
    assert figure.interval == pytest.approx((0.4618, 0.7239), abs=1e-4)
    text = page_of(folder, out=tmp_path / "page.html").text
    assert "classifier/test 60.00 % 46.2 to 72.4" in text
    assert "50 videos; top-5 90.0 %" in text
    (folder / "test" / "summary.json").write_text(json.dumps({"frame_map": 0.2, "key_frames": 9, "actions": 3}))
    assert "classifier/test 20.00 % none 9 key frames, 3 actions" in page_of(folder, out=tmp_path / "page.html").text
    (folder / "test" / "summary.json").write_text(json.dumps({"top1": "high"}))
    (sentence,) = write_run_report([folder], tmp_path / "page.html")
    assert "is not that of a finished test" in sentence


def test_bars_hold_their_intervals() -> None:
    for value, interval in ((0.98, (0.91, 1.05)), (0.01, (-0.03, 0.05)), (0.5, (0.4, 0.6)), (1.0, (0.7, 1.0))):
        low, high = _scale([Figure("a", "top-1", value, interval)])
        assert low <= interval[0] < interval[1] <= high
    assert _scale([Figure("a", "top-1", 1.0, (0.7, 1.0))])[1] == 1


def test_wilson_interval() -> None:
    # Values of Wilson's formula with z = 1.96: 8 of 10, none of 10 and all of 10.
    for share, low, high in ((0.8, 0.490, 0.943), (0.0, 0.0, 0.278), (1.0, 0.722, 1.0)):
        estimate = wilson_interval(share, 10)
        assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-3)
    assert wilson_interval(0.0, 0).high == 1


@undrawn
def test_a_study(tmp_path: Path) -> None:
    probe = {"measure": "probe", "published": None, "missing": {}}
    cells = [
        {
            "row": "both",
            "task": "motion",
            **probe,
            "top1": {"mean": 63, "half": 3, "count": 3},
            "published": 70.5,
            "cpu_minutes": 2,
        },
        {"row": "both", "task": "appearance", **probe, "top1": {"mean": 30, "half": None, "count": 1}},
        {"row": EVIL, "task": "motion", **probe, "top1": None, "missing": {"2": "has not been run"}},
    ]
    compared = {"better": "video", "than": "image", "task": "motion", "difference": {"mean": 9, "half": 2, "count": 3}}
    directions = [{"says": "Video helps.", "measure": "probe", "verdict": "holds", "comparisons": [compared]}]
    document = {"title": "Table 2", "scale": "mini", "split": "test", "note": "of ViT-S", "cells": cells}
    (tmp_path / "results.json").write_text(json.dumps({**document, "directions": directions}))
    study = read_study("study", tmp_path)
    assert study.columns == ["motion, probe", "appearance, probe"]
    assert [[isinstance(cell, Figure) for cell in row] for _, row in study.rows] == [[True, True], [False, False]]
    text = page_of(tmp_path, out=tmp_path / "page.html").text
    for words in (
        "Table 2", "mini, test", "of ViT-S", "63.00 % 60.0 to 66.0, 3 seeds; the paper has 70.5; 2.0 minutes of CPU",
        "30.00 % 1 seed",
        "none: seed 2: has not been run", "none: no such cell", "Video helps. (probe) holds",
        "video less image, motion: +9.0 ± 2.0",
    ):  # fmt: skip
        assert words in text, words
    assert "minutes of CPU for a seed" not in text
    costs = [{"encoder": "both", "seeds": 3, "cpu_minutes": 12.34}, {"encoder": EVIL, "seeds": 0, "cpu_minutes": None}]
    (tmp_path / "results.json").write_text(json.dumps({**document, "encoders": costs}))
    assert read_study("study", tmp_path).encoders == [("both", 3, 12.34), (EVIL, 0, None)]
    text = page_of(tmp_path, out=tmp_path / "page.html").text
    assert f"minutes of CPU for a seed both 3 12.3 {EVIL} 0 unknown" in text
    for broken in ({"cells": [{"row": "both"}]}, {**document, "encoders": [{"seeds": 3}]}):
        (tmp_path / "results.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match="holds no cells"):
            read_study("study", tmp_path)


@undrawn
def test_of_a_large_study_the_pre_training_is_drawn(write: Write, tmp_path: Path) -> None:
    stages = ["both_seed0", "both_seed1", "image_seed0", *(f"both_task{number}_seed0" for number in range(24))]
    for stage in stages:
        write(f"study/{stage}", steps=3)
    write("alone", steps=3)
    results = tmp_path / "runs" / "study" / "results.json"
    cell = {"row": "both", "task": "motion", "measure": "probe", "top1": None}
    encoders = [{"encoder": name, "seeds": 2, "cpu_minutes": 1} for name in ("both", "image")]

    def drawn(document: dict[str, Any], *folders: str) -> tuple[list[str], str]:
        results.write_text(json.dumps({"cells": [cell], **document}))
        paths = [tmp_path / "runs" / folder for folder in folders or ("",)]
        assert write_run_report(paths, tmp_path / "page.html") == []
        text = (tmp_path / "page.html").read_text()
        return re.findall(r'<th scope="row" class="run">.*</span>(.*)</th>', text), Page(text).text

    names, text = drawn({"encoders": encoders})
    assert names == ["alone", "study/both_seed0", "study/both_seed1", "study/image_seed0"]
    assert "24 of 28 runs are not drawn: `mvd-scale report study/RUN...` draws" in text
    assert text.index("both") < text.index(" Runs ")
    # Without names of encoders the first runs that have a line style of their own.
    names, text = drawn({})
    assert len(names) == 24
    assert "4 of 28 runs are not drawn" in text
    # Runs that are named are drawn.
    names, text = drawn({"encoders": encoders}, "study/both_task3_seed0", "study/both_seed0")
    assert names == ["both_task3_seed0", "both_seed0"]
    assert "not drawn" not in text


@undrawn
def test_the_command(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write("a")
    done = report(folder)
    assert (done.exit_code, done.stdout.strip()) == (0, str(folder / "report.html"))
    done = report(folder, write("b"))
    assert (done.exit_code, done.stdout.strip()) == (0, "report.html")
    assert "2 runs" in Path("report.html").read_text()
    (tmp_path / "none").mkdir()
    done = report(folder, tmp_path / "none", tmp_path / "gone", tmp_path / "report.html", "--out", "page.html")
    assert done.exit_code == 2
    for words in ("none holds no run", "gone: there is no such folder", "report.html: is a file"):
        assert words in done.stderr
        assert words in Path("page.html").read_text()


def test_nothing_to_show_is_one_message(tmp_path: Path) -> None:
    done = report(tmp_path)
    assert "holds no run and no finished evaluation" in str(done.exception)
    assert not (tmp_path / "report.html").exists()


def test_a_run_by_two_paths_is_shown_once(write: Write, tmp_path: Path) -> None:
    folder = write("a")
    (tmp_path / "link").symlink_to(folder)
    sources = find_sources([folder, tmp_path / "link", tmp_path / "runs"])
    assert (sources.runs, sources.left_out) == ([folder.resolve()], [])


def test_linked_folders_are_followed(write: Write, tmp_path: Path) -> None:
    kept = write("../elsewhere/kept")
    write("../elsewhere/many/one")
    run = write("real")
    runs = tmp_path / "runs"
    for link, folder in (("linked", kept), ("a_second_name", run), ("many", tmp_path / "elsewhere" / "many")):
        (runs / link).symlink_to(folder)
    (runs / "loop").symlink_to(runs)
    (run / "data").symlink_to(write("../videos/no_run_of_this"))
    sources = find_sources([runs])
    assert [sources.name(folder) for folder in sources.runs] == ["linked", "many/one", "real"]


def test_runs_without_a_common_folder_have_a_title() -> None:
    sources = Sources(runs=[Path("/a/x"), Path("/b/y"), Path("/b/z")])
    assert sources.title == "x and 2 more"
    assert [sources.name(folder) for folder in sources.runs] == ["a/x", "b/y", "b/z"]


@pytest.mark.parametrize("width", [500, 1280])
def test_nothing_is_wider_than_a_browser(write: Write, tmp_path: Path, width: int) -> None:
    """The body fits the window, so that only tables and pictures scroll sideways, in their own boxes."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs a headless browser: apt-get install chromium")
    write("a", pictures=3, settings={"a_key_of_some_length": "value" * 30})
    write("another_run_with_a_name_that_is_long_enough_to_wrap_on_a_phone")
    write_run_report([tmp_path / "runs"], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    # The page itself has no scripts; this copy measures itself.
    text = re.sub(r"<meta http-equiv=.Content-Security-Policy[^>]*>", "", text)
    script = "<script>document.title = `${document.documentElement.scrollWidth} of ${innerWidth}`</script>"
    (tmp_path / "measured.html").write_text(text.replace("</body>", f"{script}</body>"))
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom",
        f"file://{tmp_path / 'measured.html'}",
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    found = re.search(r"<title>(\d+) of (\d+)</title>", shown)
    assert found, "the browser did not run the page"
    assert int(found[1]) <= int(found[2]), f"the page is {found[1]} pixels wide in a window of {found[2]}"
