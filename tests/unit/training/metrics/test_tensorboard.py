"""Event files of TensorBoard are bounded, and a writer that failed is replaced after a while."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mvd_scale.training.metrics import tensorboard
from mvd_scale.training.metrics.sink import Values
from mvd_scale.training.metrics.tensorboard import TensorBoard


def losses(folder: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def test_scalars_and_pictures_are_read_back(tmp_path: Path, values: Values) -> None:
    sink = TensorBoard(tmp_path / "tensorboard", 0, 10)
    sink.open()
    sink.write(20, values)
    sink.show(20, "probe", 0.5)
    sink.show(20, "predictions", np.zeros((8, 8, 3), np.uint8))
    sink.close(failed=False)
    events = EventAccumulator(str(sink.folder)).Reload()
    assert set(events.Tags()["scalars"]) == {*values, "probe"}
    assert events.Tags()["images"] == ["predictions"]


def test_of_a_long_run_every_nth_reading_is_written(
    tmp_path: Path, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard, "MAX_READINGS", 10)
    sink = TensorBoard(tmp_path / "tensorboard", 0, 25)
    sink.open()
    for step in range(1, 26):
        sink.write(step, values)
    sink.close(failed=False)
    assert [step for step, _ in losses(sink.folder)] == list(range(3, 25, 3))


def test_a_folder_that_cannot_be_made_at_the_start_is_made_later(
    tmp_path: Path, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard, "_RETRY_SECONDS", 0.0)
    (tmp_path / "file").touch()
    sink = TensorBoard(tmp_path / "file" / "tensorboard", 0, 10)
    for begin in (sink.open, lambda: sink.write(1, values)):
        with pytest.raises(OSError, match="Not a directory"):
            begin()
    (tmp_path / "file").unlink()
    sink.write(2, values)
    sink.close(failed=False)
    assert [step for step, _ in losses(sink.folder)] == [2]


def test_a_writer_that_failed_is_replaced_after_a_while(
    tmp_path: Path, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = TensorBoard(tmp_path / "tensorboard", 0, 10)
    sink.open()
    sink.write(1, values)

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(sink._writer, "add_scalar", full)
    for step in (2, 3):
        with pytest.raises(OSError, match="No space"):
            sink.write(step, values)
    monkeypatch.setattr(tensorboard, "_RETRY_SECONDS", 0.0)
    sink.write(4, values)
    sink.close(failed=False)
    assert [step for step, _ in losses(sink.folder)] == [1, 4]
    assert len(list(sink.folder.iterdir())) == 2
