"""Start of an examination on the hosts of a hostfile, as `launch/multi_node.sh` starts a run: by `deepspeed` and pdsh.

Each host is tried first, by its name and by ssh. Those that fail are findings, and the others are started without them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from mvd_scale.distributed.free_port import free_port
from mvd_scale.distributed.remote_command import remote_words
from mvd_scale.doctor.all_hosts import PRESENCE, Examined
from mvd_scale.doctor.findings import Finding
from mvd_scale.doctor.report import report_from_json
from mvd_scale.elastic.meeting import addresses_of

_SSH_SECONDS = 10
_TRIES = 32
"""Hosts that are tried at the same time."""

JOB_SECONDS = 1200.0
"""Time limit of the job on all hosts."""

_LOG_LINES = 5


def examine_hostfile(hosts: Mapping[str, int], words: Sequence[str]) -> Examined:
    """Try all hosts, and run the examination on those that can be started.

    Args:
        hosts: number of ranks by name of host.
        words: options of `mvd-scale doctor` for the ranks.

    Raises:
        UserError: shells of the other hosts would interpret a part of the launcher's command.
    """
    findings = try_hosts(list(hosts))
    refused = {finding.host for finding in findings if finding.outcome == "fail"}
    reached = {name: slots for name, slots in hosts.items() if name not in refused}
    if shutil.which("pdsh") is None:
        return Examined((), 0, [*findings, _no_pdsh()])
    if not reached:
        return Examined((), 0, findings)
    examined = _run(reached, words)
    return replace(examined, findings=[*findings, *examined.findings])


def try_hosts(names: Sequence[str]) -> list[Finding]:
    """Try the name of each host and ssh to it, many at the same time."""
    with ThreadPoolExecutor(_TRIES) as pool:
        return [replace(finding, group="hosts") for finding in pool.map(_try_host, names)]


def _try_host(name: str) -> Finding:
    plain = name.rpartition("@")[2]
    if not addresses_of(plain):
        remedy = f"write {plain} into /etc/hosts or the name server, or its address into the hostfile"
        return Finding("ssh", "fail", f"the name {plain} is not known here", remedy, host=name)
    remedy = f"mend `ssh -o BatchMode=yes {name} true`: see that the host is up, its sshd runs, and your key is there"
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_SSH_SECONDS}"]
    try:
        tried = subprocess.run(
            ["ssh", *options, "--", name, "true"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=2 * _SSH_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Finding("ssh", "fail", f"no answer within {2 * _SSH_SECONDS} s", remedy, host=name)
    except FileNotFoundError:
        return Finding("ssh", "fail", "there is no ssh on this node", "install the client of OpenSSH", host=name)
    if tried.returncode:
        said = next(iter(reversed(tried.stderr.strip().splitlines())), f"code {tried.returncode}")
        return Finding("ssh", "fail", said, remedy, host=name)
    return Finding("ssh", "ok", "answers without a password", host=name)


def _no_pdsh() -> Finding:
    remedy = (
        "install pdsh on this node; or let your scheduler start `HOSTFILE=... MASTER_ADDR=... NODE_RANK=... "
        "launch/multi_node.sh doctor` on each host, which needs neither ssh nor pdsh"
    )
    said = "there is no pdsh, by which the deepspeed launcher reaches other hosts"
    return Finding("pdsh", "fail", said, remedy, group="hosts")


def _run(hosts: Mapping[str, int], words: Sequence[str]) -> Examined:
    """Run the ranks under the launcher, and join the report of rank 0 with those of hosts that do not reach it."""
    with tempfile.TemporaryDirectory(prefix="mvd-doctor-") as folder:
        file = Path(folder) / "hostfile"
        file.write_text("".join(f"{name} slots={slots}\n" for name, slots in hosts.items()))
        doctor = ["doctor", "--json", "--hostfile", str(file), *words]
        command = [
            sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(file), "--launcher_args=-N", "--quiet",
            "--master_port", str(free_port()), "--module", "--no_local_rank",
            # Without it the ranks of a single host would run on this node.
            "--force_multi", *remote_words("mvd_scale", doctor),
        ]  # fmt: skip
        try:
            job = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=JOB_SECONDS
            )
        except subprocess.TimeoutExpired:
            return Examined((), 0, [_no_report(f"the ranks do not end within {JOB_SECONDS:g} s")])
    reports = [report_from_json(line) for line in job.stdout.splitlines() if line.startswith('{"schema"')]
    if not reports:
        said = "; ".join((job.stderr.strip() or job.stdout.strip()).splitlines()[-_LOG_LINES:])
        return Examined((), 0, [_no_report(f"code {job.returncode}: {said}")])
    # In any order, as ssh carries them. Where each host is alone with one rank, only that of rank 0 tells who came.
    reports.sort(key=lambda report: (report.ranks, any(finding.check == PRESENCE for finding in report.findings)))
    findings = [finding for report in reversed(reports) for finding in report.findings]
    return Examined(reports[-1].hosts, reports[-1].ranks, findings)


def _no_report(reason: str) -> Finding:
    remedy = "mend what it says; `launch/multi_node.sh doctor` shows all that the ranks print"
    return Finding("launcher", "fail", f"the launcher gives no report: {reason}", remedy, group="hosts")
