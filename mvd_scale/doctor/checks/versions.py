"""Versions of a host, and their comparison with those of the others."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import torch

import mvd_kernels
import mvd_scale
from mvd_scale.doctor.findings import Finding, Outcome
from mvd_scale.performance.bringup.checks.machine import driver_version
from mvd_scale.utils.env_report import collect_capabilities

ABSENT = "not installed"

_PACKAGES = {
    "torch": ("torch",),
    "DeepSpeed": ("deepspeed",),
    "timm": ("timm",),
    "DALI": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    "PyAV": ("av",),
    "flash-attn": ("flash-attn-4", "flash-attn-3", "flash-attn"),
    "apex": ("apex",),
    "Triton": ("triton",),
    "numpy": ("numpy",),
}
"""Distributions by the name of the package; the first one that is installed counts."""

_SOURCES = (".py", ".cpp", ".json", ".yaml", ".html")
_MAY_DIFFER = {"driver", "Linux"}
"""Versions that may differ without another result."""


def own_versions() -> dict[str, str]:
    """Collect the versions of this host, by name."""
    return {
        "mvd-scale": mvd_scale.__version__,
        "mvd-scale, commit": _commit(),
        "mvd-scale, sources": source_digest([Path(mvd_scale.__path__[0]), Path(mvd_kernels.__path__[0])]),
        "Python": platform.python_version(),
        **{name: _installed(distributions) for name, distributions in _PACKAGES.items()},
        "CUDA of torch": torch.version.cuda or "none, built for the CPU",
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none",
        "driver": driver_version(),
        "Linux": platform.release(),
    }


def own_capabilities() -> dict[str, str]:
    """Capabilities of `mvd-scale env` on this host: an empty text for each that is on, else the reason."""
    return {row.name: "" if row.on else row.reason for row in collect_capabilities()}


def _installed(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return version if len(distributions) == 1 else f"{name} {version}"
    return ABSENT


def _commit() -> str:
    root = Path(mvd_scale.__path__[0]).parent
    if not (root / ".git").exists():
        return "not from a repository"
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({type(error).__name__} of git)"
    return asked.stdout.strip() or f"unknown ({next(iter(asked.stderr.splitlines()), 'git fails')})"


def source_digest(folders: list[Path]) -> str:
    """First 12 hex digits of the SHA-256 of all source files of some folders and their names."""
    whole = hashlib.sha256()
    for folder in folders:
        for file in sorted(path for path in folder.rglob("*") if path.suffix in _SOURCES and path.is_file()):
            whole.update(f"{file.relative_to(folder)}\0".encode())
            whole.update(file.read_bytes())
    return whole.hexdigest()[:12]


def compare_versions(versions: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    """Compare the versions of all hosts.

    Args:
        versions: versions by name, by label of the host.
    """
    for name in next(iter(versions.values())):
        found = {host: there.get(name, "unknown") for host, there in versions.items()}
        if len(set(found.values())) == 1:
            yield Finding(name, "ok", next(iter(found.values())))
            continue
        usual = _usual(found)
        others = [host for host, version in found.items() if version != usual]
        outcome: Outcome = "warning" if name in _MAY_DIFFER else "fail"
        remedy = f"give {_listed(others)} the same as the others: {name} {usual}"
        yield Finding(name, outcome, _spread(found), remedy, {"hosts": found})


def compare_capabilities(capabilities: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    """Compare the capabilities of all hosts: each is to be on everywhere, or off everywhere.

    Args:
        capabilities: reasons of those that are off, and an empty text for the others, by name, by label of the host.
    """
    hosts = list(capabilities)
    names = list(dict.fromkeys(name for there in capabilities.values() for name in there))
    on = {name: [host for host in hosts if capabilities[host].get(name, "it has none") == ""] for name in names}
    differing = {name: there for name, there in on.items() if 0 < len(there) < len(hosts)}
    for name, there in differing.items():
        lacking = {host: capabilities[host].get(name, "it has none") for host in hosts if host not in there}
        said = "; ".join(f"off on {host}: {reason}" for host, reason in lacking.items())
        remedy = f"mend the reason on {_listed(list(lacking))}; `mvd-scale env` there says more"
        yield Finding(f"{name} of `mvd-scale env`", "warning", f"on on {_listed(there)}; {said}", remedy)
    if not differing:
        count = sum(bool(there) for there in on.values())
        yield Finding("capabilities of `mvd-scale env`", "ok", f"{count} on, {len(names) - count} off")


def _usual(found: Mapping[str, str]) -> str:
    """Version of most hosts; of several such, that of the first host among them."""
    counted = Counter(found.values())
    return max(found.values(), key=lambda version: counted[version])


def _spread(found: Mapping[str, str]) -> str:
    by_version: dict[str, list[str]] = {}
    for host, version in found.items():
        by_version.setdefault(version, []).append(host)
    return "; ".join(f"{version} on {_listed(hosts)}" for version, hosts in by_version.items())


def _listed(hosts: list[str], most: int = 4) -> str:
    """List hosts, the first few by name."""
    if len(hosts) <= most:
        return ", ".join(hosts)
    return f"{', '.join(hosts[: most - 1])} and {len(hosts) - most + 1} more"
