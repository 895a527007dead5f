"""Tests that a checkpoint which lost a file, a part of one or a bit is recognised, and the one before it is taken."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mvd_scale.checkpoints.reading import read_raw_checkpoint
from mvd_scale.checkpoints.tensor_folder import complete_description, save_pieces
from mvd_scale.distributed.health.progress import Progress
from mvd_scale.errors import UserError
from mvd_scale.training.checkpointing.files import describe_files, find_damage, write_record
from mvd_scale.training.checkpointing.pieces import Pieces, PiecesSavePlanner
from mvd_scale.training.checkpointing.selection import choose_resumed_step

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TENSORS = "__0_0.distcp"


def checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step_{step:08d}"
    state = {"model.w": Pieces.of_range(torch.full((100,), float(step)), 0, (100,))}
    save_pieces(state, folder, PiecesSavePlanner(Progress()), rank=0)
    complete_description(folder, ranks=1)
    (folder / "state.json").write_text(json.dumps({"step": step, "weights": {}}))
    write_record(folder, describe_files(folder.iterdir()))
    return folder


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


TEARS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file is gone": (lambda f: (f / TENSORS).unlink(), "distcp is missing"),
    "a file is cut off": (lambda f: cut(f / TENSORS), r"distcp has \d+ of"),
    "a bit is flipped": (lambda f: flip(f / TENSORS), "distcp holds other bytes than were written"),
    "a bit is flipped in JSON": (lambda f: flip(f / "tensors.json"), "tensors.json holds other bytes"),
    "zeros": (lambda f: (f / "state.json").write_bytes(bytes((f / "state.json").stat().st_size)), "state.json holds"),
    "no record": (lambda f: (f / "files.json").unlink(), "its list of files, files.json, is missing"),
    "the record is cut off": (lambda f: cut(f / "files.json"), "its list of files, files.json, is missing or cut off"),
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_recognised(tmp_path: Path, tear: str) -> None:
    folder = checkpoint(tmp_path, 5)
    assert find_damage(folder) is None
    make, said = TEARS[tear]
    make(folder)
    damage = find_damage(folder)
    assert damage is not None
    assert re.search(said, damage), damage


def test_the_checkpoint_before_a_torn_one_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (5, 10, 15):
        checkpoint(tmp_path, step)
    for step in (10, 15):
        cut(tmp_path / "checkpoints" / f"step_{step:08d}" / TENSORS)
    with caplog.at_level(logging.INFO, logger="mvd_scale"):
        assert read_raw_checkpoint(tmp_path).tensors["w"][0] == 5
        assert choose_resumed_step([tmp_path / "checkpoints"]) == 5
    assert caplog.text.count("a torn checkpoint is passed over") == 2
    assert "step_00000015 is torn: __0_0.distcp has" in caplog.text
    kept = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_00000005", "step_00000010.torn", "step_00000015.torn"]
    assert choose_resumed_step([tmp_path / "checkpoints"]) == 5
    assert read_raw_checkpoint(tmp_path).tensors["w"][0] == 5


def test_a_run_does_not_begin_anew_over_torn_checkpoints(tmp_path: Path) -> None:
    assert choose_resumed_step([tmp_path / "checkpoints"]) is None
    cut(checkpoint(tmp_path, 5) / TENSORS)
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole \(step_00000005: __0_0.distcp has"):
        choose_resumed_step([tmp_path / "checkpoints"])
    assert (tmp_path / "checkpoints" / "step_00000005").is_dir()
