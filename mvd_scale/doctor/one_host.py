"""All checks that a host makes alone."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

from mvd_scale.config import FinetuneRecipe, Recipe
from mvd_scale.config.launcher import LaunchedRank, chosen_interfaces
from mvd_scale.distributed.process_group import choose_device
from mvd_scale.doctor.checks.decoding import decoding_checks
from mvd_scale.doctor.checks.folder import folder_checks
from mvd_scale.doctor.checks.gpus import from_bringup, gpu_checks
from mvd_scale.doctor.checks.machine import machine_checks
from mvd_scale.doctor.checks.network import network_checks
from mvd_scale.doctor.checks.recipe import checkpoint_bytes, recipe_checks
from mvd_scale.doctor.checks.versions import compare_capabilities, compare_versions, own_capabilities, own_versions
from mvd_scale.doctor.findings import Finding, HostCheck
from mvd_scale.doctor.settings import Settings
from mvd_scale.errors import UserError
from mvd_scale.performance.bringup.checks import machine

Facts = dict[str, dict[str, str]]
"""Versions and capabilities of a host, which are compared with those of the others."""

_IMPORT_SECONDS = 90.0


def examine_alone(settings: Settings) -> list[Finding]:
    """Make all checks of this node, which no launcher has started."""
    label, device = socket.gethostname(), choose_device("auto").type
    facts: Facts = {}
    reduce = partial(from_bringup, "all-reduce", machine.one_rank, device)
    checks = [
        facts_check(facts),
        *host_checks(settings, device, None, chosen_interfaces()),
        HostCheck("network", "all-reduce", reduce, 40, "see the interfaces, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"),
    ]
    findings = make_checks(checks, settings)
    return [replace(finding, host=label) for finding in [*findings, *compare_facts({label: facts})]]


def host_checks(
    settings: Settings, device: str, rank: LaunchedRank | None, by_user: Mapping[str, str]
) -> list[HostCheck]:
    """List the checks that a host makes alone, but for its versions.

    Args:
        settings: settings of the examination.
        device: device of the ranks of this host, `cuda` or `cpu`.
        rank: this rank of a job; None without a launcher.
        by_user: network interfaces that the user has chosen, by variable.
    """
    hosts = 1 if rank is None else rank.hosts or rank.world_size
    return [
        *machine_checks(1 if rank is None else rank.world_size),
        *gpu_checks(device),
        *network_checks(None if rank is None else rank.address, hosts, by_user),
        *folder_checks(settings.folder, _needed(settings.recipe)),
        *(recipe_checks(settings.recipe) if settings.recipe else []),
        *decoding_checks(device),
    ]


def facts_check(facts: Facts) -> HostCheck:
    """Collect the facts of this host into a dictionary, as a check that finds nothing unless it fails or hangs."""

    def collect() -> Iterable[Finding]:
        facts.update(versions=own_versions(), capabilities=own_capabilities())
        return ()

    hung = "a package hangs while it is imported: see `mvd-scale env` there, and the mount of its Python"
    return HostCheck("versions", "versions", collect, _IMPORT_SECONDS, hung)


def compare_facts(facts: dict[str, Facts]) -> list[Finding]:
    """Compare the facts of hosts, by label; those of a host that could not collect them do not count."""
    there = {host: of_host for host, of_host in facts.items() if of_host}
    if not there:
        return []
    findings = [
        *compare_versions({host: of_host["versions"] for host, of_host in there.items()}),
        *compare_capabilities({host: of_host["capabilities"] for host, of_host in there.items()}),
    ]
    return [replace(finding, group="versions") for finding in findings]


def make_checks(checks: Iterable[HostCheck], settings: Settings) -> list[Finding]:
    """Make the checks of the chosen groups. After one that hangs the others of its group are left out."""
    findings: list[Finding] = []
    hung: dict[str, str] = {}
    for check in checks:
        if check.group not in settings.groups:
            continue
        if check.group in hung:
            made = [Finding(check.name, "left out", f"{hung[check.group]} hangs")]
        else:
            made = check.findings()
        if any(finding.figures.get("hung") for finding in made):
            hung[check.group] = check.name
        findings += [replace(finding, group=check.group) for finding in made]
    return findings


def _needed(recipe: Recipe | FinetuneRecipe | None) -> int | str:
    """Bytes of all checkpoints of a recipe, or the reason why they are not known."""
    if recipe is None:
        return "--recipe compares that with its checkpoints"
    try:
        return checkpoint_bytes(recipe)
    except UserError as error:
        return f"the size of its checkpoints is not known: {error}"
