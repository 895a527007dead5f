"""Checks of the GPUs of a host: torch sees them, links, direct access, errors of memory and driver, throttling.

`nvidia-smi` tells all but the direct access, which torch asks the driver for.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch

from mvd_scale.doctor.findings import Finding, HostCheck
from mvd_scale.performance.bringup.checks import machine
from mvd_scale.performance.bringup.session import Check, CheckFailed, LeftOut
from mvd_scale.utils.markdown import number

_SMI_SECONDS = 20.0
"""Time limit of one call of nvidia-smi, which takes seconds without persistence mode and for ever with a lost GPU."""

_HUNG = "the driver does not answer: see `dmesg` for Xid messages, and reset or reboot the host"

_ERRORS = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected ECC errors since the last reset",
    "retired_pages.pending": "memory pages wait for their retirement",
    "remapped_rows.pending": "memory rows wait for their remapping",
    "remapped_rows.failure": "the remapping of memory rows failed",
}
"""Fields of `nvidia-smi --query-gpu` about memory errors: 0 or No if there are none."""

_SLOWED = {
    "clocks_throttle_reasons.hw_thermal_slowdown": "the GPU is too hot",
    "clocks_throttle_reasons.sw_thermal_slowdown": "the GPU is too warm",
    "clocks_throttle_reasons.hw_power_brake_slowdown": "the power supply brakes it",
}
"""Reasons of `nvidia-smi --query-gpu` why clocks are lowered: Active or Not Active."""

_NONE = ("0", "No", "Not Active", "[N/A]", "N/A", "[Not Supported]")

_XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")


class SmiFailed(Exception):
    """`nvidia-smi` that fails, with what it says."""


def gpu_checks(device: str) -> list[HostCheck]:
    """List the checks.

    Args:
        device: device of the ranks, `cuda` or `cpu`.
    """
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "GPUs": visible,
        "links of GPUs": links,
        "NVLink": nvlink,
        "direct access of GPUs": peer_access,
        "memory errors of GPUs": partial(health, "memory errors of GPUs", _ERRORS, "reset the GPU, or take it away"),
        "clocks of GPUs": partial(health, "clocks of GPUs", _SLOWED, "see cooling and power of the host"),
        "Xid": driver_errors,
        "NVDEC": partial(from_bringup, "NVDEC", machine.decoders, device),
        "copy to the GPU": partial(from_bringup, "copy to the GPU", machine.host_copy, device),
    }
    return [HostCheck("gpus", name, make, 2 * _SMI_SECONDS, _HUNG) for name, make in checks.items()]


def smi(*words: str) -> str:
    """Run nvidia-smi, and return what it prints.

    Raises:
        SmiFailed: there is none, it fails, or does not end.
    """
    if shutil.which("nvidia-smi") is None:
        raise SmiFailed("there is no nvidia-smi")
    try:
        asked = subprocess.run(
            ["nvidia-smi", *words], capture_output=True, text=True, check=False, timeout=_SMI_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise SmiFailed(f"nvidia-smi {' '.join(words)} does not end") from error
    if asked.returncode:
        said = next(iter((asked.stdout + asked.stderr).strip().splitlines()), "")
        raise SmiFailed(f"nvidia-smi {' '.join(words)} fails: {said}")
    # The head of `topo` is underlined on any output.
    return re.sub(r"\x1b\[[0-9;]*m", "", asked.stdout)


def query(fields: tuple[str, ...]) -> list[dict[str, str]]:
    """Ask for properties of all GPUs: the values by field, for each GPU.

    Raises:
        SmiFailed: it does not answer, or does not know a field.
    """
    printed = smi(f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    rows = [[value.strip() for value in line.split(",")] for line in printed.splitlines() if line.strip()]
    if any(len(row) != len(fields) for row in rows):
        raise SmiFailed(f"nvidia-smi answers {rows[0]}, expected {len(fields)} values")
    return [dict(zip(fields, row, strict=True)) for row in rows]


def visible() -> Iterator[Finding]:
    """Compare the GPUs that the driver lists with those that torch can use."""
    name = "GPUs"
    try:
        listed = [f"{row['name']}, {row['memory.total']} MiB" for row in query(("name", "memory.total"))]
    except SmiFailed as error:
        if torch.cuda.is_available():
            yield Finding(name, "ok", f"torch finds {torch.cuda.device_count()}; {error}")
        elif torch.version.cuda is None or "there is no nvidia-smi" in str(error):
            yield Finding(name, "left out", "no GPU: ranks compute on the CPU")
        else:
            yield Finding(name, "fail", str(error), "install the driver of NVIDIA, or reboot after its update")
        return
    found, kinds = torch.cuda.device_count() if torch.cuda.is_available() else 0, sorted(set(listed))
    detail = f"{len(listed)} x {' and '.join(kinds)}"
    figures = {"listed": listed, "found by torch": found}
    if not found:
        remedy = (
            "install a torch for CUDA (`pip install torch`) and a driver that its CUDA accepts; on hosts with NVSwitch "
            "start nvidia-fabricmanager; unset CUDA_VISIBLE_DEVICES if it is empty"
        )
        yield Finding(name, "fail", f"{detail}, of which torch finds none", remedy, figures)
    elif len(kinds) > 1:
        remedy = "leave the slower ones out with CUDA_VISIBLE_DEVICES: every step waits for them"
        yield Finding(name, "warning", detail, remedy, figures)
    else:
        seen = "" if found == len(listed) else f", of which this rank sees {found}"
        yield Finding(name, "ok", f"{detail}{seen}", figures=figures)


def links() -> Iterator[Finding]:
    """Check by what kind of link each pair of GPUs is connected."""
    name = "links of GPUs"
    try:
        kinds = parse_topology(smi("topo", "-m"))
    except SmiFailed as error:
        yield Finding(name, "left out", str(error))
        return
    if not kinds:
        yield Finding(name, "left out", "there are no two GPUs")
        return
    by_kind: dict[str, list[str]] = {}
    for (a, b), kind in kinds.items():
        by_kind.setdefault(kind, []).append(f"{a}-{b}")
    detail = ", ".join(f"{kind}: {len(pairs)} pairs" for kind, pairs in by_kind.items())
    figures = {"pairs by kind": by_kind}
    nvlink = any(kind.startswith("NV") for kind in by_kind)
    far = [pair for kind, pairs in by_kind.items() if not kind.startswith("NV") for pair in pairs]
    if nvlink and far:
        remedy = "see `nvidia-smi nvlink -s` for links that are down; of GPUs in two groups give a job one group"
        yield Finding(name, "warning", f"{detail}; without NVLink: {', '.join(far[:8])}", remedy, figures)
    else:
        yield Finding(name, "ok", detail, figures=figures)


def parse_topology(printed: str) -> dict[tuple[str, str], str]:
    """Read the matrix of `nvidia-smi topo -m`: kind of link, such as NV18, PIX or SYS, by pair of GPUs."""
    lines = [line.split() for line in printed.splitlines()]
    head = next((words for words in lines if words[:1] == ["GPU0"] and "X" not in words), [])
    columns = [word for word in head if re.fullmatch(r"GPU\d+", word)]
    kinds = {}
    for row, *values in (words for words in lines if words and words[0] in columns and words != head):
        for column, kind in zip(columns, values, strict=False):
            if columns.index(row) < columns.index(column):
                kinds[row, column] = kind
    return kinds


def nvlink() -> Iterator[Finding]:
    """Check that all NVLinks of all GPUs are up."""
    name = "NVLink"
    try:
        states = parse_nvlink(smi("nvlink", "--status"))
    except SmiFailed as error:
        yield Finding(name, "left out", str(error))
        return
    down = {gpu: links.count(None) for gpu, links in states.items() if None in links}
    up = sum(link is not None for links in states.values() for link in links)
    if not up:
        yield Finding(name, "left out", "these GPUs have no NVLink that is up")
    elif down:
        said = ", ".join(f"{count} of {gpu}" for gpu, count in down.items())
        remedy = "restart nvidia-fabricmanager, or reset the GPUs; see `nvidia-smi nvlink -e` for errors of a link"
        yield Finding(name, "warning", f"{up} links are up, and inactive are {said}", remedy, {"states": states})
    else:
        rate = sum(link or 0.0 for link in next(iter(states.values())))
        yield Finding(name, "ok", f"{up} links are up, {rate:.0f} GB/s each GPU", figures={"states": states})


def parse_nvlink(printed: str) -> dict[str, list[float | None]]:
    """Read `nvidia-smi nvlink --status`: GB/s of each link by GPU; None for one that is inactive."""
    states: dict[str, list[float | None]] = {}
    gpu = ""
    for line in printed.splitlines():
        if found := re.match(r"\s*(GPU \d+):", line):
            gpu = found[1]
            states[gpu] = []
        elif found := re.match(r"\s*Link \d+: (?:([\d.]+) GB/s|<inactive>)", line):
            states[gpu].append(float(found[1]) if found[1] else None)
    return {gpu: links for gpu, links in states.items() if links}


def peer_access() -> Iterator[Finding]:
    """Check that GPUs read each other's memory directly."""
    name = "direct access of GPUs"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        yield Finding(name, "left out", "there are no two GPUs")
        return
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    refused = [f"{a} to {b}" for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    if refused:
        remedy = (
            "NCCL copies through the host's memory there: switch PCIe's ACS and the IOMMU off on bare metal, or use "
            "hosts with NVLink"
        )
        yield Finding(name, "warning", f"not from GPU {', '.join(refused[:8])}", remedy, {"refused": refused})
        return
    yield Finding(name, "ok", f"among all {count} GPUs")


def health(name: str, questions: Mapping[str, str], remedy: str) -> Iterator[Finding]:
    """Ask the driver for faults of the GPUs.

    Args:
        name: name of the check.
        questions: what each field of `nvidia-smi --query-gpu` says where it is set.
        remedy: what to do then.
    """
    found: list[str] = []
    asked: list[str] = []
    for field, said in questions.items():
        # One by one: of several, a field that the driver does not know lets all fail.
        try:
            values = [row[field] for row in query((field,))]
        except SmiFailed:
            continue
        asked.append(said)
        found += [f"GPU {gpu}: {said} ({value})" for gpu, value in enumerate(values) if value not in _NONE]
    if not asked:
        yield Finding(name, "left out", "nvidia-smi does not tell")
    elif found:
        yield Finding(name, "fail", "; ".join(found), remedy, {"faults": found})
    else:
        yield Finding(name, "ok", f"none of {len(asked)} faults")


def driver_errors() -> Iterator[Finding]:
    """Look for errors that the driver has reported to the kernel (Xid)."""
    if shutil.which("nvidia-smi") is None:
        yield Finding("Xid", "left out", "there is no nvidia-smi")
        return
    asked = subprocess.run(["dmesg"], capture_output=True, text=True, check=False, timeout=_SMI_SECONDS)
    if asked.returncode:
        yield Finding("Xid", "left out", "the kernel's messages may not be read here: look at `dmesg` as root")
        return
    found = sorted({f"{number} of {gpu}" for gpu, number in _XID.findall(asked.stdout)})
    if found:
        remedy = "look the numbers up in NVIDIA's list of Xid errors; 48, 63, 64, 74, 79, 94 and 95 are of the hardware"
        yield Finding("Xid", "warning", f"since the start of the host: {', '.join(found)}", remedy, {"Xid": found})
        return
    yield Finding("Xid", "ok", "none since the start of the host")


def from_bringup(name: str, check: Callable[[Check, str], None], device: str) -> Iterator[Finding]:
    """Make a check of the bring-up, and give its figures as a finding."""
    figures: dict[str, float | str] = {}
    try:
        check(Check(figures), device)
    except LeftOut as reason:
        yield Finding(name, "left out", str(reason))
    except CheckFailed as failure:
        yield Finding(name, "fail", str(failure), "see `launch/gpu_bringup.sh --stages a`", figures)
    else:
        yield Finding(
            name, "ok", ", ".join(f"{key} {number(value)}" for key, value in figures.items()), figures=figures
        )
