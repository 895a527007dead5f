"""Sequences on disk are the lists that they stand for; texts are sorted as a whole, whatever they hold."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

import pytest

from mvd_scale.data import spool
from mvd_scale.data.spool import Mapped, Part, store, store_sorted, store_texts

TEXTS = ["b", "a/b", "a-b", "é", "\udcff", "a\nb", "", "z" * 40_000, "b", "日本"]


@pytest.fixture(autouse=True)
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(spool, "IN_MEMORY", 3)


@pytest.mark.parametrize("count", [0, 2, 3, 4, 10])
def test_what_is_kept_is_what_was_given_every_time(count):
    kept = store_texts(iter(TEXTS[:count]))
    assert isinstance(kept, list) == (count < 3)
    assert len(kept) == count
    assert list(kept) == list(kept) == TEXTS[:count]
    assert list(Part(kept, range(1, 3))) == TEXTS[1:3][: max(count - 1, 0)]
    assert list(Mapped(len, kept)) == [len(text) for text in TEXTS[:count]]


def test_two_passes_at_once_do_not_disturb_each_other():
    kept = store(range(20), str, int)
    assert [(first, second) for first in kept for second in kept if first == second] == [(k, k) for k in range(20)]


@pytest.mark.parametrize("count", [0, 2, 3, 10])
def test_texts_are_sorted_as_a_whole(count):
    assert list(store_sorted(iter(TEXTS[:count]))) == sorted(TEXTS[:count])


def test_many_runs_are_one_order():
    numbers = [str(k) for k in range(500)]
    random.Random(0).shuffle(numbers)
    assert list(store_sorted(numbers)) == sorted(numbers)


def test_files_have_no_name_and_end_with_their_sequence(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    kept = store_sorted(TEXTS)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    del kept
    assert len(os.listdir("/proc/self/fd")) == before
