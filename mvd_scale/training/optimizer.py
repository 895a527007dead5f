"""AdamW with parameter groups: with and without weight decay, and per layer in fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from mvd_scale.config import TrainingConfig
from mvd_scale.training.lr_schedule import Schedule

_TOKENS = ("mask_token", "class_token")

LARGEST_GROUP = 2**25
"""Largest number of parameters per group. At ZeRO stages 1 and 2 DeepSpeed converts the gradients of one group at a
time to float32, so this limits the memory of the optimizer step."""


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    lr_scale: Callable[[str], float] = lambda name: 1.0,
    *,
    decay_tokens: bool = True,
) -> list[dict[str, Any]]:
    """Group the trainable parameters; biases, norms and other one-dimensional ones get no weight decay.

    Args:
        model: the model to train.
        weight_decay: weight decay of all other parameters.
        lr_scale: function from the name of a parameter to a factor on its learning rate.
        decay_tokens: whether mask tokens and class tokens get weight decay.

    Returns:
        groups for an optimizer, with the additional keys `decays` and `lr_scale`.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and (decay_tokens or not name.endswith(_TOKENS))
            groups.setdefault((lr_scale(name), decays), []).append(parameter)
    return [
        {"params": part, "weight_decay": weight_decay if decays else 0.0, "decays": decays, "lr_scale": scale}
        for (scale, decays), params in groups.items()
        for part in _cut(params)
    ]


def _cut(params: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Cut a list of parameters, in order, into groups of at most `LARGEST_GROUP` parameters each."""
    part: list[nn.Parameter] = []
    for parameter in params:
        if part and sum(p.numel() for p in part) + parameter.numel() > LARGEST_GROUP:
            yield part
            part = []
        part.append(parameter)
    yield part


def layer_index(name: str, depth: int) -> int:
    """Layer index of a parameter of `Classifier` for layer-wise decay of the learning rate.

    0: patch embedding and class token; 1 to `depth`: blocks; `depth + 1`: norm and head.
    """
    inside = name.removeprefix("encoder.")
    if inside.startswith(("patch_embed.", "class_token")):
        return 0
    if inside.startswith("blocks."):
        return int(inside.split(".")[1]) + 1
    return depth + 1


def layer_scale(name: str, depth: int, decay: float) -> float:
    """Factor on the learning rate of a parameter of `Classifier`: `decay` to the power of the layers above its own."""
    return float(decay ** (depth + 1 - layer_index(name, depth)))


def build_optimizer(
    groups: list[dict[str, Any]], training: TrainingConfig, device: torch.device, *, offload: bool
) -> torch.optim.Optimizer:
    """Build AdamW: DeepSpeed's CPU version if states are offloaded, apex's fused one if installed, else torch's."""
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        host: torch.optim.Optimizer = DeepSpeedCPUAdam(
            groups, lr=training.base_lr, betas=training.betas, eps=training.eps, adamw_mode=True
        )
        return host
    if device.type == "cuda" and find_spec("apex") is not None and find_spec("amp_C") is not None:
        from apex.optimizers import FusedAdam

        apex: torch.optim.Optimizer = FusedAdam(
            groups, lr=training.base_lr, betas=training.betas, eps=training.eps, adam_w_mode=True
        )
        return apex
    return torch.optim.AdamW(groups, lr=training.base_lr, betas=training.betas, eps=training.eps, fused=True)


def adam_steps(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> int:
    """Read the number of updates that the moments have seen, which Adam's bias correction depends on."""
    if _counts_by_group(optimizer):
        return max(int(group["step"]) for group in optimizer.param_groups)
    return max(int(optimizer.state[parameter]["step"]) for parameter in parameters)


def set_adam_state(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], steps: int) -> None:
    """Set the number of updates that the moments have seen, and make moments of zeros where there are none.

    Args:
        optimizer: result of `build_optimizer`.
        parameters: tensors that the optimizer updates; DeepSpeed replaces those that it was built with.
        steps: number of updates.
    """
    by_group = _counts_by_group(optimizer)
    for parameter in parameters:
        state = optimizer.state[parameter]
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment not in state:
                state[moment] = torch.zeros_like(parameter)
        if isinstance(optimizer, torch.optim.AdamW):
            # Its fused kernel reads the number on the device.
            state["step"] = torch.tensor(float(steps), device=parameter.device)
        elif not by_group:
            state["step"] = steps
    if by_group:
        for group in optimizer.param_groups:
            group["step"] = steps


def _counts_by_group(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer counts its updates by group, as apex does from its first update on, not by parameter."""
    return type(optimizer).__module__.startswith("apex.")


def apply_schedule(optimizer: Any, schedule: Schedule, step: int) -> None:
    """Set learning rate and weight decay of all groups for the next optimizer step, number `step`."""
    lr, weight_decay = schedule.lr(step), schedule.weight_decay(step)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group["decays"]:
            group["weight_decay"] = weight_decay
