"""Command `mvd-scale probe`: evaluation of a frozen encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mvd_scale.cli.options import command_line, device_option, positions_option
from mvd_scale.config.training import Precision


@click.group()
def probe() -> None:
    """Evaluate a frozen encoder by a small classifier on its features."""


def _probing(command: Any) -> Any:
    """Add the arguments and options that all probes share."""
    for option in (
        device_option,
        click.option("--root", help="Folder or URL to which the paths of lists are relative."),
        click.option(
            "--precision", type=click.Choice(["fp32", "bf16", "fp16"]),
            help="Precision of the encoder; fp16 on GPUs and fp32 on CPUs if omitted.",
        ),
        click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Videos per batch."),
        click.option(
            "--stride", type=click.IntRange(min=1), default=4, show_default=True,
            help="For dense sampling, frames from one sampled frame to the next.",
        ),
        click.option(
            "--sampling", type=click.Choice(["dense", "uniform"]), default="dense", show_default=True,
            help="Sampling of the clip of each video.",
        ),
        click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for features and results."),
        click.option("--test", required=True, help="Labelled videos to test the classifier on."),
        click.option("--train", required=True, help="Labelled videos to fit the classifier to."),
        positions_option,
        click.argument("checkpoint", type=click.Path(path_type=Path)),
    ):  # fmt: skip
        command = option(command)
    return command


@probe.command()
@_probing
@click.option(
    "--neighbours", type=click.IntRange(min=1), default=20, show_default=True, help="Number of videos that vote."
)
def knn(neighbours: int, **options: Any) -> None:
    """Classify by a vote of the nearest training videos, by the cosine similarity of the mean of all tokens."""
    from mvd_scale.evaluation.frozen_probe import knn_probe

    _probe(lambda _: knn_probe(neighbours), **options)


@probe.command()
@_probing
@click.option("--decay", type=click.FloatRange(min=0), default=1e-3, show_default=True, help="L2 penalty.")
def linear(decay: float, **options: Any) -> None:
    """Classify by a linear layer on the mean of all tokens."""
    from mvd_scale.evaluation.frozen_probe import linear_probe

    _probe(lambda _: linear_probe(decay), **options)


@probe.command()
@_probing
@click.option("--epochs", type=click.IntRange(min=1), default=20, show_default=True, help="Number of epochs.")
@click.option(
    "--lr", type=click.FloatRange(min=0, min_open=True), default=1e-3, show_default=True, help="Peak learning rate."
)
def attentive(epochs: int, lr: float, **options: Any) -> None:
    """Classify by one block of cross-attention to all tokens.

    The tokens are stored in OUT: D x N values of 2 or 4 bytes per video.
    """
    from mvd_scale.evaluation.frozen_probe import attentive_probe

    _probe(lambda where: attentive_probe(epochs, lr, where), **options)


def _probe(
    classify: Any,
    *,
    checkpoint: Path,
    train: str,
    test: str,
    out: Path,
    sampling: Any,
    stride: int,
    batch: int,
    precision: Precision | None,
    positions: Any,
    root: str | None,
    device: str,
) -> None:
    from mvd_scale.config.data import DataConfig, ViewsConfig
    from mvd_scale.distributed.process_group import destroy_distributed, init_distributed
    from mvd_scale.evaluation.features import FeatureOptions
    from mvd_scale.evaluation.frozen_probe import ProbedEncoder, run_probe
    from mvd_scale.models.precision import usual_precision

    ranks = init_distributed(device, timeout_minutes=10)
    tested = run_probe(
        ProbedEncoder(checkpoint, precision or usual_precision(ranks.device), batch, positions),
        classify(ranks.device),
        DataConfig(source=train, root=root),
        DataConfig(source=test, root=root),
        FeatureOptions(ViewsConfig(sampling=sampling, stride=stride, clips=1, crops=1)),
        out,
        ranks,
        command=command_line(),
    )
    destroy_distributed()
    if ranks.is_main:
        click.echo(f"{tested.to_text()}\n{tested.out}")
