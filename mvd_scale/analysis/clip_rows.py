"""`mvd-scale analyze features`: pictures of what models see in one clip, in rows over its time slices.

Rows of a model: what a student sees of the clip; for each of its targets the true features and the student's
predictions at masked places; features of the whole clip; attention. The colours of features are their first three
principal components, fitted over all features of one space together, true and predicted, of all slices.

Legend: V sequences (one clip, or the slices of an image model), t time slices, N tokens, P places of a slice, M tokens
at which a target is predicted, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mvd_scale.analysis.attention import look
from mvd_scale.analysis.predicted import RunFacts, find_targets, mask_of, read_run
from mvd_scale.analysis.similarity import resize_clips
from mvd_scale.analysis.subjects import ClipShape, Subject
from mvd_scale.checkpoints import build_encoder, build_student
from mvd_scale.checkpoints.reading import read_raw_checkpoint
from mvd_scale.config import PixelTarget
from mvd_scale.config.data import ViewsConfig
from mvd_scale.data.batch import ClipBatch
from mvd_scale.data.loaders.single_video import views_of_file
from mvd_scale.data.sampling.masks import draw_mask
from mvd_scale.data.storage import DecodeError
from mvd_scale.errors import UserError
from mvd_scale.targets import FrozenTeacher, Target
from mvd_scale.targets.image_teacher import front_frames
from mvd_scale.visualization.pca import PrincipalColors
from mvd_scale.visualization.predictions import Images, front_pixels, hide_masked, spread, tokens_to_images


@dataclass(frozen=True)
class Row:
    """One image per time slice."""

    title: tuple[str, ...]
    """Lines of the title."""

    images: Images
    """float32 (t, height, width, 3) in 0..1; frames, or one pixel per token."""


@dataclass
class Section:
    """Rows of one model, and what it does not have."""

    title: str
    rows: list[Row] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ClipOptions:
    """Clip of a video, and mask of the students."""

    views: ViewsConfig
    mask_ratio: float | None = None
    """Share of masked tokens; that of the run, or the published one, if None."""

    seed: int = 0
    """Seed of the mask."""

    teachers: Mapping[str, Path] = field(default_factory=dict)
    """Files of teachers by name of the target."""


def analyse_clip(
    video: str, subjects: list[Subject], clip: ClipShape, options: ClipOptions, device: torch.device
) -> list[Section]:
    """Compute the rows of all models for the middle clip of a video, in float32.

    Returns:
        a section with the front frames of the slices, and one for each model.

    Raises:
        UserError: the video cannot be decoded, weights do not fit, or a teacher that was named is of no target here or
            unreadable.
    """
    _check_teachers(subjects, options.teachers)
    shape = subjects[0].model.model_copy(update={"frames": clip.frames, "input_size": clip.side})
    try:
        pixels = views_of_file(video, options.views, shape, device)
    except DecodeError as error:
        raise UserError(f"{video} cannot be decoded: {error.reason}") from error
    frames = pixels[0, :: clip.tubelet].cpu().float().div(255).numpy()
    head = Section(Path(video).name, [Row(("front frame",), frames)])
    return [head, *(_section(subject, pixels, clip, options) for subject in subjects)]


def _check_teachers(subjects: list[Subject], teachers: Mapping[str, Path]) -> None:
    known = {name for each in subjects for name in (*each.checkpoint.decoders, *each.checkpoint.token_heads)}
    for name in teachers:
        if name not in known:
            expected = ", ".join(sorted(known)) or "none, as none is a student"
            raise UserError(f"--teacher {name}=...: no model here predicts {name}; expected one of: {expected}")
        # A wrong path is an error; a teacher that does not fit a student is named as missing.
        read_raw_checkpoint(teachers[name])


def _section(subject: Subject, pixels: Tensor, clip: ClipShape, options: ClipOptions) -> Section:
    model = subject.model
    section = Section(f"{subject.name}: {_kind(subject)}")
    pixels = resize_clips(pixels, model.input_size)
    sequences = front_frames(pixels, clip.tubelet)[0] if subject.is_image_model else pixels
    if subject.checkpoint.kind == "student":
        _add_predictions(section, subject, sequences, options)
    else:
        section.missing.append("no decoder: no predictions")
    encoder = build_encoder(subject.checkpoint, final_norm=False).eval().to(pixels.device)
    seen = look(encoder, sequences)
    colors = PrincipalColors.fit(seen.features.flatten(0, 1).cpu())
    section.rows.append(Row(("features of", "the whole clip"), _grid(colors(seen.features.cpu()), subject)))
    whose = "of the class token" if model.class_token else "mean over queries"
    for name, attention in ((f"attention, block {model.depth}", seen.last), ("attention rollout", seen.rollout)):
        section.rows.append(_heat((name, whose), attention.cpu(), subject))
    return section


def _kind(subject: Subject) -> str:
    model, kind = subject.model, subject.checkpoint.kind
    return f"{'image' if subject.is_image_model else 'video'} {kind}, width {model.width}, depth {model.depth}"


@torch.inference_mode()
def _add_predictions(section: Section, subject: Subject, sequences: Tensor, options: ClipOptions) -> None:
    run = read_run(subject)
    if run.fault is not None:
        used = "" if options.mask_ratio is not None else "; the mask is the published one"
        section.missing.append(f"recipe of its run: {run.fault}{used}")
    batch, ratio = _masked(subject, run, sequences, options)
    student = build_student(subject.checkpoint).eval().to(sequences.device)
    predictions = student(batch.pixels, batch.visible, batch.masked)
    found = find_targets(subject, run, options.teachers)
    frames = sequences[:, :: subject.model.tubelet].cpu().float().div(255).numpy()
    seen = hide_masked(frames, batch.visible.cpu(), subject.model)
    section.rows.append(Row(("what the student", f"sees: {1 - ratio:.0%}"), _slices(seen)))
    for name, predicted in predictions.items():
        target = found.targets.get(name)
        places = batch.masked if name in student.decoders else batch.visible
        truth = None if target is None else _truth(target, batch)
        section.rows.extend(_pair(name, truth, predicted.float().cpu(), places.cpu(), subject, target))
    section.missing.extend(f"{name}, true features: {reason}" for name, reason in found.missing.items())


def _masked(subject: Subject, run: RunFacts, sequences: Tensor, options: ClipOptions) -> tuple[ClipBatch, float]:
    """Draw one mask, the same for all sequences; with it the share of tokens that it hides."""
    mask = mask_of(subject, run, options.mask_ratio)
    drawn = draw_mask(np.random.default_rng(options.seed), mask, subject.model.grid)
    visible, masked = (torch.from_numpy(tokens).to(sequences.device).expand(len(sequences), -1) for tokens in drawn)
    total = visible.shape[1] + masked.shape[1]
    if mask is not None and not 0 < visible.shape[1] < total:
        raise UserError(
            f"--mask-ratio {mask.ratio:g} leaves {visible.shape[1]} of {total} tokens of {subject.path} visible: "
            "expected at least one visible and one masked token"
        )
    ids = torch.zeros(len(sequences), dtype=torch.int64)
    return ClipBatch(sequences, visible, masked, ids, ids), masked.shape[1] / total


def _truth(target: Target, batch: ClipBatch) -> Tensor:
    """Compute the features of a target at all tokens, as the student is taught them: float32 (V, N, D), on the host."""
    every = torch.cat([batch.visible, batch.masked], dim=1).sort(dim=1).values
    whole = replace(batch, visible=every, masked=every)
    if isinstance(target, FrozenTeacher):
        target.teacher.to(batch.pixels.device)
        if target.statistics is not None:
            target.statistics.to(batch.pixels.device)
        side = target.input_size
        whole = replace(whole, resized={side: resize_clips(batch.pixels, side)})
    return target.features(whole).float().cpu()


def _pair(
    name: str, truth: Tensor | None, predicted: Tensor, places: Tensor, subject: Subject, target: Target | None
) -> list[Row]:
    """Make the rows of a target and of its prediction, in the same colours."""
    model = subject.model
    titles = (f"{name}: target",), (f"{name}: predicted", "by the student")
    if target is not None and isinstance(target.config, PixelTarget):
        every = torch.arange(math.prod(model.grid)).expand(len(predicted), -1)
        assert truth is not None
        values = (truth, predicted) if target.config.normalize == "none" else (spread(truth), spread(predicted))
        fronts = [front_pixels(part, at, model) for part, at in zip(values, (every, places), strict=True)]
        return [Row(title, _slices(images)) for title, images in zip(titles, fronts, strict=True)]
    spaces = [part.flatten(0, 1) for part in (truth, predicted) if part is not None]
    colors = PrincipalColors.fit(torch.cat(spaces))
    rows = [Row(titles[1], _slices(tokens_to_images(colors(predicted), places, model)))]
    return rows if truth is None else [Row(titles[0], _grid(colors(truth), subject)), *rows]


def _slices(images: Images) -> Images:
    """Join the slices of all sequences: (V, time, height, width, 3) to (t, height, width, 3)."""
    joined: Images = images.reshape(-1, *images.shape[2:])
    return joined


def _grid(colors: Tensor, subject: Subject) -> Images:
    """Arrange the colours of all tokens, (V, N, 3), as images of one pixel per token: (t, rows, columns, 3)."""
    _, rows, columns = subject.model.grid
    images: Images = colors.reshape(-1, rows, columns, 3).numpy()
    return images


def _heat(title: tuple[str, str], attention: Tensor, subject: Subject) -> Row:
    """Make the row of an attention map (V, N): dark is its least value, bright the 99th percentile of all slices."""
    from matplotlib import colormaps

    times_uniform = attention * attention.shape[1]
    low, high = (float(value) for value in (times_uniform.min(), times_uniform.quantile(0.99)))
    scaled = ((times_uniform - low) / max(high - low, 1e-12)).clamp(0, 1)
    colors = torch.from_numpy(colormaps["inferno"](scaled.numpy())[..., :3].astype(np.float32))
    return Row((*title, f"{low:.2g} to {high:.2g} x uniform"), _grid(colors, subject))
