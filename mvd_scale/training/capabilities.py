"""The placement of a run on the devices and ranks at hand, which are asked here what they can do."""

from __future__ import annotations

import logging
from collections.abc import Mapping
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


def make_placement(recipe: RunRecipe, targets: Mapping[str, Target], ranks: Ranks) -> Placement:
    """Decide how a recipe runs on its ranks, and log every decision. All ranks call it.

    Args:
        recipe: of pre-training, fine-tuning or detection.
        targets: with whole teachers; none but in pre-training.
        ranks: of the run.

    Raises:
        UserError: as `decide_placement`.
    """
    kind = device_kind(ranks.device)
    hosts = ranks_by_host(ranks).values()
    capabilities = probe_capabilities(ranks.device, compiler=needs_compiler(recipe, kind))
    devices = Devices(kind, ranks.world_size, max(len(members) for members in hosts), capabilities)
    placement = decide_placement(recipe, teacher_facts(targets), devices)
    for line in placement.to_lines():
        logger.info("%s", line)
    return placement


def device_kind(device: torch.device) -> DeviceKind:
    """The kind of a rank's device."""
    return "cuda" if device.type == "cuda" else "cpu"


def teacher_facts(targets: Mapping[str, Target]) -> list[Teacher]:
    """The facts of the frozen teachers of targets, in their order."""
    return [teacher_of(name, target) for name, target in targets.items() if isinstance(target, FrozenTeacher)]


def teacher_of(name: str, target: FrozenTeacher) -> Teacher:
    """The facts of a target's frozen teacher, which is whole."""
    parameters = sum(parameter.numel() for parameter in target.teacher.parameters())
    return Teacher(name, parameters, moves=not target.prefetchable)


def probe_capabilities(device: torch.device, *, compiler: bool) -> Capabilities:
    """Ask a device what it can do.

    Args:
        device: of this rank.
        compiler: whether to look for a compiler too, which takes seconds.
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
    """The ranks of every host of the job, which may have different numbers of them. All ranks call it."""
    told = [ranks.host] * ranks.world_size
    if ranks.world_size > 1:
        torch.distributed.all_gather_object(told, ranks.host)
    return {host: [rank for rank, other in enumerate(told) if other == host] for host in dict.fromkeys(told)}
