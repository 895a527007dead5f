"""Common parts of mask tokens are computed once for all clips: the same predictions and gradients as for each."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from mvd_scale.config.training import Checkpointing
from mvd_scale.models import Student
from mvd_scale.models.blocks import Block, set_gradient_checkpointing
from mvd_scale.models.layers.shared_rows import MaskPlaces, spread_rows

from .test_grouped import SHALLOW, SHAPE, learnt, student

CLIPS, VISIBLE, POSITIONS = 3, 5, 32
MASKED = torch.tensor([[0, 2, 3], [1, 2, 3]])


def clips(count: int = CLIPS) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    pixels = torch.randint(0, 256, (count, 4, 64, 64, 3), dtype=torch.uint8)
    order = torch.rand(count, POSITIONS).argsort(1)
    return pixels, order[:, :VISIBLE].sort(1).values, order[:, VISIBLE:].sort(1).values


def projected(model: nn.Module) -> list[int]:
    """Record the rows that the first norm of each block of a decoder normalises."""
    rows: list[int] = []
    for name, module in model.named_modules():
        if name.startswith(("decoders", "grouped_decoders")) and name.endswith("norm1"):
            module.register_forward_hook(lambda *call: rows.append(call[2].shape[:-1].numel()))
    return rows


def test_every_clip_gets_its_rows_and_a_shared_row_the_sum_of_their_gradients() -> None:
    """Two clips of one own token, four positions, two decoders; rows are told by their numbers."""
    rows = torch.arange(12.0).view(2, 6, 1).requires_grad_()
    spread = spread_rows(rows, MaskPlaces(MASKED, 4))
    assert spread[..., 0].tolist() == [[0, 2, 4, 5], [1, 3, 4, 5], [6, 8, 10, 11], [7, 9, 10, 11]]
    upstream = torch.tensor([[1.0, 10, 20, 30], [2, 40, 50, 60], [3, 1, 2, 3], [4, 5, 6, 7]])
    (gradient,) = torch.autograd.grad(spread, rows, upstream.unsqueeze(-1))
    assert gradient[..., 0].tolist() == [[1, 2, 10, 40, 70, 90], [3, 4, 1, 5, 8, 10]]


def test_gradients_of_many_clips_are_summed_in_float32() -> None:
    """300 ones in bfloat16 end at 256 if each is added in that precision."""
    rows = torch.zeros(1, 301, 1, dtype=torch.bfloat16, requires_grad=True)
    spread = spread_rows(rows, MaskPlaces(torch.zeros(300, 1, dtype=torch.int64), 1))
    (gradient,) = torch.autograd.grad(spread, rows, torch.ones_like(spread))
    assert gradient[0, -1].item() == 300


def test_gradients_are_those_of_plain_indexing() -> None:
    rows = torch.randn(2, 8, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda given: spread_rows(given, MaskPlaces(MASKED, 4)), rows)


@pytest.mark.parametrize("checkpointing", get_args(Checkpointing))
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("class_token", [False, True])
def test_predictions_and_gradients_are_those_of_tokens_of_each_clip(
    monkeypatch: pytest.MonkeyPatch, checkpointing: Checkpointing, batched: bool, class_token: bool
) -> None:
    """Also in a decoder of one block, which is its first and its last."""

    def made() -> Student:
        model = student(model=SHAPE.model_copy(update={"class_token": class_token}), small=SHALLOW)
        if batched:
            model.batch_decoders()
        set_gradient_checkpointing(model, checkpointing)
        return model

    shared = learnt(made(), clips())
    monkeypatch.setattr(MaskPlaces, "saves", lambda self: False)
    plain = learnt(made(), clips())
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_first_block_computes_each_position_once(training: bool) -> None:
    model = student()
    rows = projected(model)
    with torch.set_grad_enabled(training):
        model(*clips())
    own, everything = CLIPS * VISIBLE + POSITIONS, CLIPS * POSITIONS
    # Without gradients a CPU takes the tokens of 1600 at a time: all of these clips.
    assert rows == [own, everything, own, everything]


def test_a_single_clip_has_fewer_mask_tokens_than_there_are_positions() -> None:
    model = student()
    rows = projected(model)
    model(*clips(1))
    assert rows == [POSITIONS] * 4


def test_a_compiled_block_is_one_program() -> None:
    torch.manual_seed(0)
    block, places = Block(32, 2, 2.0, 0.0), MaskPlaces(MASKED, 4)
    rows = torch.randn(1, 6, 32, requires_grad=True)
    plain = block(rows, 2, None, places)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)(rows, 2, None, places)
    torch.testing.assert_close(compiled, plain)
    gradients = [torch.autograd.grad(output.square().sum(), rows)[0] for output in (compiled, plain)]
    torch.testing.assert_close(*gradients)
