"""Colours of features: signs are fixed, and constant features have a colour too."""

from __future__ import annotations

import torch

from mvd_scale.visualization.pca import PrincipalColors

SPREAD = torch.tensor([9.0, -4, 2, 0.1, 0.1, 0.1])


def features(seed: int = 0) -> torch.Tensor:
    return torch.randn(200, 6, generator=torch.Generator().manual_seed(seed)) * SPREAD


def test_components_follow_in_the_order_of_their_variance_with_positive_signs() -> None:
    axes = PrincipalColors.fit(features()).axes
    assert axes.abs().argmax(0).tolist() == [0, 1, 2]
    assert (axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0.9).all()


def test_signs_do_not_depend_on_the_features_order_or_on_their_sign() -> None:
    plain = PrincipalColors.fit(features())
    torch.testing.assert_close(PrincipalColors.fit(features().flip(0)).axes, plain.axes, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(PrincipalColors.fit(-features()).axes, plain.axes, atol=1e-4, rtol=1e-4)


def test_colours_fill_the_range_between_two_percentiles() -> None:
    colours = PrincipalColors.fit(features())(features())
    assert colours.shape == (200, 3)
    assert ((colours == 0).sum(0) <= 3).all()
    assert ((colours == 1).sum(0) <= 3).all()
    assert (colours.std(0) > 0.1).all()


def test_constant_features_have_a_colour() -> None:
    constant = torch.ones(20, 6)
    assert torch.isfinite(PrincipalColors.fit(constant)(constant)).all()
