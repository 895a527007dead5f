"""Nothing of a checkpoint is unpickled, when a run resumes or when its weights are read; no name leads out of it."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from mvd_scale.checkpoints.reading import read_raw_checkpoint
from mvd_scale.checkpoints.tensor_folder import complete_description, load_pieces, save_pieces
from mvd_scale.distributed.health.progress import Progress
from mvd_scale.errors import UserError
from mvd_scale.training.checkpointing.files import describe_files, find_damage, write_record
from mvd_scale.training.checkpointing.pieces import Pieces, PiecesLoadPlanner, PiecesSavePlanner

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

PIECES = "__0_0.distcp"


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one tensor."""
    folder = tmp_path / "checkpoints" / "step_00000005"
    state = {"model.w": Pieces.of_range(torch.arange(100.0), 0, (100,))}
    save_pieces(state, folder, PiecesSavePlanner(Progress()), rank=0)
    complete_description(folder, ranks=1)
    (folder / "state.json").write_text(json.dumps({"step": 5, "weights": {}}))
    record(folder)
    return folder


def record(folder: Path) -> None:
    """Write the checksums anew: whoever changes a checkpoint on purpose can do so too."""
    write_record(folder, describe_files(file for file in folder.iterdir() if file.name != "files.json"))


def edit(file: Path, change: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(change(content)))


def resume(folder: Path) -> torch.Tensor:
    """Load the tensor as a resumed run does."""
    pieces = Pieces.of_range(torch.zeros(100), 0, (100,))
    load_pieces({"model.w": pieces}, folder, PiecesLoadPlanner())
    (tensor,) = pieces.tensors.values()
    return tensor


def replace_piece(folder: Path, content: bytes) -> None:
    (folder / PIECES).write_bytes(content)

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        tensors["model.w"]["pieces"][0] |= {"start": 0, "bytes": len(content)}
        return tensors

    edit(folder / "tensors.json", change)
    record(folder)


@pytest.mark.parametrize("form", ["pickle", "zip"])
def test_a_piece_that_carries_code_is_refused(folder: Path, tmp_path: Path, form: str) -> None:
    marker = tmp_path / "marker"
    if form == "zip":
        torch.save(Bomb(marker), tmp_path / "bomb.pt")
        replace_piece(folder, (tmp_path / "bomb.pt").read_bytes())
    else:
        replace_piece(folder, pickle.dumps(Bomb(marker)))
    assert find_damage(folder) is None
    for read in (resume, read_raw_checkpoint):
        with pytest.raises(UserError, match="is damaged, or holds something else than a tensor") as error:
            read(folder)
        assert "weights_only" not in str(error.value), "torch proposes to unpickle without restriction"
    assert not marker.exists()


def test_metadata_as_torch_pickles_it_is_not_read(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb(marker)))
    record(folder)
    assert resume(folder).equal(torch.arange(100.0))
    read_raw_checkpoint(folder)
    (folder / "tensors.json").unlink()
    record(folder)
    with pytest.raises(UserError, match=r"tensors\.json is missing"):
        resume(folder)
    with pytest.raises(UserError):
        read_raw_checkpoint(folder)
    assert not marker.exists()


OUTSIDE = ["../secret", "/etc/passwd", "a/b", "..", ".", "", "a\0b", 7]


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_a_piece_in_a_file_outside_is_refused(folder: Path, name: Any) -> None:
    (folder.parent / "secret").write_bytes((folder / PIECES).read_bytes())

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        tensors["model.w"]["pieces"][0]["file"] = name
        return tensors

    edit(folder / "tensors.json", change)
    for read in (resume, read_raw_checkpoint):
        with pytest.raises(UserError, match="is no file beside it"):
            read(folder)


@pytest.mark.parametrize("name", [name for name in OUTSIDE if isinstance(name, str)], ids=repr)
def test_a_record_of_a_file_outside_is_damage(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_bytes(b"secret")
    known = describe_files([folder.parent / "secret"])["secret"]
    edit(folder / "files.json", lambda files: {name: known, **files})
    assert "is no file beside it" in str(find_damage(folder))


@pytest.mark.parametrize(
    "content", ["[]", "3", "null", '{"a": 1}', '{"a": {"bytes": "x", "sha256": "y"}}', '{"a": {}}']
)
def test_other_json_is_damage(folder: Path, content: str) -> None:
    (folder / "files.json").write_text(content)
    assert "missing or cut off" in str(find_damage(folder))
    (folder / "tensors.json").write_text(content)
    with pytest.raises(UserError, match="is missing or damaged"):
        resume(folder)
    with pytest.raises(UserError, match="is missing or damaged"):
        read_raw_checkpoint(folder)


def test_an_unknown_dtype_is_damage(folder: Path) -> None:
    edit(folder / "tensors.json", lambda tensors: {"model.w": tensors["model.w"] | {"dtype": "object"}})
    with pytest.raises(UserError, match="its dtypes are float32"):
        read_raw_checkpoint(folder)


@pytest.mark.parametrize("tag", ["", ".", ".."])
def test_a_deepspeed_folder_that_names_itself_or_its_parent(tmp_path: Path, tag: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").write_text(tag)
    with pytest.raises(UserError, match="names the checkpoint"):
        read_raw_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("shard", ["model.safetensors.index.json", "", "..", "../model.safetensors", "a\0b"], ids=repr)
def test_an_index_of_shards_that_names_itself_or_files_outside(tmp_path: Path, shard: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": shard}}))
    with pytest.raises(UserError, match="names the shard"):
        read_raw_checkpoint(tmp_path)
