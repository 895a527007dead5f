"""Tests of pickles of every protocol: the same tensors come out, and code stays refused."""

from __future__ import annotations

import argparse
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from mvd_scale.checkpoints.pickle_protocols import as_protocol_2
from mvd_scale.checkpoints.pickles import load_pickle
from mvd_scale.errors import UserError

VALUES = {
    "numbers": [2**40, -1, 300, 70000, 1.5, True, False, None],
    "texts": ["a", "a", "é" * 300, ("a", "b", "c", "d"), ()],
    "nested": {"a": {"a": [[]]}},
}


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_protocol_gives_the_same(tmp_path: Path, protocol: int, zipped: bool) -> None:
    tensors = {
        "view": torch.arange(6.0).view(2, 3)[:, ::2],
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "half": torch.full((2,), 0.5, dtype=torch.bfloat16),
    }
    beside = {"args": argparse.Namespace(lr=1, out=Path("x"), tags={"a"}), "score": np.float64(2), "raw": b"xy" * 200}
    file = tmp_path / "weights.pth"
    whole = {"model": tensors, **VALUES, **beside}
    torch.save(whole, file, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    loaded = load_pickle(file)
    for name, tensor in tensors.items():
        torch.testing.assert_close(loaded["model"][name].detach(), tensor.detach(), rtol=0, atol=0)
    assert {name: loaded[name] for name in VALUES} == VALUES


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_is_refused_in_every_protocol(tmp_path: Path, protocol: int, zipped: bool) -> None:
    file, trap = tmp_path / "weights.pth", tmp_path / "trap"
    torch.save(
        {"w": torch.ones(1), "x": RunsCode(trap)},
        file,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(UserError, match="is a pickle that contains code"):
        load_pickle(file)
    assert not trap.exists()


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_damaged_one_is_told_with_its_protocol(tmp_path: Path, protocol: int) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"w": torch.ones(9)}, file, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UserError, match=f"it was saved with pickle protocol {protocol}"):
        load_pickle(file)


def test_names_that_are_no_texts_are_refused() -> None:
    with pytest.raises(pickle.UnpicklingError, match="a name in the pickle is no text"):
        as_protocol_2(io.BytesIO(b"\x80\x04K\x01K\x02\x93."))
    with pytest.raises(pickle.UnpicklingError, match="the pickle has the operation POP"):
        as_protocol_2(io.BytesIO(b"\x80\x04K\x010."))
    with pytest.raises(pickle.UnpicklingError, match="damaged pickle"):
        as_protocol_2(io.BytesIO(b"\x80\x04h\x07."))
