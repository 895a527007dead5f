"""Files of columns: what is written is read, by blocks and by other processes; a file that is not whole is refused."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvd_scale.data import columns
from mvd_scale.data.columns import (
    Categories,
    ColumnFile,
    ColumnWriter,
    Texts,
    TornFileError,
    encode_texts,
    in_memory,
    share,
)

TEXTS = ["a", "", "é", "\udcff", None, "end"]


def write(path: Path, texts: Sequence[str | None] = TEXTS, pieces: int = 2) -> ColumnFile:
    numbers = np.arange(10)
    with path.open("wb") as file:
        writer = ColumnWriter(file)
        writer.add("numbers", np.array_split(numbers, pieces), np.int64)
        writer.add("same", [np.full((3, 2), 7)], np.int64)
        writer.add("none", [], np.float64)
        writer.add_texts("texts", lambda: [encode_texts(texts[:2]), encode_texts(texts[2:])])
        writer.finish({"said": "so"})
    return ColumnFile.open(path)


def test_columns_are_read_as_they_were_written(tmp_path):
    file = write(tmp_path / "a")
    assert file["numbers"].tolist() == list(range(10))
    assert file["same"].tolist() == [[7, 7]] * 3
    assert file["none"].tolist() == []
    assert file.about == {"said": "so"}
    assert file.get("gone") is None
    present = np.array([text is not None for text in TEXTS])
    texts = Texts(file["texts.ends"], file["texts.bytes"], present)
    assert texts == TEXTS
    assert [texts[row] for row in range(-6, 6)] == TEXTS * 2
    assert texts[1:4] == TEXTS[1:4]
    with pytest.raises(IndexError):
        texts[6]


def test_texts_are_equal_in_blocks_of_any_size(tmp_path, monkeypatch):
    for block in (1, 2, 5, 100):
        monkeypatch.setattr(columns, "BLOCK", block)
        file = write(tmp_path / "a", TEXTS[:4])
        assert list(Texts(file["texts.ends"], file["texts.bytes"])) == TEXTS[:4]
        assert list(Categories(np.array([1, 0, 1], np.int32), ["x", "y"])) == ["y", "x", "y"]


def test_equal_values_take_the_place_of_one(tmp_path):
    with (tmp_path / "same").open("wb") as file:
        writer = ColumnWriter(file)
        writer.add("same", [np.full(1000, 7)] * 100, np.int64)
        writer.add("after", [np.arange(3)], np.int64)
        writer.finish({})
    assert (tmp_path / "same").stat().st_size < 1000
    read = ColumnFile.open(tmp_path / "same")
    assert read["same"].tolist() == [7] * 100_000
    assert read["after"].tolist() == [0, 1, 2]


def test_a_file_that_was_cut_anywhere_is_torn(tmp_path):
    write(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for length in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(TornFileError):
            ColumnFile.open(tmp_path / "cut")


def test_pages_that_are_given_back_are_read_again():
    numbers = np.random.default_rng(0).integers(0, 99, 1_000_000)
    file = share(numbers=numbers)
    assert (file["numbers"] == numbers).all()
    file.release()
    assert (file["numbers"] == numbers).all()


@pytest.mark.parametrize("named", [True, False])
def test_another_process_maps_the_same_file(tmp_path, named):
    file = write(tmp_path / "a") if named else share(numbers=np.arange(10))
    script = """
import pickle, sys
file = pickle.load(sys.stdin.buffer)
lines = [line.split() for line in open("/proc/self/maps")]
print(file["numbers"].sum(), *{int(line[4]) for line in lines if line[-1].endswith(sys.argv[1])})
"""
    name = "/a" if named else "(deleted)"
    answer = subprocess.run(
        [sys.executable, "-c", script, name], input=pickle.dumps(file), capture_output=True, check=True
    )
    total, *inodes = map(int, answer.stdout.split())
    assert total == 45
    assert os.fstat(file._descriptor).st_ino in inodes


def test_a_pickle_outlives_no_file():
    file = share(numbers=np.arange(10))
    saved = pickle.dumps(file)
    assert pickle.loads(saved)["numbers"].tolist() == list(range(10))
    descriptor = file._descriptor
    del file
    # The number of a descriptor that was closed goes to the next file.
    other = os.open("/dev/zero", os.O_RDONLY)
    try:
        os.dup2(other, descriptor)
        with pytest.raises((OSError, TornFileError)):
            pickle.loads(saved)
    finally:
        for number in {other, descriptor}:
            os.close(number)


def test_a_pickle_does_not_grow_with_the_columns():
    sizes = [len(pickle.dumps(share(numbers=np.arange(count)))) for count in (10, 100_000)]
    assert max(sizes) - min(sizes) < 8
    assert max(sizes) < 300


def test_what_is_in_memory_fails_as_it_is_written():
    def fail(file: Any) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        in_memory(fail)
