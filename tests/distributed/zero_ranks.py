"""Run by every rank of test_zero.py: trains a tiny student by each ZeRO stage and writes down what happened."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mvd_scale.config import Recipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.distributed.process_group import Ranks, destroy_distributed, init_distributed
from mvd_scale.errors import UserError
from mvd_scale.models import Student
from mvd_scale.performance.batches import BatchLoader
from mvd_scale.performance.bringup.checks.tiny import (
    DECODER,
    FROZEN,
    global_batch,
    held_at_rest,
    tiny_recipe,
    tiny_teacher,
)
from mvd_scale.targets import FrozenTeacher, build_targets
from mvd_scale.targets.load import ema_file
from mvd_scale.training.capabilities import make_placement
from mvd_scale.training.deepspeed_engine import full_parameters
from mvd_scale.training.distillation import StudentParts, distillation_models
from mvd_scale.training.ema import ModelEma
from mvd_scale.training.teachers.prefetch import TeacherPrefetcher
from mvd_scale.training.teachers.statistics import running_statistics
from mvd_scale.training.trainer import Trainer

STEPS = 6


DROPPED: dict[str, Any] = {"video": {**FROZEN["video"], "decoder": {**DECODER, "depth": 2, "drop_path": 0.5}}}
STANDARDISED: dict[str, Any] = {
    name: {**FROZEN[name], "standardize": kind, "standardize_momentum": 0.5}
    for name, kind in (("image", "channel"), ("video", "layer"))
}
MOMENTUM: dict[str, Any] = {"average": {"kind": "momentum", "momentum": 0.8, "norm": True, "decoder": DECODER}}


def micro_batches(ranks: Ranks, made: Recipe, *, poison_last: bool) -> Iterator[ClipBatch]:
    """This rank's part of the global batches."""
    micro, accumulation = made.micro_batch_and_accumulation(ranks.world_size)
    for step in range(STEPS):
        whole = global_batch(step, poisoned=poison_last and step == STEPS - 1)
        for turn in range(accumulation):
            first = (ranks.rank * accumulation + turn) * micro
            yield whole.map(lambda tensor, first=first: tensor[first : first + micro])


def train(ranks: Ranks, made: Recipe, *, poison_last: bool = False, out: Path | None = None) -> dict[str, Any]:
    if poison_last:
        made = made.model_copy(update={"training": made.training.model_copy(update={"skip_nonfinite_steps": 0})})
    targets = build_targets(made, tiny_teacher)
    torch.manual_seed(0)
    parts = StudentParts(Student.from_recipe(made, targets), targets, made, make_placement(made, targets, ranks))
    (model,) = distillation_models([parts], ranks, steps_per_epoch=1)
    batches = TeacherPrefetcher(BatchLoader(micro_batches(ranks, made, poison_last=poison_last)))
    trainer, engine = Trainer([model], batches, made, ranks), model.engine
    averages = [average for average in model.averages if isinstance(average, ModelEma)]
    expected = encoder_weights(engine) if averages else {}
    losses, before = [], 0.0
    for step in range(STEPS):
        if poison_last and step == STEPS - 1:
            before = weight_sum(engine)
            with pytest.raises(UserError, match=rf"are not finite in '\w+' of step {step + 1}[;,]"):
                trainer.train_step()
            break
        total = torch.stack([micro.loss for micro in trainer.train_step()]).mean()
        for average in averages:
            decay = average.momentum(step)
            now = encoder_weights(engine)
            expected = {name: decay * old + (1 - decay) * now[name] for name, old in expected.items()}
        torch.distributed.all_reduce(total)
        losses.append(float(total) / ranks.world_size)
    return average_values(averages, expected, out, ranks) | {
        "losses": losses,
        "weights": weight_sum(engine),
        "weights_before_last_step": before,
        "skipped_steps": engine.skipped_steps,
        "moments": [kept.statistics.moments.tolist() for kept in running_statistics(targets, ranks)],
        "at_rest": {n: held_at_rest(t.teacher) for n, t in targets.items() if isinstance(t, FrozenTeacher)},
        "linear_untouched": nn.functional.linear is torch._C._nn.linear,
    }


def encoder_weights(engine: Any) -> dict[str, Tensor]:
    whole = {name.removeprefix("encoder."): full.double() for name, full in full_parameters(engine)}
    return {name: full for name, full in whole.items() if not name.startswith(("norm.", "decoders."))}


