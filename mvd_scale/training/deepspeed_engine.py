"""The student's DeepSpeed engine, and the parts of its parameters that a rank holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mvd_scale.config import RunRecipe
from mvd_scale.config.deepspeed import student_deepspeed_config
from mvd_scale.distributed.process_group import Ranks, import_deepspeed
from mvd_scale.models import Student
from mvd_scale.models.blocks import set_gradient_checkpointing
from mvd_scale.training.compile import compile_blocks
from mvd_scale.training.optimizer import build_optimizer
from mvd_scale.training.placement import Placement


def train_engine(
    model: nn.Module, groups: list[dict[str, Any]], recipe: RunRecipe, placement: Placement, ranks: Ranks
) -> Any:
    """A model under DeepSpeed ZeRO with its optimizer; parameters are sharded from here on at stage 3.

    Args:
        model: on the CPU.
        groups: its parameters, as `optim.parameter_groups` cuts them.
        recipe: DeepSpeed file and optimizer.
        placement: of the recipe on these ranks.
        ranks: all of them call this.

    Raises:
        UserError: the DeepSpeed file contradicts the recipe.
    """
    config = student_deepspeed_config(recipe, ranks.world_size)
    if placement.batch_decoders.value:
        assert isinstance(model, Student)
        model.batch_decoders()
    set_gradient_checkpointing(model, placement.gradient_checkpointing.value)
    offload = config["zero_optimization"].get("offload_optimizer", {}).get("device") in ("cpu", "nvme")
    engine, *_ = import_deepspeed().initialize(
        model=model.to(ranks.device),
        optimizer=build_optimizer(groups, recipe.training, ranks.device, offload=offload),
        config=config,
        dist_init_required=False,
    )
    # Off by default in float32 at stages 1 and 2: without it a step that is not finite would ruin the weights.
    engine.optimizer.check_grad_overflow = True
    if placement.compile.value:
        # Not `engine.compile()`: that makes one program of the whole model.
        compile_blocks(engine.module)
    return engine


def full_parameters(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the student by name: whole, float32, on the CPU. All ranks must iterate."""
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        yield name, full.detach().float().cpu().clone()


def online_shard(online: nn.Parameter, averaged: nn.Parameter, ranks: Ranks) -> Tensor:
    """The part of a parameter of the student that this rank keeps of its moving average: float32, flat.

    At ZeRO stage 3 and with a sharded average both are cut alike and nothing is sent; at stages 1 and 2 every rank has
    the whole parameter in the precision that it trains in. All ranks call it.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

    if not hasattr(online, "ds_id"):
        return local_shard(online.detach(), averaged, ranks).float()
    if hasattr(averaged, "ds_tensor"):
        local: Tensor = safe_get_local_fp32_param(online)
        return local
    full: Tensor = safe_get_full_fp32_param(online)
    return full.detach().float().flatten()


def local_shard(whole: Tensor, like: nn.Parameter, ranks: Ranks) -> Tensor:
    """What this rank keeps of a whole tensor if it is cut as the parameter `like` is: flat, padded with zeros."""
    flat = whole.flatten()
    if not hasattr(like, "ds_tensor"):
        return flat
    size = like.ds_tensor.numel()
    share = flat[ranks.rank * size : (ranks.rank + 1) * size]
    return nn.functional.pad(share, (0, size - share.numel()))


def gather_full(share: Tensor, like: nn.Parameter, ranks: Ranks) -> Tensor:
    """The inverse of `local_shard`: a tensor of the shape of `like`. All ranks call it."""
    if not hasattr(like, "ds_tensor"):
        return share.view(like.shape)
    shares = [torch.empty_like(share) for _ in range(ranks.world_size)]
    torch.distributed.all_gather(shares, share)
    whole: Tensor = torch.cat(shares)[: like.ds_numel].view(like.ds_shape)  # type: ignore[attr-defined]
    return whole


def write_shard(parameter: nn.Parameter, share: Tensor) -> None:
    """Put what `local_shard` cuts out into a parameter of a frozen model, sharded or not."""
    if hasattr(parameter, "ds_tensor"):
        parameter.ds_tensor.data.copy_(share)
    else:
        parameter.data.copy_(share.view(parameter.shape))
