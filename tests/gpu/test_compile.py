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
from mvd_scale.training.compile import compile_blocks
from mvd_scale.training.teachers.cuda_graph import CudaGraphTeacher

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
    graphed, recorded = CudaGraphTeacher(ours), []
    for seed in range(4):
        pixels, tokens = clips(seed, gpu)
        # One micro batch after the other, on either stream.
        stream = torch.cuda.Stream(gpu) if seed % 2 else torch.cuda.current_stream(gpu)
        stream.wait_stream(torch.cuda.current_stream(gpu))
        with torch.cuda.stream(stream):
            recorded.append((graphed(pixels, output_tokens=tokens), pixels, tokens))
    torch.cuda.synchronize(gpu)
    with torch.no_grad():
        # No later call has written over them.
        for features, pixels, tokens in recorded:
            torch.testing.assert_close(features, teacher(pixels, output_tokens=tokens), rtol=1e-2, atol=1e-2)
        few, tokens = pixels[:1], tokens[:1]
        torch.testing.assert_close(
            graphed(few, output_tokens=tokens), teacher(few, output_tokens=tokens), rtol=1e-2, atol=1e-2
        )
        # A moving average.
        for moved, parameter in zip(ours.parameters(), teacher.parameters(), strict=True):
            parameter.mul_(1.1)
            moved.data.copy_(parameter)
        features, pixels, tokens = recorded[0]
        moved_features = graphed(pixels, output_tokens=tokens)
        assert not torch.allclose(moved_features, features, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(moved_features, teacher(pixels, output_tokens=tokens), rtol=1e-2, atol=1e-2)


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
    predictions = [student(pixels, tokens, masked) for student in (fast, plain)]
    torch.testing.assert_close(*predictions, rtol=1e-3, atol=1e-3)
    for predicted in predictions:
        sum(prediction.square().mean() for prediction in predicted.values()).backward()  # type: ignore[union-attr]
    for (name, ours), theirs in zip(fast.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2, atol=1e-4, msg=name)
