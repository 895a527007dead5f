"""Precisions of models: their dtypes, the devices that support them, and casting of models for inference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mvd_scale.config.training import FrozenPrecision, Precision
from mvd_scale.errors import UserError
from mvd_scale.models.quantization import quantize_linear_layers

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of(precision: Precision) -> torch.dtype:
    """Return the dtype of weights in a precision."""
    return _DTYPES[precision]


def usual_precision(device: torch.device) -> Precision:
    """Return the default precision of inference: fp16 on GPUs, fp32 on CPUs."""
    return "fp16" if device.type == "cuda" else "fp32"


def refusal(precision: Precision, kind: str, gpu: str, *, bf16: bool) -> str:
    """Return the reason why a device does not support a precision; an empty string if it does.

    Args:
        precision: precision to check.
        kind: kind of the device, `cuda` or `cpu`.
        gpu: name of the GPU.
        bf16: whether the GPU supports bf16; not read for CPUs, which all do.
    """
    if precision == "fp16" and kind == "cpu":
        return "precision fp16 needs a GPU: on CPUs use bf16 or fp32"
    if precision == "bf16" and kind == "cuda" and not bf16:
        return f"{gpu} has no bf16: use fp16 or fp32"
    return ""


def check_precision(precision: Precision, device: torch.device) -> None:
    """Check that a device supports a precision.

    Raises:
        UserError: the precision is fp16 on a CPU, or bf16 on a GPU without it.
    """
    on_gpu = device.type == "cuda"
    gpu = torch.cuda.get_device_name(device) if on_gpu else ""
    if reason := refusal(precision, device.type, gpu, bf16=not on_gpu or torch.cuda.is_bf16_supported()):
        raise UserError(reason)


def cast_frozen(
    model: nn.Module, precision: FrozenPrecision, device: torch.device, rest: Precision | None = None
) -> nn.Module:
    """Move an unsharded model for inference to its device and precision.

    Args:
        model: model on the CPU; it is modified in place.
        precision: precision of weights and arithmetic.
        device: device that the model will run on.
        rest: for an 8-bit `precision`, precision of the layers that are not quantized; None for the device's default,
            see `quantize_linear_layers`.

    Raises:
        UserError: the device does not support the precision, or weights are not finite.
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
    """Move a layer's parameters to a device and precision, except those that ZeRO-3 has sharded already.

    Returns:
        names of the parameters with values that are not finite.
    """
    faults = []
    for name, parameter in layer.named_parameters():
        if hasattr(parameter, "ds_tensor"):
            continue
        if not torch.isfinite(parameter).all():
            faults.append(name)
        # A copy even if nothing changes: the parameter may be a view of a memory-mapped file.
        parameter.data = parameter.data.to(device, _DTYPES[precision], copy=True)
    return faults


def refuse_not_finite(names: Sequence[str]) -> None:
    """Raise an error if parameters with values that are not finite were found.

    Args:
        names: names of such parameters.

    Raises:
        UserError: `names` is not empty; the message contains all of them.
    """
    if names:
        raise UserError("weights are not finite:\n  " + "\n  ".join(names))
