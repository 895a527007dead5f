"""A journal finds what earlier runs recorded, however many lines there are, and whatever the last one left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvd_scale.data.indexing import journal
from mvd_scale.data.indexing.journal import Journal, Places
from mvd_scale.data.manifest import Row

KEYS = [f"/videos/é{k}.mp4  {k}" for k in range(7)]
ROWS = [
    Row(name=f"{k}\udcff", path="x" * 900 * k, duration=k / 3, left_out="broken" if k == 3 else None) for k in range(7)
]


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "RUN", 2)


def write(path: Path | None, options: dict[str, object] | None = None) -> None:
    with Journal(path, options or {}) as book:
        book.add(KEYS[:3], ROWS[:3])
        book.add(KEYS[3:], ROWS[3:])


def test_rows_are_read_back_by_their_places(tmp_path):
    for path in (None, tmp_path / "deep" / "journal"):
        with Journal(path, {}) as book:
            places = [*book.add(KEYS[:4], ROWS[:4]), *book.add(KEYS[4:], ROWS[4:])]
            assert [book.row(place) for place in reversed(places)] == ROWS[::-1]
            assert book.row(places[2], name="other").name == "other"


def test_a_later_run_finds_all_of_them(tmp_path):
    write(tmp_path / "journal")
    with Journal(tmp_path / "journal", {}) as book:
        places = book.find([*KEYS[::-1], "another"])
        assert places[-1] is None
        assert [book.row(place) for place in places[:-1] if place is not None] == ROWS[::-1]
    with Journal(tmp_path / "journal", {"verify": True}) as book:
        assert book.find(KEYS) == [None] * 7
    assert (tmp_path / "journal").read_text() == '{"verify": true}\n'


def test_keys_of_one_hash_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "_hash", lambda key: 1)
    write(tmp_path / "journal")
    with Journal(tmp_path / "journal", {}) as book:
        found = [book.find([key])[0] for key in KEYS]
        # One that is hidden by another of its hash is probed again; none gets the row of another.
        rows = [(book.row(place), row) for place, row in zip(found, ROWS, strict=True) if place is not None]
    assert rows
    assert all(one == other for one, other in rows)


def test_the_last_of_several_records_counts(tmp_path):
    path = tmp_path / "journal"
    write(path)
    with Journal(path, {}) as book:
        book.add(KEYS[:1], [Row("new", "path")])
    with Journal(path, {}) as book:
        place = book.find(KEYS[:1])[0]
        assert place is not None
        assert book.row(place).name == "new"


@pytest.mark.parametrize("cut", [1, 2, 30, 200])
def test_a_line_that_a_kill_left_incomplete_is_forgotten(tmp_path, cut):
    path = tmp_path / "journal"
    write(path)
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path, {}) as book:
        assert [place is None for place in book.find(KEYS)] == [False] * 6 + [cut > 1]
        book.add(KEYS[6:], ROWS[6:])
    with Journal(path, {}) as book:
        assert None not in book.find(KEYS)


def test_places_are_those_of_their_numbers():
    with Places() as places:
        places.note([2, 0], [1 << 40, 7])
        places.note([1], [0])
        assert list(places) == [7, 0, 1 << 40]
