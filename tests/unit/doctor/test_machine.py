"""What the checks of a host conclude from CPUs, shared memory, limits, disks and the time of the job."""

from __future__ import annotations

import resource
import shutil
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import pytest

from mvd_scale.doctor.checks import machine
from mvd_scale.doctor.findings import Finding


def by_name(findings: object) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}  # type: ignore[attr-defined]


@pytest.mark.parametrize(("quota", "outcome"), [(None, "ok"), (64.0, "ok"), (3.0, "ok"), (1.5, "warning")])
def test_cpus(monkeypatch: pytest.MonkeyPatch, quota: float | None, outcome: str) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    (finding,) = machine.cpus()
    assert finding.outcome == outcome
    assert finding.figures == {"CPUs": 8, "quota": quota}


@pytest.mark.parametrize(("free", "outcome"), [(64 * 2**20, "fail"), (2**29, "warning"), (16 * 2**30, "ok")])
def test_shared_memory(monkeypatch: pytest.MonkeyPatch, free: int, outcome: str) -> None:
    monkeypatch.setattr(machine.shared_memory, "free_bytes", lambda: free)
    (finding,) = machine.shared()
    assert finding.outcome == outcome
    assert ("--shm-size" in finding.remedy) == (outcome != "ok")


def test_no_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine.shared_memory, "SHARED", tmp_path / "none")
    (finding,) = machine.shared()
    assert (finding.outcome, finding.detail) == ("warning", "there is none")


def test_a_low_limit_of_files_that_the_user_can_raise() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
    try:
        finding = by_name(machine.limits(8))["limit of open files"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert finding.outcome == "fail"
    assert finding.detail == "1000, expected 4120 or more"
    assert "`ulimit -n 4120`" in finding.remedy


def test_a_hard_limit_needs_the_administrator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda number: (1024, 1024))
    monkeypatch.setattr(machine, "INFINIBAND", Path("/"))
    findings = by_name(machine.limits(2))
    assert {finding.outcome for finding in findings.values()} == {"fail"}
    assert "LimitMEMLOCK" in findings["limit of locked memory"].remedy
    assert findings["limit of CPU time"].detail == "1024, expected unlimited or more"


def test_sound_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda number: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    monkeypatch.setattr(machine, "INFINIBAND", Path("/nowhere"))
    findings = by_name(machine.limits(4096))
    assert {name: finding.outcome for name, finding in findings.items()} == {
        "limit of open files": "ok",
        "limit of processes": "ok",
        "limit of CPU time": "ok",
        "limit of locked memory": "left out",
    }


@pytest.mark.parametrize(("free", "outcome"), [(2**20, "fail"), (2**30, "warning"), (2**40, "ok")])
def test_disks(monkeypatch: pytest.MonkeyPatch, free: int, outcome: str) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2**41, 0, free))
    findings = by_name(machine.disks())
    assert {finding.outcome for finding in findings.values()} == {outcome}
    assert set(findings) == {"temporary folder", "home folder"}


def test_a_home_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    finding = by_name(machine.disks())["home folder"]
    assert finding.outcome == "fail"
    assert "No such file" in finding.detail
    assert by_name(machine.disks())["temporary folder"].detail.startswith(tempfile.gettempdir())


@pytest.mark.parametrize(("hours", "outcome"), [(None, "left out"), (0.2, "warning"), (12, "ok")])
def test_time_of_the_job(monkeypatch: pytest.MonkeyPatch, hours: float | None, outcome: str) -> None:
    monkeypatch.setattr(machine, "job_end", lambda: None if hours is None else time.time() + 3600 * hours)
    (finding,) = machine.time_of_job()
    assert finding.outcome == outcome
