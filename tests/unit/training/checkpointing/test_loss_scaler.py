"""The dynamic loss scaler of fp16 goes on where a run was stopped; this needs no engine and no GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from mvd_scale.training.checkpointing.engine_state import read_loss_scaler, restore_loss_scaler


def engine(scaler: Any, *, fp16: bool = True) -> Any:
    return SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler), fp16_enabled=lambda: fp16)


def dynamic() -> DynamicLossScaler:
    return DynamicLossScaler(2**16, 3, 1, delayed_shift=2, consecutive_hysteresis=False)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed.runtime.fp16.loss_scaler.dist.get_rank", lambda: 0)


def test_a_restored_scaler_does_what_the_stopped_one_would_have_done() -> None:
    overflows = [True, False, True, False, False, False, True, True, False, False, False, True]
    whole, stopped, resumed = dynamic(), dynamic(), dynamic()
    for overflow in overflows[:5]:
        whole.update_scale(overflow)
        stopped.update_scale(overflow)
    restore_loss_scaler(engine(resumed), read_loss_scaler(engine(stopped)))
    for overflow in overflows[5:]:
        whole.update_scale(overflow)
        resumed.update_scale(overflow)
        assert (resumed.cur_scale, resumed.cur_iter) == (whole.cur_scale, whole.cur_iter)


def test_other_precisions_and_fixed_scales_have_none() -> None:
    assert read_loss_scaler(engine(dynamic(), fp16=False)) is None
    assert read_loss_scaler(engine(LossScaler(1.0))) is None
    fresh = dynamic()
    restore_loss_scaler(engine(fresh), None)
    restore_loss_scaler(engine(fresh, fp16=False), {"cur_scale": 4.0})
    assert fresh.cur_scale == 2**16
