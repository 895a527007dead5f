"""What a run predicts beside what is true: frames, the mask, and every target as colours.

Legend: B clips, T frames, N tokens, M masked, D channels, R principal components (3), p side of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvd_scale.checkpoints.weights import load_student
from mvd_scale.config import ModelConfig, PixelTarget, Recipe, load_recipe
from mvd_scale.data.batch import ClipBatch
from mvd_scale.data.index import open_source
from mvd_scale.data.loader import ClipLoader
from mvd_scale.errors import UserError
from mvd_scale.models import Student
from mvd_scale.targets import FrozenTeacher, Target
from mvd_scale.targets.load import load_targets, teacher_sides
from mvd_scale.training.run_folder import RunFolder

Image = NDArray[np.float32]
_HIDDEN = 0.5


@dataclass(frozen=True)
class Panel:
    """One column of the picture: an image per clip and time slice, float32 (B, time, height, width, 3) in 0..1."""

    title: str
    images: Image


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
    loader = ClipLoader(
        manifest,
        recipe.data.model_copy(
            update={"workers": 0, "copies": 1, "clips_per_video": max(clips, recipe.data.clips_per_video)}
        ),
        recipe.model,
        # A seed of its own: clips that no step of the run has seen.
        recipe.seed + 1,
        global_batch=clips,
        micro_batch=clips,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        start_step=0,
        total_steps=1,
        sides=teacher_sides(recipe, targets),
        report=None,
    )
    with loader:
        batch = next(iter(loader))
    picture = run / "predictions.png"
    save_panels(panels_of(student, targets, batch, recipe), picture)
    return picture


@torch.no_grad()
def panels_of(student: torch.nn.Module, targets: dict[str, Target], batch: ClipBatch, recipe: Recipe) -> list[Panel]:
    """Frames, masked frames, and for each target its truth and its prediction."""
    model = recipe.model
    frames = batch.pixels[:, :: model.tubelet].float().div(255).numpy()
    hidden = _tokens_to_images(torch.ones(*batch.visible.shape, 3), batch.visible, model, outside=0.0)
    panels = [
        Panel("front frame", frames),
        Panel("what the student sees", np.where(_enlarge(hidden, model) == 0, np.float32(_HIDDEN), frames)),
    ]
    predictions = student(batch.pixels, batch.visible, batch.masked)
    for name, target in targets.items():
        truth, guess = target.features(batch).float(), predictions[name].float()
        if isinstance(recipe.targets[name], PixelTarget):
            pairs = [_front_pixels(values, batch.masked, model) for values in (truth, guess)]
        else:
            pairs = [
                _enlarge(_tokens_to_images(c, batch.masked, model), model) for c in principal_colours(truth, guess)
            ]
        panels += [Panel(f"{name}: target", pairs[0]), Panel(f"{name}: predicted", pairs[1])]
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
    _, _, axes = torch.pca_lowrank(flat - mean, q=3, niter=8)
    projected = [(values - mean) @ axes for values in (truth, guess)]
    low, high = projected[0].flatten(0, 1).quantile(torch.tensor([0.01, 0.99]), dim=0)
    first, second = (((values - low) / (high - low)).clamp(0, 1) for values in projected)
    return first, second


def _tokens_to_images(values: Tensor, tokens: Tensor, model: ModelConfig, outside: float = _HIDDEN) -> Image:
    """(B, M, 3) at token indices (B, M) to float32 (B, time, rows, columns, 3); other tokens get `outside`."""
    time, rows, columns = model.grid
    grid = torch.full((len(values), time * rows * columns, 3), outside)
    grid.scatter_(1, tokens.unsqueeze(-1).expand(-1, -1, 3), values)
    images: Image = grid.view(-1, time, rows, columns, 3).numpy()
    return images


def _enlarge(images: Image, model: ModelConfig) -> Image:
    """One pixel per token to one pixel per pixel."""
    return images.repeat(model.patch_size, axis=2).repeat(model.patch_size, axis=3)


def _front_pixels(values: Tensor, masked: Tensor, model: ModelConfig) -> Image:
    """Normalised pixels of masked tokens (B, M, t p p 3) to images of the front frames, scaled to 0..1."""
    side = model.patch_size
    fronts = values.unflatten(2, (model.tubelet, side, side, 3))[:, :, 0].clamp(-2, 2).div(4).add(0.5)
    time, rows, columns = model.grid
    grid = torch.full((len(values), time * rows * columns, side, side, 3), _HIDDEN)
    grid[torch.arange(len(values)).unsqueeze(1), masked] = fronts
    images: Image = (
        grid.view(-1, time, rows, columns, side, side, 3)
        .permute(0, 1, 2, 4, 3, 5, 6)
        .reshape(-1, time, rows * side, columns * side, 3)
        .numpy()
    )
    return images


def save_panels(panels: list[Panel], out: Path) -> None:
    """Lay panels out as columns, clips and up to two time slices of each as rows, and write a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    clips, time = panels[0].images.shape[:2]
    slices = sorted({0, time // 2})
    rows = [(clip, at) for clip in range(clips) for at in slices]
    figure = Figure(figsize=(2.1 * len(panels), 2.1 * len(rows) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(panels), squeeze=False)
    for row, (clip, at) in enumerate(rows):
        for column, panel in enumerate(panels):
            axis = axes[row][column]
            axis.imshow(panel.images[clip, at], vmin=0, vmax=1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(panel.title, fontsize=10)
        axes[row][0].set_ylabel(f"clip {clip + 1}, slice {at + 1}/{time}", fontsize=8)
    figure.supxlabel("grey: hidden from the student in the second column, seen by it in those to the right", fontsize=9)
    figure.savefig(out, dpi=110)
