"""The command `mvd-scale`: one thin function per subcommand."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import click

from mvd_scale import __version__
from mvd_scale.config.launcher import launched_rank
from mvd_scale.config.training import Precision
from mvd_scale.detection.commands import detect
from mvd_scale.errors import UserError
from mvd_scale.logs import configure

_recipe_command: dict[str, Any] = {"context_settings": {"ignore_unknown_options": True}}
_overrides = click.argument("overrides", nargs=-1, type=click.UNPROCESSED)


class Fraction(click.ParamType):
    """`3/64`: the third of 64."""

    name = "K/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """The two numbers."""
        number, _, count = str(value).partition("/")
        if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
            return int(number), int(count)
        self.fail(f"{value!r} is not K/N with 1 <= K <= N, such as 3/64", param, ctx)


class Bytes(click.ParamType):
    """`500MB`, `1GB`."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(value).strip(), re.IGNORECASE)
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is no size: expected a number and a unit, such as 500MB or 1GB", param, ctx)
        return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mvd-scale")
@click.option("--debug", is_flag=True, help="Show the traceback of errors.")
def cli(debug: bool) -> None:
    """Masked Video Distillation at scale."""


@cli.command(**_recipe_command)
@click.option("--recipe", required=True, help="A name of `mvd-scale recipes`, or the path of a YAML file.")
@_overrides
def pretrain(recipe: str, overrides: tuple[str, ...]) -> None:
    """Train what a recipe says; resume when its run folder holds checkpoints.

    OVERRIDES are dotted keys of the recipe: --training.epochs 3 --data.source videos/
    """
    from mvd_scale.config import load_recipe
    from mvd_scale.training.pretrain import pretrain as run
    from mvd_scale.training.resilience import exit_when_stopped

    with exit_when_stopped():
        run(load_recipe(recipe, list(overrides)))


@cli.command()
def recipes() -> None:
    """List the recipes that come with the package."""
    from mvd_scale.config import list_recipes

    names = list_recipes()
    width = max(map(len, names))
    for name, head in names.items():
        click.echo(f"{name:{width}}  {head}")


@cli.command()
def schema() -> None:
    """Print every key of a recipe with its type, default and meaning, as JSON Schema."""
    import json

    from mvd_scale.config import Recipe

    click.echo(json.dumps(Recipe.model_json_schema(), indent=2))


@cli.command()
def env() -> None:
    """Show what this machine can do, and why what is off is off."""
    from mvd_scale.capabilities import probe, table

    click.echo(table(probe()))


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/quickstart"), show_default=True)
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True, help="Processes of every stage.")
@click.option("--steps", type=click.IntRange(min=1), help="Stop every stage after so many steps.")
def quickstart(out: Path, ranks: int, steps: int | None) -> None:
    """Train two teachers on real clips, distil a student from both, fine-tune and test it: `pipeline quickstart`."""
    from mvd_scale.config.pipeline import TrainStage, load_pipeline
    from mvd_scale.pipeline import run_pipeline

    overrides = ["--folder", str(out), "--ranks", str(ranks)]
    if steps is not None:
        trained = [n for n, stage in load_pipeline("quickstart").stages.items() if isinstance(stage, TrainStage)]
        overrides += [f"--stages.{name}.recipe.training.max_steps={steps}" for name in trained]
    run_pipeline(load_pipeline("quickstart", overrides))
    click.echo(
        "Next: your own videos, with any recipe of `mvd-scale recipes`:\n"
        "  mvd-scale pretrain --recipe quickstart/video_teacher --run.folder runs/mine --data.source VIDEOS/"
    )


@cli.command(**_recipe_command)
@click.argument("file")
@_overrides
def pipeline(file: str, overrides: tuple[str, ...]) -> None:
    """Run the stages of a pipeline FILE in order: what is done is skipped, what was cut off goes on.

    FILE is a YAML file, or the name of one that comes with it: quickstart, synthetic, mvd_b. OVERRIDES are its dotted
    keys: --folder runs/mine --stages.student.recipe.training.max_steps 100
    """
    from mvd_scale.config.pipeline import load_pipeline
    from mvd_scale.pipeline import run_pipeline

    run_pipeline(load_pipeline(file, list(overrides)))


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--clips", type=click.IntRange(min=1), default=4, show_default=True, help="Clips to show.")
def draw(run: Path, clips: int) -> None:
    """Draw what a finished RUN predicts beside what is true: RUN/predictions.png."""
    from mvd_scale.evaluation.picture import draw_run

    click.echo(draw_run(run, clips=clips))


