"""Blocks that compute only some output tokens give the same values for them as for all tokens."""

from typing import get_args

import pytest
import torch

from mvd_scale.config import DecoderConfig, ModelConfig
from mvd_scale.config.training import Checkpointing
from mvd_scale.models import Decoder, Encoder, blocks
from mvd_scale.models.blocks import Blocks, select_output_tokens

MODEL = {"width": 48, "depth": 2, "heads": 3, "frames": 4, "input_size": 32}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_the_last_block_keeps_tokens_or_the_last_so_many() -> None:
    blocks, tokens = Blocks(48, 2, 3), torch.randn(2, 9, 48)
    chosen = torch.tensor([[0, 3, 8], [1, 2, 3]])
    for output_tokens in (chosen, 4, None):
        torch.testing.assert_close(blocks(tokens, output_tokens), select_output_tokens(blocks(tokens), output_tokens))


@pytest.mark.parametrize("output_tokens", [None, 4, torch.arange(15).view(5, 3)])
def test_frozen_blocks_take_some_sequences_at_a_time(
    monkeypatch: pytest.MonkeyPatch, output_tokens: torch.Tensor | int | None
) -> None:
    output_tokens = output_tokens % 9 if isinstance(output_tokens, torch.Tensor) else output_tokens
    stack, tokens, seen = Blocks(48, 2, 3), torch.randn(5, 9, 48), []
    expected = stack(tokens, output_tokens)
    monkeypatch.setattr(blocks, "_CACHED_TOKENS", 2 * 9)
    stack[0].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with torch.no_grad():
        torch.testing.assert_close(stack(tokens, output_tokens), expected)
        assert seen == [2, 2, 1]
        # As a rank whose weights are gathered at every call, which all ranks must do as often.
        stack[0].mlp.fc1.weight.ds_id = 0
        stack(tokens, output_tokens)
    assert seen[3:] == [5]


@pytest.mark.parametrize("class_token", [False, True])
def test_an_encoder_gives_the_features_that_are_wanted(class_token: bool) -> None:
    config = ModelConfig.model_validate({**MODEL, "class_token": class_token})
    encoder = Encoder(config, final_norm=False).eval()
    pixels = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    wanted = torch.tensor([[1, 5, 7], [0, 2, 6]])
    whole = encoder(pixels)[:, int(class_token) :]
    torch.testing.assert_close(encoder(pixels, output_tokens=wanted), select_output_tokens(whole, wanted))


def test_gradients_by_any_checkpointing_are_those_of_the_whole() -> None:
    config = ModelConfig.model_validate(MODEL)
    decoder = Decoder(DecoderConfig(width=48, depth=2, heads=3), config, 5)
    encoded = torch.randn(2, 3, 48)
    visible, masked = torch.tensor([[0, 1, 2]] * 2), torch.tensor([[3, 4, 5, 6, 7]] * 2)
    gradients = []
    for checkpointing in get_args(Checkpointing):
        decoder.blocks.gradient_checkpointing = checkpointing
        decoder.zero_grad()
        decoder(encoded, visible, masked).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in decoder.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(list(decoder.parameters()))
    for plain, *again in zip(*gradients, strict=True):
        assert all(torch.equal(plain, gradient) for gradient in again)
