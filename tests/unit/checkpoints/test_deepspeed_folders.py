"""Checkpoint folders of DeepSpeed at every ZeRO stage, written by two ranks, are read without DeepSpeed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mvd_scale.checkpoints.deepspeed_folders import load_deepspeed
from mvd_scale.checkpoints.reading import read_raw_checkpoint
from mvd_scale.errors import UserError
from tests.fork_server import ForkServer

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> dict[int, Path]:
    return {stage: _written(tmp_path_factory.mktemp(f"zero{stage}"), stage, fork_server) for stage in range(4)}


def _written(folder: Path, stage: int, fork_server: ForkServer) -> Path:
    code, output = fork_server.run("tests.unit.checkpoints.zero_folder", folder, str(stage), ranks=2)
    assert code == 0, output[-3000:]
    return folder


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("inside", ["", "step_7"])
def test_every_parameter_comes_back(folders: dict[int, Path], stage: int, inside: str) -> None:
    true = load_file(folders[stage] / "true.safetensors")
    read = read_raw_checkpoint(folders[stage] / inside).tensors
    assert read.keys() == true.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in true.items())


def test_an_incomplete_folder_is_refused(folders: dict[int, Path], tmp_path: Path) -> None:
    folder = tmp_path / "step_7"
    shutil.copytree(folders[3] / "step_7", folder)
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(UserError, match=r"lacks the file zero_pp_rank_1.*2 here"):
        load_deepspeed(folder)
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(UserError, match="lacks the file zero_pp_rank_0"):
        load_deepspeed(folder)
    (tmp_path / "latest").write_text("step_8")
    with pytest.raises(UserError, match="step_8"):
        read_raw_checkpoint(tmp_path)


def test_files_of_another_kind_in_a_folder_are_named(tmp_path: Path) -> None:
    whole = tmp_path / "mp_rank_00_model_states.pt"
    torch.save([1, 2], whole)
    with pytest.raises(UserError, match=r"mp_rank_00_model_states\.pt holds no dictionary"):
        load_deepspeed(tmp_path)
    torch.save({"module": {}}, whole)
    torch.save({"module": {}}, tmp_path / "mp_rank_01_model_states.pt")
    with pytest.raises(UserError, match="tensor parallelism"):
        load_deepspeed(tmp_path)
