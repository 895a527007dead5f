"""`metrics.jsonl` has whole lines only, loses none to a full disk, and is bounded."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mvd_scale.training.metrics import json_lines
from mvd_scale.training.metrics.json_lines import JsonLines
from mvd_scale.training.metrics.sink import Values
from mvd_scale.utils.io import last_metrics, read_metrics


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the kernel cut off writes beyond a size, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_readings_of_a_full_disk_follow_when_there_is_room(tmp_path: Path, values: Values) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl", 0)
    sink.open()
    sink.write(1, values)
    whole = sink.path.read_bytes()
    with largest_file(len(whole) + 50):
        for step in (2, 3):
            with pytest.raises(OSError, match="File too large"):
                sink.write(step, values)
            assert sink.path.read_bytes() == whole
    sink.write(4, values)
    assert [reading["step"] for reading in read_metrics(sink.path)] == [1, 2, 3, 4]


def test_a_start_on_a_full_disk_removes_later_readings_when_there_is_room(
    tmp_path: Path, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl", 1)
    sink.path.write_text('{"step": 1}\n{"step": 2}\n')
    with largest_file(4):
        with pytest.raises(OSError, match="File too large"):
            sink.open()
        with pytest.raises(OSError, match="File too large"):
            sink.write(2, values)
    sink.write(3, values)
    assert [(reading["step"], "loss" in reading) for reading in read_metrics(sink.path)] == [
        (1, False), (2, True), (3, True),
    ]  # fmt: skip


def test_size_is_bounded_and_the_ends_stay(tmp_path: Path, values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "MAX_BYTES", 20_000)
    sink = JsonLines(tmp_path / "metrics.jsonl", 0)
    sink.open()
    for step in range(1, 1001):
        sink.write(step, values)
    steps = [reading["step"] for reading in read_metrics(sink.path)]
    assert sink.path.stat().st_size <= 20_000
    assert (steps[0], steps[-1]) == (1, 1000)
    assert steps == sorted(set(steps))
    assert len(steps) > 20


@pytest.mark.parametrize(
    ("content", "step"),
    [
        ("", None),
        ('{"step": 1}\n', 1),
        ('{"step": 1}\n{"step": 2', 1),
        ('{"step": 1}\n{"step": 2}', 1),
        ('{"step": 1}\n\x00\x00\n', 1),
        ('{"step": 1}\n[2]\n', 1),
        ('{"st', None),
        ('{"step": 1, "x": "' + "y" * 100_000 + '"}\n{"step": 2}\n', 2),
    ],
)
def test_the_last_whole_reading_is_found_from_the_end(tmp_path: Path, content: str, step: int | None) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    reading = last_metrics(path)
    assert (reading and reading["step"]) == step
    assert last_metrics(tmp_path / "none.jsonl") is None
