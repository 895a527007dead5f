"""Quantization of frozen transformers to 8 bits: the linear layers of their blocks, which do most of the arithmetic."""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch
from torch import nn

from mvd_kernels import Int8Linear, bf16_instructions
from mvd_scale.errors import UserError
from mvd_scale.models.blocks import QKV, Attention, Block, Mlp

QuantizedPrecision = Literal["int8", "fp8"]

REFUSED: dict[QuantizedPrecision, str] = {
    "int8": "precision int8 is for CPUs; on GPUs use fp8 (Ada, Hopper or newer) or fp16",
    "fp8": "precision fp8 needs a GPU of the kind Ada, Hopper or newer; use fp16 (CPUs: int8)",
}
"""Error message for a device that does not support the precision, by precision."""


def quantize_linear_layers(
    model: nn.Module, kind: QuantizedPrecision, device: torch.device, rest: torch.dtype | None = None
) -> nn.Module:
    """Replace the linear layers of a frozen model's blocks by 8-bit ones.

    Args:
        model: an encoder of this project or of timm, on the CPU; it is modified in place.
        kind: `int8` for CPUs (by oneDNN), or `fp8` for GPUs from Ada and Hopper on (by torchao).
        device: the device that the model will run on.
        rest: dtype of all other weights; None: bf16, or float32 on CPUs without bf16 instructions, see
            `unquantized_precision`.

    Raises:
        UserError: the device does not support this precision, or torchao is not installed.
    """
    if rest is None:
        rest = torch.bfloat16 if unquantized_precision(kind, bf16=bf16_instructions()) == "bf16" else torch.float32
    if kind == "int8":
        if device.type != "cpu":
            raise UserError(REFUSED["int8"])
        _to_int8(model)
        return _cast(model, device, rest)
    if device.type != "cuda" or not has_fp8(device):
        raise UserError(REFUSED["fp8"])
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError as error:
        raise UserError("precision fp8 needs torchao: pip install torchao") from error
    for block in model.modules():
        if isinstance(block, Block):
            block.attn.qkv = _as_linear(block.attn.qkv)
    names = set(_linear_layers(model))
    model = _cast(model, device, rest)
    # torchao would tune all compiled programs of the process, which takes minutes, and before 0.18 compute float32
    # products of the process in TF32.
    granular = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    quantize_(model, granular, filter_fn=lambda _, name: name in names)
    return model


def _cast(model: nn.Module, device: torch.device, rest: torch.dtype) -> nn.Module:
    """Move a model to a device, and cast all but its tables of positions, as other precisions do."""
    named = [(part, name, table) for part in model.modules() for name, table in part.named_buffers(recurse=False)]
    model = model.to(device, rest)
    for part, name, table in named:
        if name == "positions":
            setattr(part, name, table.to(device))
    return model


def has_fp8(gpu: torch.device) -> bool:
    """Whether a GPU has tensor cores for fp8 (Ada, Hopper and later)."""
    return torch.cuda.get_device_capability(gpu) >= (8, 9)


def unquantized_precision(kind: QuantizedPrecision, *, bf16: bool) -> Literal["bf16", "fp32"]:
    """Return the precision of weights that are not quantized: bf16, or fp32 with int8 on a CPU without bf16.

    Args:
        kind: precision of the linear layers.
        bf16: whether the CPU has instructions for bf16.
    """
    return "bf16" if kind == "fp8" or bf16 else "fp32"


def quantizable_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights (out, in) that `quantize_linear_layers` would convert to 8 bits."""
    packed = [block.attn.qkv for block in model.modules() if isinstance(block, Block)]
    return [layer.weight for layer in (*packed, *_linear_layers(model).values())]  # type: ignore[misc]


def _to_int8(model: nn.Module) -> None:
    for block in model.modules():
        if isinstance(block, Block):
            qkv = _as_linear(block.attn.qkv)
            block.attn.qkv = Int8Linear(qkv.weight, qkv.bias)
            assert isinstance(block.mlp, Mlp)
            first, second = block.mlp.fc1, block.mlp.fc2
            assert isinstance(first, nn.Linear)
            assert isinstance(second, nn.Linear)
            block.mlp = nn.Sequential(
                Int8Linear(first.weight, first.bias, gelu=True), Int8Linear(second.weight, second.bias)
            )
    for name, linear in _linear_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Int8Linear(linear.weight, linear.bias))


def _as_linear(qkv: nn.Module) -> nn.Linear:
    assert isinstance(qkv, QKV)
    linear = nn.Linear(qkv.weight.shape[1], qkv.weight.shape[0], device="meta")
    linear.weight = nn.Parameter(qkv.weight.detach(), requires_grad=False)
    linear.bias = nn.Parameter(qkv.bias().detach(), requires_grad=False)
    return linear


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Find the linear layers of our and timm's standard attention and MLP modules, by name.

    Other modules of timm read the weights of their layers directly and would not work with replaced layers.
    """
    # A model of timm exists only where timm was imported.
    timm: Any = sys.modules.get("timm.layers")
    kinds = (Attention, Mlp, *((timm.Attention, timm.Mlp) if timm else ()))
    return {
        f"{path}.{name}": child
        for path, parent in model.named_modules()
        if isinstance(parent, kinds)
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    }
