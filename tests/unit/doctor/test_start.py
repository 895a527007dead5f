"""Hosts of a hostfile are tried and started; what cannot be started is a finding with its remedy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mvd_scale.distributed.remote_command import unpack
from mvd_scale.doctor import start
from mvd_scale.doctor.findings import Finding
from mvd_scale.doctor.report import Report

HOSTS = {"node-1": 8, "node-2": 8, "node-3": 4}

Answer = subprocess.CompletedProcess[str] | Exception


class Programs:
    """Stands for `subprocess.run`: ssh answers by host, the launcher by one answer. Commands are kept."""

    def __init__(self) -> None:
        self.ssh: dict[str, Answer] = {}
        self.launcher: Answer = finished()
        self.commands: list[list[str]] = []
        self.hostfiles: list[str] = []

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        assert options["timeout"] > 0
        answer = self.launcher
        if command[0] == "ssh":
            answer = self.ssh.get(command[-2], finished())
        else:
            self.hostfiles.append(Path(command[command.index("--hostfile") + 1]).read_text())
        if isinstance(answer, Exception):
            raise answer
        return answer


def finished(code: int = 0, out: str = "", err: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, out, err)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Programs:
    made = Programs()
    monkeypatch.setattr("subprocess.run", made.run)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(start, "addresses_of", lambda name: ["10.0.0.1"])
    found = Finding("CPUs", "ok", "8 CPUs", host="node-1", group="machine")
    report = Report("1.0", "now", 1.0, ("node-1", "node-2"), 16, (found,))
    made.launcher = finished(out=f"a line of the launcher\n{report.to_json()}\n")
    return made


def faults(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.host or finding.check: finding for finding in findings if finding.outcome == "fail"}


def test_all_hosts_are_started_as_multi_node_does(programs: Programs) -> None:
    examined = start.examine_hostfile(HOSTS, ["--folder", "/a b; touch marker", "--rounds", "3"])
    assert not faults(examined.findings)
    assert (examined.hosts, examined.ranks) == (("node-1", "node-2"), 16)
    assert [finding.check for finding in examined.findings] == ["ssh", "ssh", "ssh", "CPUs"]
    command = programs.commands[-1]
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    module, action, packed = command[-3:]
    assert (module, action) == ("mvd_scale.distributed.remote_command", "run")
    assert unpack(packed)[:3] == ["mvd_scale", "doctor", "--json"]
    assert unpack(packed)[-4:] == ["--folder", "/a b; touch marker", "--rounds", "3"]
    assert programs.hostfiles == ["node-1 slots=8\nnode-2 slots=8\nnode-3 slots=4\n"]


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (finished(255, err="ssh: connect to host node-2 port 22: No route to host\n"), "No route to host"),
        (finished(255, err="Permission denied (publickey).\n"), "Permission denied"),
        (finished(1), "code 1"),
        (subprocess.TimeoutExpired("ssh", 20), "no answer within 20 s"),
        (FileNotFoundError(2, "ssh"), "there is no ssh on this node"),
    ],
)
def test_a_host_that_ssh_does_not_reach_is_left_out(programs: Programs, answer: Answer, detail: str) -> None:
    programs.ssh["node-2"] = answer
    examined = start.examine_hostfile(HOSTS, [])
    (fault,) = faults(examined.findings).values()
    assert fault.host == "node-2"
    assert detail in fault.detail
    assert fault.remedy
    assert programs.hostfiles == ["node-1 slots=8\nnode-3 slots=4\n"]


def test_a_name_that_is_not_known_is_left_out(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "addresses_of", lambda name: [] if name == "node-3" else ["10.0.0.1"])
    examined = start.examine_hostfile({"me@node-3": 1, "node-1": 1}, [])
    assert "node-3 is not known" in faults(examined.findings)["me@node-3"].detail
    assert programs.hostfiles == ["node-1 slots=1\n"]


def test_no_host_is_reached(programs: Programs) -> None:
    programs.ssh = dict.fromkeys(HOSTS, finished(255, err="No route to host"))
    examined = start.examine_hostfile(HOSTS, [])
    assert set(faults(examined.findings)) == set(HOSTS)
    assert examined.hosts == ()
    assert programs.hostfiles == []


def test_without_pdsh_the_way_without_it_is_told(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    fault = faults(start.examine_hostfile(HOSTS, []).findings)["pdsh"]
    assert "NODE_RANK=... launch/multi_node.sh doctor" in fault.remedy
    assert programs.hostfiles == []


def test_a_single_host_is_not_taken_for_this_node(programs: Programs) -> None:
    assert not faults(start.examine_hostfile({"node-1": 2}, []).findings)
    assert [command[0] for command in programs.commands] == ["ssh", sys.executable]
    assert "--force_multi" in programs.commands[-1]


def test_reports_of_hosts_that_are_apart_are_joined_with_that_of_rank_0(programs: Programs) -> None:
    came = Finding("presence", "fail", "2 hosts with 16 ranks came", "see node-3", group="hosts")
    apart = Finding("meeting", "fail", "rank 16 does not meet rank 0", "open the port", host="node-3", group="hosts")
    lines = [
        Report("1.0", "now", 1.0, ("node-3",), 4, (apart,)).to_json(),
        Report("1.0", "now", 1.0, ("node-1", "node-2"), 16, (came,)).to_json(),
    ]
    for order in (lines, lines[::-1]):
        programs.launcher = finished(1, out="\n".join(order))
        examined = start.examine_hostfile(HOSTS, [])
        assert (examined.hosts, examined.ranks) == (("node-1", "node-2"), 16)
        assert examined.findings[3:] == [came, apart]


def test_of_reports_of_one_rank_each_that_of_rank_0_leads(programs: Programs) -> None:
    reports = [
        Report(
            "1.0", "now", 1.0, (host,), 1, (Finding(check, "fail", "it failed", "mend it", host=host, group="hosts"),)
        )
        for host, check in (("node-1", "presence"), ("node-2", "meeting"))
    ]
    for order in (reports, reports[::-1]):
        programs.launcher = finished(1, out="\n".join(report.to_json() for report in order))
        assert start.examine_hostfile({"node-1": 1, "node-2": 1}, []).hosts == ("node-1",)


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (finished(1, err="pdsh@here: node-2: ssh exited with exit code 255\n"), "code 1: pdsh@here: node-2"),
        (subprocess.TimeoutExpired("deepspeed", 1200), "the ranks do not end within 1200 s"),
    ],
)
def test_a_launcher_without_a_report(programs: Programs, answer: Answer, detail: str) -> None:
    programs.launcher = answer
    assert detail in faults(start.examine_hostfile(HOSTS, []).findings)["launcher"].detail


def test_words_of_hosts_reach_ssh_as_one_argument(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    start.try_hosts(["-oProxyCommand=true"])
    assert programs.commands == [
        ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "--", "-oProxyCommand=true", "true"]
    ]
