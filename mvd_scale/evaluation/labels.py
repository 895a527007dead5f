"""Checks of a manifest's labels before a classifier is trained or evaluated with them."""

from __future__ import annotations

import numpy as np

from mvd_scale.data.manifest import Manifest
from mvd_scale.errors import UserError


def class_count(manifest: Manifest, classes: int | None = None) -> int:
    """Number of classes: `classes` if given, else the manifest's class names, else the highest label + 1; 0 without
    labels."""
    labels = manifest.label[manifest.usable]
    return classes or len(manifest.classes) or int(labels.max(initial=-1)) + 1


def check_labels(
    manifest: Manifest,
    classes: int,
    key: str,
    *,
    every_class: bool = False,
    like: Manifest | None = None,
) -> None:
    """Check that every usable video has a label below the number of classes.

    Args:
        manifest: the videos.
        classes: number of outputs of the head.
        key: key of the recipe, for messages.
        every_class: also require a video of each class.
        like: manifest whose class names must be the same, in the same order; without names, there must be none.

    Raises:
        UserError: a check failed; the message names the first video or class that violates it.
    """
    rows = manifest.usable
    if not len(rows):
        raise UserError(f"{key} has no usable video; `mvd-scale data stats` lists the reasons")
    labels = manifest.label[rows]
    without = rows[labels < 0]
    if len(without):
        raise UserError(
            f"{key}: {len(without)} videos have no label, the first is {manifest.name[without[0]]}; "
            "give class folders, or a list of `path label`"
        )
    beyond = np.flatnonzero(manifest.label >= classes)
    if len(beyond):
        raise UserError(
            f"{key}: {manifest.name[beyond[0]]} has label {manifest.label[beyond[0]]}, but there are {classes} classes "
            f"(0 to {classes - 1}); {len(beyond)} videos have such labels"
        )
    if manifest.classes and len(manifest.classes) != classes:
        raise UserError(f"{key} has {len(manifest.classes)} classes, but the classifier has {classes}")
    if every_class:
        absent = np.setdiff1d(np.arange(classes), labels)
        if len(absent):
            names = ", ".join(manifest.classes[c] if manifest.classes else str(c) for c in absent[:5])
            raise UserError(f"{key}: {len(absent)} of {classes} classes have no usable video: {names}")
    if like is not None and bool(like.classes) != bool(manifest.classes):
        raise UserError(
            f"{key}: the classes are {'names' if manifest.classes else 'numbers'} here, but "
            f"{'names' if like.classes else 'numbers'} in the training videos, and nothing says which is which: give "
            "both lists the same, or index the one of numbers with the file of the names, --classes"
        )
    if like is not None and like.classes != manifest.classes:
        differing = next(c for c in range(classes) if like.classes[c] != manifest.classes[c])
        raise UserError(
            f"{key}: class {differing} is {manifest.classes[differing]!r} here, but {like.classes[differing]!r} in the "
            "training videos; give both the same class folders, or lists with the same numbers"
        )
