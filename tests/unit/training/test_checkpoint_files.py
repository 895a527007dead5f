"""Tests that a checkpoint which lost a file or a part of one is recognised, and the one before it is taken."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mvd_scale.checkpoints.reading import read_raw_checkpoint
from mvd_scale.errors import UserError
from mvd_scale.training.checkpoint_files import find_damage, record_files
from mvd_scale.training.checkpointer import Checkpointer


def checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step_{step:08d}"
    (folder / "deep").mkdir(parents=True)
    torch.save({"module": {"w": torch.full((100,), float(step))}}, folder / "mp_rank_00_model_states.pt")
    save_file({"w": torch.full((100,), float(step))}, folder / "deep" / "average.safetensors")
    (folder / "layout.json").write_text(json.dumps({"ranks": 1}))
    record_files(folder)
    return folder


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def clear_end(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:50] + bytes(file.stat().st_size - 50))


TEARS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file is gone": (lambda f: (f / "mp_rank_00_model_states.pt").unlink(), "mp_rank_00_model_states.pt is missing"),
    "a file is cut off": (
        lambda f: cut(f / "deep" / "average.safetensors"),
        r"average.safetensors has \d+ of",
    ),
    "zeros in a pickle": (lambda f: clear_end(f / "mp_rank_00_model_states.pt"), "model_states.pt is damaged"),
    "zeros in safetensors": (lambda f: clear_end(f / "deep" / "average.safetensors"), "average.safetensors is damaged"),
    "zeros in JSON": (lambda f: (f / "layout.json").write_bytes(bytes(12)), "layout.json is damaged"),
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


def checkpointer(run: Path) -> Checkpointer:
    made = object.__new__(Checkpointer)
    made.path = run / "checkpoints"
    made.ranks = SimpleNamespace(is_main=True)  # type: ignore[assignment]
    return made


def test_the_checkpoint_before_a_torn_one_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (5, 10, 15):
        checkpoint(tmp_path, step)
    for step in (10, 15):
        cut(tmp_path / "checkpoints" / f"step_{step:08d}" / "mp_rank_00_model_states.pt")
    with caplog.at_level(logging.INFO, logger="mvd_scale"):
        assert read_raw_checkpoint(tmp_path).tensors["w"][0] == 5
        assert checkpointer(tmp_path)._set_torn_aside() == 5
    assert caplog.text.count("a torn checkpoint is passed over") == 2
    assert "step_00000015 is torn: mp_rank_00_model_states.pt has" in caplog.text
    kept = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_00000005", "step_00000010.torn", "step_00000015.torn"]
    assert checkpointer(tmp_path)._set_torn_aside() == 5
    assert read_raw_checkpoint(tmp_path).tensors["w"][0] == 5


def test_a_run_does_not_begin_anew_over_torn_checkpoints(tmp_path: Path) -> None:
    assert checkpointer(tmp_path)._set_torn_aside() is None
    cut(checkpoint(tmp_path, 5) / "mp_rank_00_model_states.pt")
    with pytest.raises(
        UserError, match=r"no checkpoint in .* is whole \(step_00000005: mp_rank_00_model_states.pt has"
    ):
        checkpointer(tmp_path)._set_torn_aside()
    assert (tmp_path / "checkpoints" / "step_00000005").is_dir()
