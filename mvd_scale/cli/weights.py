"""Commands for files of weights: `import`, `export`, `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mvd_scale.cli.options import shape_options


@click.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--as",
    "role",
    type=click.Choice(["image_teacher", "video_teacher", "student", "classifier"]),
    required=True,
    help="Role of the imported weights.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write (.safetensors).")
@click.option(
    "--tubelet",
    type=click.IntRange(min=1),
    help="Inflate an image model to a video model with this many frames per token.",
)
@shape_options
def import_weights(source: Path, role: Any, out: Path, tubelet: int | None, **hints: Any) -> None:
    """Convert published weights (MAE, VideoMAE, MVD, timm, Hugging Face) or a run of this package into one file.

    SOURCE is a file or a run folder; the result is in the format of this package.
    """
    from mvd_scale.checkpoints import Hints, adapt, describe_checkpoint, import_checkpoint, read_checkpoint

    if tubelet is None:
        checkpoint = read_checkpoint(source, Hints(**hints))
    else:
        # --frames applies to the inflated model: the image model itself is read with its own frames.
        frames = hints.pop("frames")
        checkpoint = adapt(read_checkpoint(source, Hints(**hints)), frames=frames, tubelet=tubelet)
    import_checkpoint(checkpoint, role, out)
    click.echo(f"{out}:\n{describe_checkpoint(read_checkpoint(out))}")


@click.command("export")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "family",
    type=click.Choice(["videomae", "mvd", "mae", "timm", "hf", "hub", "torch", "onnx"]),
    required=True,
    help="Format to write: hf is for transformers, hub for mvd_scale.from_pretrained, each a folder with a model card; "
    "torch and onnx write a classifier as a program.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="File to write: .pth or .safetensors; a folder for hf and hub; .pt2 for torch; .onnx for onnx.",
)
@click.option(
    "--licence", default="unknown", show_default=True,
    help="Licence of the weights in the model card of hf and hub, by its name on the hub, such as cc-by-nc-4.0.",
)  # fmt: skip
@shape_options
def export_weights(source: Path, family: str, out: Path, licence: str, **hints: Any) -> None:
    """Write the weights of SOURCE, a run folder or a file, in the format of another tool.

    hf and hub write a folder with a model card, README.md, of what the run folder of SOURCE tells. hf is for
    transformers, of models with its positions; hub is for mvd_scale.from_pretrained, of any model.

    A program (torch, onnx) takes clips, uint8 (batch, frames, size, size, 3), and returns softmax probabilities,
    float32 (batch, classes).
    """
    from mvd_scale.checkpoints import Hints, export_checkpoint, read_checkpoint

    checkpoint = read_checkpoint(source, Hints(**hints))
    export_checkpoint(checkpoint, family, out, licence=licence)
    click.echo(f"{out}: {checkpoint.kind} in the format of {family}")


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@shape_options
def inspect(file: Path, **hints: Any) -> None:
    """Print the properties of a checkpoint FILE: format, shape, decoders, classes, and faults."""
    from mvd_scale.checkpoints import Hints, describe_checkpoint, read_checkpoint

    click.echo(describe_checkpoint(read_checkpoint(file, Hints(**hints))))
