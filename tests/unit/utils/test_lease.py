"""A folder has one holder at any time, on one machine and on several; a holder that is gone keeps nobody waiting."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mvd_scale.errors import UserError
from mvd_scale.utils import lease as leases
from mvd_scale.utils.lease import Holder, Lease, decode_holder, look_at_lease
from mvd_scale.utils.machine import ProcessSpace, is_running, process_start

HERE = ProcessSpace.own()
ELSEWHERE = ProcessSpace("elsewhere", "other boot", HERE.pids)
FAST = 0.05
"""Seconds between renewals in these tests."""

HOLD = f"""
import sys, time
from pathlib import Path
from mvd_scale.errors import UserError
from mvd_scale.utils.lease import Lease
try:
    lease = Lease(Path(sys.argv[1]), renew_seconds={FAST})
except UserError as error:
    print(error, flush=True)
    sys.exit(2)
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def hold(path: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that holds a lease for some seconds."""
    return subprocess.Popen([sys.executable, "-c", HOLD, str(path), str(seconds)], stdout=subprocess.PIPE, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def take(path: Path, space: ProcessSpace | None = None) -> Lease:
    return Lease(path, renew_seconds=FAST, space=space)


def foreign(**values: Any) -> Holder:
    """A holder on another host, of which nothing is known here but its file."""
    held = Holder(
        *ELSEWHERE, pid=1, start=7, token="theirs", since="2026-01-01T00:00:00", renewed="2026-01-01T00:00:00"
    )
    return replace(held, **values)


def held_by(path: Path) -> Holder:
    holder = decode_holder(path.read_bytes())
    assert holder is not None
    return holder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lease.json"


def test_a_lease_is_held_renewed_and_given_back(path: Path) -> None:
    lease = take(path)
    assert look_at_lease(path).alive is True
    first = held_by(path)
    assert (first.host, first.pid, first.start) == (HERE.host, os.getpid(), process_start(os.getpid()))
    deadline = time.monotonic() + 10
    while held_by(path).renewals == first.renewals:
        assert time.monotonic() < deadline
        time.sleep(FAST)
    lease.check()
    lease.release()
    lease.release()
    assert held_by(path).released
    assert look_at_lease(path).alive is False
    take(path).release()
    assert sorted(file.name for file in path.parent.iterdir()) == ["lease.json"]


def test_the_holder_is_named_to_the_second(path: Path) -> None:
    lease = take(path)
    with pytest.raises(UserError, match=rf"process {os.getpid()} of host {HERE.host} since 20\d\d-") as raised:
        take(path)
    assert "--run.folder" in str(raised.value)
    lease.check()
    lease.release()


def test_no_descriptor_is_left_open(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    lease = take(path)
    for _ in range(3):
        with pytest.raises(UserError):
            take(path)
    lease.release()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_killed_holder_of_this_machine_keeps_nobody_waiting(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = hold(path, 60)
    assert first_line(process) == "held"
    process.send_signal(signal.SIGKILL)
    # Not waited for: a zombie has ended as well.
    while is_running(process.pid, held_by(path).start):
        time.sleep(0.01)
    monkeypatch.setattr(Lease, "_watch", lambda *_: pytest.fail("waited for a dead process"))
    lease = take(path)
    assert held_by(path).pid == os.getpid()
    lease.release()
    process.wait()


def test_a_process_id_that_was_given_again_is_another_process(path: Path) -> None:
    start = process_start(os.getpid())
    assert start is not None
    path.write_bytes(Holder(*HERE, os.getpid(), start - 1, "before", "then", "then").encode())
    take(path).release()


def test_the_start_of_a_process_does_not_depend_on_the_clock() -> None:
    ticks = process_start(os.getpid())
    assert ticks is not None
    seconds = float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    assert 0 <= seconds < 7 * 24 * 3600


def test_of_many_that_race_one_gets_it(path: Path) -> None:
    path.write_bytes(Holder(*HERE, 2**22 + 1, 1, "dead", "then", "then").encode())
    processes = [hold(path, 5) for _ in range(4)]
    said = [first_line(process) for process in processes]
    for process in processes:
        process.kill()
        process.wait()
    assert said.count("held") == 1, said
    assert all("another process is training" in line for line in said if line != "held")


def test_of_many_threads_that_race_for_a_dead_lease_one_gets_it(path: Path) -> None:
    for round_ in range(20):
        path.write_bytes(Holder(*HERE, 2**22 + 1, 1, f"dead {round_}", "then", "then").encode())
        got: list[Lease] = []
        refused: list[UserError] = []

        def run(got: list[Lease] = got, refused: list[UserError] = refused) -> None:
            try:
                got.append(take(path))
            except UserError as error:
                refused.append(error)

        threads = [threading.Thread(target=run) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(got), len(refused)) == (1, 5)
        got[0].check()
        got[0].release()


def test_a_holder_of_another_host_that_is_alive_is_left_alone(path: Path) -> None:
    theirs = take(path, ELSEWHERE)
    with pytest.raises(UserError, match=r"another process is training .* of host elsewhere"):
        take(path)
    theirs.check()
    theirs.release()
    take(path).release()


def test_a_holder_of_another_host_that_is_dead_is_waited_for_by_the_own_clock(path: Path) -> None:
    # Its clock is a year ahead, which means nothing.
    path.write_bytes(foreign(renewed="2030-01-01T00:00:00").encode())
    began = time.monotonic()
    lease = take(path)
    assert time.monotonic() - began >= leases.STALE_RENEWALS * FAST
    assert held_by(path).host == HERE.host
    lease.release()


def test_the_same_process_id_in_another_container_is_not_this_process(path: Path) -> None:
    container = ProcessSpace(HERE.host, HERE.boot, "pid:[1]")
    path.write_bytes(replace(foreign(pid=2**22 + 1), host=HERE.host, boot=HERE.boot, pids="pid:[1]").encode())
    assert not held_by(path).is_gone(HERE)
    assert held_by(path).is_gone(container)


def test_readings_that_the_file_system_holds_up_prove_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(foreign().encode())
    readings = 0

    def slow(file: Path) -> bytes | None:
        nonlocal readings
        readings += 1
        if 1 < readings < 5:
            time.sleep(3 * FAST)
        return file.read_bytes() if file.exists() else None

    monkeypatch.setattr(leases, "read_lease", slow)
    lease = take(path)
    lease.release()
    assert readings >= 1 + 3 + leases.STALE_RENEWALS


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00" * 100, b"[1, 2]", b'{"host": "a"}', b"null"])
def test_a_torn_lease_is_taken_over_when_it_does_not_change(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    view = look_at_lease(path)
    assert (view.holder, view.alive) == (None, None)
    take(path).release()


def test_a_torn_lease_that_becomes_whole_is_judged_again(path: Path) -> None:
    path.write_bytes(b"{")
    mine = Holder(*HERE, os.getpid(), process_start(os.getpid()), "mine", "now", "now")
    timer = threading.Timer(2 * FAST, lambda: path.write_bytes(mine.encode()))
    timer.start()
    with pytest.raises(UserError, match="another process is training"):
        take(path)
    timer.join()


@pytest.mark.parametrize("alive", [True, False])
def test_a_process_that_died_while_it_took_over_is_passed_over(alive: bool, path: Path) -> None:
    """`alive`: another one is taking over at this moment."""
    path.write_bytes(Holder(*HERE, 2**22 + 1, 1, "dead", "then", "then").encode())
    pid, start = (os.getpid(), process_start(os.getpid())) if alive else (2**22 + 2, 1)
    following = path.with_name("lease.json.next")
    following.write_bytes(Holder(*HERE, pid, start, "taker", "then", "then").encode())
    if alive:
        with pytest.raises(UserError, match="another process is training"):
            take(path)
    else:
        take(path).release()
        assert not following.exists()


def test_a_holder_that_slept_ends_and_does_not_undo_the_takeover(path: Path) -> None:
    slept = take(path, ELSEWHERE)
    path.write_bytes(foreign().encode())
    path.unlink()
    ours = take(path)
    slept._renew()
    assert held_by(path).token == ours._holder.token
    with pytest.raises(UserError, match=rf"was taken over by process {os.getpid()} of host {HERE.host}"):
        slept.check()
    slept.release()
    ours.check()
    ours.release()


def test_a_folder_that_is_moved_away_ends_the_run(path: Path) -> None:
    lease = take(path)
    path.rename(path.with_name("moved"))
    with pytest.raises(UserError, match="is gone"):
        lease.check()
    lease.release()
    assert not path.exists()


def test_a_file_system_without_hard_links_will_do(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no links")

    monkeypatch.setattr(leases.os, "link", link)
    first = take(path)
    with pytest.raises(UserError, match="another process"):
        take(path)
    first.release()
    second = take(path)
    second.check()
    second.release()
    assert [file.name for file in path.parent.iterdir()] == ["lease.json"]


def test_an_answer_of_a_server_that_is_lost_is_found_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS repeats a request whose answer was lost, and then says that the link exists."""
    real = os.link

    def link(source: Path, target: Path) -> None:
        real(source, target)
        raise FileExistsError(errno.EEXIST, "exists")

    monkeypatch.setattr(leases.os, "link", link)
    lease = take(path)
    lease.check()
    monkeypatch.undo()
    lease.release()
    assert held_by(path).released


def test_a_folder_that_cannot_be_written_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(file: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(file, flags, mode)

    monkeypatch.setattr(leases.os, "open", refuse)
    with pytest.raises(OSError, match="Read-only"):
        take(path)


def test_a_failing_renewal_is_one_warning(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lease = take(path)
    lease._ended.set()
    lease._thread.join()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with caplog.at_level("WARNING"), monkeypatch.context() as patch:
        patch.setattr(leases.os, "pwrite", full)
        lease._renew()
        lease._renew()
    assert [record.getMessage() for record in caplog.records] == [f"{path} cannot be renewed: No space left on device"]
    lease._ended.clear()
    lease.release()


def test_the_file_is_as_long_whatever_it_holds() -> None:
    assert len(foreign().encode()) == len(foreign(renewals=10**9, released=True).encode()) == 512


def test_a_file_system_that_does_not_answer_a_check_ends_no_run(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lease = take(path)

    def stale(path: Path) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as failing, caplog.at_level("WARNING", logger="mvd_scale"):
        failing.setattr(leases, "read_lease", stale)
        lease.check()
        lease.check()
    assert caplog.text.count("cannot be read: Stale file handle") == 1
    lease.check()
    lease.release()


def test_a_renewal_that_hangs_does_not_hold_up_the_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease, hung, ended = take(path), threading.Event(), threading.Event()

    def hang(descriptor: int, content: bytes) -> None:
        hung.set()
        ended.wait()

    monkeypatch.setattr(leases, "_write", hang)
    assert hung.wait(20)
    lease.release()
    ended.set()
