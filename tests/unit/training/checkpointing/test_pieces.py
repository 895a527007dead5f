"""Any range of a tensor's flat order as boxes, and states that are saved by one cut and loaded by another."""

from __future__ import annotations

import json
import math
import pickletools
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mvd_scale.checkpoints.tensor_folder import (
    complete_description,
    load_pieces,
    read_description,
    read_tensors,
    save_pieces,
)
from mvd_scale.distributed.health.progress import Progress
from mvd_scale.errors import UserError
from mvd_scale.training.checkpointing.pieces import Pieces, PiecesLoadPlanner, PiecesSavePlanner, boxes

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SHAPES = st.lists(st.integers(1, 5), max_size=4)


@given(shape=SHAPES, data=st.data())
def test_boxes_are_the_range_in_its_order(shape: Sequence[int], data: st.DataObject) -> None:
    count = math.prod(shape)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    whole, seen = torch.arange(count).view(tuple(shape)), []
    found = list(boxes(start, stop, shape))
    for offsets, sizes in found:
        box = whole
        for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            box = box.narrow(axis, offset, size)
        seen += box.flatten().tolist()
    assert seen == list(range(start, stop))
    assert len(found) <= max(2 * len(shape) - 1, 1)


def written(folder: Path, tensors: dict[str, Tensor], cut: int) -> None:
    """Save tensors as two ranks would: one holds the first `cut` elements of each, the other the rest.

    A single process writes both, as pieces of one state.
    """
    state = {}
    for name, tensor in tensors.items():
        first, second = (
            Pieces.of_range(part, start, tensor.shape).tensors
            for part, start in ((tensor.flatten()[:cut], 0), (tensor.flatten()[cut:], cut))
        )
        state[name] = Pieces(tuple(tensor.shape), tensor.dtype, {**first, **second})
    save_pieces(state, folder, PiecesSavePlanner(Progress()), rank=0)
    complete_description(folder, ranks=1)


TENSORS = {"a": torch.randn(5, 3, 4), "b": torch.randn(70), "c": torch.randn(7, 11)}


def test_another_cut_loads_the_same_tensors(tmp_path: Path) -> None:
    written(tmp_path, TENSORS, 31)
    for start, stop in ((0, 17), (17, 60), (59, 60), (3, 3)):
        flats = {name: torch.zeros(stop - start) for name in TENSORS}
        state = {name: Pieces.of_range(flats[name], start, tensor.shape) for name, tensor in TENSORS.items()}
        load_pieces(state, tmp_path, PiecesLoadPlanner())
        for name, tensor in TENSORS.items():
            assert torch.equal(flats[name], tensor.flatten()[start:stop]), name


def test_whole_tensors_are_read_without_a_process_group(tmp_path: Path) -> None:
    written(tmp_path, TENSORS, 31)
    read = read_tensors(tmp_path, lambda name: name != "b")
    assert read.keys() == {"a", "c"}
    assert all(torch.equal(read[name], TENSORS[name]) for name in read)


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    written(tmp_path, TENSORS, 31)
    state = {"a": Pieces.of_range(torch.zeros(60), 0, (3, 5, 4))}
    with pytest.raises(UserError, match="Size mismatch"):
        load_pieces(state, tmp_path, PiecesLoadPlanner())


def test_a_folder_holds_tensors_and_json_alone(tmp_path: Path) -> None:
    """Each piece is a file of `torch.save` that names torch's own functions of tensors only."""
    written(tmp_path, TENSORS, 31)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["__0_0.distcp", "tensors.json"]
    content = (tmp_path / "__0_0.distcp").read_bytes()
    for tensor in read_description(tmp_path).values():
        for piece in tensor["pieces"]:
            part = tmp_path / "piece"
            part.write_bytes(content[piece["start"] : piece["start"] + piece["bytes"]])
            with zipfile.ZipFile(part) as archive:
                (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
                called = {
                    argument
                    for opcode, argument, _ in pickletools.genops(archive.read(name))
                    if opcode.name == "GLOBAL"
                }
            assert called <= {"torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict"}


def test_a_description_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "step"
    written(folder, TENSORS, 31)
    (folder / "__0_0.distcp").rename(tmp_path / "__0_0.distcp")
    described = json.loads((folder / "tensors.json").read_text().replace("__0_0.distcp", "../__0_0.distcp"))
    (folder / "tensors.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="which is no file beside it"):
        read_tensors(folder)


@pytest.mark.parametrize("content", [None, "", "{"])
def test_a_damaged_description_is_named(tmp_path: Path, content: str | None) -> None:
    written(tmp_path, TENSORS, 31)
    (tmp_path / "tensors.json").unlink()
    if content is not None:
        (tmp_path / "tensors.json").write_text(content)
    with pytest.raises(UserError, match=r"tensors\.json is missing or damaged"):
        read_tensors(tmp_path)
