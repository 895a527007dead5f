"""Models that are analysed side by side: their names, and the clips that all of them can take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mvd_scale.checkpoints import Checkpoint, Hints, adapt, read_checkpoint
from mvd_scale.config import ModelConfig
from mvd_scale.config.model import Positions
from mvd_scale.data.loaders.view_loader import ViewShape
from mvd_scale.errors import UserError

_FRAMES, _TUBELET = 16, 2
"""Frames of a clip and of a time slice where all models are image models; as published (Sec. 3.3, 4.1)."""


@dataclass(frozen=True)
class Subject:
    """One model of an analysis."""

    name: str
    """Name in tables and pictures."""

    path: Path
    """File or folder as it was given."""

    checkpoint: Checkpoint

    own_frames: int
    """Frames of the clips that the model of the file takes, before it was adapted."""

    @property
    def model(self) -> ModelConfig:
        """Shape of the encoder."""
        return self.checkpoint.model

    @property
    def is_image_model(self) -> bool:
        """Whether the model takes single frames; it then sees the front frame of each time slice (Sec. 3.3)."""
        return self.model.frames == 1


@dataclass(frozen=True)
class ClipShape:
    """Clips that all models of an analysis are given."""

    frames: int
    tubelet: int
    """Frames of a time slice."""

    side: int
    """Side of the square crop in pixels, that of the model with the largest input; the others get it resized."""

    @property
    def slices(self) -> int:
        """Number of time slices."""
        return self.frames // self.tubelet

    @property
    def view(self) -> ViewShape:
        """Shape of the views that loaders cut."""
        return ViewShape(self.frames, self.side)


class Lineup(NamedTuple):
    """Models of an analysis."""

    subjects: list[Subject]

    clip: ClipShape
    """Clips that all of them take."""

    left_out: dict[str, str]
    """Reasons why models were left out, by name of the model."""


def read_subjects(words: Sequence[str], *, frames: int | None = None, positions: Positions | None = None) -> Lineup:
    """Read the models of an analysis; those that cannot take the clips of the first video model are left out.

    Args:
        words: PATH or NAME=PATH of each, a file or folder in any known format.
        frames: frames per clip to which video models are adapted; None for their own.
        positions: position table of the training, for files that contain none.

    Returns:
        the models, the clips that all of them take, and the reasons why models were left out, by name.

    Raises:
        UserError: see `read_checkpoint`; two models have one name, or no model can take clips of `frames`.
    """
    named = [_split(word) for word in words]
    read = [read_checkpoint(path, Hints(positions=positions)) for _, path in named]
    subjects: list[Subject] = []
    left_out: dict[str, str] = {}
    first: Subject | None = None
    for name, (_, path), checkpoint in zip(_names(named), named, read, strict=True):
        own = checkpoint.model.frames
        try:
            adapted = checkpoint if frames is None or own == 1 else adapt(checkpoint, frames=frames)
            subject = Subject(name, path, adapted, own)
            if not subject.is_image_model:
                first = first or subject
                _check_slices(first, subject)
        except UserError as error:
            left_out[name] = str(error)
        else:
            subjects.append(subject)
    if not subjects:
        raise UserError(next(iter(left_out.values())))
    return Lineup(subjects, _common_clips(subjects, first, frames), left_out)


def _split(word: str) -> tuple[str | None, Path]:
    name, equals, path = word.partition("=")
    # A path may hold an equals sign itself.
    return (name, Path(path)) if equals and name and path and not Path(word).exists() else (None, Path(word))


def _names(named: Sequence[tuple[str | None, Path]]) -> list[str]:
    """Names as given, otherwise that of the file or run folder; with the folder before it where files are alike."""
    stems = Counter(path.stem for given, path in named if given is None)
    names = []
    for given, path in named:
        folder = path.resolve().parent.name
        names.append(given or (f"{folder}/{path.stem}" if stems[path.stem] > 1 else path.stem))
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"two models are called {twice[0]}: name them apart, as in NAME=PATH")
    return names


def _common_clips(subjects: Sequence[Subject], first: Subject | None, frames: int | None) -> ClipShape:
    side = max(subject.model.input_size for subject in subjects)
    if first is None:
        length = frames or _FRAMES
        if length % _TUBELET:
            raise UserError(f"--frames {length}: expected a multiple of {_TUBELET}, the frames of a time slice")
        return ClipShape(length, _TUBELET, side)
    return ClipShape(first.model.frames, first.model.tubelet, side)


def _check_slices(first: Subject, other: Subject) -> None:
    if (other.model.frames, other.model.tubelet) != (first.model.frames, first.model.tubelet):
        adapt = "Adapt them by `--frames N`, or analyse" if other.model.tubelet == first.model.tubelet else "Analyse"
        raise UserError(
            f"{first.path} takes clips of {_clip_text(first.model)}, {other.path} of {_clip_text(other.model)}: "
            f"models are compared on the same time slices. {adapt} them one by one"
        )


def _clip_text(model: ModelConfig) -> str:
    return f"{model.frames} frames in {model.grid[0]} time slices"
