"""Placement of a run on its actual devices and ranks, and detection of the devices' capabilities."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch

from mvd_kernels import bf16_instructions
from mvd_scale.config import RunRecipe
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.models.quantization import has_fp8
from mvd_scale.targets import FrozenTeacher, Target
from mvd_scale.training.placement import (
    Capabilities,
    DeviceKind,
    Devices,
    Placement,
    Teacher,
    decide_placement,
    needs_compiler,
)
from mvd_scale.utils.env_report import torch_compile

logger = logging.getLogger("mvd_scale")


def make_placement(recipe: RunRecipe, targets: Mapping[str, Target], ranks: Ranks, student: str = "") -> Placement:
    """Decide how a recipe runs on its ranks, and log every decision. All ranks call it.

    Args:
        recipe: recipe of pre-training, fine-tuning or detection.
        targets: targets of the recipe by name, with unsharded teachers; empty except in pre-training.
        ranks: this process among all.
        student: name of the student, for one of several.

    Raises:
        UserError: see `decide_placement`.
    """
    kind = device_kind(ranks.device)
    hosts = ranks_by_host(ranks).values()
    capabilities = replace(
        probe_capabilities(ranks.device, compiler=needs_compiler(recipe, kind)),
        no_nvdec=ranks.data_rank.nvdec.missing if kind == "cuda" and recipe.data.decoder != "host" else "",
    )
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
