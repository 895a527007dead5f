"""Stochastic depth of encoder and decoders: rates per block, independent draws, the same when recomputed."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvd_scale.config import DecoderConfig, ModelConfig, list_recipes, load_recipe
from mvd_scale.config.training import Checkpointing
from mvd_scale.models import Decoder, Encoder, Student
from mvd_scale.models.blocks import Blocks, set_gradient_checkpointing
from mvd_scale.models.layers.drop_path import DropPath

SHAPE = ModelConfig(width=48, depth=1, heads=3, frames=4, input_size=64)
DISTILLED = [name for name in list_recipes() if name.startswith("distill/")]
PRETRAINED = [name for name in list_recipes() if name.startswith("pretrain/")]


def rates(blocks: Blocks) -> list[float]:
    return [block.drop_path.drop_prob if isinstance(block.drop_path, DropPath) else 0.0 for block in blocks]


def stacks(name: str) -> list[Blocks]:
    """Blocks of the encoder and of all decoders of a recipe."""
    recipe = load_recipe(name)
    with torch.device("meta"):
        decoders = [
            Decoder(target.decoder, recipe.model, 1) for target in recipe.targets.values() if target.decoder is not None
        ]
        return [Encoder(recipe.model).blocks, *(decoder.blocks for decoder in decoders)]


@pytest.mark.parametrize("name", DISTILLED)
def test_rates_rise_from_0_over_the_blocks_of_each_stack(name: str) -> None:
    last = 0.2 if "/h_from" in name else 0.1
    encoder, *decoders = stacks(name)
    depth = {"s": 2, "b": 2, "l": 4, "h": 8}[name.removeprefix("distill/")[0]]
    assert [len(stack) for stack in decoders] == [depth, depth]
    for stack in (encoder, *decoders):
        assert rates(stack) == pytest.approx(torch.linspace(0, last, len(stack)).tolist())


@pytest.mark.parametrize("name", PRETRAINED)
def test_stage_1_drops_nothing(name: str) -> None:
    assert {rate for stack in stacks(name) for rate in rates(stack)} == {0.0}


@pytest.mark.parametrize(("own", "expected"), [(None, [0.0, 0.2, 0.4]), (0.0, [0.0] * 3), (0.1, [0.0, 0.05, 0.1])])
def test_a_decoder_may_have_a_rate_of_its_own(own: float | None, expected: list[float]) -> None:
    decoder = Decoder(DecoderConfig(width=32, depth=3, heads=2, drop_path=own), with_rate(0.4), 5)
    assert rates(decoder.blocks) == pytest.approx(expected)


def with_rate(drop_path: float) -> ModelConfig:
    return SHAPE.model_copy(update={"drop_path": drop_path})


def two_decoders(drop_path: float = 0.5) -> Student:
    torch.manual_seed(0)
    decoder = DecoderConfig(width=32, depth=2, heads=2)
    return Student(with_rate(drop_path), {"image": (decoder, 7), "video": (decoder, 7)})


def clips(count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    # The same clip and mask throughout, so that predictions differ by what was dropped only.
    pixels = torch.randint(0, 256, (1, 4, 64, 64, 3), dtype=torch.uint8, generator=generator)
    order = torch.randperm(32, generator=generator)
    parts = (pixels, order[None, :5].sort().values, order[None, 5:].sort().values)
    return tuple(part.repeat(count, *[1] * (part.dim() - 1)) for part in parts)  # type: ignore[return-value]


@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "as one batch"])
def test_each_decoder_draws_for_each_clip(batched: bool) -> None:
    """The last block drops its two updates or not: four results, of which a clip gets one, whatever the other gets."""
    student = two_decoders()
    if batched:
        student.batch_decoders()
    with torch.no_grad():
        predicted = student(*clips(256))
    cases = {name: case_of_each(values) for name, values in predicted.items()}
    assert all(len(set(drawn.tolist())) == 4 for drawn in cases.values())
    for drawn in cases.values():
        assert all(0.15 < (drawn == case).float().mean() < 0.35 for case in drawn.unique())
    # Of 16 pairs each is drawn: the decoders do not drop the updates of the same clips.
    pairs = set(zip(cases["image"].tolist(), cases["video"].tolist(), strict=True))
    assert len(pairs) == 16


def case_of_each(predicted: Tensor) -> Tensor:
    """Number of the result that each clip got, of all different results: (B,)."""
    # In float32 the same computation of another clip of the batch may differ in the last bits.
    figures: Tensor = predicted.flatten(1)[:, :16].mul(100).round().unique(dim=0, return_inverse=True)[1]
    return figures


@pytest.mark.parametrize("checkpointing", get_args(Checkpointing))
@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "as one batch"])
def test_recomputed_blocks_drop_the_same(batched: bool, checkpointing: Checkpointing) -> None:
    results = []
    for again in ("none", checkpointing):
        student = two_decoders()
        if batched:
            student.batch_decoders()
        set_gradient_checkpointing(student, again)  # type: ignore[arg-type]
        torch.manual_seed(3)
        sum(predicted.square().sum() for predicted in student(*clips(16)).values()).backward()
        results.append([parameter.grad for parameter in student.parameters()])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_updates_are_dropped_by_clip_and_their_mean_and_gradient_are_kept() -> None:
    torch.manual_seed(0)
    path = DropPath(0.25)
    updates = torch.ones(4000, 3, 2, requires_grad=True)
    seen = path(updates)
    assert set(seen.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (seen == seen[:, :1, :1]).all()
    assert abs(seen.mean() - 1) < 0.05
    seen.sum().backward()
    assert torch.equal(updates.grad, seen)  # type: ignore[arg-type]
    assert path.eval()(updates) is updates


def test_a_last_layer_is_not_computed_again_because_of_dropped_updates() -> None:
    calls: list[str] = []
    layers = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    for name, layer in layers.named_children():
        layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    layers.append(DropPath(0.5))
    checkpoint(layers, torch.randn(2, 3, 4, requires_grad=True), use_reentrant=False).sum().backward()
    # Forward, and again up to the input of the last layer, which stops it there.
    assert calls == ["0", "1", "2", "0", "1"]


def test_dropped_updates_keep_no_memory_for_the_backward_pass() -> None:
    kept = {}
    for rate in (0.0, 0.5):
        kept[rate] = 0

        def count(tensor: Tensor, rate: float = rate) -> Tensor:
            kept[rate] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            Blocks(32, 3, 2, drop_path=rate)(torch.randn(2, 12, 32))
    assert kept[0.5] == kept[0.0] > 0
