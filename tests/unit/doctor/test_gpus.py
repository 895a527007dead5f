"""What the checks of GPUs conclude from what `nvidia-smi` prints; nothing of it has run on a GPU."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from mvd_scale.doctor.checks import gpus
from mvd_scale.doctor.findings import Finding
from mvd_scale.performance.bringup.session import Check, CheckFailed, LeftOut

TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tPXB\t0-47\t0
GPU1\tNV18\t X \tNV18\tSYS\t0-47\t0
GPU2\tSYS\tNV18\t X \tSYS\t48-95\t1
NIC0\tPXB\tSYS\tSYS\t X

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
"""

NVLINK = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)
\t Link 0: 26.562 GB/s
\t Link 1: 26.562 GB/s
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)
\t Link 0: 26.562 GB/s
\t Link 1: <inactive>
"""

Smi = Callable[..., None]


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch) -> Smi:
    """Let nvidia-smi print these texts, by the first of these words that is in its arguments; others fail."""

    def install(**texts: str) -> None:
        def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            words = " ".join(command)
            found = [text for word, text in texts.items() if word.replace("_", ".") in words]
            printed = found[0] if found else "Field is not a valid field to query."
            return subprocess.CompletedProcess(command, 0 if found else 2, printed, "")

        monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr("subprocess.run", run)

    return install


def one(findings: Iterable[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_without_nvidia_smi_all_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    findings = [finding for check in gpus.gpu_checks("cpu") for finding in check.findings()]
    assert {finding.outcome for finding in findings} == {"left out"}
    assert len(findings) == len(gpus.gpu_checks("cpu"))


def found_by_torch(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_gpus_that_torch_finds(monkeypatch: pytest.MonkeyPatch, smi: Smi) -> None:
    smi(memory_total="NVIDIA H100, 81559\nNVIDIA H100, 81559\n")
    found_by_torch(monkeypatch, 2)
    assert one(gpus.visible()).detail == "2 x NVIDIA H100, 81559 MiB"
    found_by_torch(monkeypatch, 1)
    assert one(gpus.visible()).detail.endswith("of which this rank sees 1")


def test_gpus_that_torch_does_not_find(monkeypatch: pytest.MonkeyPatch, smi: Smi) -> None:
    smi(memory_total="NVIDIA H100, 81559\n")
    found_by_torch(monkeypatch, 0)
    finding = one(gpus.visible())
    assert finding.outcome == "fail"
    assert "nvidia-fabricmanager" in finding.remedy


def test_gpus_of_two_kinds(monkeypatch: pytest.MonkeyPatch, smi: Smi) -> None:
    smi(memory_total="NVIDIA H100, 81559\nNVIDIA A100, 40960\n")
    found_by_torch(monkeypatch, 2)
    assert one(gpus.visible()).outcome == "warning"


def test_a_driver_that_fails(monkeypatch: pytest.MonkeyPatch, smi: Smi) -> None:
    smi()
    found_by_torch(monkeypatch, 0)
    assert one(gpus.visible()).outcome == "fail"


def test_a_driver_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("subprocess.run", run)
    found_by_torch(monkeypatch, 0)
    assert "does not end" in one(gpus.visible()).detail


def test_topology(smi: Smi) -> None:
    smi(topo=TOPOLOGY)
    finding = one(gpus.links())
    assert finding.outcome == "warning"
    assert finding.detail == "NV18: 2 pairs, SYS: 1 pairs; without NVLink: GPU0-GPU2"
    smi(topo=TOPOLOGY.replace("SYS", "NV18"))
    assert one(gpus.links()).outcome == "ok"
    smi(topo="\tGPU0\tCPU Affinity\nGPU0\t X \t0-47\n")
    assert one(gpus.links()).outcome == "left out"


def test_nvlink(smi: Smi) -> None:
    smi(nvlink=NVLINK)
    finding = one(gpus.nvlink())
    assert (finding.outcome, finding.detail) == ("warning", "3 links are up, and inactive are 1 of GPU 1")
    smi(nvlink=NVLINK.replace("<inactive>", "26.562 GB/s"))
    assert one(gpus.nvlink()).detail == "4 links are up, 53 GB/s each GPU"
    smi(nvlink="")
    assert one(gpus.nvlink()).outcome == "left out"


def test_direct_access(monkeypatch: pytest.MonkeyPatch) -> None:
    found_by_torch(monkeypatch, 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    assert one(gpus.peer_access()).outcome == "ok"
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a, b) != (1, 0))
    finding = one(gpus.peer_access())
    assert (finding.outcome, finding.detail) == ("warning", "not from GPU 1 to 0")


QUESTIONS = {"ecc.errors": "ECC errors", "remapped.failure": "the remapping failed"}


def test_faults_of_memory(smi: Smi) -> None:
    smi(ecc_errors="0\n3\n", remapped_failure="No\nNo\n")
    finding = one(gpus.health("memory", QUESTIONS, "reset it"))
    assert (finding.outcome, finding.detail) == ("fail", "GPU 1: ECC errors (3)")
    smi(ecc_errors="0\n[N/A]\n", remapped_failure="No\nNo\n")
    assert one(gpus.health("memory", QUESTIONS, "reset it")).outcome == "ok"


def test_a_field_that_the_driver_does_not_know_is_passed_over(smi: Smi) -> None:
    smi(ecc_errors="0\n")
    assert one(gpus.health("memory", QUESTIONS, "reset it")).detail == "none of 1 faults"
    smi()
    assert one(gpus.health("memory", QUESTIONS, "reset it")).outcome == "left out"


def test_errors_of_the_driver(smi: Smi) -> None:
    line = "[ 1.0] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.\n"
    smi(dmesg=2 * line)
    finding = one(gpus.driver_errors())
    assert (finding.outcome, finding.detail) == ("warning", "since the start of the host: 79 of 0000:3b:00")
    smi(dmesg="[ 1.0] all is well\n")
    assert one(gpus.driver_errors()).outcome == "ok"
    smi()
    assert one(gpus.driver_errors()).outcome == "left out"


def test_checks_of_the_bringup_become_findings() -> None:
    def passes(check: Check, device: str) -> None:
        check.figure("GB/s", 25.04)

    def fails(check: Check, device: str) -> None:
        raise CheckFailed("a promise")

    def left_out(check: Check, device: str) -> None:
        raise LeftOut("a reason")

    assert one(gpus.from_bringup("copy", passes, "cuda")).detail == "GB/s 25.04"
    assert one(gpus.from_bringup("copy", fails, "cuda")).outcome == "fail"
    assert one(gpus.from_bringup("copy", left_out, "cuda")).outcome == "left out"
