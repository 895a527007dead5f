"""`mvd-scale data`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from mvd_scale.cli.options import WITH_OVERRIDES, Bytes, Fraction, overrides_argument


@click.group()
def data() -> None:
    """Videos and manifests."""


_manifest_out = click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Manifest to write (.parquet)."
)


@data.command()
@click.argument("sources", nargs=-1, required=True, metavar="SRC...")
@_manifest_out
@click.option("--root", help="Folder or URL that the paths of a list start from; the list's own if left out.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes; the number of cores if left out.")
@click.option("--part", type=Fraction(), help="Only a part of the videos, such as 3/64; `data merge` unites them.")
@click.option("--verify", is_flag=True, help="Decode the first, middle and last frame of every video.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=60.0, show_default=True, help="Seconds per video.")
@click.option("--split", type=click.Choice(["train", "validation", "test"]), help="Of a list that holds several.")
@click.option("--fold", type=click.IntRange(1, 3), default=1, show_default=True, help="Of HMDB51's three.")
@click.option("--classes", help="File with the names of the classes: classInd.txt, labels.json.")
def index(
    sources: tuple[str, ...],
    out: Path,
    root: str | None,
    workers: int | None,
    part: tuple[int, int] | None,
    verify: bool,
    timeout: float,
    split: str | None,
    fold: int,
    classes: str | None,
) -> None:
    """Probe every video of some sources once and write a manifest; started again after a kill, it goes on.

    SRC is a folder, a quoted glob, a list (`path label` lines, a csv with a header, or an official list of Kinetics,
    Something-Something, UCF101 or HMDB51), a tar file, or an fsspec URL of one of these.
    """
    from mvd_scale.data.index import Probing, build_manifest
    from mvd_scale.data.listing import ListOptions

    journal = out.with_name(f".{out.name}.journal")
    manifest = build_manifest(
        sources,
        workers=workers or len(os.sched_getaffinity(0)),
        options=ListOptions(root, classes, split, fold),
        probing=Probing(timeout, verify),
        part=part,
        journal=journal,
    )
    manifest.save(out)
    journal.unlink()
    click.echo(f"{out}: {len(manifest)} videos, {len(manifest) - len(manifest.usable)} left out")


@data.command()
@click.argument("parts", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PART...")
@_manifest_out
def merge(parts: tuple[Path, ...], out: Path) -> None:
    """Unite the manifests of all parts of a source."""
    from mvd_scale.data.index import merge as unite
    from mvd_scale.data.manifest import Manifest

    manifest = unite([Manifest.load(part) for part in parts])
    manifest.save(out)
    click.echo(f"{out}: {len(manifest)} videos, {len(manifest) - len(manifest.usable)} left out")


@data.command()
@click.argument("manifest")
@click.option("--png", type=click.Path(path_type=Path), help="Picture to draw.")
def stats(manifest: str, png: Path | None) -> None:
    """Say what a MANIFEST holds: classes, codecs, lengths, sizes, and what was left out and why."""
    from mvd_scale.data.manifest import Manifest
    from mvd_scale.data.statistics import Statistics

    statistics = Statistics.of(Manifest.load(manifest))
    click.echo(statistics.to_text())
    if png is not None:
        statistics.draw(png)
        click.echo(f"\n{png}")


@data.command()
@click.argument("manifest")
@click.option("--out", required=True, help="Folder or fsspec URL for the shards and their manifest.")
@click.option("--size", type=Bytes(), default="1GB", show_default=True, help="Bytes of a shard.")
@click.option("--encode", type=click.Choice(["h264", "hevc", "vp9", "av1"]), help="Encode every video anew.")
@click.option("--short-side", type=click.IntRange(min=16), help="With --encode: shrink to this many pixels.")
@click.option("--keyframes", type=click.IntRange(min=1), help="With --encode: frames between keyframes; 16.")
@click.option("--quality", type=click.IntRange(0, 63), help="With --encode: constant rate factor; lower is better.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes; the number of cores if left out.")
def shard(
    manifest: str,
    out: str,
    size: int,
    encode: Any,
    short_side: int | None,
    keyframes: int | None,
    quality: int | None,
    workers: int | None,
) -> None:
    """Pack the videos of a MANIFEST into tar shards, and write OUT/manifest.parquet that points into them.

    Started again after a kill, it goes on with the next shard.
    """
    from mvd_scale.data.manifest import Manifest
    from mvd_scale.data.reencode import Encoding
    from mvd_scale.data.shards import save_manifest, shard_videos

    encoding = None
    if encode is not None:
        encoding = Encoding(encode, short_side, keyframes or 16, quality)
    elif (short_side, keyframes, quality) != (None, None, None):
        raise click.UsageError("--short-side, --keyframes and --quality go with --encode")
    packed = shard_videos(
        Manifest.load(manifest), out, size=size, workers=workers or len(os.sched_getaffinity(0)), encoding=encoding
    )
    click.echo(f"{save_manifest(packed, out)}: {len(packed.usable)} videos in shards")


@data.command(context_settings=WITH_OVERRIDES)
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Contact sheet to write (.png).")
@click.option("--recipe", default="distill/b_from_b", show_default=True, help="Recipe that says how clips are cut.")
@click.option("--clips", type=click.IntRange(min=1), default=6, show_default=True, help="Clips to show.")
@click.option("--moving", type=click.Path(path_type=Path), help="Also write the first clip as .gif or .mp4.")
@overrides_argument
def preview(source: str, out: Path, recipe: str, clips: int, moving: Path | None, overrides: tuple[str, ...]) -> None:
    """Draw clips of SOURCE (a manifest, or whatever `data index` takes) as the student sees them.

    OVERRIDES are dotted keys of the recipe: --data.copies 2 --data.mask.ratio 0.75
    """
    import tempfile

    from mvd_scale.config import load_recipe
    from mvd_scale.evaluation.preview import preview as draw_preview

    loaded = load_recipe(recipe, [*overrides, "--data.source", source])
    with tempfile.TemporaryDirectory() as scratch:
        replaced = draw_preview(loaded, out, clips=clips, moving=moving, scratch=Path(scratch))
    note = f", {replaced} of the clips replaced because their videos cannot be decoded" if replaced else ""
    click.echo(f"{out}{f' and {moving}' if moving else ''}{note}")


@data.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the clips.")
def samples(out: Path) -> None:
    """Cut the real videos of the `samples` extra into short clips."""
    from mvd_scale.data.samples import make_samples

    click.echo(make_samples(out))


@data.command()
@click.option("--kind", type=click.Choice(["appearance", "motion"]), required=True, help="What the label is.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for train/ and test/.")
@click.option("--train", type=click.IntRange(min=1), default=100, show_default=True, help="Videos of a class.")
@click.option("--test", type=click.IntRange(min=1), default=25, show_default=True, help="Videos of a class.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def synth(kind: Any, out: Path, train: int, test: int, seed: int) -> None:
    """Make labelled videos of real textures: the label lies in what is seen, or in how it moves, and nowhere else."""
    from mvd_scale.data.synth import make_synthetic

    click.echo(make_synthetic(kind, out, train=train, test=test, seed=seed))
