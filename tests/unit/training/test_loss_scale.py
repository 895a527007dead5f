"""DeepSpeed's scaler, given the loss scale of a kind of recipe, follows the published rule."""

from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.precision_config import DeepSpeedFP16Config

from mvd_scale.config import load_any_recipe
from mvd_scale.config.deepspeed import student_deepspeed_config
from mvd_scale.errors import UserError
from mvd_scale.training.nonfinite import smallest_loss_scale


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler asks for its rank, for its messages."""
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 0)


def scaler_of(name: str) -> loss_scaler.DynamicLossScaler:
    config = student_deepspeed_config(load_any_recipe(name), world_size=8)["fp16"]
    arguments = DeepSpeedFP16Config(**config).dynamic_loss_scale_args()
    return loss_scaler.CreateLossScaler(torch.half, 0, dynamic_scaling=True, dynamic_loss_args=arguments)


def skipped(scaler: loss_scaler.DynamicLossScaler, largest: float, steps: int) -> int:
    """Drive the scaler with gradients that overflow above a scale; count the steps that overflow."""
    overflows = 0
    for _ in range(steps):
        overflow = scaler.cur_scale > largest
        overflows += overflow
        scaler.update_scale(overflow)
    return overflows


@pytest.mark.parametrize("name", ["pretrain/mae_b", "pretrain/videomae_b_k400", "distill/b_from_b", "detection/b_ava"])
def test_training_with_torchs_scaler_halves_at_each_overflow_and_doubles_after_2000_steps(name: str) -> None:
    scaler, torchs = scaler_of(name), torch.amp.GradScaler("cpu")
    assert scaler.cur_scale == torchs.get_scale() == 65536
    assert (torchs.get_growth_interval(), torchs.get_growth_factor(), torchs.get_backoff_factor()) == (2000, 2, 0.5)
    for scale in (32768, 16384, 8192):
        scaler.update_scale(True)
        assert scaler.cur_scale == scale
    # DeepSpeed doubles one step later than torch after an overflow, and then as often.
    for _ in range(2000):
        scaler.update_scale(False)
        assert scaler.cur_scale == 8192
    scaler.update_scale(False)
    assert scaler.cur_scale == 16384
    for _ in range(2000):
        scaler.update_scale(False)
    assert scaler.cur_scale == 32768


def test_fine_tuning_begins_at_128_and_waits_for_a_second_overflow() -> None:
    scaler = scaler_of("finetune/b_k400")
    assert scaler.cur_scale == 128
    scaler.update_scale(True)
    assert scaler.cur_scale == 128
    scaler.update_scale(True)
    assert scaler.cur_scale == 64


@pytest.mark.parametrize(("name", "share"), [("distill/b_from_b", 1 / 2002), ("finetune/b_k400", 2 / 131)])
def test_steps_that_are_skipped_once_the_scale_is_as_large_as_the_gradients_allow(name: str, share: float) -> None:
    """The figures of ds_configs/README.md: 0.05 % and 1.5 %."""
    scaler = scaler_of(name)
    skipped(scaler, 1024, 20_000)
    assert skipped(scaler, 1024, 200_000) / 200_000 == pytest.approx(share, rel=0.02)


def test_an_overflow_at_the_smallest_scale_ends_the_run_with_step_and_remedy() -> None:
    scaler = scaler_of("distill/b_from_b")
    with (
        pytest.raises(UserError, match=r"in 'optimizer' of step 8; .*training\.precision bf16.*training\.base_lr"),
        smallest_loss_scale(7),
    ):
        skipped(scaler, 0, 100)
    assert scaler.cur_scale == 1


def test_other_exceptions_of_a_step_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="NCCL"), smallest_loss_scale(7):
        raise RuntimeError("NCCL error")
