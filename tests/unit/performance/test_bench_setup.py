"""The recipe that is measured."""

from __future__ import annotations

from mvd_scale.performance.bench_setup import bench_recipe


def test_the_batch_is_the_measurement_s_and_the_rest_the_user_s() -> None:
    recipe = bench_recipe("quickstart/student", ["--training.micro_batch", "2"], "bf16", batch=6)
    assert recipe.training.global_batch == 6
    assert recipe.micro_batch_and_accumulation(1) == (2, 3)
    assert recipe.training.precision == "bf16"
    assert bench_recipe("quickstart/student", [], "fp32", batch=6).micro_batch_and_accumulation(1) == (6, 1)
