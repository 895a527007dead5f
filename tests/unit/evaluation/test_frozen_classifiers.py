"""Probes recognise classes whose features differ, and are at chance if they do not differ."""

from __future__ import annotations

import pytest
import torch

from mvd_scale.evaluation.frozen_classifiers import linear_classifier, nearest_neighbours, top1


def clouds(distance: float, seed: int, count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = distance * torch.eye(3, 8)
    return centres[labels] + torch.randn(count, 8, generator=generator), labels


@pytest.mark.parametrize("kind", ["knn", "linear"])
@pytest.mark.parametrize(("distance", "low", "high"), [(8.0, 0.95, 1.0), (0.0, 0.1, 0.6)])
def test_accuracy_follows_the_distance_of_classes(kind: str, distance: float, low: float, high: float) -> None:
    (known, labels), (tested, truth) = clouds(distance, 0), clouds(distance, 1)
    if kind == "knn":
        scores = nearest_neighbours(known, labels, tested, classes=3, neighbours=5)
    else:
        scores = linear_classifier(known, labels, tested, classes=3)
    assert scores.shape == (60, 3)
    assert low <= top1(scores, truth) <= high


def test_neighbours_vote_by_their_cosine() -> None:
    known = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    scores = nearest_neighbours(known, torch.tensor([0, 1, 1]), torch.tensor([[5.0, 0.5]]), classes=2, neighbours=3)
    cosine = torch.nn.functional.cosine_similarity(known, torch.tensor([[5.0, 0.5]]))
    weights = (cosine / 0.07).exp()
    torch.testing.assert_close(scores[0], torch.stack([weights[0], weights[1] + weights[2]]))
    # More neighbours than there are videos: all of them vote.
    assert torch.equal(
        nearest_neighbours(known, torch.tensor([0, 1, 1]), known, classes=2, neighbours=99).argmax(1),
        torch.tensor([0, 1, 1]),
    )


def test_fitting_leaves_the_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    known, labels = torch.randn(20, 4, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 2
    linear_classifier(known, labels, known, classes=2)
    assert torch.equal(state, torch.get_rng_state())
