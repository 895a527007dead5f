"""Eq. 2 against sums written out; the gradient reaches predictions only."""

from __future__ import annotations

import pytest
import torch

from mvd_kernels import masked_distance


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("distance", ["smooth_l1", "l1", "l2", "cosine"])
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
