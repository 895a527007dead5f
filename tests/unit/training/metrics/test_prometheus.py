"""The text file for node exporter is in Prometheus' format, whole at any time, and names the run."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from mvd_scale.errors import UserError
from mvd_scale.run_dir import RunFolder
from mvd_scale.training.metrics.prometheus import Metric, PrometheusFile, prom_file, render
from mvd_scale.training.metrics.sink import Values
from mvd_scale.utils.events import EventLog

SAMPLE = re.compile(
    r'(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)\{(?P<labels>(?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)+)\} (?P<value>\S+)'
)
"""A line of the text exposition format 0.0.4 with labels and without a time."""


def parse(text: str) -> dict[tuple[str, str], float]:
    """Read samples by name and labels; checks that HELP and TYPE come once, before the samples of their metric."""
    assert text.endswith("\n")
    samples: dict[tuple[str, str], float] = {}
    described: list[str] = []
    for line in text.splitlines():
        if line.startswith("# HELP "):
            described.append(line.split(" ")[2])
            assert described.count(described[-1]) == 1
        elif line.startswith("# TYPE "):
            assert line == f"# TYPE {described[-1]} gauge"
        else:
            found = SAMPLE.fullmatch(line)
            assert found, line
            assert found["name"] == described[-1]
            assert (found["name"], found["labels"]) not in samples
            samples[found["name"], found["labels"]] = float(found["value"])
    return samples


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "my run")
    (run.checkpoints / "step_00000007").mkdir(parents=True)
    os.utime(run.checkpoints / "step_00000007", (1000.0, 2000.0))
    log = EventLog(run.events)
    for event in ("start", "fault", "restart", "fault", "restart", "start"):
        log.write(event)  # type: ignore[arg-type]
    return run


def test_a_reading_is_exported_with_the_state_of_the_run(folder: RunFolder, tmp_path: Path, values: Values) -> None:
    sink = PrometheusFile(tmp_path / "run.prom", folder, 100)
    sink.open()
    sink.write(8, values)
    label = f'run="{folder.path}"'
    samples = parse(sink.path.read_text())
    expected = {
        "running": 1, "step": 8, "last_step": 100, "loss": 1.25, "learning_rate": 1e-3, "gradient_norm": float("inf"),
        "clips_per_second": 2, "step_seconds": 4, "data_wait_ratio": 0.25, "memory_bytes": 1.5 * 2**30,
        "clips_replaced": 3, "checkpoint_step": 7, "checkpoint_timestamp_seconds": 2000, "restarts": 2, "faults": 2,
    }  # fmt: skip
    for name, value in expected.items():
        assert samples[f"mvd_scale_{name}", label] == value, name
    assert samples["mvd_scale_loss_part", f'{label},part="video"'] == 0.75
    sink.close(failed=False)
    assert parse(sink.path.read_text())["mvd_scale_running", label] == 0
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["run.prom"]


def test_names_are_escaped() -> None:
    text = render({Metric("loss", "a\\b\nc"): {(("part", 'q"'),): 1.0}}, 'a"b\\c\nd')
    assert text == (
        "# HELP mvd_scale_loss a\\\\b\\nc\n# TYPE mvd_scale_loss gauge\n"
        'mvd_scale_loss{run="a\\"b\\\\c\\nd",part="q\\""} 1.0\n'
    )
    parse(text)


@pytest.mark.parametrize(("value", "text"), [(float("nan"), "NaN"), (float("-inf"), "-Inf"), (1e-9, "1e-09")])
def test_values_that_are_not_finite_are_spelt_as_prometheus_reads_them(value: float, text: str) -> None:
    assert render({Metric("loss", "Loss."): value}, "r").endswith(f" {text}\n")


def test_runs_of_one_name_have_files_of_their_own_in_the_collectors_folder(tmp_path: Path) -> None:
    first, second = (prom_file(tmp_path, tmp_path / place / "run 1") for place in "ab")
    assert first != second
    assert first.parent == tmp_path
    assert re.fullmatch(r"mvd_scale_run_1_[0-9a-f]{8}\.prom", first.name)


@pytest.mark.parametrize("name", ["run.txt", "missing/run.prom"])
def test_a_file_that_the_collector_would_not_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"logging\.prometheus .*: expected an existing folder"):
        prom_file(tmp_path / name, tmp_path)


def test_a_run_without_checkpoints_and_readings_leaves_no_file(tmp_path: Path) -> None:
    sink = PrometheusFile(tmp_path / "run.prom", RunFolder(tmp_path / "run"), 100)
    sink.open()
    sink.close(failed=True)
    assert not sink.path.exists()
