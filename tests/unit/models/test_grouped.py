"""Decoders of one shape in one batched pass predict what they predict in turn, with the same gradients."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mvd_scale.config import DecoderConfig, ModelConfig
from mvd_scale.config.training import Checkpointing
from mvd_scale.models import Student
from mvd_scale.models.blocks import set_gradient_checkpointing

SHAPE = ModelConfig(width=48, depth=1, heads=3, frames=4, input_size=64, positions="sincos3d", drop_path=0.0)
DECODER = DecoderConfig(width=32, depth=2, heads=2)
SHALLOW = DECODER.model_copy(update={"depth": 1})
CLIPS, VISIBLE = 3, 5


def student(decoder: DecoderConfig = DECODER, model: ModelConfig = SHAPE, **others: DecoderConfig) -> Student:
    heads: dict[str, Any] = {"image": (decoder, 7), "video": (decoder, 9)}
    torch.manual_seed(0)
    made = Student(model, heads | {name: (shape, 5) for name, shape in others.items()})
    # So that no two biases, norms and tokens are alike.
    for parameter in made.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return made


@pytest.fixture
def clips() -> tuple[Tensor, Tensor, Tensor]:
    pixels = torch.randint(0, 256, (CLIPS, 4, 64, 64, 3), dtype=torch.uint8)
    order = torch.rand(CLIPS, 32).argsort(1)
    return pixels, order[:, :VISIBLE].sort(1).values, order[:, VISIBLE:].sort(1).values


def learnt(model: Student, clips: tuple[Tensor, Tensor, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    predictions = model(*clips)
    sum((place + 1) * predictions[name].square().mean() for place, name in enumerate(sorted(predictions))).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert None not in gradients.values()
    return {name: predicted.detach() for name, predicted in predictions.items()}, gradients  # type: ignore[return-value]


@pytest.mark.parametrize("checkpointing", get_args(Checkpointing))
@pytest.mark.parametrize(
    ("case", "groups"),
    [
        ({}, [["image", "video"]]),
        ({"decoder": DECODER.model_copy(update={"embed_bias": False})}, [["image", "video"]]),
        ({"pixels": DECODER, "small": SHALLOW}, [["image", "video", "pixels"]]),
        ({"pixels": SHALLOW, "small": SHALLOW}, [["image", "video"], ["pixels", "small"]]),
    ],
)
def test_predictions_and_gradients_are_those_of_each_in_turn(
    case: dict[str, Any], groups: list[list[str]], checkpointing: Checkpointing, clips: tuple[Tensor, Tensor, Tensor]
) -> None:
    apart, together = student(**case), student(**case)
    together.batch_decoders()
    assert [list(dict(group.decoders)) for group in together.grouped_decoders] == groups  # type: ignore[arg-type]
    called: list[str] = []
    for model in (apart, together):
        set_gradient_checkpointing(model, checkpointing)
        for name, decoder in model.decoders.items():
            decoder.register_forward_hook(lambda *_, name=name: called.append(name))
    expected = learnt(apart, clips)
    called.clear()
    torch.testing.assert_close(learnt(together, clips), expected, rtol=1e-4, atol=1e-5)
    assert called == [name for name in together.decoders if not any(name in group for group in groups)]
    stacks = [group.blocks for group in together.grouped_decoders]
    assert [stack.gradient_checkpointing for stack in stacks] == [checkpointing] * len(groups)  # type: ignore[union-attr]


def test_a_class_token_is_seen_by_all(clips: tuple[Tensor, Tensor, Tensor]) -> None:
    model = student(model=SHAPE.model_copy(update={"class_token": True}))
    expected = model(*clips)
    model.batch_decoders()
    torch.testing.assert_close(model(*clips), expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_lost_without_gradients(clips: tuple[Tensor, Tensor, Tensor], monkeypatch: Any) -> None:
    """CPUs then take some clips at a time, which may not cut through those of a decoder."""
    monkeypatch.setattr("mvd_scale.models.blocks._CACHED_TOKENS", 40)
    model = student()
    with torch.no_grad():
        expected = model(*clips)
        model.batch_decoders()
        torch.testing.assert_close(model(*clips), expected, rtol=1e-4, atol=1e-5)


def test_the_student_has_the_parameters_that_it_had() -> None:
    model = student()
    before, names = model.state_dict(), [name for name, _ in model.named_parameters()]
    model.batch_decoders()
    assert [name for name, _ in model.named_parameters()] == names
    assert model.state_dict().keys() == before.keys()


def test_decoders_of_different_shapes_stay_apart(clips: tuple[Tensor, Tensor, Tensor]) -> None:
    shapes: dict[str, Any] = {"image": (DECODER, 7), "video": (DECODER.model_copy(update={"heads": 4}), 9)}
    model = Student(SHAPE, shapes)
    assert model.groups_by_shape() == []
    model.batch_decoders()
    assert model(*clips).keys() == {"image", "video"}
    assert len(model.grouped_decoders) == 0
