"""The student's DeepSpeed engine, and access to its full and sharded parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mvd_scale.config import RunRecipe
from mvd_scale.config.deepspeed import student_deepspeed_config
from mvd_scale.distributed.process_group import Ranks, import_deepspeed
from mvd_scale.models import Student
from mvd_scale.models.bf16_ways import set_bf16_ways
from mvd_scale.models.blocks import set_gradient_checkpointing
from mvd_scale.training.compile import compile_blocks
from mvd_scale.training.optimizer import build_optimizer
from mvd_scale.training.placement import Placement


def train_engine(
    model: nn.Module, groups: list[dict[str, Any]], recipe: RunRecipe, placement: Placement, ranks: Ranks
) -> Any:
    """Create the DeepSpeed engine of a model with its optimizer. All ranks call it.

    At ZeRO stage 3 the model's parameters are sharded after this call.

    Args:
        model: model on the CPU.
        groups: parameter groups of the model, see `optimizer.parameter_groups`.
        recipe: recipe with the DeepSpeed file and the optimizer's settings.
        placement: placement of the recipe on these ranks.
        ranks: this process among all.

    Returns:
        engine of `deepspeed.initialize`.

    Raises:
        UserError: the DeepSpeed file contradicts the recipe.
    """
    config = student_deepspeed_config(recipe, ranks.world_size)
    if placement.batch_decoders.value:
        assert isinstance(model, Student)
        model.batch_decoders()
    if placement.bf16_ways is not None:
        set_bf16_ways(model, placement.bf16_ways.value)
    set_gradient_checkpointing(model, placement.gradient_checkpointing.value)
    offload = config["zero_optimization"].get("offload_optimizer", {}).get("device") in ("cpu", "nvme")
    engine, *_ = import_deepspeed().initialize(
        model=model.to(ranks.device),
        optimizer=build_optimizer(groups, recipe.training, ranks.device, offload=offload),
        config=config,
        dist_init_required=False,
    )
    # DeepSpeed disables this check in float32 at stages 1 and 2; non-finite gradients would then corrupt the weights.
    engine.optimizer.check_grad_overflow = True
    if placement.compile.value:
        # `engine.compile()` would compile the whole model as one program.
        compile_blocks(engine.module)
    return engine


def full_parameters(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield name and gathered value of every parameter, float32 on the CPU. All ranks must exhaust the iterator."""
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        yield name, full.detach().float().cpu().clone()


def online_shard(online: nn.Parameter, averaged: nn.Parameter, ranks: Ranks) -> Tensor:
    """Return the part of a student parameter that matches this rank's part of its moving average: float32, flat.

    All ranks call it. If both the student (ZeRO stage 3) and the average are sharded, their shards match and the call
    does not communicate. At stages 1 and 2 every rank has the full parameter in the training precision.

    Args:
        online: parameter of the student.
        averaged: parameter of the moving average.
        ranks: this process among all.
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
    """Return this rank's shard of a full tensor, sharded like the parameter `like`: flat, padded with zeros.

    If `like` is not sharded, the shard is the whole tensor.
    """
    flat = whole.flatten()
    if not hasattr(like, "ds_tensor"):
        return flat
    size = like.ds_tensor.numel()
    share = flat[ranks.rank * size : (ranks.rank + 1) * size]
    return nn.functional.pad(share, (0, size - share.numel()))


def gather_full(share: Tensor, like: nn.Parameter, ranks: Ranks) -> Tensor:
    """Gather the shards of all ranks to a full tensor of the shape of `like`; inverse of `local_shard`.

    All ranks call it.
    """
    if not hasattr(like, "ds_tensor"):
        return share.view(like.shape)
    shares = [torch.empty_like(share) for _ in range(ranks.world_size)]
    torch.distributed.all_gather(shares, share)
    whole: Tensor = torch.cat(shares)[: like.ds_numel].view(like.ds_shape)  # type: ignore[attr-defined]
    return whole


def write_shard(parameter: nn.Parameter, share: Tensor) -> None:
    """Write a shard, as `local_shard` returns it, to a parameter of a frozen model, sharded or not."""
    if hasattr(parameter, "ds_tensor"):
        parameter.ds_tensor.data.copy_(share)
    else:
        parameter.data.copy_(share.view(parameter.shape))
