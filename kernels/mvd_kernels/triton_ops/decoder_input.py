"""`decoder_input` as a Triton kernel: one program per token of the result, one launch per decoder.

Legend: B clips of a decoder, N tokens, P class tokens, V visible, M masked, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvd_kernels.triton_ops.launch import Launch, block, rows, warps


@triton.jit
def decoder_input_kernel(
    embedded,  # (B, P + V, D)
    mask_token,  # (D,)
    positions,  # (N, D)
    visible,  # int64 (B, V)
    masked,  # int64 (B, M)
    tokens,  # (B, P + V + M, D)
    e_clip,
    e_token,
    p_token,
    v_clip,
    v_place,
    m_clip,
    m_place,
    class_tokens,
    seen,
    hidden,
    width,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    count = class_tokens + seen + hidden
    clip, place = program // count, program % count
    channel = tl.arange(0, BLOCK)
    inside = channel < width
    # Masked-out loads do not access memory: a program reads one row and at most one position.
    is_hidden = place >= class_tokens + seen
    is_seen = (place >= class_tokens) & (place < class_tokens + seen)
    known = tl.load(embedded + clip * e_clip + place * e_token + channel, mask=inside & (place < class_tokens + seen))
    guess = tl.load(mask_token + channel, mask=inside & is_hidden)
    base = tl.where(is_hidden, guess.to(tokens.dtype.element_ty), known)
    seen_at = tl.load(visible + clip * v_clip + (place - class_tokens) * v_place, mask=is_seen, other=0)
    hidden_at = tl.load(masked + clip * m_clip + (place - class_tokens - seen) * m_place, mask=is_hidden, other=0)
    table_row = tl.where(is_hidden, hidden_at, seen_at)
    position = tl.load(positions + table_row * p_token + channel, mask=inside & (is_seen | is_hidden), other=0)
    position = position.to(tokens.dtype.element_ty)
    value = base.to(tl.float32) + position.to(tl.float32)
    tl.store(tokens + program * width + channel, value.to(tokens.dtype.element_ty), mask=inside)


def launch(
    embedded: Tensor, mask_token: Tensor, positions: Tensor, visible: Tensor, masked: Tensor, tokens: Tensor
) -> Launch:
    """Make the launch that writes the input of one decoder to `tokens` (B, P + V + M, D)."""
    width = embedded.shape[-1]
    arguments = {
        "embedded": embedded,
        "mask_token": mask_token,
        "positions": positions,
        "visible": visible,
        "masked": masked,
        "tokens": tokens,
        "e_clip": embedded.stride(0),
        "e_token": embedded.stride(1),
        "p_token": positions.stride(0),
        "v_clip": visible.stride(0),
        "v_place": visible.stride(1),
        "m_clip": masked.stride(0),
        "m_place": masked.stride(1),
        "class_tokens": embedded.shape[1] - visible.shape[1],
        "seen": visible.shape[1],
        "hidden": masked.shape[1],
        "width": width,
    }
    constants = {"BLOCK": block(width)}
    return Launch(decoder_input_kernel, tokens.shape[0] * tokens.shape[1], arguments, constants, warps(width))


@torch.library.custom_op("mvd_kernels::decoder_input", mutates_args=())
def decoder_input(embedded: Tensor, mask_token: Tensor, positions: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
    """See `mvd_kernels.decoder_input`."""
    tokens = _allocate(embedded, mask_token, positions, visible, masked)
    table = rows(positions)
    parts = (tensor.chunk(len(mask_token)) for tensor in (rows(embedded), mask_token, tokens))
    for given, guess, result in zip(*parts, strict=True):
        launch(given, guess.flatten(), table, visible, masked, result).run()
    return tokens


@decoder_input.register_fake
def _allocate(embedded: Tensor, mask_token: Tensor, positions: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
    clips, known, width = embedded.shape
    return embedded.new_empty(clips, known + masked.shape[1], width)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    embedded, mask_token = inputs[:2]
    ctx.known, ctx.decoders, ctx.dtype = embedded.shape[1], len(mask_token), mask_token.dtype


def _differentiate(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    # Positions are added, so the gradient of `embedded` is the first P + V tokens of `upstream`; no kernel is needed.
    guesses = upstream[:, ctx.known :].unflatten(0, (ctx.decoders, -1))
    mask_token = guesses.sum((1, 2), dtype=torch.float32).to(ctx.dtype).unsqueeze(1)
    return upstream[:, : ctx.known], mask_token, None, None, None


decoder_input.register_autograd(_differentiate, setup_context=_save)
