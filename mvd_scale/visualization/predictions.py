"""Picture of a run's predictions: frames, the mask, and target and prediction of every target as colours.

Legend: B clips, T frames, N tokens, M masked, D channels, R principal components (3), p side of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mvd_scale.checkpoints.weights import load_student
from mvd_scale.config import ModelConfig, PixelTarget, Recipe, load_recipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.data.indexing.build import load_source
from mvd_scale.data.loaders.clip_loader import BatchPlan, ClipLoader
from mvd_scale.data.manifest import Manifest
from mvd_scale.distributed.data_rank import DataRank
from mvd_scale.errors import UserError
from mvd_scale.models import Student
from mvd_scale.run_dir import RunFolder
from mvd_scale.targets import FrozenTeacher, Target
from mvd_scale.targets.build import load_targets
from mvd_scale.targets.load import teacher_input_sizes
from mvd_scale.visualization.pca import PrincipalColors

Images = NDArray[np.float32]
Picture = NDArray[np.uint8]
HIDDEN = 0.5
"""Grey of hidden tokens, and of tokens that are not predicted."""

_SIDE = 192
"""Side, in pixels, to which smaller frames are enlarged."""

_LEFT, _TOP, _GAP, _TEXT = 72, 24, 4, 14
"""Margins at the left and the top, gap between panels, and size of letters, in pixels."""


@dataclass(frozen=True)
class Panel:
    """One column of the picture: images per clip and time slice, float32 (B, time, height, width, 3) in 0..1."""

    title: str
    images: Images


def draw_predictions(run: Path, *, clips: int = 4) -> Path:
    """Draw a finished run's predictions for clips that it was not trained on, computed in float32 on the CPU.

    Args:
        run: folder of the run.
        clips: number of clips to show.

    Returns:
        path of the picture, `predictions.png` in the run's folder.

    Raises:
        UserError: the folder holds no finished run, or its videos or teachers are missing.
    """
    folder = RunFolder(run)
    if not folder.student.is_file():
        raise UserError(f"{run} holds no finished run: expected {folder.student}")
    recipe = load_recipe(folder.recipe)
    manifest = load_source(recipe.data, run)
    targets = load_targets(recipe, run)
    for target in targets.values():
        if isinstance(target, FrozenTeacher):
            target.teacher.float()
    student = Student.from_recipe(recipe, targets).eval()
    load_student(student, folder.student)
    batch = visualization_batch(recipe, manifest, targets, clips, torch.device("cpu"))
    picture = run / "predictions.png"
    Image.fromarray(compose(predict_panels(student, targets, batch, recipe))).save(picture)
    return picture


def visualization_batch(
    recipe: Recipe, manifest: Manifest, targets: dict[str, Target], clips: int, device: torch.device
) -> ClipBatch:
    """Load the clips of a recipe's pictures: always the same ones, and none that a training step uses."""
    data = recipe.data.model_copy(
        update={"workers": 0, "copies": 1, "clips_per_video": max(clips, recipe.data.clips_per_video)}
    )
    sides = teacher_input_sizes(recipe, targets)
    loader = ClipLoader(
        manifest,
        data,
        recipe.model,
        recipe.seed + 1,
        plan=BatchPlan.one_batch(clips),
        rank=DataRank(device),
        sides=sides,
    )
    with loader:
        return next(iter(loader))


@torch.no_grad()
def predict_panels(
    student: torch.nn.Module, targets: dict[str, Target], batch: ClipBatch, recipe: Recipe
) -> list[Panel]:
    """Compute the panels of a batch: frames, their visible part, and features and prediction of each target."""
    predictions = student(batch.pixels, batch.visible, batch.masked)
    pairs = {name: (target.features(batch), predictions[name]) for name, target in targets.items()}
    return make_panels(pairs, targets, batch, recipe)


def make_panels(
    pairs: Mapping[str, tuple[Tensor, Tensor]], targets: Mapping[str, Target], batch: ClipBatch, recipe: Recipe
) -> list[Panel]:
    """Create the panels of a batch from given features and predictions.

    Args:
        pairs: features and predictions, (B, M, D) each on any device, by target name.
        targets: targets by name.
        batch: clips and masks.
        recipe: shape of the model, and kinds of the targets.
    """
    model = recipe.model
    frames = batch.pixels[:, :: model.tubelet].cpu().float().div(255).numpy()
    panels = [
        Panel("front frame", frames),
        Panel("what the student sees", hide_masked(frames, batch.visible.cpu(), model)),
    ]
    for name, pair in pairs.items():
        truth, guess = (values.float().cpu() for values in pair)
        tokens = targets[name].tokens(batch)
        places = torch.arange(recipe.tokens).expand(len(truth), -1) if tokens is None else tokens.cpu()
        config = recipe.targets[name]
        if isinstance(config, PixelTarget):
            pixels = (truth, guess) if config.normalize == "none" else (spread(truth), spread(guess))
            images = [front_pixels(values, places, model) for values in pixels]
        else:
            colours = pca_colors(truth, guess)
            images = [_enlarge(tokens_to_images(colour, places, model), model) for colour in colours]
        panels += [Panel(f"{name}: target", images[0]), Panel(f"{name}: predicted", images[1])]
    return panels