@cli.command(**_recipe_command)
@click.option("--recipe", required=True, help="A name of `mvd-scale recipes`, or the path of a YAML file.")
@_overrides
def finetune(recipe: str, overrides: tuple[str, ...]) -> None:
    """Teach a pre-trained encoder to name classes; resume when its run folder holds checkpoints.

    OVERRIDES are dotted keys of the recipe: --training.initial_encoder runs/mine/encoder.safetensors
    """
    from mvd_scale.config import load_finetuning
    from mvd_scale.training.finetune import finetune as run
    from mvd_scale.training.resilience import exit_when_stopped

    with exit_when_stopped():
        run(load_finetuning(recipe, list(overrides)))


@cli.command()
@click.argument("source")
@click.option("--encoder", type=click.Path(path_type=Path), required=True, help="Pre-trained weights.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Recipe to write (.yaml).")
@click.option("--validation", help="Labelled videos to test after every epoch.")
@click.option(
    "--folder", type=click.Path(path_type=Path), default=Path("runs/mine"), show_default=True, help="Of the run."
)
def propose(source: str, encoder: Path, out: Path, validation: str | None, folder: Path) -> None:
    """Write a recipe that fine-tunes an encoder on the labelled videos of SOURCE, after their number and length.

    SOURCE is a folder with a folder for each class, a csv of paths and labels, or whatever `data index` takes.
    """
    import tempfile

    from mvd_scale.checkpoints import read_checkpoint
    from mvd_scale.config.data import DataConfig
    from mvd_scale.data.index import open_source
    from mvd_scale.training.proposal import propose as settings
    from mvd_scale.training.run_folder import write_whole

    model = read_checkpoint(encoder).model
    with tempfile.TemporaryDirectory() as scratch:
        manifest = open_source(DataConfig(source=source), Path(scratch))
    proposal = settings(manifest, model, source=source, encoder=encoder, validation=validation, folder=folder)
    command = f"launch/single_node.sh finetune --recipe {out}"
    write_whole(out, proposal.to_yaml(command))
    click.echo(f"{out}: {proposal.title}\nStart it: {command}")


def _test_views(command: Any) -> Any:
    """Which views of a video a classifier is shown."""
    count = click.IntRange(min=1)
    for option in (
        click.option("--crops", type=count, help="Crops of a clip; likewise, or 3."),
        click.option("--clips", type=count, help="Clips in time; likewise, or 5."),
        click.option("--stride", type=count, help="Of dense: frames between frames; likewise, or 4."),
        click.option(
            "--sampling", type=click.Choice(["dense", "uniform"]), help="As the weights say if left out, or dense."
        ),
    ):
        command = option(command)
    return command


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for scores and figures.")
@_test_views
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, help="Videos decoded together.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="fp16 on GPUs, fp32 on CPUs.")
@click.option("--root", help="Folder or URL that the paths of a list start from.")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True)
@click.option("--report", "page", type=click.Path(path_type=Path), help="Also write `mvd-scale report` to this file.")
def evaluate(
    checkpoint: Path,
    source: str,
    out: Path,
    page: Path | None,
    batch: int,
    precision: Precision | None,
    root: str | None,
    device: str,
    **views: Any,
) -> None:
    """Test a fine-tuned CHECKPOINT on the videos of SOURCE by several views; started again after a kill, it goes on.

    5 x 3 dense views are published for Kinetics, UCF101 and HMDB51, 2 x 3 uniform ones for Something-Something.
    """
    from mvd_scale.config.data import DataConfig
    from mvd_scale.evaluation.evaluate import evaluate as test
    from mvd_scale.training.engine import join_ranks, leave_ranks

    ranks = join_ranks(device, timeout_minutes=10)
    tested = test(
        checkpoint,
        DataConfig(source=source, root=root),
        {name: value for name, value in views.items() if value is not None},
        out,
        ranks,
        batch=batch,
        precision=precision or ("fp16" if ranks.device.type == "cuda" else "fp32"),
        command=_command(),
    )
    leave_ranks()
    if ranks.first:
        click.echo(f"{tested.to_text()}\n{out}")
        if page is not None:
            _write_report(out, page)


