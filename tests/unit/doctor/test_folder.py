"""The folder that hosts share: written, flushed, locked, the same everywhere, and never seen by halves."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
import time
from collections import namedtuple
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from mvd_scale.doctor.checks import folder as checks
from mvd_scale.doctor.checks.folder import existing, flush, folder_checks, free_disk, own_lock, share_folder, writing
from mvd_scale.doctor.findings import Finding
from mvd_scale.doctor.meeting import Meeting
from tests.unit.doctor.conftest import Meet


def one(findings: Iterable[Finding]) -> Finding:
    (finding,) = findings
    return finding


def refuse(number: int) -> Any:
    def call(*arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    return call


def test_a_sound_folder(tmp_path: Path) -> None:
    findings = [
        finding for check in folder_checks(tmp_path / "runs" / "new", "unknown") for finding in check.findings()
    ]
    assert {finding.outcome for finding in findings} == {"ok"}
    assert [finding.check for finding in findings] == ["writing", "free disk", "flush to disk", "flock"]
    assert list(tmp_path.iterdir()) == []


def test_the_nearest_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert existing(tmp_path / "a" / "b") == tmp_path
    monkeypatch.chdir(tmp_path)
    assert existing(Path("runs/a")) == tmp_path


def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write into folders without rights; a read-only mount refuses it with this error.
    monkeypatch.setattr(checks, "write_atomic", refuse(errno.EROFS))
    finding = one(writing(tmp_path))
    assert (finding.outcome, finding.detail) == ("fail", f"{tmp_path} cannot be written: Read-only file system")
    assert "--folder" in finding.remedy


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into folders without rights")
def test_a_folder_without_rights(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert one(writing(tmp_path)).outcome == "fail"


def test_a_read_only_mount(tmp_path: Path) -> None:
    finding = one(writing(Path("/proc/1")))
    assert finding.outcome == "fail"


@pytest.mark.parametrize(("needed", "outcome"), [(2**30, "ok"), (3 * 2**30, "fail"), ("no recipe", "ok")])
def test_free_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: int | str, outcome: str) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2**40, 0, 2 * 2**30))
    finding = one(free_disk(tmp_path, needed))
    assert finding.outcome == outcome
    assert ("checkpoints.keep" in finding.remedy) == (outcome == "fail")


def test_a_folder_that_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    assert one(flush(tmp_path)).outcome == "fail"
    assert list(tmp_path.iterdir()) == []


def test_a_slow_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_SLOW_SYNC", 0.0)
    assert one(flush(tmp_path)).outcome == "warning"


def test_flock_is_information(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert one(own_lock(tmp_path)).detail == "works on this host"
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    finding = one(own_lock(tmp_path))
    assert (finding.outcome, finding.detail) == ("ok", "not known (No locks available); a lease is used")


def found(results: list[list[Finding]]) -> list[dict[str, tuple[str, str]]]:
    return [{finding.check: (finding.outcome, finding.detail) for finding in findings} for findings in results]


def test_hosts_share_a_folder(meet: Meet, tmp_path: Path) -> None:
    first, second, third = found(meet(3, lambda meeting: list(share_folder(meeting, [0, 1, 2], tmp_path))))
    assert first == {"shared folder": ("ok", f"{tmp_path}: files of 2 other hosts appear")}
    for host in (second, third):
        assert {check: outcome for check, (outcome, _) in host.items()} == {
            "shared folder": "ok",
            "flock among hosts": "ok",
            "rename": "ok",
        }
        assert host["flock among hosts"][1] == "a lock of rank 0 holds here"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_flock_is_sound(meet: Meet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    first, second = found(meet(2, lambda meeting: list(share_folder(meeting, [0, 1], tmp_path))))
    assert first == {
        "flock among hosts": ("ok", "not known (No locks available); a lease is used"),
        "shared folder": ("ok", f"{tmp_path}: files of 1 other host appear"),
    }
    assert {check: outcome for check, (outcome, _) in second.items()} == {"shared folder": "ok", "rename": "ok"}


def test_flock_is_refused_to_another_host_alone(meet: Meet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = fcntl.flock, count()
    monkeypatch.setattr(fcntl, "flock", lambda *words: (refuse(errno.EOPNOTSUPP) if next(calls) else whole)(*words))
    first, second = found(meet(2, lambda meeting: list(share_folder(meeting, [0, 1], tmp_path))))
    assert list(first) == ["shared folder"]
    assert second["flock among hosts"] == ("ok", "not known (Operation not supported); a lease is used")


def test_a_host_with_another_folder(meet: Meet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_SEEN", 0.5)
    folders = [tmp_path / name for name in ("shared", "shared", "own")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    work = lambda meeting: list(share_folder(meeting, [0, 1, 2], folders[meeting.seat.rank]))  # noqa: E731
    first, second, third = found(meet(3, work))
    assert first == {"shared folder": ("fail", f"files of node-2 do not appear in {folders[0]}")}
    assert second["rename"][0] == "ok"
    assert third["shared folder"][0] == "fail"
    assert third["shared folder"][1].startswith(f"a file of rank 0 does not appear in {folders[2]}")


def test_rank_0_cannot_write(meet: Meet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", refuse(errno.EROFS))
    first, second = found(meet(2, lambda meeting: list(share_folder(meeting, [0, 1], tmp_path))))
    assert first["shared folder"] == ("fail", f"{tmp_path} cannot be written: Read-only file system")
    assert second["shared folder"] == ("left out", "rank 0 cannot write there")


def test_another_host_cannot_write(meet: Meet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path.write_text

    def write_text(path: Path, text: str, **options: Any) -> int:
        if path.name.startswith("host-"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return whole(path, text, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    first, second = found(meet(2, lambda meeting: list(share_folder(meeting, [0, 1], tmp_path))))
    assert first["shared folder"][0] == "fail"
    assert second["shared folder"][0] == "fail"
    assert second["shared folder"][1].endswith("Permission denied")


def watched(meet: Meet, file: Path, replace: Any) -> Finding:
    """What a host finds that watches a file while rank 0 replaces it."""

    def work(meeting: Meeting) -> Finding | None:
        if not meeting.leads:
            return checks._watch(meeting, file)
        time.sleep(0.1)
        replace()
        meeting.put("folder/replaced", True)
        return None

    file.write_text(checks._content("a"))
    finding = meet(2, work)[1]
    assert isinstance(finding, Finding)
    return finding


def test_a_rename_that_is_seen_by_halves(meet: Meet, tmp_path: Path) -> None:
    file = tmp_path / "file"
    half = watched(meet, file, lambda: file.write_text(checks._content("b")[:1000]))
    assert (half.outcome, half.detail) == ("fail", "while rank 0 replaces it, a file has 1000 strange bytes")
    gone = watched(meet, file, file.unlink)
    assert (gone.outcome, gone.detail) == (
        "fail",
        "while rank 0 replaces it, a file is gone: No such file or directory",
    )


def test_a_rename_that_is_not_seen(meet: Meet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_SEEN", 0.3)
    stale = watched(meet, tmp_path / "file", lambda: None)
    assert stale.outcome == "fail"
    assert stale.detail.startswith("the old content is read")


def test_a_file_that_appears_late(tmp_path: Path) -> None:
    file = tmp_path / "late"
    threading.Timer(0.2, lambda: file.write_text("x")).start()
    seconds = checks._appears(file, "x", 5.0)
    assert seconds is not None
    assert seconds > 0.1
    assert checks._visible(tmp_path, seconds).outcome == "ok"
    assert checks._visible(tmp_path, 9.0).outcome == "warning"
    assert checks._appears(tmp_path / "never", "x", 0.1) is None