def hide_masked(frames: Images, visible: Tensor, model: ModelConfig) -> Images:
    """Paint masked patches grey on front frames, float32 (B, time, height, width, 3); `visible` is int64 (B, V)."""
    seen = tokens_to_images(torch.ones(*visible.shape, 3), visible, model, outside=0.0)
    hidden: Images = np.where(_enlarge(seen, model) == 0, np.float32(HIDDEN), frames)
    return hidden


def pca_colors(truth: Tensor, guess: Tensor) -> tuple[Tensor, Tensor]:
    """Map features to colours by the first three principal components of the true features.

    Args:
        truth: true features (B, M, D).
        guess: predicted features (B, M, D), mapped by the same components.

    Returns:
        two tensors (B, M, 3) in 0..1; the range is the 1st to 99th percentile of the true features.
    """
    colors = PrincipalColors.fit(truth.flatten(0, 1))
    return colors(truth), colors(guess)


def tokens_to_images(values: Tensor, tokens: Tensor, model: ModelConfig, outside: float = HIDDEN) -> Images:
    """Place values (B, M, 3) at tokens (B, M) on float32 (B, time, rows, columns, 3); other tokens get `outside`."""
    time, rows, columns = model.grid
    grid = torch.full((len(values), time * rows * columns, 3), outside)
    grid.scatter_(1, tokens.unsqueeze(-1).expand(-1, -1, 3), values)
    images: Images = grid.view(-1, time, rows, columns, 3).numpy()
    return images


def _enlarge(images: Images, model: ModelConfig) -> Images:
    """Enlarge images of one pixel per token, (B, time, rows, columns, 3), to the size of the frames."""
    return images.repeat(model.patch_size, axis=2).repeat(model.patch_size, axis=3)


def spread(normalised: Tensor) -> Tensor:
    """Map normalised pixels to 0..1, which two standard deviations to either side of a token's mean fill."""
    return normalised.div(4).add(0.5)


def front_pixels(values: Tensor, masked: Tensor, model: ModelConfig) -> Images:
    """Convert pixels of masked tokens, (B, M, t p p 3) in 0..1, to images of the front frames."""
    side = model.patch_size
    fronts = values.unflatten(2, (model.tubelet, side, side, 3))[:, :, 0].clamp(0, 1)
    time, rows, columns = model.grid
    grid = torch.full((len(values), time * rows * columns, side, side, 3), HIDDEN)
    grid[torch.arange(len(values)).unsqueeze(1), masked] = fronts
    images: Images = (
        grid.view(-1, time, rows, columns, side, side, 3)
        .permute(0, 1, 2, 4, 3, 5, 6)
        .reshape(-1, time, rows * side, columns * side, 3)
        .numpy()
    )
    return images


def compose(panels: list[Panel]) -> Picture:
    """Compose panels as columns, and clips with up to two time slices each as rows: uint8 (height, width, 3)."""
    clips, time, height, width = panels[0].images.shape[:4]
    scale = max(_SIDE // width, 1)
    rows = [(clip, at) for clip in range(clips) for at in sorted({0, time // 2})]
    high, wide = height * scale, width * scale
    sheet = Image.new("RGB", (_LEFT + len(panels) * (wide + _GAP), _TOP + len(rows) * (high + _GAP) + _TOP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT)
    for column, panel in enumerate(panels):
        left = _LEFT + column * (wide + _GAP)
        draw.text((left, 4), panel.title, "black", font)
        for row, (clip, at) in enumerate(rows):
            pixels = (panel.images[clip, at] * 255).round().astype(np.uint8).repeat(scale, 0).repeat(scale, 1)
            sheet.paste(Image.fromarray(pixels), (left, _TOP + row * (high + _GAP)))
    for row, (clip, at) in enumerate(rows):
        draw.text((4, _TOP + row * (high + _GAP)), f"clip {clip + 1}\nslice {at + 1}/{time}", "black", font)
    note = "grey: masked in the second column; not predicted in the columns to the right"
    draw.text((_LEFT, sheet.height - _TOP + 2), note, "black", font)
    return np.asarray(sheet)
