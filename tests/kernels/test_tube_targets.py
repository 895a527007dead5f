"""Pixel targets of chosen tokens against their formulas, the kernel against its reference."""

from __future__ import annotations

import pytest
import torch

from mvd_kernels import tube_pixels, tube_targets
from mvd_kernels.tubes import IMAGENET_MEAN, IMAGENET_STD

from .conftest import Evaluate
from .evaluation import Call, evaluate

TOKENS = torch.tensor([[0, 5, 3], [1, 2, 4]])


def clip(frames: int = 4, height: int = 10, width: int = 15) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, frames, height, width, 3), dtype=torch.uint8, generator=generator)


def tube(pixels: torch.Tensor, row: int, token: int) -> torch.Tensor:
    """Tube of 2 x 5 x 5 in a grid of 2 x 3 tokens a tubelet, as (50, 3)."""
    t, h, w = token // 6, token // 3 % 2, token % 3
    return pixels[row, 2 * t : 2 * t + 2, 5 * h : 5 * h + 5, 5 * w : 5 * w + 5].reshape(50, 3).double() / 255


@pytest.mark.parametrize("normalize", ["none", "channel", "patch"])
def test_targets_follow_the_published_formulas(normalize: str) -> None:
    pixels = clip()
    targets = tube_targets(pixels, TOKENS, tubelet=2, patch=5, normalize=normalize)  # type: ignore[arg-type]
    assert targets.dtype == torch.float32
    for row in range(2):
        for place, token in enumerate(TOKENS[row].tolist()):
            values = tube(pixels, row, token)
            if normalize == "channel":
                values = (values - values.mean(0)) / (values.std(0) + 1e-6)
            elif normalize == "patch":
                values = (values - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
                values = (values - values.mean()) / (values.var() + 1e-6).sqrt()
            torch.testing.assert_close(targets[row, place].double(), values.flatten(), atol=1e-5, rtol=1e-5)


def test_raw_pixels_keep_an_axis_of_colours() -> None:
    pixels = clip()
    values = tube_pixels(pixels, TOKENS, tubelet=2, patch=5)
    assert torch.equal(values.flatten(2), tube_targets(pixels, TOKENS, tubelet=2, patch=5))
    torch.testing.assert_close(values[1, 0].double(), tube(pixels, 1, 1), atol=1e-6, rtol=1e-6)


def assert_alike(
    kernel: Evaluate, pixels: torch.Tensor, tokens: torch.Tensor | None, compiled: bool = False, **keywords: object
) -> None:
    call = Call("tube_targets", (pixels, tokens), keywords, compiled=compiled)
    (result,), _ = kernel(call)
    (expected,), _ = evaluate(call, "reference")
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("normalize", ["none", "channel", "patch"])
def test_kernel_equals_twin(kernel: Evaluate, normalize: str) -> None:
    assert_alike(kernel, clip(), TOKENS, tubelet=2, patch=5, normalize=normalize)
    assert_alike(kernel, clip(1, 14, 28), None, tubelet=1, patch=14, normalize=normalize)


@pytest.mark.parametrize("normalize", ["none", "channel", "patch"])
def test_kernel_takes_floating_pixels_and_views(kernel: Evaluate, normalize: str) -> None:
    channels_first = clip().permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    assert_alike(kernel, channels_first.half() / 255, TOKENS, tubelet=2, patch=5, normalize=normalize)
    assert_alike(kernel, clip(4, 10, 20)[:, :, :, 5:], TOKENS, tubelet=2, patch=5, normalize=normalize)


@pytest.mark.parametrize("normalize", ["channel", "patch"])
def test_a_tube_of_one_colour_stays_near_zero(kernel: Evaluate, normalize: str) -> None:
    grey = torch.full((1, 2, 5, 5, 3), 100, dtype=torch.uint8)
    if normalize == "patch":  # the same after whitening
        grey = torch.tensor(IMAGENET_MEAN).expand(1, 2, 5, 5, 3)
    (result,), _ = kernel(Call("tube_targets", (grey, None), {"tubelet": 2, "patch": 5, "normalize": normalize}))
    # The mean of equal numbers may miss them by a rounding error, which 1e-6 magnifies.
    assert result.abs().max() < 0.5


def test_a_compiled_program_keeps_the_kernel_whole(kernel: Evaluate) -> None:
    assert_alike(kernel, clip(), TOKENS, compiled=True, tubelet=2, patch=5, normalize="channel")
