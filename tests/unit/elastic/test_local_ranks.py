"""Processes of the ranks of a host: their environment, their end, and that nothing of them is left."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mvd_scale.elastic.local_ranks import LocalRanks, Place

PLACE = Place(ranks=2, first_rank=4, world_size=6, node=1, address="10.0.0.1", port=29501)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_end(ranks: LocalRanks) -> list[int]:
    wait_until(lambda: bool(ranks.poll() or not ranks.is_running) and not ranks.is_running)
    return sorted(ranks.codes)


def test_ranks_have_the_variables_of_a_launcher_and_of_no_other(tmp_path: Path) -> None:
    script = "import json, os; open(os.environ['RANK'], 'w').write(json.dumps(dict(os.environ)))"
    outer = {**os.environ, "CROSS_RANK": "7", "TORCHELASTIC_USE_AGENT_STORE": "True", "MINE": "a; b"}
    ranks = LocalRanks([sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {script}"], PLACE, outer)
    assert wait_for_end(ranks) == [0, 0]
    for rank, local in (("4", "0"), ("5", "1")):
        found = json.loads((tmp_path / rank).read_text())
        expected = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
        expected |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501", "MINE": "a; b"}
        assert expected.items() <= found.items()
        assert not found.keys() & {"CROSS_RANK", "TORCHELASTIC_USE_AGENT_STORE"}


def test_words_reach_no_shell(tmp_path: Path) -> None:
    word = f"$(touch {tmp_path}/a); touch {tmp_path}/b\n'\""
    script = "import sys; sys.exit(0 if sys.argv[1] == sys.argv[2].encode().decode('unicode_escape') else 1)"
    ranks = LocalRanks(
        [sys.executable, "-c", script, word, word.encode("unicode_escape").decode()], PLACE, dict(os.environ)
    )
    assert wait_for_end(ranks) == [0, 0]
    assert list(tmp_path.iterdir()) == []


def test_what_a_rank_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    ranks = LocalRanks(["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/$RANK; exit 3"], PLACE, dict(os.environ))
    assert wait_for_end(ranks) == [3, 3]
    children = [int((tmp_path / rank).read_text()) for rank in ("4", "5")]
    wait_until(lambda: not any(psutil.pid_exists(child) for child in children))


def test_a_rank_that_does_not_end_in_time_is_killed(tmp_path: Path) -> None:
    script = f"trap '' TERM; touch {tmp_path}/$RANK; while :; do sleep 0.1; done"
    ranks = LocalRanks(["sh", "-c", script], PLACE, dict(os.environ))
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    ranks.stop(signal.SIGTERM, 60)
    ranks.poll()
    assert ranks.is_running
    ranks.stop(None, 0.1)
    assert wait_for_end(ranks) == [-signal.SIGKILL, -signal.SIGKILL]


def test_a_signal_to_a_rank_that_has_just_ended_takes_no_exit_code(tmp_path: Path) -> None:
    """As where all ranks of a host are killed at once: one is found, and the others are asked to end."""
    others = psutil.Process().children()
    ranks = LocalRanks(["sh", "-c", f"touch {tmp_path}/$RANK; exit 3"], PLACE, dict(os.environ))
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    children = [child for child in psutil.Process().children() if child not in others]
    wait_until(lambda: all(child.status() == psutil.STATUS_ZOMBIE for child in children))
    ranks.stop(signal.SIGTERM, 60)
    assert wait_for_end(ranks) == [3, 3]


def test_a_command_that_cannot_be_started_leaves_nothing() -> None:
    with pytest.raises(OSError, match="No such file"):
        LocalRanks(["/no/such/program"], PLACE, {})
