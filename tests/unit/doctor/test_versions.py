"""Versions and capabilities of hosts are equal, or the hosts that differ are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvd_scale.doctor.checks import versions
from mvd_scale.doctor.checks.versions import compare_capabilities, compare_versions, own_versions, source_digest
from mvd_scale.utils.env_report import Capability

SAME = {"torch": "2.14.1", "driver": "580.1"}


def test_own_versions_have_all_that_must_be_equal() -> None:
    found = own_versions()
    assert {"mvd-scale", "mvd-scale, commit", "mvd-scale, sources", "Python", "torch", "DeepSpeed", "timm"} <= set(
        found
    )
    assert {"DALI", "flash-attn", "apex", "CUDA of torch", "NCCL", "driver"} <= set(found)
    assert all(found.values())
    assert found["torch"][0].isdigit()


def test_equal_versions_are_sound() -> None:
    findings = list(compare_versions({"a": SAME, "b": SAME}))
    assert [(finding.check, finding.outcome, finding.detail) for finding in findings] == [
        ("torch", "ok", "2.14.1"),
        ("driver", "ok", "580.1"),
    ]


def test_the_host_that_differs_is_named() -> None:
    hosts = {"a": SAME, "b": {**SAME, "torch": "2.13.0"}, "c": SAME, "d": {**SAME, "driver": "570.0"}}
    torch, driver = compare_versions(hosts)
    assert (torch.outcome, torch.detail) == ("fail", "2.14.1 on a, c, d; 2.13.0 on b")
    assert torch.remedy == "give b the same as the others: torch 2.14.1"
    assert driver.outcome == "warning"


def test_a_version_that_a_host_does_not_tell_is_a_fault() -> None:
    torch, _ = compare_versions({"a": SAME, "b": {"driver": "580.1"}})
    assert (torch.outcome, torch.detail) == ("fail", "2.14.1 on a; unknown on b")


def test_many_hosts_are_not_all_listed() -> None:
    hosts = {f"n{number}": {"torch": "1" if number else "2"} for number in range(100)}
    (finding,) = compare_versions(hosts)
    assert finding.detail == "2 on n0; 1 on n1, n2, n3 and 96 more"


def test_capabilities_that_are_on_here_and_off_there() -> None:
    hosts = {"a": {"DALI": "", "apex": "not built"}, "b": {"DALI": "broken: libfoo", "apex": "not built"}}
    (finding,) = compare_capabilities(hosts)
    assert finding.outcome == "warning"
    assert finding.check == "DALI of `mvd-scale env`"
    assert finding.detail == "on on a; off on b: broken: libfoo"


def test_a_capability_that_a_host_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = compare_capabilities({"a": {"GPU 7": ""}, "b": {}})
    assert finding.detail == "on on a; off on b: it has none"
    (finding,) = compare_capabilities({"a": {"GPU 7": ""}, "b": {"GPU 7": ""}})
    assert (finding.outcome, finding.detail) == ("ok", "1 on, 0 off")
    rows = [Capability("DALI", True, "2.4"), Capability("apex", False, reason="not installed")]
    monkeypatch.setattr(versions, "collect_capabilities", lambda: rows)
    assert versions.own_capabilities() == {"DALI": "", "apex": "not installed"}


def test_the_digest_follows_contents_and_names_of_sources(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1")
    before = source_digest([tmp_path])
    (tmp_path / "a.pyc").write_text("no source")
    assert source_digest([tmp_path]) == before
    (tmp_path / "a.py").write_text("x = 2")
    assert source_digest([tmp_path]) != before
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert source_digest([tmp_path]) != before
