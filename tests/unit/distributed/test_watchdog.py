"""Tests of the watchdog: two ranks as objects of one process over a real store, whose end is recorded, not executed."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import TCPStore

from mvd_scale.distributed.health import verdict as verdicts
from mvd_scale.distributed.health import watchdog as module
from mvd_scale.distributed.health.verdict import Member, Verdict
from mvd_scale.distributed.health.watchdog import Watchdog
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.errors import Preempted, SharedError, UserError
from mvd_scale.utils.events import EventLog, read_events

MINUTES = 2 / 60

WAKE_NEIGHBOURS = Watchdog._wake_neighbours


class Ended(BaseException):
    """Stands for the end of the process, in the thread that would end it."""


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Exit codes by the name of the thread that ended its process."""
    codes: dict[str, int] = {}

    def end(code: int) -> None:
        codes[threading.current_thread().name] = code
        if threading.current_thread() is threading.main_thread():
            raise Ended

    monkeypatch.setattr(module, "_exit_with_children", end)
    monkeypatch.setattr(module, "_SECONDS_TO_END", 0.3)
    # This process goes on after its end: a guard, and the rank beside it, would take it to stand still, and have the
    # stacks of its running threads dumped, which can crash it.
    monkeypatch.setattr(module, "StallGuard", lambda seconds: nullcontext())
    monkeypatch.setattr(Watchdog, "_wake_neighbours", lambda dog, verdict: None)
    return codes


@pytest.fixture
def claimed() -> bool:
    """Whether the run folder is known to be the run's."""
    return True


@pytest.fixture
def pair(tmp_path: Path, ends: dict[str, int], claimed: bool) -> Iterator[list[Watchdog]]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    events = EventLog(tmp_path / "events.jsonl")
    dogs = [
        Watchdog(
            Ranks(rank, rank, 2, torch.device("cpu")), tmp_path / "faults", events, MINUTES, store, claimed=claimed
        )
        for rank in range(2)
    ]
    yield dogs
    for dog in dogs:
        dog._stop.set()
    # A thread that still ended its process would count in the next test.
    for dog in dogs:
        for thread in dog._threads:
            thread.join()
        dog._resources.close()


def enter(dogs: list[Watchdog]) -> None:
    """Enter both at the same time: each waits for the other."""
    other = threading.Thread(target=dogs[1].__enter__)
    other.start()
    dogs[0].__enter__()
    other.join()


def leave(dogs: list[Watchdog]) -> None:
    for dog in dogs:
        dog.__exit__(None, None, None)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition is not met after 20 s"
        time.sleep(0.02)


def fault(tmp_path: Path) -> str:
    return read_events(tmp_path / "events.jsonl")[-1]["message"]


