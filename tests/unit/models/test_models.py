"""Encoder, decoder and student against computations written out by hand."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from mvd_scale.config import DecoderConfig, ModelConfig
from mvd_scale.config.training import Checkpointing
from mvd_scale.models import Classifier, Decoder, Encoder, Student
from mvd_scale.models.blocks import set_gradient_checkpointing
from mvd_scale.models.positions import position_table

SHAPE = ModelConfig(width=48, depth=2, heads=3, frames=4, input_size=48)
DECODER = DecoderConfig(width=32, depth=2, heads=2)


@pytest.fixture
def clip() -> torch.Tensor:
    return torch.randint(0, 256, (2, 4, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.stack([torch.randperm(18, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    return order[:, :5].sort().values, order[:, 5:].sort().values


def test_the_encoder_sees_only_the_chosen_tubes(clip: torch.Tensor, tokens: tuple[torch.Tensor, torch.Tensor]) -> None:
    encoder, (visible, masked) = Encoder(SHAPE), tokens
    encoded = encoder(clip, visible)
    assert encoded.shape == (2, 5, 48)
    changed = clip.clone()
    for row, hidden in enumerate(masked.tolist()):
        for token in hidden:
            t, h, w = token // 9, token // 3 % 3, token % 3
            changed[row, 2 * t : 2 * t + 2, 16 * h : 16 * h + 16, 16 * w : 16 * w + 16] = 0
    assert torch.equal(encoder(changed, visible), encoded)
    seen = visible[0, 0].item()
    changed[0, 2 * (seen // 9), 16 * (seen // 3 % 3), 16 * (seen % 3)] ^= 255
    assert not torch.equal(encoder(changed, visible)[0], encoded[0])


def test_all_tokens_in_order_are_the_default(clip: torch.Tensor) -> None:
    encoder = Encoder(SHAPE)
    everything = torch.arange(18).expand(2, -1)
    torch.testing.assert_close(encoder(clip), encoder(clip, everything))


def test_tubes_are_embedded_as_by_a_three_dimensional_convolution(clip: torch.Tensor) -> None:
    encoder = Encoder(SHAPE, final_norm=False)
    encoder.blocks = type(encoder.blocks)(48, 0, 3)
    weight = encoder.patch_embed.weight.view(48, 2, 16, 16, 3).movedim(-1, 1)
    pixels = clip.permute(0, 4, 1, 2, 3).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in (encoder.mean, encoder.std))
    convolved = torch.nn.functional.conv3d((pixels - mean) / std, weight, encoder.patch_embed.bias, stride=(2, 16, 16))
    expected = convolved.flatten(2).transpose(1, 2) + encoder.positions
    torch.testing.assert_close(encoder(clip), expected, atol=1e-5, rtol=1e-5)


def test_a_class_token_comes_first() -> None:
    image = ModelConfig(
        width=48, depth=1, heads=3, frames=1, tubelet=1, input_size=32, positions="sincos2d", class_token=True
    )
    encoder = Encoder(image)
    assert encoder(torch.zeros(2, 1, 32, 32, 3, dtype=torch.uint8)).shape == (2, 5, 48)
    decoder = Decoder(DECODER, image, 7)
    predicted = decoder(torch.randn(2, 3, 48), torch.tensor([[0, 2]] * 2), torch.tensor([[1, 3]] * 2))
    assert predicted.shape == (2, 2, 7)


def test_predictions_follow_the_order_of_the_masked_tokens(tokens: tuple[torch.Tensor, torch.Tensor]) -> None:
    decoder, (visible, masked) = Decoder(DECODER, SHAPE, 7), tokens
    encoded = torch.randn(2, 5, 48)
    forth, back = decoder(encoded, visible, masked), decoder(encoded, visible, masked.flip(1))
    torch.testing.assert_close(forth, back.flip(1), atol=1e-5, rtol=1e-5)


def test_targets_have_decoders_of_their_own(clip: torch.Tensor, tokens: tuple[torch.Tensor, torch.Tensor]) -> None:
    student = Student(SHAPE, {"image": (DECODER, 7), "video": (DECODER, 9)})
    predictions = student(clip, *tokens)
    assert {name: p.shape for name, p in predictions.items()} == {"image": (2, 13, 7), "video": (2, 13, 9)}
    predictions["image"].sum().backward()
    assert student.decoders["video"].head.weight.grad is None
    assert student.encoder.patch_embed.weight.grad is not None


def test_gradient_checkpointing_changes_no_gradient(
    clip: torch.Tensor, tokens: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Gradients are equal to the last bit, also with stochastic depth."""
    gradients, states = [], []
    for checkpointing in get_args(Checkpointing):
        torch.manual_seed(0)
        student = Student(SHAPE.model_copy(update={"drop_path": 0.5}), {"video": (DECODER, 9)})
        set_gradient_checkpointing(student, checkpointing)
        torch.manual_seed(1)
        student(clip, *tokens)["video"].square().sum().backward()
        gradients.append([p.grad for p in student.parameters()])
        states.append(torch.get_rng_state())
    for again, state in zip(gradients[1:], states[1:], strict=True):
        torch.testing.assert_close(again, gradients[0], rtol=0, atol=0)
        assert torch.equal(state, states[0])


def test_the_classifier_pools_all_tokens(clip: torch.Tensor) -> None:
    classifier = Classifier(SHAPE, classes=11)
    expected = classifier.head(classifier.norm(classifier.encoder(clip).mean(1)))
    torch.testing.assert_close(classifier(clip), expected)
    assert classifier.encoder.norm is None


@pytest.mark.parametrize("kind", ["sincos3d", "sinusoid", "sincos2d"])
def test_positions_tell_tokens_apart(kind: str) -> None:
    table = position_table(kind, (1 if kind == "sincos2d" else 2, 3, 3), 48)  # type: ignore[arg-type]
    assert torch.cdist(table, table).fill_diagonal_(1).min() > 1e-3


def test_three_dimensional_positions_spend_a_quarter_on_time() -> None:
    table = position_table("sincos3d", (2, 3, 3), 48).view(2, 9, 48)
    assert torch.equal(table[0, :, 12:], table[1, :, 12:])
    assert (table[:, :1, :12] == table[:, :, :12]).all()
