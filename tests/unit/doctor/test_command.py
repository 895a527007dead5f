"""`mvd-scale doctor` as a user starts it: alone, under a launcher, with faults, as table and as JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mvd_scale.cli.doctor import _GROUPS, doctor
from mvd_scale.doctor.findings import GROUPS
from mvd_scale.doctor.settings import Settings
from tests.e2e.conftest import RECIPE
from tests.fork_server import ROOT, ForkServer


def read(output: str) -> dict[str, Any]:
    (line,) = [line for line in output.splitlines() if line.startswith('{"schema"')]
    values: dict[str, Any] = json.loads(line)
    return values


def outcomes(report: dict[str, Any]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for finding in report["findings"]:
        found.setdefault(finding["check"], set()).add(finding["outcome"])
    return found


def test_the_command_offers_all_groups() -> None:
    assert _GROUPS == GROUPS


def test_the_guide_names_the_rounds_of_pairs() -> None:
    guide = " ".join((ROOT / "docs/guides/distributed.md").read_text().split())
    (rounds,) = re.findall(r"in n - 1 rounds \(n if n is odd\), in (\d+) at most", guide)
    (option,) = [option for option in doctor.params if option.name == "rounds"]
    assert int(rounds) == option.default == Settings(Path()).rounds


def test_one_node(fork_server: ForkServer, tmp_path: Path) -> None:
    words = ["--folder", tmp_path, "--only", "machine", "--only", "folder", "--only", "network"]
    code, output = fork_server.run("mvd_scale", "doctor", *words)
    lines = output.splitlines()
    assert lines[0] == "machine"
    assert any(line.split()[:2] == ["OK", "writing"] for line in lines), output
    assert "1 host, 1 rank" in lines[-1]
    failed = [line for line in lines if line.strip().startswith("FAIL")]
    assert code == (1 if failed else 0)


def test_a_fault_is_a_red_line_with_its_remedy_and_exit_code_1(fork_server: ForkServer, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)
    words = ["--recipe", recipe, "--run.folder", tmp_path / "run", "--data.source", tmp_path / "missing"]
    code, output = fork_server.run("mvd_scale", "doctor", "--only", "folder", *words)
    assert code == 1
    line, remedy = output[output.index("FAIL") :].splitlines()[:2]
    assert f"files of the recipe    missing: data.source {tmp_path / 'missing'}".split() == line.split()[1:]
    assert remedy.strip() == "-> mount or copy them to the same paths on every host"
    assert "its checkpoints take 0.0" in output


def test_two_ranks_of_this_host(fork_server: ForkServer, tmp_path: Path) -> None:
    words = ["--json", "--folder", tmp_path, "--only", "network", "--only", "folder"]
    code, output = fork_server.run("mvd_scale", "doctor", *words, ranks=2)
    report = read(output)
    assert (len(report["hosts"]), report["ranks"]) == (1, 2)
    assert code == (1 if report["outcome"] == "fail" else 0)
    assert outcomes(report)["all-reduce"] == {"ok"}
    assert "clock" not in outcomes(report)


def test_two_hosts(fork_server: ForkServer, tmp_path: Path) -> None:
    words = ["--json", "--folder", tmp_path, "--only", "network", "--only", "folder", "--only", "versions"]
    code, output = fork_server.run("mvd_scale", "doctor", *words, ranks=[1, 2])
    report = read(output)
    assert (len(report["hosts"]), report["ranks"]) == (2, 3)
    found = outcomes(report)
    for check in ("torch", "clock", "shared folder", "rename", "pairs of hosts", "all-reduce"):
        assert found[check] == {"ok"}, report["findings"]
    assert code == (1 if report["outcome"] == "fail" else 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_everything_on_one_node(fork_server: ForkServer, tmp_path: Path) -> None:
    code, output = fork_server.run("mvd_scale", "doctor", "--json", "--folder", tmp_path)
    report = read(output)
    assert code == (1 if report["outcome"] == "fail" else 0)
    assert {finding["group"] for finding in report["findings"]} == set(GROUPS) - {"hosts"}
    assert outcomes(report)["decoding"] == {"ok"}, report["findings"]
    assert all(finding["remedy"] for finding in report["findings"] if finding["outcome"] in ("fail", "warning"))


def test_overrides_need_a_recipe(fork_server: ForkServer) -> None:
    code, output = fork_server.run("mvd_scale", "doctor", "--run.folder", "x")
    assert code == 2
    assert "unexpected argument --run.folder: keys of a recipe need --recipe" in output


def test_a_malformed_hostfile_is_a_user_error(fork_server: ForkServer, tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node-1\n")
    code, output = fork_server.run("mvd_scale", "doctor", "--hostfile", hostfile)
    assert code == 2
    assert "it has no slots" in output
    code, output = fork_server.run("mvd_scale", "doctor", "--hostfile", tmp_path / "none")
    assert code == 2
    assert "cannot be read" in output
