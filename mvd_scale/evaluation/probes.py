"""How good frozen features are for naming classes: nearest neighbours and a linear layer.

Legend: X and Y features to learn from and to test, C classes, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_TEMPERATURE = 0.07
_CHUNK = 1024


def nearest_neighbours(features: Tensor, labels: Tensor, tested: Tensor, *, classes: int, neighbours: int) -> Tensor:
    """Classes by the vote of the nearest training features by cosine, each weighted by exp(cosine / 0.07).

    Args:
        features: float32 (X, D).
        labels: int64 (X,).
        tested: float32 (Y, D).
        classes: C.
        neighbours: how many vote.

    Returns:
        scores, float32 (Y, C).
    """
    known, hot = F.normalize(features, dim=1), F.one_hot(labels, classes).float()
    scores = []
    for part in F.normalize(tested, dim=1).split(_CHUNK):
        near, places = (part @ known.T).topk(min(neighbours, len(known)), dim=1)
        scores.append((hot[places] * (near / _TEMPERATURE).exp().unsqueeze(2)).sum(1))
    return torch.cat(scores)


def linear_classifier(
    features: Tensor, labels: Tensor, tested: Tensor, *, classes: int, decay: float = 1e-3, steps: int = 100
) -> Tensor:
    """Classes by multinomial logistic regression on standardised features, fitted by L-BFGS from zero.

    Args:
        features: float32 (X, D).
        labels: int64 (X,).
        tested: float32 (Y, D).
        classes: C.
        decay: L2 penalty on the weights.
        steps: of L-BFGS, at most.

    Returns:
        scores, float32 (Y, C).
    """
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    known, asked = (features - mean) / deviation, (tested - mean) / deviation
    weight = torch.zeros(classes, known.shape[1], device=known.device, requires_grad=True)
    bias = torch.zeros(classes, device=known.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(known, weight, bias), labels) + decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return F.linear(asked, weight, bias).detach()


def top1(scores: Tensor, labels: Tensor) -> float:
    """Share of rows of (Y, C) whose highest score is at the label."""
    return float((scores.argmax(1) == labels).float().mean())
