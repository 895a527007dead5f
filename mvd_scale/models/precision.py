"""Precisions of models: their dtypes, the devices that compute them, and the casting of models that are not trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mvd_scale.config.training import FrozenPrecision, Precision
from mvd_scale.errors import UserError
from mvd_scale.models.quantization import quantize_linear_layers

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of(precision: Precision) -> torch.dtype:
    """The dtype of weights in a precision."""
    return _DTYPES[precision]


def usual_precision(device: torch.device) -> Precision:
    """The precision of inference where none is asked for."""
    return "fp16" if device.type == "cuda" else "fp32"


def refusal(precision: Precision, kind: str, gpu: str, *, bf16: bool) -> str:
    """Why a device does not compute a precision; empty where it does.

    Args:
        precision: of 16 or 32 bits.
        kind: of the device, `cuda` or `cpu`.
        gpu: its name.
        bf16: whether a GPU computes bf16; every CPU does.
    """
    if precision == "fp16" and kind == "cpu":
        return "precision fp16 needs a GPU: on CPUs use bf16 or fp32"
    if precision == "bf16" and kind == "cuda" and not bf16:
        return f"{gpu} has no bf16: use fp16 or fp32"
    return ""


def check_precision(precision: Precision, device: torch.device) -> None:
    """Refuse a precision that the device cannot compute.

    Raises:
        UserError: fp16 on a CPU, bf16 on a GPU without it.
    """
    on_gpu = device.type == "cuda"
    gpu = torch.cuda.get_device_name(device) if on_gpu else ""
    if reason := refusal(precision, device.type, gpu, bf16=not on_gpu or torch.cuda.is_bf16_supported()):
        raise UserError(reason)


def cast_frozen(
    model: nn.Module, precision: FrozenPrecision, device: torch.device, rest: Precision | None = None
) -> nn.Module:
    """Bring a whole model that is not trained to its device and precision.

    Args:
        model: on the CPU.
        precision: of its weights and arithmetic.
        device: where it will run.
        rest: precision of the layers that are not in 8 bits, where `precision` is of 8 bits; the device's if None.

    Raises:
        UserError: the device lacks the precision, or weights are not finite.
    """
    model = model.eval().requires_grad_(False)
    if precision == "int8" or precision == "fp8":
        refuse_not_finite(cast_parameters(model, "fp32", torch.device("cpu")))
        dtype = None if rest is None else dtype_of(rest)
        return quantize_linear_layers(model, precision, device, dtype).requires_grad_(False)
    check_precision(precision, device)
    refuse_not_finite(cast_parameters(model, precision, device))
    return model.to(device)


def cast_parameters(layer: nn.Module, precision: Precision, device: torch.device) -> list[str]:
    """Bring a layer's parameters, but those that ZeRO-3 has cut, to the device and precision.

    Returns:
        names of the parameters that are not finite.
    """
    faults = []
    for name, parameter in layer.named_parameters():
        if hasattr(parameter, "ds_tensor"):
            continue
        if not torch.isfinite(parameter).all():
            faults.append(name)
        # A copy of its own: a view would keep the file mapped.
        parameter.data = parameter.data.to(device, _DTYPES[precision], copy=True)
    return faults


def refuse_not_finite(names: Sequence[str]) -> None:
    """Refuse a model if any of its parameters are not finite.

    Raises:
        UserError: naming all of them.
    """
    if names:
        raise UserError("weights are not finite:\n  " + "\n  ".join(names))
