"""What a run predicts beside what is true: frames, the mask, and every target as colours.

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
from mvd_scale.data.index import open_source
from mvd_scale.data.loader import ClipLoader
from mvd_scale.data.manifest import Manifest
from mvd_scale.errors import UserError
from mvd_scale.models import Student
from mvd_scale.targets import FrozenTeacher, Target
from mvd_scale.targets.load import load_targets, teacher_sides
from mvd_scale.training.run_folder import RunFolder

Images = NDArray[np.float32]
Picture = NDArray[np.uint8]
_HIDDEN = 0.5

_SIDE = 192
"""Pixels that small frames are enlarged to."""

_LEFT, _TOP, _GAP, _TEXT = 72, 24, 4, 14
"""Pixels around and between the panels, and of the letters."""


@dataclass(frozen=True)
class Panel:
    """One column of the picture: an image per clip and time slice, float32 (B, time, height, width, 3) in 0..1."""

    title: str
    images: Images


def draw_run(run: Path, *, clips: int = 4) -> Path:
    """Draw fresh clips through a finished run's student and targets into its `predictions.png`, in float32 on the CPU.

    Args:
        run: its folder.
        clips: how many clips to show.

    Raises:
        UserError: the folder holds no finished run, or its videos or teachers are gone.
    """
    folder = RunFolder(run)
    if not folder.student.is_file():
        raise UserError(f"{run} holds no finished run: expected {folder.student}")
    recipe = load_recipe(folder.recipe)
    manifest = open_source(recipe.data, run)
    targets = load_targets(recipe, run)
    for target in targets.values():
        if isinstance(target, FrozenTeacher):
            target.teacher.float()
    student = Student(
        recipe.model, {name: (recipe.targets[name].head_config, target.channels) for name, target in targets.items()}
    ).eval()
    load_student(student, folder.student)
    batch = fresh_batch(recipe, manifest, targets, clips, torch.device("cpu"))
    picture = run / "predictions.png"
    Image.fromarray(compose(panels_of(student, targets, batch, recipe))).save(picture)
    return picture


def fresh_batch(
    recipe: Recipe, manifest: Manifest, targets: dict[str, Target], clips: int, device: torch.device
) -> ClipBatch:
    """The same few clips for a recipe at any time, none of which a step of its run has seen."""
    loader = ClipLoader(
        manifest,
        recipe.data.model_copy(
            update={"workers": 0, "copies": 1, "clips_per_video": max(clips, recipe.data.clips_per_video)}
        ),
        recipe.model,
        recipe.seed + 1,
        global_batch=clips,
        micro_batch=clips,
        rank=0,
        world_size=1,
        device=device,
        start_step=0,
        total_steps=1,
        sides=teacher_sides(recipe, targets),
        report=None,
    )
    with loader:
        return next(iter(loader))


@torch.no_grad()
def panels_of(student: torch.nn.Module, targets: dict[str, Target], batch: ClipBatch, recipe: Recipe) -> list[Panel]:
    """Frames, what is visible of them, and for each target its truth and its prediction."""
    predictions = student(batch.pixels, batch.visible, batch.masked)
    pairs = {name: (target.features(batch), predictions[name]) for name, target in targets.items()}
    return panels_from(pairs, targets, batch, recipe)


def panels_from(
    pairs: Mapping[str, tuple[Tensor, Tensor]], targets: Mapping[str, Target], batch: ClipBatch, recipe: Recipe
) -> list[Panel]:
    """The same from features (B, M, D) and predictions that are there already, on any device."""
    model = recipe.model
    frames = batch.pixels[:, :: model.tubelet].cpu().float().div(255).numpy()
    visible = batch.visible.cpu()
    seen = _tokens_to_images(torch.ones(*visible.shape, 3), visible, model, outside=0.0)
    panels = [
        Panel("front frame", frames),
        Panel("what the student sees", np.where(_enlarge(seen, model) == 0, np.float32(_HIDDEN), frames)),
    ]
    for name, pair in pairs.items():
        truth, guess = (values.float().cpu() for values in pair)
        tokens = targets[name].tokens(batch)
        places = torch.arange(recipe.tokens).expand(len(truth), -1) if tokens is None else tokens.cpu()
        config = recipe.targets[name]
        if isinstance(config, PixelTarget):
            pixels = (truth, guess) if config.normalize == "none" else (_spread(truth), _spread(guess))
            images = [_front_pixels(values, places, model) for values in pixels]
        else:
            colours = principal_colours(truth, guess)
            images = [_enlarge(_tokens_to_images(colour, places, model), model) for colour in colours]
        panels += [Panel(f"{name}: target", images[0]), Panel(f"{name}: predicted", images[1])]
    return panels


def principal_colours(truth: Tensor, guess: Tensor) -> tuple[Tensor, Tensor]:
    """The first three principal components of the true features as colours, and the prediction in the same ones.

    Args:
        truth: (B, M, D).
        guess: (B, M, D).

    Returns:
        two tensors (B, M, 3) in 0..1; 1st to 99th percentile of the truth fill the range.
    """
    flat = truth.flatten(0, 1)
    mean = flat.mean(0)
    # Ascending; no random start as in `pca_lowrank`, whose draws would be the training's.
    _, axes = torch.linalg.eigh(torch.cov(flat.T))
    axes = axes[:, -3:].flip(1)
    projected = [(values - mean) @ axes for values in (truth, guess)]
    low, high = projected[0].flatten(0, 1).quantile(torch.tensor([0.01, 0.99]), dim=0)
    first, second = (((values - low) / (high - low)).clamp(0, 1) for values in projected)
    return first, second


def _tokens_to_images(values: Tensor, tokens: Tensor, model: ModelConfig, outside: float = _HIDDEN) -> Images:
    """(B, M, 3) at token indices (B, M) to float32 (B, time, rows, columns, 3); other tokens get `outside`."""
    time, rows, columns = model.grid
    grid = torch.full((len(values), time * rows * columns, 3), outside)
    grid.scatter_(1, tokens.unsqueeze(-1).expand(-1, -1, 3), values)
    images: Images = grid.view(-1, time, rows, columns, 3).numpy()
    return images


def _enlarge(images: Images, model: ModelConfig) -> Images:
    """One pixel per token to one pixel per pixel."""
    return images.repeat(model.patch_size, axis=2).repeat(model.patch_size, axis=3)


def _spread(normalised: Tensor) -> Tensor:
    """Two standard deviations to either side of a token's mean fill 0..1."""
    return normalised.div(4).add(0.5)


def _front_pixels(values: Tensor, masked: Tensor, model: ModelConfig) -> Images:
    """Pixels of masked tokens, (B, M, t p p 3) in 0..1, to images of the front frames."""
    side = model.patch_size
    fronts = values.unflatten(2, (model.tubelet, side, side, 3))[:, :, 0].clamp(0, 1)
    time, rows, columns = model.grid
    grid = torch.full((len(values), time * rows * columns, side, side, 3), _HIDDEN)
    grid[torch.arange(len(values)).unsqueeze(1), masked] = fronts
    images: Images = (
        grid.view(-1, time, rows, columns, side, side, 3)
        .permute(0, 1, 2, 4, 3, 5, 6)
        .reshape(-1, time, rows * side, columns * side, 3)
        .numpy()
    )
    return images


def compose(panels: list[Panel]) -> Picture:
    """Panels as columns, clips and up to two time slices of each as rows: uint8 (height, width, 3)."""
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
    note = "grey: hidden from the student in the second column; not predicted in those to the right"
    draw.text((_LEFT, sheet.height - _TOP + 2), note, "black", font)
    return np.asarray(sheet)
