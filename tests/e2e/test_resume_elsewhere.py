"""A run goes on from its checkpoint by other ranks, another ZeRO stage, precision and micro batch.

The losses after it are those of a run that nobody touched: equal to 2e-5 relative in float32, since other ranks sum in
another order. The clips are the same ones, in the same order.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mvd_scale.checkpoints.reading import read_raw_checkpoint

from .conftest import Jobs

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

FAST = ["--training.warmup_epochs", "0", "--model.drop_path", "0", "--training.global_batch", "8"]
AVERAGE = "{kind: momentum, momentum: 0.9, norm: true, decoder: {width: 32, depth: 1, heads: 2}}"


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def go_on(jobs: Jobs, run: Path, words: list[str | Path], steps: int, *, ranks: int, changes: str = "") -> str:
    """Train to a step on so many ranks, from wherever the run stands, and return the output."""
    (run / "summary.json").unlink(missing_ok=True)
    arguments = [*words, "--run.folder", run, "--training.max_steps", str(steps), *changes.split()]
    code, output = jobs.run(*arguments, ranks=ranks)
    assert code == 0, output
    return output


def words_of(recipe: Path, clips: Path) -> list[str | Path]:
    return ["pretrain", "--recipe", recipe, "--data.source", clips, "--targets.average", AVERAGE, *FAST]


def test_other_ranks_stages_and_micro_batches(jobs: Jobs, recipe: Path, clips: Path, tmp_path: Path) -> None:
    words = words_of(recipe, clips)
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    go_on(jobs, whole, words, 12, ranks=1)
    go_on(jobs, moved, words, 3, ranks=2, changes="--training.deepspeed zero1 --training.micro_batch 4")
    output = go_on(jobs, moved, words, 6, ranks=1, changes="--training.deepspeed zero3 --training.micro_batch 8")
    assert "ranks 1, before 2; ZeRO stage 3, before 1; micro batch 8, before 4" in output
    go_on(jobs, moved, words, 9, ranks=4, changes="--training.deepspeed zero2 --training.micro_batch 2")
    go_on(jobs, moved, words, 10, ranks=2, changes="--training.deepspeed zero3 --teachers.sharding zero3")
    go_on(jobs, moved, words, 12, ranks=1, changes="--training.deepspeed zero3_offload")
    assert losses(moved) == pytest.approx(losses(whole), rel=2e-5)
    for name in ("encoder", "student", "momentum_average"):
        ours, theirs = (load_file(run / f"{name}.safetensors") for run in (moved, whole))
        assert ours.keys() == theirs.keys()
        for key, weight in theirs.items():
            torch.testing.assert_close(ours[key], weight, rtol=1e-3, atol=1e-5)


def test_another_precision(jobs: Jobs, recipe: Path, clips: Path, tmp_path: Path) -> None:
    words = words_of(recipe, clips)
    run, stayed = tmp_path / "run", tmp_path / "stayed"
    go_on(jobs, stayed, words, 8, ranks=2, changes="--training.precision bf16")
    go_on(jobs, run, words, 5, ranks=2, changes="--training.precision bf16")
    checkpoint = run / "checkpoints" / "step_00000005"
    saved = read_raw_checkpoint(checkpoint).tensors
    assert all(weight.dtype == torch.float32 for weight in saved.values())
    output = go_on(jobs, run, words, 8, ranks=1, changes="--training.precision fp32 --training.deepspeed zero3")
    assert "precision fp32, before bf16" in output
    assert losses(run) == pytest.approx(losses(stayed), rel=2e-2)


def test_the_same_ranks_and_stage_go_on_bit_for_bit(jobs: Jobs, recipe: Path, clips: Path, tmp_path: Path) -> None:
    # Two runs: each would otherwise round as its own trial of the ways of bf16 says.
    words = [*words_of(recipe, clips), "--training.bf16_products", "bf16"]
    for stage, precision in (("zero1", "bf16"), ("zero3", "fp32")):
        whole, resumed = tmp_path / f"{stage}_{precision}", tmp_path / f"{stage}_{precision}_resumed"
        changes = f"--training.deepspeed {stage} --training.precision {precision}"
        go_on(jobs, whole, words, 7, ranks=2, changes=changes)
        go_on(jobs, resumed, words, 4, ranks=2, changes=changes)
        go_on(jobs, resumed, words, 7, ranks=2, changes=changes)
        assert losses(resumed) == losses(whole), (stage, precision)
        ours, theirs = (load_file(run / "student.safetensors") for run in (resumed, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), (stage, precision)


def test_a_classifier_with_an_average(jobs: Jobs, clips: Path, tmp_path: Path) -> None:
    file = tmp_path / "finetune.yaml"
    file.write_text(
        """
run: {folder: unused}
device: cpu
model: {width: 48, depth: 2, heads: 3, frames: 4, input_size: 48, positions: sinusoid}
data: {stride: 2, clips_per_video: 2, mask: null}
classifier: {from_scratch: true}
mix: null
training:
  {epochs: 6, global_batch: 4, base_lr: 1e-2, warmup_epochs: 0, deepspeed: zero2, ema_decay: 0.9, layer_decay: 0.75}
checkpoints: {every_epochs: null, every_steps: 50}
logging: {every_steps: 1}
"""
    )
    listing = tmp_path / "list.csv"
    videos = sorted(path for path in clips.iterdir() if path.suffix in (".mp4", ".webm"))
    listing.write_text("".join(f"{path} {number % 3}\n" for number, path in enumerate(videos)))
    words: list[str | Path] = ["finetune", "--recipe", file, "--data.source", listing]
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    go_on(jobs, whole, words, 6, ranks=1)
    go_on(jobs, moved, words, 2, ranks=2, changes="--training.deepspeed zero3")
    go_on(jobs, moved, words, 4, ranks=1, changes="--training.deepspeed zero1")
    go_on(jobs, moved, words, 6, ranks=2)
    assert losses(moved) == pytest.approx(losses(whole), rel=1e-4)
    ours, theirs = (load_file(run / "average.safetensors") for run in (moved, whole))
    for key, weight in theirs.items():
        torch.testing.assert_close(ours[key], weight, rtol=1e-3, atol=1e-5)
