"""State of a DeepSpeed engine as pieces of whole tensors: float32 weights and Adam's moments, at ZeRO stages 1 to 3.

    model.NAME                   weights of the parameter NAME, float32
    optimizer.exp_avg.NAME       first moment
    optimizer.exp_avg_sq.NAME    second moment

At stages 1 and 2 a rank holds a range of the flat parameters of each group; at stage 3 a range of every parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mvd_scale.checkpoints.tensor_folder import MODEL
from mvd_scale.training.checkpointing.pieces import Pieces, State
from mvd_scale.training.optimizer import adam_steps, set_adam_state

_MOMENTS = ("exp_avg", "exp_avg_sq")
_PREFIXES: dict[str | None, str] = {None: MODEL, **{moment: f"optimizer.{moment}." for moment in _MOMENTS}}
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Counters:
    """Numbers of an engine's state beside its tensors."""

    adam_steps: int
    """Updates that the moments have seen: steps without the skipped ones."""

    skipped_steps: int
    """Steps that were skipped because gradients overflowed in fp16."""

    loss_scaler: dict[str, float] | None
    """Attributes of the dynamic loss scaler; None if the precision is not fp16."""

    def to_json(self) -> dict[str, Any]:
        """Convert to values that JSON can hold."""
        return asdict(self)


def engine_state(engine: Any) -> State:
    """Collect the parts of weights and moments that this rank holds.

    Without offloading they share memory with the engine's own tensors, otherwise they may be copies.
    """
    _ensure_moments(engine)
    return {
        f"{prefix}{name}": Pieces.of_range(flat, start, shape)
        for key, prefix in _PREFIXES.items()
        for name, flat, start, shape in _ranges(engine, key)
    }


def read_counters(engine: Any) -> Counters:
    """Read the numbers of an engine's state."""
    return Counters(
        adam_steps=adam_steps(_base(engine), _flat_masters(engine)),
        skipped_steps=engine.skipped_steps,
        loss_scaler=read_loss_scaler(engine),
    )


def read_loss_scaler(engine: Any) -> dict[str, float] | None:
    """Read the attributes of the dynamic loss scaler; None if the precision is not fp16, or the scale is fixed."""
    scaler = engine.optimizer.loss_scaler
    if not (engine.fp16_enabled() and scaler.dynamic):
        return None
    return {name: float(getattr(scaler, name)) for name in _SCALER}


def restore_loss_scaler(engine: Any, state: dict[str, float] | None) -> None:
    """Set the attributes that `read_loss_scaler` read; without any, or in another precision, it begins anew."""
    scaler = engine.optimizer.loss_scaler
    if state is None or not (engine.fp16_enabled() and scaler.dynamic):
        return
    for name, value in state.items():
        setattr(scaler, name, type(getattr(scaler, name))(value))


def restore_engine(engine: Any, state: State, counters: Counters, step: int, batch: int, accumulation: int) -> None:
    """Continue from loaded tensors. All ranks must call it.

    Args:
        engine: engine of any ZeRO stage and precision.
        state: result of `engine_state` of this engine, filled with the loaded values.
        counters: numbers of the saved state.
        step: optimizer steps that were done, the skipped ones included.
        batch: clips per optimizer step of all ranks.
        accumulation: micro batches per optimizer step.
    """
    if engine.zero_optimization_stage() == 3:
        _write_local_parts(engine, state)
    set_adam_state(_base(engine), _flat_masters(engine), counters.adam_steps)
    _publish(engine)
    engine.global_steps, engine.micro_steps, engine.global_samples = step, step * accumulation, step * batch
    if engine.fp16_enabled():
        # In other precisions a skipped step ends the run.
        engine.skipped_steps = counters.skipped_steps
    restore_loss_scaler(engine, counters.loss_scaler)


def _ranges(engine: Any, key: str | None) -> Iterator[tuple[str, Tensor, int, tuple[int, ...]]]:
    """Yield name, part of the weights or of a moment, its first element, and the whole shape, of each parameter."""
    whole = engine.zero_optimization_stage() < 3
    for name, parameter in engine.module.named_parameters():
        if whole:
            held = parameter._hp_mapping
            if held is None:
                yield name, torch.empty(0), 0, tuple(parameter.shape)
            else:
                yield name, held.get_hp_fragment(key), held.lp_fragment_address.start, tuple(parameter.shape)
            continue
        flat, rank = _local_part(engine, parameter, key), torch.distributed.get_rank(parameter.ds_process_group)
        start = rank * flat.numel()
        count = min(max(parameter.ds_numel - start, 0), flat.numel())
        yield name, flat[:count], start, tuple(parameter.ds_shape)


def _local_part(engine: Any, parameter: nn.Parameter, key: str | None) -> Tensor:
    """Return this rank's part of a parameter's weights or of a moment at stage 3, with padding: flat."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    part: Tensor = (
        safe_get_local_fp32_param(parameter) if key is None else safe_get_local_optimizer_state(parameter, key)
    )
    # DeepSpeed copies offloaded states to the GPU, where all of them together would not fit.
    return part.cpu() if engine.optimizer.offload_optimizer else part


def _write_local_parts(engine: Any, state: State) -> None:
    """Hand loaded parts to an engine of stage 3, which may keep its states on the host."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    for key, prefix in _PREFIXES.items():
        for name, parameter in engine.module.named_parameters():
            flat = _local_part(engine, parameter, key)
            loaded = [tensor.flatten() for tensor in state[f"{prefix}{name}"].tensors.values()]
            if not loaded:
                continue
            values = torch.cat(loaded)
            padded = nn.functional.pad(values, (0, flat.numel() - values.numel()))
            if key is None:
                safe_set_local_fp32_param(parameter, padded)
            else:
                safe_set_local_optimizer_state(parameter, padded, key)


def _ensure_moments(engine: Any) -> None:
    """Give the optimizer moments of zeros where no step has made any."""
    optimizer = engine.optimizer
    flats = _flat_masters(engine)
    if any("exp_avg" not in _base(engine).state[flat] for flat in flats):
        set_adam_state(_base(engine), flats, 0)
    if engine.zero_optimization_stage() < 3:
        # DeepSpeed links the moments of all groups in the first step, when only the first group has any.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _publish(engine: Any) -> None:
    """Copy the float32 weights to the weights that the model computes with, on all ranks."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        optimizer.update_lp_params()
        return
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    # Small parameters are kept whole on all ranks.
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _base(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed's wraps."""
    base: torch.optim.Optimizer = engine.optimizer.optimizer
    return base


def _flat_masters(engine: Any) -> list[Tensor]:
    """The flat float32 weights that the wrapped optimizer updates, one per group."""
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            flats: list[Tensor] = list(getattr(optimizer, name))
            return flats
    raise AssertionError(f"{type(optimizer).__name__} is no optimizer of DeepSpeed's ZeRO")
