"""Eq. 2 against sums written out, its kernel against its reference; the gradient reaches predictions only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mvd_kernels import masked_distance

from .conftest import Evaluate
from .evaluation import Call, evaluate

DISTANCES = ["smooth_l1", "l1", "l2", "cosine"]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mean_distance_at_masked_tokens(distance: str, norm: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    predictions = (2 * torch.randn(2, 3, 5, generator=generator)).to(dtype).requires_grad_()
    features = torch.randn(2, 7, 5, generator=generator).to(dtype)
    masked = torch.tensor([[0, 4, 6], [1, 2, 3]])
    result = masked_distance(predictions, features, masked, distance=distance, norm=norm)  # type: ignore[arg-type]
    total = 0.0
    for clip in range(2):
        for place, token in enumerate(masked[clip].tolist()):
            truth = features[clip, token].double()
            if norm:
                truth = (truth - truth.mean()) / (truth.var(unbiased=False) + 1e-6).sqrt()
            gap = (predictions[clip, place].detach().double() - truth).abs()
            terms = {"l1": gap, "l2": gap**2, "smooth_l1": torch.where(gap < 1, gap**2 / 2, gap - 0.5)}
            guess = predictions[clip, place].detach().double()
            cosine = guess @ truth / (guess.norm() * truth.norm())
            terms["cosine"] = (1 - cosine).expand(5)  # one value per token
            total += terms[distance].sum().item()
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(total / (2 * 3 * 5), rel=1e-5)
    result.backward()
    assert predictions.grad is not None


def test_features_of_masked_tokens_alone_need_no_indices() -> None:
    predictions, features = torch.randn(2, 3, 5), torch.randn(2, 7, 5, requires_grad=True)
    masked = torch.tensor([[0, 4, 6], [1, 2, 3]])
    picked = features[torch.arange(2).unsqueeze(1), masked]
    with_indices = masked_distance(predictions, features, masked, distance="l2")
    torch.testing.assert_close(masked_distance(predictions, picked, None, distance="l2"), with_indices)
    assert not with_indices.requires_grad


def call(
    width: int, distance: str, norm: bool, predicted: torch.dtype, taught: torch.dtype, gather: bool = True
) -> Call:
    """Two clips, three of seven tokens; neither tensor contiguous, as slices behind a class token are."""
    generator = torch.Generator().manual_seed(0)
    predictions = (2 * torch.randn(2, 4, width, generator=generator)).to(predicted)[:, 1:]
    features = torch.randn(2, 8, width, generator=generator).to(taught)[:, 1:]
    masked = torch.tensor([[0, 4, 6, 9], [1, 2, 6, 9]])[:, :3] if gather else None
    features = features if gather else features[:, :3]
    return Call("masked_distance", (predictions, features, masked), {"distance": distance, "norm": norm}, (0,))


def assert_alike(kernel: Evaluate, call: Call, tolerance: float) -> None:
    (result,), (gradient,) = kernel(call)
    (expected,), (expected_gradient,) = evaluate(call, "reference")
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("width", [5, 130])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
def test_kernel_equals_twin(kernel: Evaluate, distance: str, norm: bool, width: int) -> None:
    assert_alike(kernel, call(width, distance, norm, torch.float32, torch.float32), 1e-6)


@pytest.mark.parametrize(
    ("predicted", "taught"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, torch.float16)],
)
@pytest.mark.parametrize("distance", DISTANCES)
def test_kernel_takes_every_pair_of_dtypes(
    kernel: Evaluate, distance: str, predicted: torch.dtype, taught: torch.dtype
) -> None:
    assert_alike(kernel, call(33, distance, True, predicted, taught), 1e-2)


def test_kernel_needs_no_indices(kernel: Evaluate) -> None:
    assert_alike(kernel, call(33, "smooth_l1", True, torch.float32, torch.float32, gather=False), 1e-6)


def test_kernel_takes_transposed_tensors(kernel: Evaluate) -> None:
    first = call(6, "smooth_l1", False, torch.float32, torch.float32)
    predictions, features, masked = first.arguments
    transposed = (predictions.mT.contiguous().mT, features.mT.contiguous().mT, masked.T.contiguous().T)
    assert_alike(kernel, replace(first, arguments=transposed), 1e-6)


def test_a_zero_prediction_has_a_finite_cosine(kernel: Evaluate) -> None:
    zero = Call("masked_distance", (torch.zeros(1, 2, 5), torch.ones(1, 2, 5), None), {"distance": "cosine"}, (0,))
    (result,), (gradient,) = kernel(zero)
    assert result.item() == 1
    assert torch.isfinite(gradient).all()


def test_kernel_gives_the_same_bits_each_time(kernel: Evaluate) -> None:
    once = call(130, "smooth_l1", True, torch.float32, torch.float32)
    (first,), (gradient,) = kernel(once)
    (second,), (again,) = kernel(once)
    assert torch.equal(first, second)
    assert torch.equal(gradient, again)


def test_a_compiled_program_keeps_the_kernel_whole(kernel: Evaluate) -> None:
    assert_alike(kernel, replace(call(33, "smooth_l1", True, torch.float32, torch.float32), compiled=True), 1e-6)
