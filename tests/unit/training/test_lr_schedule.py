"""Learning rate and weight decay by step."""

from __future__ import annotations

import pytest

from mvd_scale.config import TrainingConfig, load_recipe
from mvd_scale.training.lr_schedule import Schedule


def schedule(**training: float) -> Schedule:
    values = {"epochs": 10, "global_batch": 512, "base_lr": 1e-3, "min_lr": 1e-5, "warmup_epochs": 2, **training}
    return Schedule(TrainingConfig.model_validate(values), steps_per_epoch=5, lr_batch=values["global_batch"])


def test_rates_scale_with_the_global_batch() -> None:
    assert schedule().lr(9) == pytest.approx(2e-3)
    assert schedule(global_batch=256).lr(9) == pytest.approx(1e-3)


def test_warm_up_climbs_from_zero_and_the_cosine_falls_to_the_minimum() -> None:
    rates = [schedule().lr(step) for step in range(50)]
    assert rates[0] == 0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 2e-5 < rates[-1] < 3e-5


def test_the_warm_up_of_mae_reaches_the_peak_one_step_later() -> None:
    """MVD and VideoMAE divide by the number of warm-up steps less one, MAE by their number."""
    early, late = schedule(), schedule(warmup_endpoint=False)
    assert [early.lr(step) for step in range(11)] == pytest.approx([2e-3 * min(step / 9, 1) for step in range(11)])
    assert [late.lr(step) for step in range(11)] == pytest.approx([2e-3 * step / 10 for step in range(11)])
    assert [late.lr(step) for step in range(10, 50)] == [early.lr(step) for step in range(10, 50)]


@pytest.mark.parametrize(
    ("name", "endpoint"), [("pretrain/mae_h", False), ("pretrain/videomae_h_ssv2", True), ("distill/h_from_h", True)]
)
def test_recipes_have_the_warm_up_of_their_published_code(name: str, endpoint: bool) -> None:
    assert load_recipe(name).training.warmup_endpoint is endpoint


def test_an_early_stop_leaves_the_schedule_as_it_is() -> None:
    short = schedule(max_steps=7)
    assert short.last_step == 7
    assert [short.lr(step) for step in range(7)] == [schedule().lr(step) for step in range(7)]


def test_weight_decay_is_constant_or_a_cosine() -> None:
    assert {schedule().weight_decay(step) for step in (0, 49)} == {0.05}
    rising = schedule(weight_decay_end=0.5)
    assert rising.weight_decay(0) == pytest.approx(0.05)
    assert rising.weight_decay(50) == pytest.approx(0.5)
