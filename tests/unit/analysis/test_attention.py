"""Attention beside the forward pass: that of the block itself, and the rollout that can be computed by hand."""

from __future__ import annotations

import pytest
import torch

from mvd_scale.analysis.attention import look, mean_attention
from mvd_scale.config import ModelConfig
from mvd_scale.models import Encoder, blocks
from mvd_scale.models.blocks import Attention

IMAGE = ModelConfig(
    width=32, depth=2, heads=2, frames=1, tubelet=1, input_size=48, positions="sincos2d", class_token=True
)
VIDEO = ModelConfig(width=32, depth=3, heads=2, frames=4, input_size=32)
ROTARY = ModelConfig(width=32, depth=3, heads=2, frames=4, input_size=32, positions="rotary_vjepa2")


def clips(model: ModelConfig, count: int) -> torch.Tensor:
    side = model.input_size
    return torch.randint(
        0, 256, (count, model.frames, side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@torch.no_grad()
def test_the_scores_are_those_that_the_block_uses() -> None:
    attention, tokens = Attention(32, 1), torch.randn(2, 7, 32)
    torch.nn.init.normal_(attention.qkv.q_bias)
    scores = mean_attention(attention, tokens)
    torch.testing.assert_close(scores.sum(-1), torch.ones(2, 7))
    value = attention.qkv(tokens)[..., 64:]
    torch.testing.assert_close(attention.proj(scores @ value), attention(tokens), atol=1e-5, rtol=1e-5)
    # Angles that differ by token, so that they change the scores.
    angles = torch.linspace(0, 3, 7)[:, None].expand(7, 32)
    rotation = torch.stack([angles.cos(), angles.sin()])
    turned = mean_attention(attention, tokens, rotation)
    assert not torch.allclose(turned, scores, atol=1e-3)
    expected = attention(tokens, rotation=rotation)
    torch.testing.assert_close(attention.proj(turned @ value), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_heads_are_averaged() -> None:
    attention, tokens = Attention(32, 2), torch.randn(1, 7, 32)
    query, key, _ = attention.qkv(tokens).chunk(3, -1)
    heads = [torch.softmax(query[..., part] @ key[..., part].mT / 4, -1) for part in (slice(0, 16), slice(16, 32))]
    torch.testing.assert_close(mean_attention(attention, tokens), sum(heads) / 2)


@pytest.mark.parametrize("model", [IMAGE, VIDEO, ROTARY])
def test_rollout_of_uniform_attention_is_that_computed_by_hand(model: ModelConfig) -> None:
    encoder = Encoder(model, final_norm=False).eval()
    for block in encoder.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)
    seen = look(encoder, clips(model, 2))
    slices, rows, columns = model.grid
    patches = slices * rows * columns
    tokens = patches + int(model.class_token)
    torch.testing.assert_close(seen.last, torch.full((2, patches), 1 / tokens))
    # (A + I) / 2, applied L times: A (1 - 2 ** -L) + I 2 ** -L, as A is uniform. The class token sees no patch by I;
    # averaged over all tokens, I gives every patch 1 / N.
    share = 1 - 2.0**-model.depth if model.class_token else 1
    torch.testing.assert_close(seen.rollout, torch.full((2, patches), share / tokens))


@torch.no_grad()
def test_later_blocks_read_what_earlier_blocks_have_mixed() -> None:
    encoder, pixels = Encoder(VIDEO, final_norm=False).eval(), clips(VIDEO, 2)
    for block in encoder.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight)
    seen = look(encoder, pixels)
    tokens = encoder.patch_embed(encoder.patchify.rows(pixels)) + encoder.positions
    mixed = torch.eye(tokens.shape[1])
    for block in encoder.blocks:
        scores = mean_attention(block.attn, block.norm1(tokens))
        mixed = (scores / 2 + torch.eye(tokens.shape[1]) / 2) @ mixed
        tokens = block(tokens)
    torch.testing.assert_close(seen.features, tokens)
    torch.testing.assert_close(seen.last, scores.mean(1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen.rollout, mixed.mean(1), atol=1e-5, rtol=1e-4)
    # What all tokens attend to, not what a token attends to, which would be the same for all.
    torch.testing.assert_close(seen.last.sum(1), torch.ones(2))
    assert seen.last.std() > 0.01


def test_sequences_in_chunks_are_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, images = Encoder(IMAGE, final_norm=False).eval(), clips(IMAGE, 5)
    alone = [look(encoder, image.unsqueeze(0)) for image in images]
    monkeypatch.setattr(blocks, "_CACHED_TOKENS", 20)
    together = look(encoder, images)
    for name in ("features", "last", "rollout"):
        expected = torch.cat([getattr(each, name) for each in alone])
        torch.testing.assert_close(getattr(together, name), expected, atol=1e-5, rtol=1e-5)
    assert together.features.shape == (5, 9, 32)
    assert not any(block.attn._forward_pre_hooks for block in encoder.blocks)
