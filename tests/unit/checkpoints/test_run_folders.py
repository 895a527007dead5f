"""The one rule by which every command chooses the weights of a run folder: the last ones; others only by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mvd_scale.checkpoints import reading
from mvd_scale.checkpoints.reading import read_raw_checkpoint
from mvd_scale.errors import UserError

LAST, BEST, AVERAGE = range(3)


def write(file: Path, value: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.tensor(value)}, file)


def value_of(path: Path) -> int:
    return int(read_raw_checkpoint(path).tensors["weight"])


@pytest.mark.parametrize("kind", ["classifier", "detector"])
def test_a_run_folder_means_its_last_weights(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / f"{kind}.safetensors", LAST)
    write(tmp_path / "best.safetensors", BEST)
    write(tmp_path / "average.safetensors", AVERAGE)
    said: list[str] = []
    monkeypatch.setattr(reading.logger, "info", lambda text, *values: said.append(text % values))
    assert value_of(tmp_path) == LAST
    assert value_of(tmp_path) == LAST
    # One line for each file that is read, however often a command reads it.
    (line,) = said
    assert line == (
        f"{tmp_path}: reads {tmp_path}/{kind}.safetensors (not {tmp_path}/best.safetensors, the best weights of its "
        f"validation; not {tmp_path}/average.safetensors, the moving average of its weights)"
    )
    assert value_of(tmp_path / "best.safetensors") == BEST
    assert value_of(tmp_path / "average.safetensors") == AVERAGE


def test_a_run_that_has_not_ended_means_its_newest_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "best.safetensors", BEST)
    for step, value in (("step_00000010", 10), ("step_00000020", 20), ("step_00000030.partial", 30)):
        write(tmp_path / "checkpoints" / step / "classifier.safetensors", value)
        write(tmp_path / "checkpoints" / step / "average.safetensors", -value)
    assert value_of(tmp_path) == 20
    assert value_of(tmp_path / "checkpoints" / "step_00000010") == 10


def test_a_folder_of_best_weights_alone_is_refused_with_their_name(tmp_path: Path) -> None:
    write(tmp_path / "best.safetensors", BEST)
    with pytest.raises(UserError, match=r"holds no checkpoint.*best\.safetensors, the best weights of its validation"):
        read_raw_checkpoint(tmp_path)
