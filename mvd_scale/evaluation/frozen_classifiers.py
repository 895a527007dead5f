"""Classifiers on frozen features: nearest neighbours, a linear layer, an attentive head.

Legend: X training clips, Y test clips, C classes, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from mvd_scale.models.attentive import AttentiveHead

_TEMPERATURE = 0.07
_CHUNK = 1024


def nearest_neighbours(features: Tensor, labels: Tensor, tested: Tensor, *, classes: int, neighbours: int) -> Tensor:
    """Classify by the vote of the nearest training features by cosine, each weighted by exp(cosine / 0.07).

    Args:
        features: training features, float32 (X, D).
        labels: training labels, int64 (X,).
        tested: test features, float32 (Y, D).
        classes: C.
        neighbours: number of neighbours that vote.

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
    """Classify by multinomial logistic regression on standardised features, fitted by L-BFGS from zero weights.

    Args:
        features: training features, float32 (X, D).
        labels: training labels, int64 (X,).
        tested: test features, float32 (Y, D).
        classes: C.
        decay: factor of the L2 penalty on the weights.
        steps: largest number of L-BFGS iterations.

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


def attentive_classifier(
    parts: Callable[[], Iterator[tuple[Tensor, Tensor]]],
    tested: Iterable[Tensor],
    head: AttentiveHead,
    *,
    epochs: int,
    lr: float,
    batch: int = 64,
    decay: float = 0.05,
) -> Tensor:
    """Classify by an attentive head, trained by AdamW with a cosine schedule whose first tenth is warm-up.

    Args:
        parts: function that yields one epoch in parts that fit in memory: tokens (X_i, N, D), labels int64 (X_i,).
        tested: test tokens in parts (Y_i, N, D).
        head: head with random weights, on the device to compute on.
        epochs: passes over the training tokens.
        lr: peak learning rate.
        batch: clips per step.
        decay: weight decay.

    Returns:
        scores (logits), float32 (Y, C), on the host.
    """
    device = head.query.device
    steps = epochs * sum(-(-len(labels) // batch) for _, labels in parts())
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=decay)
    rise, fall = LinearLR(optimizer, 0.01, total_iters=max(steps // 10, 1)), CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(0)
    head.train()
    with torch.enable_grad():
        for _ in range(epochs):
            for tokens, labels in parts():
                for rows in torch.randperm(len(labels), generator=order).split(batch):
                    scores = head(tokens[rows].to(device).float())
                    loss = F.cross_entropy(scores, labels[rows].to(device))
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    rise.step()
                    fall.step()
    head.eval()
    with torch.no_grad():
        return torch.cat([head(rows.to(device).float()).cpu() for tokens in tested for rows in tokens.split(batch)])


def top1(scores: Tensor, labels: Tensor) -> float:
    """Share (0 to 1) of the rows of scores (Y, C) whose highest score is that of the label (Y,)."""
    return float((scores.argmax(1) == labels).float().mean())