@cli.command()
@click.argument("videos", nargs=-1, required=True, metavar="VIDEO...")
@click.option("--checkpoint", type=click.Path(path_type=Path), required=True, help="Fine-tuned weights, or their run.")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Classes to name.")
@_test_views
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="fp16 on GPUs, fp32 on CPUs.")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each video instead of text.")
def predict(videos: tuple[str, ...], checkpoint: Path, top: int, as_json: bool, **options: Any) -> None:
    """Name the most likely classes of each VIDEO, a file or URL; fewer views are faster: --clips 1 --crops 1."""
    from mvd_scale.evaluation.predict import load_classifier
    from mvd_scale.evaluation.predict import predict as name_classes

    for prediction in name_classes(load_classifier(checkpoint, **options), videos, top):
        click.echo(prediction.to_json() if as_json else prediction.to_text())


@cli.command()
@click.argument("tests", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="TEST...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for scores and figures.")
def ensemble(tests: tuple[Path, ...], out: Path) -> None:
    """Average the scores of several models, each a folder that `evaluate` wrote over the same videos."""
    from mvd_scale.evaluation.evaluate import merge_tests

    click.echo(f"{merge_tests(tests, out, _command()).to_text()}\n{out}")


@cli.command()
@click.argument("test", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Page to write; TEST/report.html if left out.")
@click.option("--hardest", type=click.IntRange(min=0), default=8, show_default=True, help="Videos shown of each kind.")
def report(test: Path, out: Path | None, hardest: int) -> None:
    """Write the report of a finished TEST as one page: figures, classes, and the hardest videos in pictures.

    TEST is a folder that `evaluate`, `ensemble` or `probe` wrote.
    """
    _write_report(test, test / "report.html" if out is None else out, hardest)


def _write_report(test: Path, page: Path, hardest: int = 8) -> None:
    from mvd_scale.evaluation.report import write_report

    write_report(test, page, hardest=hardest)
    click.echo(page)


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the shards of features.")
@click.option("--layer", type=click.IntRange(min=1), help="Block whose output is taken; the last if left out.")
@click.option(
    "--pool", type=click.Choice(["clip", "time", "none"]), default="clip", show_default=True,
    help="Mean over the tokens of a clip, of each time slice, or every token.",
)  # fmt: skip
@click.option("--norm/--no-norm", default=True, show_default=True, help="The final norm, after the last block.")
@click.option("--sampling", type=click.Choice(["dense", "uniform", "sliding"]), default="dense", show_default=True)
@click.option("--stride", type=click.IntRange(min=1), default=4, show_default=True, help="Frames between frames.")
@click.option("--every", type=click.IntRange(min=1), help="With sliding: frames between the starts of clips.")
@click.option("--clips", type=click.IntRange(min=1), default=1, show_default=True, help="Clips in time.")
@click.option("--crops", type=click.IntRange(min=1), default=1, show_default=True, help="Crops of a clip.")
@click.option(
    "--format", "kind", type=click.Choice(["safetensors", "parquet"]), default="safetensors", show_default=True
)
@click.option("--shard", type=click.IntRange(min=1), default=256, show_default=True, help="Videos of a shard.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Videos decoded together.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="fp16 on GPUs, fp32 on CPUs.")
@click.option("--root", help="Folder or URL that the paths of a list start from.")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True)
def features(
    checkpoint: Path,
    source: str,
    out: Path,
    layer: int | None,
    pool: Any,
    norm: bool,
    sampling: Any,
    stride: int,
    every: int | None,
    clips: int,
    crops: int,
    kind: Any,
    shard: int,
    batch: int,
    precision: Precision | None,
    root: str | None,
    device: str,
) -> None:
    """Write what the encoder of a CHECKPOINT makes of the videos of SOURCE; started again after a kill, it goes on.

    CHECKPOINT is in any format that `inspect` knows; SOURCE is a manifest or whatever `data index` takes. On several
    ranks: launch/single_node.sh features ...
    """
    from mvd_scale.config.data import DataConfig, ViewsConfig
    from mvd_scale.evaluation.features import FeatureOptions, write_features
    from mvd_scale.training.engine import join_ranks, leave_ranks

    if (every is not None) != (sampling == "sliding"):
        raise click.UsageError("--every goes with --sampling sliding, which needs it")
    views = ViewsConfig(sampling=sampling, stride=stride, every=every, clips=clips, crops=crops)
    ranks = join_ranks(device, timeout_minutes=10)
    written, failed = write_features(
        checkpoint,
        DataConfig(source=source, root=root),
        FeatureOptions(views, layer, pool, norm, kind, shard),
        out,
        ranks,
        batch=batch,
        precision=precision or ("fp16" if ranks.device.type == "cuda" else "fp32"),
    )
    leave_ranks()
    if ranks.first:
        note = f"; {failed} videos cannot be decoded, see {out / 'quarantine.jsonl'}" if failed else ""
        click.echo(f"{out}: features of {written} views{note}")


@cli.group()
def probe() -> None:
    """Judge a frozen encoder by a small classifier of its features, during pre-training or after it."""


def _command() -> str:
    """This very command line, to be kept with what it makes."""
    return shlex.join(["mvd-scale", *sys.argv[1:]])


def _probing(command: Any) -> Any:
    """What all probes take."""
    for option in (
        click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True),
        click.option("--root", help="Folder or URL that the paths of lists start from."),
        click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="fp16 on GPUs, fp32 on CPUs."),
        click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Videos read together."),
        click.option("--stride", type=click.IntRange(min=1), default=4, show_default=True, help="Of dense clips."),
        click.option("--sampling", type=click.Choice(["dense", "uniform"]), default="dense", show_default=True),
        click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for features and results."),
        click.option("--test", required=True, help="Labelled videos to be judged by."),
        click.option("--train", required=True, help="Labelled videos to learn from."),
        click.argument("checkpoint", type=click.Path(path_type=Path)),
    ):  # fmt: skip
        command = option(command)
    return command


