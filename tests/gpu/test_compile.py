"""Teachers as CUDA graphs, compiled blocks and decoders in one pass give what they gave before."""

from __future__ import annotations

import copy
from typing import get_args

import pytest
import torch

from mvd_scale.config import DecoderConfig, ModelConfig
from mvd_scale.config.training import Checkpointing
from mvd_scale.models import Encoder, Student
from mvd_scale.models.blocks import set_gradient_checkpointing
from mvd_scale.performance.bringup.checks.comparisons import Call, gradient_errors, graph_errors
from mvd_scale.training.compile import compile_blocks

pytestmark = pytest.mark.gpu

SHAPE = {"width": 128, "depth": 3, "heads": 2, "frames": 4, "input_size": 64}
CLIPS, TOKENS = 4, 32


def clips(seed: int, gpu: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels, and half of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (CLIPS, 4, 64, 64, 3), dtype=torch.uint8, generator=generator)
    tokens = torch.stack([torch.randperm(TOKENS, generator=generator)[: TOKENS // 2] for _ in range(CLIPS)])
    return pixels.to(gpu), tokens.sort(1).values.to(gpu)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_graphed_teacher_gives_the_features_of_the_same_one_without(gpu: torch.device, compiled: bool) -> None:
    torch.manual_seed(0)
    teacher = Encoder(ModelConfig.model_validate(SHAPE), final_norm=False).to(gpu, torch.float16)
    teacher.eval().requires_grad_(False)
    ours = copy.deepcopy(teacher)
    if compiled:
        compile_blocks(ours)
    errors = graph_errors(teacher, ours, [Call(*clips(seed, gpu)) for seed in range(4)])
    assert errors.pop("change by the move") > 1e-2
    assert max(errors.values()) < 1e-2, errors


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("checkpointing", get_args(Checkpointing))
def test_a_student_made_fast_gives_the_same_predictions_and_gradients(
    gpu: torch.device, checkpointing: Checkpointing, together: bool, compiled: bool
) -> None:
    torch.manual_seed(0)
    decoder = DecoderConfig(width=64, depth=2, heads=2)
    plain = Student(ModelConfig.model_validate(SHAPE), {"image": (decoder, 96), "video": (decoder, 128)}).to(gpu)
    fast = copy.deepcopy(plain)
    if together:
        fast.batch_decoders()
    set_gradient_checkpointing(fast, checkpointing)
    if compiled:
        compile_blocks(fast)
    pixels, tokens = clips(0, gpu)
    everything = torch.arange(TOKENS, device=gpu)
    masked = torch.stack([everything[~torch.isin(everything, mine)] for mine in tokens])
    errors = gradient_errors(fast, plain, lambda student: student(pixels, tokens, masked))
    assert max(errors.values()) < 1e-3, errors
