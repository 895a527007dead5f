"""Preview of a recipe's clips as the student sees them: a contact sheet, and an animation of one clip.

Legend: B clips, T frames, H W pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mvd_scale.config import ModelConfig, Recipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.data.indexing.build import load_source
from mvd_scale.data.loaders.clip_loader import BatchPlan, ClipLoader
from mvd_scale.data.manifest import Manifest
from mvd_scale.data.sampling.sampler import ClipPlan, Sampler
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.visualization.moving import check_moving, write_moving

_SHOWN = 8
"""Frames per clip on a contact sheet."""

_HIDDEN = 110
"""Grey level of hidden patches."""

Frames = NDArray[np.uint8]


def preview(recipe: Recipe, out: Path, *, clips: int, moving: Path | None, scratch: Path) -> int:
    """Draw the first clips of a recipe's training stream.

    Args:
        recipe: gives data, model and seed.
        out: PNG to write.
        clips: number of clips to show, copies included.
        moving: GIF or MP4 to write of the first clip, unmasked beside masked; None for none.
        scratch: folder for the manifest if the source must be indexed.

    Returns:
        number of clips that were replaced because their videos cannot be decoded.

    Raises:
        UserError: `moving` has another suffix, or the source cannot be read.
    """
    if moving is not None:
        check_moving(moving)
    copies = recipe.data.copies
    clips = -(-clips // copies) * copies
    manifest = load_source(recipe.data, scratch)
    repeats = -(-clips // (len(manifest.usable) * copies))
    data = recipe.data.model_copy(update={"clips_per_video": max(recipe.data.clips_per_video, repeats), "workers": 0})
    rank = DataRank(torch.device("cpu"))
    loader = ClipLoader(manifest, data, recipe.model, recipe.seed, plan=BatchPlan.one_batch(clips), rank=rank)
    with loader:
        batch = next(loader)
    sampler = Sampler(manifest, data, recipe.model, recipe.seed)
    plans = [sampler.plan(0, draw) for draw in range(clips // copies)]
    _draw_sheet(batch, manifest, plans, recipe, out)
    if moving is not None:
        _write_moving(batch, recipe.model, moving)
    return loader.substituted


def mask_clip(pixels: Frames, visible: NDArray[np.int64], model: ModelConfig) -> Frames:
    """Paint the hidden patches of a clip grey.

    Args:
        pixels: uint8 (T, H, W, 3).
        visible: indices of the visible tokens, time-major, int64 (V,).
        model: gives the token grid.

    Returns:
        uint8 (T, H, W, 3).
    """
    tokens = np.ones(int(np.prod(model.grid)), bool)
    tokens[visible] = False
    hidden = tokens.reshape(model.grid)
    for axis, size in enumerate((model.tubelet, model.patch_size, model.patch_size)):
        hidden = hidden.repeat(size, axis)
    return np.where(hidden[..., None], np.uint8(_HIDDEN), pixels)


def _draw_sheet(batch: ClipBatch, manifest: Manifest, plans: list[ClipPlan], recipe: Recipe, out: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    frames = np.unique(np.linspace(0, recipe.model.frames - 1, min(_SHOWN, recipe.model.frames)).round().astype(int))
    clips, copies, width = len(batch.pixels), recipe.data.copies, 1.35
    text_width = 2.5
    figure = Figure(figsize=(width * len(frames) + text_width + 0.2, clips * (2 * width + 0.25) + 0.45))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        clips, 2, width_ratios=(text_width, width * len(frames)), wspace=0.02, hspace=0.07,
        left=0.01, right=0.995, top=1 - 0.4 / figure.get_figheight(), bottom=0.1 / figure.get_figheight(),
    )  # fmt: skip
    for clip in range(clips):
        pixels = batch.pixels[clip].numpy()
        seen = mask_clip(pixels, batch.visible[clip].numpy(), recipe.model)
        axis = figure.add_subplot(grid[clip, 1])
        # A thin white line separates frames, and the row of full frames from the row of masked frames.
        rows = [np.concatenate([_framed(row[frame]) for frame in frames], axis=1) for row in (pixels, seen)]
        axis.imshow(np.concatenate(rows), interpolation="none")
        axis.axis("off")
        words = figure.add_subplot(grid[clip, 0])
        words.axis("off")
        words.text(
            0.02, 0.98, _caption(batch, manifest, plans[clip // copies], clip, copies), va="top", fontsize=7.5,
            family="monospace", linespacing=1.45, transform=words.transAxes,
        )  # fmt: skip
    model = recipe.model
    mask = "no mask" if recipe.data.mask is None else f"{recipe.data.mask.kind} mask {recipe.data.mask.ratio:g}"
    figure.suptitle(
        f"{model.frames} frames of {model.input_size} x {model.input_size}, {mask}: "
        "above as cropped, below as the student sees it",
        fontsize=10, x=0.01, ha="left", y=1 - 0.12 / figure.get_figheight(), va="top",
    )  # fmt: skip
    figure.savefig(out, dpi=110)


def _framed(picture: Frames) -> Frames:
    edge = max(picture.shape[0] // 60, 1)
    return np.pad(picture, ((0, edge), (0, edge), (0, 0)), constant_values=255)


def _caption(batch: ClipBatch, manifest: Manifest, plan: ClipPlan, clip: int, copies: int) -> str:
    number = int(batch.video_ids[clip])
    row = manifest.row(number)
    label = int(batch.labels[clip])
    name = f" {manifest.classes[label]}" if 0 <= label < len(manifest.classes) else ""
    lines = [
        _shorten(row.name, 38),
        f"row {number}, label {'none' if label < 0 else label}{_shorten(name, 24)}",
        f"{row.frames} frames, {row.fps:.4g} per s, {row.duration:.3g} s",
        f"{row.height} x {row.width}, {row.codec} {row.pixel_format}",
    ]
    if plan.row != number:
        return "\n".join(
            [*lines, "in place of a video that", "cannot be decoded:", _shorten(manifest.name[plan.row], 38)]
        )
    copy = plan.copies[clip % copies]
    top, left, height, width = copy.crop.box
    steps = np.unique(np.diff(plan.frames)).tolist()
    stride = f"every {steps[0]}" if len(steps) == 1 else f"{min(steps)} to {max(steps)} apart" if steps else ""
    lines += [
        f"frames {plan.frames[0]} to {plan.frames[-1]}, {stride}".rstrip(", "),
        f"crop {height} x {width} at {top}, {left}{', flipped' if copy.flip else ''}",
    ]
    if copies > 1:
        lines.append(f"copy {clip % copies + 1} of {copies}")
    return "\n".join(lines)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"…{text[1 - length :]}"


def _write_moving(batch: ClipBatch, model: ModelConfig, out: Path) -> None:
    pixels = batch.pixels[0].numpy()
    seen = mask_clip(pixels, batch.visible[0].numpy(), model)
    gap = np.full((*pixels.shape[:2], 4, 3), 255, np.uint8)
    both = np.concatenate([pixels, gap, seen], axis=2)
    write_moving(list(both), out, rate=8)
