"""Parameter groups: weight decay, factor on the learning rate, and the largest size of a group."""

import pytest
from torch import nn

from mvd_scale.training import optimizer as optim


def test_no_group_is_larger_than_it_may_be_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "LARGEST_GROUP", 100)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 40), nn.Linear(40, 2), nn.Linear(2, 1))
    groups = optim.parameter_groups(model, 0.05)
    sizes = [[parameter.numel() for parameter in group["params"]] for group in groups if group["decays"]]
    assert sizes == [[64, 32], [160], [80, 2]]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert all(group["weight_decay"] == (0.05 if group["decays"] else 0) for group in groups)
