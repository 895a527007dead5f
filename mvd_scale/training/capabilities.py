"""Placement of a run on its actual devices and ranks, and detection of the devices' capabilities."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch

from mvd_kernels import bf16_instructions
from mvd_kernels.cpu_attention import possible_ways
from mvd_kernels.cpu_trial import CHANNELS, time_attention, time_products
from mvd_kernels.native.attention import instructions
from mvd_scale.config import RunRecipe
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.models.bf16_ways import Bf16Trial
from mvd_scale.models.quantization import has_fp8
from mvd_scale.targets import FrozenTeacher, Target
from mvd_scale.training.placement import (
    Capabilities,
    DeviceKind,
    Devices,
    Placement,
    Teacher,
    decide_placement,
    needs_bf16_trial,
    needs_compiler,
)
from mvd_scale.utils.env_report import torch_compile
from mvd_scale.utils.io import write_atomic
from mvd_scale.utils.machine import processor_name

logger = logging.getLogger("mvd_scale")


def make_placement(
    recipe: RunRecipe,
    targets: Mapping[str, Target],
    ranks: Ranks,
    student: str = "",
    *,
    bf16_record: Path | None = None,
) -> Placement:
    """Decide how a recipe runs on its ranks, and log every decision. All ranks call it.

    Args:
        recipe: recipe of pre-training, fine-tuning or detection.
        targets: targets of the recipe by name, with unsharded teachers; empty except in pre-training.
        ranks: this process among all.
        student: name of the student, for one of several.
        bf16_record: file of the run for the trial of bf16, see `try_bf16`; None keeps it in this process alone.

    Raises:
        UserError: see `decide_placement`.
    """
    kind = device_kind(ranks.device)
    hosts = ranks_by_host(ranks).values()
    capabilities = replace(
        probe_capabilities(ranks.device, compiler=needs_compiler(recipe, kind)),
        no_nvdec=ranks.data_rank.nvdec.missing if kind == "cuda" and recipe.data.decoder != "host" else "",
    )
    # Of all ranks alike, though their CPUs may differ: rank 0 tells them what it measured.
    if any(needs_bf16_trial(recipe, kind, bf16=able) for able in (True, False)):
        capabilities = replace(capabilities, bf16_trial=try_bf16(ranks, bf16_record))
    devices = Devices(kind, ranks.world_size, max(len(members) for members in hosts), capabilities)
    placement = decide_placement(recipe, teacher_facts(targets), devices)
    title, *lines = placement.to_lines()
    logger.info("%s%s", f"students.{student}: " if student else "", title)
    for line in lines:
        logger.info("%s", line)
    return placement


def device_kind(device: torch.device) -> DeviceKind:
    """Return the kind of a rank's device for the placement rules."""
    return "cuda" if device.type == "cuda" else "cpu"


def teacher_facts(targets: Mapping[str, Target]) -> list[Teacher]:
    """Collect the properties of all frozen teachers that their placement depends on, in the order of `targets`."""
    return [teacher_of(name, target) for name, target in targets.items() if isinstance(target, FrozenTeacher)]


def teacher_of(name: str, target: FrozenTeacher) -> Teacher:
    """Collect the properties of one target's frozen teacher, which must not be sharded yet."""
    parameters = sum(parameter.numel() for parameter in target.teacher.parameters())
    return Teacher(name, parameters, moves=not target.prefetchable)


def probe_capabilities(device: torch.device, *, compiler: bool) -> Capabilities:
    """Detect the capabilities of a device.

    Args:
        device: device of this rank.
        compiler: whether to check that torch.compile works, which takes seconds.
    """
    no_compile = torch_compile(device.type).reason if compiler else ""
    if device.type == "cpu":
        return Capabilities(bf16=bf16_instructions(), no_compile=no_compile)
    return Capabilities(
        gpu=torch.cuda.get_device_name(device),
        bf16=torch.cuda.is_bf16_supported(),
        fp8=has_fp8(device),
        no_compile=no_compile,
    )


@cache
def ranks_by_host(ranks: Ranks) -> dict[str, list[int]]:
    """Group all ranks by the identifier of their host; hosts may have different numbers of ranks. All ranks call it."""
    hosts = [ranks.host] * ranks.world_size
    if ranks.world_size > 1:
        torch.distributed.all_gather_object(hosts, ranks.host)
    members: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        members.setdefault(host, []).append(rank)
    return members


def try_bf16(ranks: Ranks, record: Path | None) -> Bf16Trial:
    """Time the ways in which the CPU of rank 0 computes bf16, or read the times that the run has. All ranks call it.

    A run that resumes on the same kind of CPU reads them, so that it computes as before.

    Args:
        ranks: this process among all.
        record: JSON file of the run for the times and the CPU that they are of.
    """
    made = [_recorded_trial(record) if ranks.is_main else None]
    if ranks.world_size > 1:
        torch.distributed.broadcast_object_list(made)
    assert made[0] is not None
    return made[0]


def _recorded_trial(record: Path | None) -> Bf16Trial:
    if record is None:
        return _trial()
    supported = sorted(name for name, value in instructions().items() if value is True)
    ways = possible_ways(CHANNELS)
    cpu = {"processor": processor_name(), "instructions": supported, "attention": ways, "torch": torch.__version__}
    if record.is_file():
        with suppress(ValueError, KeyError, TypeError):
            stands = json.loads(record.read_text())
            if stands["cpu"] == cpu:
                return Bf16Trial(stands["products"], stands["attention"])
        logger.warning(
            "%s is damaged, or of another CPU or torch: bf16 is tried anew, and may be rounded otherwise", record
        )
    trial = _trial()
    write_atomic(record, json.dumps({"cpu": cpu, **asdict(trial)}, indent=2) + "\n")
    return trial


@cache
def _trial() -> Bf16Trial:
    """Make the trial, once a process: several students compute alike."""
    return Bf16Trial(time_products(), time_attention())