@probe.command()
@_probing
@click.option("--neighbours", type=click.IntRange(min=1), default=20, show_default=True, help="Videos that vote.")
def knn(neighbours: int, **options: Any) -> None:
    """The vote of the nearest training videos, by the mean of all tokens."""
    from mvd_scale.evaluation.probing import by_neighbours

    _probe("knn", lambda _: by_neighbours(neighbours), **options)


@probe.command()
@_probing
@click.option("--decay", type=click.FloatRange(min=0), default=1e-3, show_default=True, help="L2 penalty.")
def linear(decay: float, **options: Any) -> None:
    """A linear layer on the mean of all tokens."""
    from mvd_scale.evaluation.probing import by_linear_layer

    _probe("linear", lambda _: by_linear_layer(decay), **options)


@probe.command()
@_probing
@click.option("--epochs", type=click.IntRange(min=1), default=20, show_default=True, help="Passes over the tokens.")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), default=1e-3, show_default=True)
def attentive(epochs: int, lr: float, **options: Any) -> None:
    """A single block of cross-attention to all tokens, which are kept in OUT: D x N x 2 or 4 bytes a video."""
    from mvd_scale.evaluation.probing import by_attention

    _probe("attentive", lambda where: by_attention(epochs, lr, where), **options)


def _probe(
    kind: Any,
    judge: Any,
    *,
    checkpoint: Path,
    train: str,
    test: str,
    out: Path,
    sampling: Any,
    stride: int,
    batch: int,
    precision: Precision | None,
    root: str | None,
    device: str,
) -> None:
    from mvd_scale.config.data import DataConfig, ViewsConfig
    from mvd_scale.evaluation.features import FeatureOptions
    from mvd_scale.evaluation.probing import probe as judge_encoder
    from mvd_scale.training.engine import join_ranks, leave_ranks

    ranks = join_ranks(device, timeout_minutes=10)
    tested = judge_encoder(
        checkpoint,
        kind,
        judge(ranks.device),
        DataConfig(source=train, root=root),
        DataConfig(source=test, root=root),
        FeatureOptions(ViewsConfig(sampling=sampling, stride=stride, clips=1, crops=1)),
        out,
        ranks,
        batch=batch,
        precision=precision or ("fp16" if ranks.device.type == "cuda" else "fp32"),
        command=_command(),
    )
    leave_ranks()
    if ranks.first:
        click.echo(f"{tested.to_text()}\n{tested.out}")


cli.add_command(detect)


@cli.group()
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


