"""Teachers' features standardised by running statistics: by hand, by ranks and micro batches, and when resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mvd_scale.analysis import clip_rows
from mvd_scale.checkpoints.native import save_weights
from mvd_scale.checkpoints.tensor_folder import complete_description, load_pieces, save_pieces
from mvd_scale.data.batch import ClipBatch
from mvd_scale.distributed.health.progress import Progress
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.models import Student
from mvd_scale.targets import MaskedDistillation, build_targets
from mvd_scale.targets.build import load_targets
from mvd_scale.targets.load import build_ema_encoder, ema_file
from mvd_scale.targets.statistics import FeatureStatistics
from mvd_scale.training.checkpointing.pieces import PiecesLoadPlanner, PiecesSavePlanner
from mvd_scale.training.teachers.statistics import RunningStatistics, running_statistics

from .test_targets import VIDEO, batch, recipe, teacher  # noqa: F401

ALONE = Ranks(0, 0, 1, torch.device("cpu"))


def statistics(channels: int, momentum: float = 0.9, **options: Any) -> FeatureStatistics:
    return FeatureStatistics(channels, momentum, **{"layers": 1, "each_channel": True, **options})


def features(step: int, rows: int = 6, channels: int = 3) -> Tensor:
    drawn = torch.randn(rows, 4, channels, generator=torch.Generator().manual_seed(step))
    return drawn * torch.tensor([1.0, 10.0, 100.0][:channels]) + 5


def test_the_first_step_is_standardised_by_itself_and_the_next_by_it() -> None:
    """Two channels of two values: means 2 and 20, deviations 1 and 10."""
    made = statistics(2)
    first = torch.tensor([[[1.0, 10.0], [3.0, 30.0]]])
    torch.testing.assert_close(made.observe(first), torch.tensor([[[-1.0, -1.0], [1.0, 1.0]]]))
    made.update()
    assert made.moments.tolist() == [[2, 20], [5, 500]]
    torch.testing.assert_close(made.observe(torch.tensor([[[4.0, 0.0]]])), torch.tensor([[[2.0, -2.0]]]))
    made.update()
    # 0.9 of the old moments and 0.1 of 4, 16 and of 0, 0.
    torch.testing.assert_close(made.moments, torch.tensor([[2.2, 18.0], [6.1, 450.0]], dtype=torch.float64))


def test_one_deviation_of_each_layer_keeps_the_proportions_of_channels() -> None:
    """Variances 1 and 49 in the first layer, 25 in the second: divided by 5 both."""
    made = statistics(4, layers=2, each_channel=False)
    given = torch.tensor([[[-1.0, 7.0, 5.0, 15.0], [1.0, -7.0, -5.0, 5.0]]])
    expected = torch.tensor([[[-0.2, 1.4, 1.0, 1.0], [0.2, -1.4, -1.0, -1.0]]])
    torch.testing.assert_close(made.observe(given), expected)


def test_micro_batches_and_ranks_do_not_change_the_statistics() -> None:
    """After each step they are those of one rank with one micro batch, and equal on both ranks."""
    whole = statistics(3)
    ranks = [statistics(3), statistics(3)]
    for step in range(3):
        given = features(step)
        whole.observe(given)
        whole.update()
        for rank, part in zip(ranks, given.chunk(2), strict=True):
            # Reduced by hand below.
            for micro in part.split([1, 2]):
                rank.observe(micro)
        total = ranks[0]._sums + ranks[1]._sums
        for rank in ranks:
            rank.reduce = lambda tensor, total=total: tensor.copy_(total)
            rank.update()
            rank.reduce = lambda tensor: None
        assert torch.equal(ranks[0].moments, ranks[1].moments)
        torch.testing.assert_close(ranks[0].moments, whole.moments, rtol=1e-6, atol=0)


def test_the_first_micro_batch_is_standardised_by_all_ranks() -> None:
    made = statistics(1)
    other = torch.tensor([4.0, 16.0, 1.0], dtype=torch.float64)
    made.reduce = lambda sums: sums.add_(other)
    # 0 here and 4 on the other rank: mean 2, deviation 2.
    torch.testing.assert_close(made.observe(torch.zeros(1, 1, 1)), torch.tensor([[[-1.0]]]))


def test_a_mean_that_is_much_larger_than_the_deviation() -> None:
    made = statistics(2)
    drawn = torch.randn(8, 100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = (drawn + torch.tensor([3.0e4, -2.0e3])).float()
    exact = given.double()
    expected = ((exact - exact.mean((0, 1))) / exact.std((0, 1), correction=0)).float()
    torch.testing.assert_close(made.observe(given), expected, rtol=1e-5, atol=1e-5)
    made.update()
    torch.testing.assert_close(made.standardize(given), expected, rtol=1e-5, atol=1e-5)


def test_features_of_a_step_that_changed_no_weight_are_forgotten() -> None:
    """A resumed run never saw them."""
    run, resumed = statistics(3), statistics(3)
    run.observe(features(0))
    RunningStatistics("it", run, ALONE).skip()
    for made in (run, resumed):
        made.observe(features(1))
        made.update()
    assert torch.equal(run.moments, resumed.moments)


def test_a_first_step_without_finite_features_leaves_the_next_one_to_itself() -> None:
    made, fresh = statistics(3), statistics(3)
    made.observe(features(0) * float("inf"))
    made.update()
    assert not made.known
    assert torch.equal(made.standardize(features(1)), features(1))
    assert torch.equal(made.observe(features(1)), fresh.observe(features(1)))
    made.update()
    fresh.update()
    assert made.known
    assert torch.equal(made.moments, fresh.moments)


def test_features_that_are_not_finite_do_not_count() -> None:
    made = statistics(3)
    made.observe(features(0))
    made.update()
    before = made.moments.clone()
    made.observe(features(1).fill_(float("inf")))
    made.update()
    assert torch.equal(made.moments, before)
    made.observe(features(1))
    made.observe(features(1) * float("nan"))
    made.update()
    assert torch.isfinite(made.moments).all()
    assert not torch.equal(made.moments, before)


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """By the pieces of a checkpoint, of which one rank writes all, and by the file of a finished run."""
    run, resumed = statistics(3), statistics(3)
    saved = RunningStatistics("it", run, ALONE)
    for step in range(2):
        run.observe(features(step))
        saved.update(step)
    assert saved.share_of_state().keys() == saved.state().keys() == {"statistics.it"}
    assert not RunningStatistics("it", run, Ranks(1, 1, 1, ALONE.device)).share_of_state()["statistics.it"].tensors
    save_pieces(saved.share_of_state(), tmp_path, PiecesSavePlanner(Progress()), rank=0)
    complete_description(tmp_path, ranks=1)
    other = RunningStatistics("it", resumed, ALONE)
    load_pieces(other.state(), tmp_path, PiecesLoadPlanner())
    other.publish()
    assert torch.equal(run.observe(features(2)), resumed.observe(features(2)))
    run.update()
    resumed.update()
    assert torch.equal(run.moments, resumed.moments)

    saved.save(tmp_path)
    drawn = recipe(it={"kind": "momentum", "standardize": "channel"})
    save_weights(ema_file(tmp_path, "it"), build_ema_encoder(drawn).state_dict(), drawn.model)
    (loaded,) = load_targets(drawn, tmp_path).values()
    assert torch.equal(loaded.statistics.moments, run.moments)  # type: ignore[attr-defined]
    assert loaded.statistics.known  # type: ignore[attr-defined]


@pytest.mark.parametrize("ahead", [False, True])
def test_the_loss_is_that_of_standardised_features(batch: ClipBatch, ahead: bool) -> None:  # noqa: F811
    made = recipe(video={"kind": "video_teacher", "standardize": "channel", "distance": "l2", "visible_weight": 0.5})
    model = teacher(**VIDEO)
    targets = build_targets(made, lambda _: model)
    objective, student = MaskedDistillation(targets), Student.from_recipe(made, targets)
    (average,) = running_statistics(targets, ALONE)
    given = objective.prefetch_features(batch) if ahead else batch
    raw = targets["video"].raw_features(batch).double()
    mean, deviation = raw.mean((0, 1)), raw.std((0, 1), correction=0)
    expected = (raw - mean) / (deviation.square() + 1e-6).sqrt()
    predictions = student(batch.pixels, batch.visible, batch.masked)["video"].double()
    for _ in range(2):
        loss, _ = objective(student, given)
        seen, hidden = ((predictions - expected).square()).split(4, dim=1)
        torch.testing.assert_close(loss.double(), hidden.mean() + 0.5 * seen.mean(), rtol=1e-4, atol=1e-5)
        average.update(0)
    torch.testing.assert_close(targets["video"].features(batch).double(), expected, rtol=1e-3, atol=1e-4)


def test_features_are_scaled_once() -> None:
    with pytest.raises(ValidationError, match="norm and standardize channel both scale the features"):
        recipe(video={"kind": "video_teacher", "norm": True, "standardize": "channel"})


def test_a_momentum_without_statistics_is_refused() -> None:
    with pytest.raises(ValidationError, match="standardize_momentum has no effect with `standardize: none`"):
        recipe(video={"kind": "video_teacher", "standardize_momentum": 0.5})
    made = recipe(video={"kind": "video_teacher", "standardize": "layer"})
    (target,) = build_targets(made, lambda _: teacher(**VIDEO)).values()
    assert target.statistics.momentum == 0.99  # type: ignore[attr-defined]


def test_an_analysis_standardises_on_the_device_of_its_clips(batch: ClipBatch, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    made = recipe(video={"kind": "video_teacher", "standardize": "layer"})
    target = build_targets(made, lambda _: teacher(**VIDEO))["video"]
    moved: list[torch.device] = []
    monkeypatch.setattr(target.statistics, "to", moved.append)
    clip_rows._truth(target, batch)
    assert moved == [batch.pixels.device]