def test_rank_that_hangs_is_named_with_its_phase(
    pair: list[Watchdog], ends: dict[str, int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    enter(pair)
    pair[0].ranks.progress.enter("data wait", 4)
    pair[0].ranks.progress.enter("backward", 4)
    pair[1].ranks.progress.enter("data wait", 4)
    wait_for(lambda: ends.get("watchdog") == 75)
    wait_for(lambda: (tmp_path / "events.jsonl").exists())
    leave(pair)
    assert "rank 1 (host " in fault(tmp_path)
    assert "did not leave 'data wait' of step 5, and the others wait in 'backward' of step 5" in fault(tmp_path)
    assert capfd.readouterr().err.count("mvd-scale: no progress for 2 s") == 1
    assert "test_watchdog.py" in (tmp_path / "faults" / "rank_0.txt").read_text()


@pytest.mark.parametrize("claimed", [False])
def test_a_rank_that_is_lost_before_the_folder_is_claimed_is_named_and_nothing_is_written(
    pair: list[Watchdog], ends: dict[str, int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    enter(pair)
    # It sends no heartbeats any more, as over a link that is cut.
    pair[1]._stop.set()
    wait_for(lambda: ends.get("watchdog") == 75)
    leave(pair)
    assert "rank 1 (host " in capfd.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("claimed", [False])
def test_the_folder_is_written_to_once_it_is_claimed(pair: list[Watchdog], tmp_path: Path) -> None:
    enter(pair)
    assert not any(tmp_path.iterdir())
    pair[1].claim()
    assert [file.name for file in (tmp_path / "faults").iterdir()] == ["rank_1.txt"]
    leave(pair)


def test_only_ranks_that_do_not_end_by_themselves_are_signalled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(0, 0, 4, torch.device("cpu"))
    dog = Watchdog(ranks, tmp_path, EventLog(tmp_path / "events.jsonl"), MINUTES)
    space = Member.own(0).space
    dog._members = {rank: Member(rank, "host", 100 + rank, None, space) for rank in range(4)}
    # Rank 1 ends at the second look, rank 2 is stopped, rank 3 does not hang.
    looks = {101: iter([True])}
    monkeypatch.setattr(Member, "lives", property(lambda member: next(looks.get(member.pid, iter([True])), False)))
    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(module.os, "kill", lambda pid, number: signals.append((pid, number)))
    WAKE_NEIGHBOURS(dog, Verdict("message", 75, (1, 2), hangs=True))
    assert signals == [(102, signal.SIGUSR2), (102, signal.SIGCONT)]


def test_rank_whose_checkpoint_is_not_written_is_named_while_the_steps_go_on(
    pair: list[Watchdog], ends: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdicts, "WRITING_PATIENCE", 1)
    enter(pair)
    for dog in pair:
        dog.ranks.progress.begin_writing(dog, 5)
        dog.ranks.progress.count_piece()
    pair[0].ranks.progress.count_part()
    step = 5
    while not ends:
        assert step < 500
        for dog in pair:
            dog.ranks.progress.enter("forward", step)
        step += 1
        time.sleep(0.02)
    wait_for(lambda: (tmp_path / "events.jsonl").exists())
    leave(pair)
    (event,) = read_events(tmp_path / "events.jsonl")
    assert event["ranks"] == [1]
    assert "in writing the checkpoint after step 5 beside the training: rank 1 (host " in event["message"]
    assert "did not leave 'save' of step 5" in event["message"]


def test_rank_that_waits_in_no_collective_is_named(
    pair: list[Watchdog], ends: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ranks are in the same phase, and only one has begun the collective in which it waits for the other."""
    names: dict[str, int] = {}
    monkeypatch.setattr(module, "count_collectives", lambda: names.setdefault(str(threading.get_ident()), len(names)))
    enter(pair)
    for dog in pair:
        dog.ranks.progress.enter("optimizer", 4)
    wait_for(lambda: bool(ends) and (tmp_path / "events.jsonl").exists())
    leave(pair)
    assert fault(tmp_path).count("(host ") == 1
    assert "did not leave 'optimizer' of step 5, and the others wait in 'optimizer' of step 5" in fault(tmp_path)


def test_rank_without_heartbeat_is_named(pair: list[Watchdog], ends: dict[str, int], tmp_path: Path) -> None:
    enter(pair)
    pair[1].ranks.progress.enter("forward", 2)
    time.sleep(0.5)
    pair[1]._stop.set()  # as if its process were stopped
    wait_for(lambda: bool(ends))
    pair[0]._stop.set()
    assert "no sign of life of rank 1" in fault(tmp_path)
    assert "last seen in 'forward' of step 3" in fault(tmp_path)


def test_rank_0_without_heartbeat_is_named_by_the_other(
    pair: list[Watchdog], ends: dict[str, int], tmp_path: Path
) -> None:
    enter(pair)
    time.sleep(0.5)
    pair[0]._stop.set()
    wait_for(lambda: bool(ends))
    pair[1]._stop.set()
    assert "rank 0 (host " in fault(tmp_path)
    assert "has not answered for 2 s" in fault(tmp_path)


def test_progress_within_the_limit_ends_nothing(pair: list[Watchdog], ends: dict[str, int]) -> None:
    enter(pair)
    for step in range(30):
        for dog in pair:
            dog.ranks.progress.enter("forward", step)
        time.sleep(0.07)
    leave(pair)
    assert not ends
    assert not pair[0]._faults.exists(), "empty stack files are removed"


def test_error_of_a_rank_reaches_the_others(pair: list[Watchdog], ends: dict[str, int], tmp_path: Path) -> None:
    enter(pair)
    with pytest.raises(Ended), pair[1].explaining():
        raise UserError("2 of 2 clips were replaced")
    wait_for(lambda: ends.get("watchdog") == 2)
    leave(pair)
    assert ends["MainThread"] == 2
    assert "failed in 'start': 2 of 2 clips were replaced" in fault(tmp_path)


def test_error_of_all_ranks_is_told_by_rank_0(
    pair: list[Watchdog], ends: dict[str, int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    enter(pair)
    pair[0].ranks.progress.enter("save", 4)
    with pytest.raises(UserError) as caught, pair[0].explaining():
        raise UserError("no room")
    with pytest.raises(Ended), pair[1].explaining():
        raise UserError("no room")
    leave(pair)
    assert capfd.readouterr().err == "", "rank 0 prints it at the end of the command"
    assert len(read_events(tmp_path / "events.jsonl")) == 1
    assert str(caught.value) == fault(tmp_path) == f"{pair[0]._members[0].name} failed in 'save' of step 5: no room"


def test_shared_error_of_all_ranks_names_the_rank_at_fault_alone(
    pair: list[Watchdog], ends: dict[str, int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    enter(pair)
    told = "rank 1 (host b, pid 7) failed in 'save' of step 10: [Errno 5]"
    with pytest.raises(SharedError) as caught, pair[0].explaining():
        raise SharedError(told, [1])
    with pytest.raises(Ended), pair[1].explaining():
        raise SharedError(told, [1])
    leave(pair)
    assert capfd.readouterr().err == "", "rank 0 prints it at the end of the command"
    (event,) = read_events(tmp_path / "events.jsonl")
    assert (event["message"], event["ranks"]) == (told, [1])
    assert str(caught.value) == told
    assert ends["MainThread"] == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_error_of_the_program_is_told_in_one_line_beside_its_traceback(
    rank: int, pair: list[Watchdog], ends: dict[str, int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    enter(pair)
    pair[rank].ranks.progress.enter("forward", 4)
    with pytest.raises(ZeroDivisionError), pair[rank].explaining():
        raise ZeroDivisionError("a bug")
    wait_for(lambda: ends.get("watchdog") == 1)
    leave(pair)
    assert capfd.readouterr().err == f"mvd-scale: {fault(tmp_path)}\n"
    assert fault(tmp_path) == f"{pair[0]._members[rank].name} failed in 'forward' of step 5: ZeroDivisionError: a bug"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_gpu_that_fails_is_a_fault_that_its_rank_tells_once(
    rank: int, pair: list[Watchdog], ends: dict[str, int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    enter(pair)
    with pytest.raises(torch.AcceleratorError), pair[rank].explaining():
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
    wait_for(lambda: ends.get("watchdog") == 75)
    leave(pair)
    assert capfd.readouterr().err == f"mvd-scale: {fault(tmp_path)}\n"
    assert len(read_events(tmp_path / "events.jsonl")) == 1
    assert "AcceleratorError: CUDA error: uncorrectable ECC" in fault(tmp_path)


def test_input_that_is_refused_before_the_steps_is_told_as_it_is(pair: list[Watchdog], ends: dict[str, int]) -> None:
    enter(pair)
    error = UserError("written with other videos")
    pair[0].__exit__(UserError, error, None)  # and so the error is raised further
    assert not ends
    pair[1].__exit__(None, None, None)


def test_error_of_the_system_names_rank_0_also_outside_of_the_steps(
    pair: list[Watchdog], ends: dict[str, int], tmp_path: Path
) -> None:
    enter(pair)
    pair[0].ranks.progress.enter("export", patience=0)
    full = OSError(28, "No space left")
    with pytest.raises(UserError, match=r"rank 0 \(host .*\) failed in 'export': \[Errno 28\] No space left"):
        pair[0].__exit__(OSError, full, None)
    pair[1].__exit__(None, None, None)
    assert "rank 0 (host " in fault(tmp_path)


def test_dead_neighbour_is_named_after_an_error_of_a_collective(
    pair: list[Watchdog], ends: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(pair)
    pair[1].ranks.progress.enter("optimizer", 9)
    time.sleep(0.5)
    monkeypatch.setattr(Member, "lives", property(lambda member: False))
    with pytest.raises(Ended), pair[0].explaining():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711")
    leave(pair)
    assert ends["MainThread"] == 75
    assert "rank 1 (host " in fault(tmp_path)
    assert "ended without a message, last seen in 'optimizer' of step 10" in fault(tmp_path)


def test_launcher_cannot_end_a_rank_before_its_watchdog_does(
    pair: list[Watchdog], ends: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exit code would be that of a request to stop, while the verdict on a rank that hangs is being told."""
    handlers: list[object] = []

    def sleep(seconds: float) -> None:
        handlers.append(signal.getsignal(signal.SIGTERM))
        raise Ended

    enter(pair)
    pair[0]._ending = True
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    with pytest.raises(Ended), pair[0].explaining():
        raise RuntimeError("[gloo] Connection closed by peer")
    signal.signal(signal.SIGTERM, before)
    leave(pair)
    assert handlers == [signal.SIG_IGN]


def test_process_of_another_machine_of_the_same_name_is_not_looked_for_here(
    pair: list[Watchdog], ends: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(pair)
    there = pair[0]._members[1]
    assert there.space is not None
    pair[0]._members[1] = replace(there, space=there.space._replace(boot="another"))
    monkeypatch.setattr(Member, "lives", property(lambda member: False))
    assert pair[0]._neighbours() == []
    leave(pair)
    assert not ends


@pytest.mark.parametrize(
    ("error", "code"), [(OSError(28, "No space left"), 2), (ValueError("a bug"), 1), (UserError("no videos"), 2)]
)
def test_others_end_with_the_code_of_the_command_line(
    error: Exception, code: int, pair: list[Watchdog], ends: dict[str, int]
) -> None:
    enter(pair)
    with pytest.raises(UserError if code == 2 else ValueError), pair[0].explaining():
        raise error
    wait_for(lambda: ends.get("watchdog") == code)
    leave(pair)


def test_others_end_with_the_code_of_rank_0_that_failed_in_its_own_work(
    pair: list[Watchdog], ends: dict[str, int]
) -> None:
    """As after `run_on_rank0`: a traceback of rank 0 must not end the job for good, as invalid input does."""
    enter(pair)
    with pytest.raises(ZeroDivisionError), pair[0].explaining():
        raise ZeroDivisionError
    told = UserError("rank 0 failed in 'summary'; see its own message")
    told.reported, told.exit_code = True, 1
    with pytest.raises(Ended), pair[1].explaining():
        raise told
    leave(pair)
    assert ends["MainThread"] == 1


def test_error_of_a_collective_among_living_ranks_is_that_of_its_rank(
    pair: list[Watchdog], ends: dict[str, int], tmp_path: Path
) -> None:
    """The traceback of that rank is printed, and the others end too: they may wait for it for ever."""
    enter(pair)
    with pytest.raises(RuntimeError, match="gloo"), pair[0].explaining():
        raise RuntimeError("gloo: sizes differ")
    wait_for(lambda: ends.get("watchdog") == 1)
    leave(pair)
    assert "rank 0 (host " in fault(tmp_path)
    assert "failed in 'start': RuntimeError: gloo: sizes differ" in fault(tmp_path)


def test_a_run_that_stops_on_request_is_no_fault(pair: list[Watchdog], ends: dict[str, int], tmp_path: Path) -> None:
    enter(pair)
    with pytest.raises(Preempted), pair[0].explaining():
        raise Preempted(143)
    leave(pair)
    assert not ends
    assert not (tmp_path / "events.jsonl").exists()


def test_end_of_the_launcher_is_a_request_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: dict[str, int]
) -> None:
    sent: list[int] = []
    told: list[str] = []
    monkeypatch.setattr(module.os, "kill", lambda pid, number: sent.append(number))
    monkeypatch.setattr(module.LauncherProcesses, "ended", lambda self: 4711)
    monkeypatch.setattr(module.logger, "warning", lambda text, *values: told.append(text % values))
    with Watchdog(
        Ranks(0, 0, 1, torch.device("cpu")), tmp_path / "faults", EventLog(tmp_path / "events.jsonl"), MINUTES
    ):
        wait_for(lambda: bool(sent))
        time.sleep(0.5)
    assert sent == [module.signal.SIGTERM], "once"
    ended = (
        f"the launcher of {Member.own(0).name}, process 4711, has ended in 'start': the run stops after a checkpoint"
    )
    assert told == [ended]


def test_a_file_system_that_hangs_holds_up_neither_the_message_nor_the_end(
    pair: list[Watchdog],
    ends: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    mended, stuck = threading.Event(), []

    def hang(*values: object, **fields: object) -> None:
        if not mended.is_set():
            stuck.append(capfd.readouterr().err)
        mended.wait(60)

    monkeypatch.setattr(module, "_SECONDS_TO_WRITE", 0.2)
    enter(pair)
    monkeypatch.setattr(pair[0]._stacks, "write", hang)
    monkeypatch.setattr(pair[0]._stacks, "remove_if_empty", hang)
    monkeypatch.setattr(pair[0]._events, "write", hang)
    for dog in pair:
        dog.ranks.progress.enter("forward", 4)
    try:
        wait_for(lambda: not pair[0]._threads[0].is_alive())
    finally:
        mended.set()
    leave(pair)
    assert ends["watchdog"] == 75
    assert "mvd-scale: no progress for 2 s" in stuck[0], "before anything is written"


def test_a_verdict_is_told_though_the_main_thread_was_about_to_tell_it(
    pair: list[Watchdog], ends: dict[str, int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The other thread ends this process at once."""
    enter(pair)
    told: list[str] = []

    def ask() -> verdicts.Verdict | None:
        wait_for(lambda: "watchdog" in ends)
        told.append(capfd.readouterr().err)
        return pair[0]._verdict

    monkeypatch.setattr(pair[0], "_ask", ask)
    for dog in pair:
        dog.ranks.progress.enter("forward", 4)
    with pytest.raises(Ended), pair[0].explaining():
        raise RuntimeError("[gloo] Connection closed by peer")
    leave(pair)
    assert told[0].count("mvd-scale: no progress for 2 s") == 1
    assert "mvd-scale" not in capfd.readouterr().err, "once"


def test_a_process_that_slept_speaks_again_after_one_limit(tmp_path: Path) -> None:
    """Until then the others may have ended because it slept."""
    ranks, events = Ranks(0, 0, 2, torch.device("cpu")), EventLog(tmp_path / "events.jsonl")
    dog = Watchdog(ranks, tmp_path / "faults", events, MINUTES)
    dog._members[0] = Member.own(0)
    dog._wake_up(100, 0.9 * dog.limit)
    verdict = verdicts.Verdict("rank 1 hangs", 75, (1,), hangs=True)
    dog._judge(100 + dog.limit + 2 * dog.interval)
    assert not dog._reports(verdict)
    dog._judge(100 + dog.limit + 6 * dog.interval)
    assert dog._reports(verdict)
