"""Metrics of several students: one name for each, and the plain names in the folder of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvd_scale.run_dir import RunFolder
from mvd_scale.training.metrics.json_lines import StudentJsonLines
from mvd_scale.training.metrics.prometheus import PrometheusFile
from mvd_scale.training.metrics.sink import MetricSink, Values, select_student, students_of
from mvd_scale.training.metrics.terminal import _one_line
from mvd_scale.training.metrics.writer import MetricWriter
from mvd_scale.utils.io import read_metrics

SHARED = {"clips_per_second": 8.0, "data_wait_share": 0.1, "memory_gib": 2.0}
OWN = {"loss": 1.0, "loss/video": 0.5, "lr": 1e-3, "grad_norm": 2.0, "loss_scale": 1.0}
READING: Values = {
    **{f"students/s/{name}": value for name, value in OWN.items()},
    **{f"students/b/{name}": 3 * value for name, value in OWN.items()},
    **SHARED,
}


def test_a_student_has_its_own_and_the_shared_metrics() -> None:
    assert students_of(READING) == ["s", "b"]
    assert select_student(READING, "s") == OWN | SHARED
    assert students_of(SHARED) == []


def test_its_own_file_has_the_names_of_a_run_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.of_student("s").path.mkdir(parents=True)
    sink = StudentJsonLines(folder, "s", 0)
    sink.open()
    sink.write(1, READING)
    assert read_metrics(tmp_path / "students" / "s" / "metrics.jsonl") == [{"step": 1, **OWN, **SHARED}]
    assert sink.name == "students/s/metrics.jsonl"


def test_the_line_of_the_terminal_names_each() -> None:
    line = _one_line(READING)
    assert line.startswith("s: loss 1.0000  video 0.5000  lr 1.00e-03  norm 2  scale 1  b: loss 3.0000  video 1.5000")
    assert line.endswith("8.0 clips/s  wait 10%  2.0 GiB")
    assert _one_line(OWN | SHARED).startswith("loss 1.0000  video 0.5000  lr")


def test_prometheus_has_a_label_for_each(tmp_path: Path) -> None:
    for student, steps in (("s", (5, 10)), ("b", (5,))):
        for step in steps:
            (RunFolder(tmp_path).of_student(student).checkpoints / f"step_{step:08d}").mkdir(parents=True)
    sink = PrometheusFile(tmp_path / "run.prom", RunFolder(tmp_path), 10)
    sink.open()
    sink.write(7, READING)
    text = (tmp_path / "run.prom").read_text()
    assert f'mvd_scale_loss{{run="{tmp_path}",student="b"}} 3.0' in text
    assert f'mvd_scale_loss_part{{run="{tmp_path}",student="s",part="video"}} 0.5' in text
    assert f'mvd_scale_clips_per_second{{run="{tmp_path}"}} 8.0' in text
    # The newest that all have.
    assert f'mvd_scale_checkpoint_step{{run="{tmp_path}"}} 5.0' in text


class Shown(MetricSink):
    name = "a list"

    def __init__(self) -> None:
        self.shown: list[tuple[int, str]] = []

    def open(self) -> None: ...

    def write(self, step: int, values: Values) -> None: ...

    def show(self, step: int, name: str, value: Any) -> None:
        self.shown.append((step, name))

    def close(self, *, failed: bool) -> None: ...


@pytest.mark.parametrize(("prefix", "name"), [("", "predictions"), ("students/s/", "students/s/predictions")])
def test_pictures_are_named_after_the_student(prefix: str, name: str) -> None:
    sink = Shown()
    MetricWriter([sink]).named(prefix).show(3, "predictions", np.zeros((1, 1, 3), np.uint8))
    assert sink.shown == [(3, name)]