def average_values(
    averages: Sequence[ModelEma], expected: dict[str, Tensor], out: Path | None, ranks: Ranks
) -> dict[str, Any]:
    """How far an average is from the true one, whether its state is all of it, and how much of it lies here."""
    if not averages:
        return {}
    assert out is not None
    (average,) = averages
    average.save(out)
    torch.distributed.barrier()
    held = [share.clone() for share in average.shards]
    for pieces in average.state().values():
        for piece in pieces.tensors.values():
            piece.zero_()
    left = sum(float(share.abs().sum()) for share in average.shards)
    for share, before in zip(average.shards, held, strict=True):
        share.copy_(before)
    weights = load_file(ema_file(out, "average"))
    torch.distributed.barrier()
    return {
        "names": weights.keys() == expected.keys(),
        "error": max(float((weight - expected[name]).abs().max()) for name, weight in weights.items()),
        "left_out": left,
        "share": sum(share.numel() for share in average.shards),
        "whole": sum(weight.numel() for weight in weights.values()),
    }


def weight_sum(engine: Any) -> float:
    return sum(float(full.double().abs().sum()) for _, full in full_parameters(engine))


def main(out: Path) -> None:
    ranks = init_distributed("cpu", timeout_minutes=2)
    results: dict[str, Any] = {"threads": torch.get_num_threads()}
    if ranks.world_size == 4:
        for over in ("node", "world"):
            made = tiny_recipe("zero2", "fp32", "zero3", 2)
            teachers = made.teachers.model_copy(update={"shard_over": over})
            results[over] = train(ranks, made.model_copy(update={"teachers": teachers}))
        (out / f"rank{ranks.rank}.json").write_text(json.dumps(results))
        return destroy_distributed()
    for stage in ("zero1", "zero2", "zero3"):
        results[stage] = train(ranks, tiny_recipe(stage, "fp32", "zero3", 4))
    results["one micro batch after the other"] = train(ranks, tiny_recipe("zero2", "fp32", "zero3", 2))
    for again in ("block", "attention"):
        results[f"{again} again"] = train(ranks, tiny_recipe("zero3", "fp32", "zero3", 4, checkpointing=again))
    results["decoders together"] = train(ranks, tiny_recipe("zero2", "fp32", "zero3", 2, together=True))
    again = tiny_recipe("zero1", "fp32", "zero3", 4, checkpointing="block", together=True)
    results["decoders together, block again"] = train(ranks, again)
    results["replicated teachers"] = train(ranks, tiny_recipe("zero2", "fp32", "replicated", 4))
    # As many micro batches on one rank as on two: the first step standardises features by its own.
    results["standardised"] = train(ranks, tiny_recipe("zero2", "fp32", "zero3", 8, STANDARDISED))
    for stage, again in (("zero1", "none"), ("zero3", "none"), ("zero3", "block"), ("zero3", "attention")):
        made = tiny_recipe(stage, "fp32", "replicated", 4, DROPPED, again)
        results[f"dropped updates, {stage}, {again} again"] = train(ranks, made)
    for stage in ("zero1", "zero2", "zero3"):
        for sharding in ("zero3", "replicated"):
            made = tiny_recipe(stage, "fp32", sharding, 4, MOMENTUM)
            results[f"momentum, {stage}, {sharding}"] = train(ranks, made, out=out)
    # The rest is compared with one rank in float32, or with itself.
    for stage in ("zero1", "zero2", "zero3") if ranks.world_size > 1 else ():
        made = tiny_recipe(stage, "bf16", "zero3", 4, MOMENTUM)
        results[f"momentum, {stage}, bf16"] = train(ranks, made, out=out)
        results[f"bf16, {stage}"] = train(ranks, tiny_recipe(stage, "bf16", "zero3", 4))
        results[f"not finite, {stage}"] = train(ranks, tiny_recipe(stage, "fp32", "zero3", 4), poison_last=True)
    if ranks.world_size > 1:
        results["bf16, decoders together"] = train(ranks, tiny_recipe("zero2", "bf16", "zero3", 4, together=True))
    (out / f"rank{ranks.rank}.json").write_text(json.dumps(results))
    destroy_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
