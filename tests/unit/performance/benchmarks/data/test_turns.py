from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mvd_scale.performance.benchmarks.data import turns as turns_module
from mvd_scale.performance.benchmarks.data.turns import Contest, LoaderProcess, order_of_round, take_turns


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes of the loaders import this module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[5]))


def batches(log: Path, name: str, end: int | None = None, how: str = "") -> Iterator[str]:
    """Yield the name, noting each batch; from batch `end` on fail as `how` says."""
    n = 0
    log.with_name(f"{name}.pid").write_text(str(os.getpid()))
    if how == "worker" and os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    while True:
        if n == end:
            if how == "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            if how == "exit":
                os._exit(3)
            raise RuntimeError("broken frame\nand a page of more")
        with log.open("a") as file:
            file.write(f"{name}\n")
        n += 1
        time.sleep(0.01)
        yield name


def no_check(batch: Any) -> None:
    pass


def refuse_b(batch: str) -> None:
    if batch == "b":
        raise ValueError("its first batch is b")


def contest(log: Path, rounds: int = 2, check: Any = no_check, **ends: Any) -> tuple[Contest, list[str]]:
    said: list[str] = []
    loaders = {name: (partial(batches, log, name, *ends.get(name, ())), check) for name in "abc"}
    return take_turns(loaders, rounds=rounds, seconds=0.05, say=said.append), said


def test_loaders_take_turns_and_each_round_begins_with_another(tmp_path: Path) -> None:
    log = tmp_path / "log"
    found, said = contest(log, rounds=3)
    drawn = log.read_text().split()
    turns = [name for n, name in enumerate(drawn) if n == 0 or drawn[n - 1] != name]
    # Each is opened first, which draws a batch.
    assert turns == [*"abc", *"abc", *"bca", *"cab"]
    assert all(len(found.turns[name]) == 3 for name in "abc")
    assert sum(turn.batches for turn in found.turns["a"]) + 1 == drawn.count("a")
    assert all(turn.seconds >= 0.05 for turns in found.turns.values() for turn in turns)
    assert len([line for line in said if line.startswith("round")]) == 3
    assert [order_of_round("abc", n) for n in (0, 1, 3)] == [[*"abc"], [*"bca"], [*"abc"]]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("segfault", "its process ended by SIGSEGV"),
        ("exit", "its process ended with exit code 3"),
        ("error", "RuntimeError: broken frame"),
    ],
)
def test_a_loader_that_aborts_is_one_line_and_the_others_go_on(tmp_path: Path, how: str, reason: str) -> None:
    found, said = contest(tmp_path / "log", b=(3, how))
    assert found.failed == {"b": reason}
    assert [*found.turns] == ["a", "c"]
    assert all(len(turns) == 2 for turns in found.turns.values())
    assert said.count(f"b is left out: {reason}") == 1


@pytest.mark.parametrize("how", ["alone", "worker"])
def test_a_loader_that_is_killed_between_turns_is_one_line_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A worker that outlives its loader holds the loader's end of the connection."""
    monkeypatch.setattr(turns_module, "PATIENCE", 5.0)
    log = tmp_path / "log"

    def kill(line: str) -> None:
        if line.startswith("round 1"):
            os.kill(int((tmp_path / "b.pid").read_text()), signal.SIGKILL)

    loaders = {name: (partial(batches, log, name, None, how if name == "b" else ""), no_check) for name in "abc"}
    found = take_turns(loaders, rounds=2, seconds=0.05, say=kill)
    assert found.failed == {"b": "its process ended by SIGKILL"}
    assert {name: len(turns) for name, turns in found.turns.items()} == {"a": 2, "c": 2}


def test_a_loader_that_is_killed_before_it_reads_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resume = LoaderProcess._signal

    def kill(self: LoaderProcess, number: signal.Signals) -> None:
        resume(self, signal.SIGKILL if number is signal.SIGCONT else number)

    monkeypatch.setattr(LoaderProcess, "_signal", kill)
    loaders = {"a": (partial(batches, tmp_path / "log", "a"), no_check)}
    found = take_turns(loaders, rounds=1, seconds=0.05, say=print)
    assert found.failed == {"a": "its process ended by SIGKILL"}


def test_a_loader_that_yields_other_clips_is_left_out(tmp_path: Path) -> None:
    found, _ = contest(tmp_path / "log", rounds=1, check=refuse_b)
    assert found.failed == {"b": "ValueError: its first batch is b"}