@data.command(**_recipe_command)
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Contact sheet to write (.png).")
@click.option("--recipe", default="distill/b_from_b", show_default=True, help="Recipe that says how clips are cut.")
@click.option("--clips", type=click.IntRange(min=1), default=6, show_default=True, help="Clips to show.")
@click.option("--moving", type=click.Path(path_type=Path), help="Also write the first clip as .gif or .mp4.")
@_overrides
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


@cli.group()
def bench() -> None:
    """Measure speed and memory on this machine."""


@bench.command(**_recipe_command)
@click.option("--recipe", default="distill/b_from_b", show_default=True, help="Recipe whose step is measured.")
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="fp16 on GPUs and fp32 on CPUs if left out."
)
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, help="Clips of a step.")
@click.option("--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Steps that are timed.")
@click.option("--methods", help="Instead of a recipe: all, or some methods of the paper, beside co-teaching.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@_overrides
def step(
    recipe: str,
    precision: Precision | None,
    batch: int,
    steps: int,
    methods: str | None,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Time one optimizer step by part: data, each teacher, student forward, backward, optimizer."""
    from mvd_scale.performance.step import measure_step

    if methods is not None:
        from mvd_scale.performance.methods import measure_methods

        words = ["--batch", str(batch), "--steps", str(steps), *overrides]
        table = measure_methods(methods, words if precision is None else [*words, "--precision", precision])
        click.echo(table.to_json() if as_json else table.to_text())
        return
    report = measure_step(recipe, list(overrides), precision=precision, batch=batch, steps=steps)
    if launched_rank() == 0:
        click.echo(report.to_json() if as_json else report.to_text())


@bench.command("data")
@click.argument("source", required=False)
@click.option("--workers", default="0,1,2", show_default=True, help="Worker processes to try.")
@click.option("--clips", type=click.IntRange(min=8), default=128, show_default=True, help="Clips timed for each way.")
@click.option("--large/--no-large", default=True, show_default=True, help="Also 1280x720, without SOURCE.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder that keeps the videos made; a temporary one.")
@click.option("--memory", type=click.IntRange(min=80), metavar="CLIPS", help="Instead: memory while drawing so many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def bench_data(
    source: str | None, workers: str, clips: int, large: bool, work: Path | None, memory: int | None, as_json: bool
) -> None:
    """Time the data path beside decord, torchcodec and PyAV over the same videos.

    SOURCE is a manifest or whatever `data index` takes; without it, real pictures are encoded into clips of 10 s.
    """
    import tempfile

    from mvd_scale.performance.data import measure_data, measure_memory

    if not re.fullmatch(r"\d+(,\d+)*", workers):
        raise click.BadParameter(f"{workers!r} is no list of numbers such as 0,1,2", param_hint="--workers")
    with tempfile.TemporaryDirectory() as scratch:
        folder = work or Path(scratch)
        if memory is not None:
            for drawn, mib in measure_memory(source, folder, memory):
                click.echo(f"{drawn:>8} clips  {mib:8.1f} MiB")
            return
        report = measure_data(
            source, folder, workers=[int(count) for count in workers.split(",")], clips=clips, large=large
        )
        click.echo(report.to_json() if as_json else report.to_text())


@bench.command("eval")
@click.argument("source", required=False)
@click.option("--videos", type=click.IntRange(min=1), default=12, show_default=True, help="Videos timed for each way.")
@click.option(
    "--size", type=click.Choice(["none", "S", "B", "L", "H"]), default="S", show_default=True,
    help="Classifier of the whole test; none times the loading of the views alone.",
)  # fmt: skip
@click.option("--workers", type=click.IntRange(min=0), help="Worker processes; the number of cores if left out.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder that keeps the videos made; a temporary one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def bench_eval(
    source: str | None, videos: int, size: str, workers: int | None, work: Path | None, as_json: bool
) -> None:
    """Time the test by 5 x 3 views beside plain ways, which decode a video anew for every view or clip.

    SOURCE is a manifest or whatever `data index` takes; without it, real pictures are encoded into clips of 10 s.
    """
    import tempfile

    from mvd_scale.performance.testing import measure_testing

    with tempfile.TemporaryDirectory() as scratch:
        report = measure_testing(
            source,
            work or Path(scratch),
            videos=videos,
            size=None if size == "none" else size,
            workers=len(os.sched_getaffinity(0)) if workers is None else workers,
        )
        click.echo(report.to_json() if as_json else report.to_text())


def _hints(command: Any) -> Any:
    """Options for what a checkpoint of weights does not tell itself."""
    count = click.IntRange(min=1)
    tables = click.Choice(["sincos3d", "sinusoid", "sincos2d"])
    for option in (
        click.option("--positions", type=tables, help="Position table it was trained with, where it holds none."),
        click.option("--input-size", type=count, help="Side of the crop it shall take; its own if left out."),
        click.option("--frames", type=count, help="Frames it shall take; its own if left out."),
        click.option("--decoder-heads", type=count, help="Heads of its decoders; by their width if left out."),
        click.option("--heads", type=count, help="Heads of its encoder; by its width if left out."),
    ):
        command = option(command)
    return command


@cli.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--as",
    "role",
    type=click.Choice(["image_teacher", "video_teacher", "student", "classifier"]),
    required=True,
    help="What it shall be here.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write (.safetensors).")
@click.option("--tubelet", type=click.IntRange(min=1), help="Make a video model of an image model: frames per token.")
@_hints
def import_weights(source: Path, role: Any, out: Path, tubelet: int | None, **hints: Any) -> None:
    """Bring published weights (MAE, VideoMAE, MVD, timm, Hugging Face) or a run of ours into one file of ours."""
    from mvd_scale.checkpoints import Hints, adapt, describe, import_checkpoint, read_checkpoint

    if tubelet is None:
        checkpoint = read_checkpoint(source, Hints(**hints))
    else:
        # Frames count after the image became a clip.
        frames = hints.pop("frames")
        checkpoint = adapt(read_checkpoint(source, Hints(**hints)), frames=frames, tubelet=tubelet)
    import_checkpoint(checkpoint, role, out)
    click.echo(f"{out}:\n{describe(read_checkpoint(out))}")


@cli.command("export")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "family",
    type=click.Choice(["videomae", "mvd", "mae", "timm", "hf", "torch", "onnx"]),
    required=True,
    help="Whose form; torch and onnx: a classifier as a program.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help=".pth, .safetensors, or a folder for hf; .pt2 for torch, .onnx for onnx.",
)
@_hints
def export_weights(source: Path, family: str, out: Path, **hints: Any) -> None:
    """Write the weights of a run folder or file in the form that other tools expect.

    Programs take clips, uint8 (batch, frames, size, size, 3), and give their softmax, float32 (batch, classes).
    """
    from mvd_scale.checkpoints import Hints, export_checkpoint, read_checkpoint

    checkpoint = read_checkpoint(source, Hints(**hints))
    export_checkpoint(checkpoint, family, out)
    click.echo(f"{out}: {checkpoint.kind} in the form of {family}")


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@_hints
def inspect(file: Path, **hints: Any) -> None:
    """Say what a checkpoint is: format, shape, decoders, classes, and what is wrong with it."""
    from mvd_scale.checkpoints import Hints, describe, read_checkpoint

    click.echo(describe(read_checkpoint(file, Hints(**hints))))


@bench.command()
@click.option("--size", type=click.Choice(["S", "B", "L", "H"]), default="H", show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def load(size: str, precision: Precision, device: str, as_json: bool) -> None:
    """Time the loading of a teacher into ZeRO-3 shards and measure its memory; start it on several ranks."""
    from mvd_scale.performance.load import measure_load

    report = measure_load(size, precision, device)
    if launched_rank() == 0:
        click.echo(report.to_json() if as_json else report.to_text())


def main() -> None:
    """Entry point: user errors are one message and exit code 2; `--debug` adds the traceback."""
    debug = "--debug" in sys.argv
    if debug:
        # Accepted anywhere on the line.
        sys.argv = [sys.argv[0], "--debug", *(word for word in sys.argv[1:] if word != "--debug")]
    configure()
    try:
        cli(prog_name="mvd-scale")
    except (UserError, OSError) as error:
        if debug:
            raise
        _speak_once()
        click.echo(f"mvd-scale: {error}", err=True)
        sys.exit(2)


def _speak_once() -> None:
    """Let rank 0 say an error that all ranks share: its exit makes the launcher end the others before they speak."""
    if launched_rank():
        time.sleep(5)
