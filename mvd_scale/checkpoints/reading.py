"""Reader for files and folders of weights: a flat dictionary of tensors.

Files are untrusted: only tensors and plain values are read.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mvd_scale.checkpoints.deepspeed_folders import find_deepspeed, load_deepspeed
from mvd_scale.checkpoints.other_kinds import refuse_other_kinds
from mvd_scale.checkpoints.pickle_protocols import newer_protocol
from mvd_scale.checkpoints.pickles import load_pickle
from mvd_scale.checkpoints.tensor_folder import is_tensor_folder, read_model
from mvd_scale.checkpoints.wrappers import SEPARATOR, nested, unwrap
from mvd_scale.errors import UserError
from mvd_scale.utils.io import is_plain_name

logger = logging.getLogger("mvd_scale")

TORN = ".torn"
"""Suffix of a checkpoint that lost files and was set aside."""

_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS = (
    "student.safetensors",
    "classifier.safetensors",
    "detector.safetensors",
    "encoder.safetensors",
    "model.safetensors",
    "pytorch_model.bin",
)
"""Files that represent a folder, in order of preference, the most complete first: those of our runs and checkpoints,
then those of Hugging Face. Of a run these are the weights after its last step, which the published figures are of."""

_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
"""Suffixes of files of weights, of which a folder has one under a name of its own."""

_BY_NAME = {
    "best.safetensors": "the best weights of its validation",
    "average.safetensors": "the moving average of its weights",
}
"""Files of a run that do not represent it: they are read only where the file itself is named."""


def digest(path: Path) -> str:
    """First 16 hex digits of the SHA-256 of a file, or of all files of a folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 22):
                whole.update(chunk)
    return whole.hexdigest()[:16]


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """First 16 hex digits of the SHA-256 of tensors and their names; does not depend on the file format."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(name.encode())
        whole.update(tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()[:16]


@dataclass(frozen=True)
class RawCheckpoint:
    """Content of a file or folder of weights."""

    path: Path
    """Path as the user gave it, for messages."""

    tensors: dict[str, Tensor]
    """Tensors by the names of the file, memory-mapped if the format allows it."""

    metadata: dict[str, str] = field(default_factory=dict)
    """Metadata of a safetensors file; empty for other formats."""

    config: dict[str, Any] = field(default_factory=dict)
    """The `config.json` beside Hugging Face's weights."""

    recipe: Path | None = None
    """Path of the recipe of the run that wrote the file; None if there is none nearby."""


def read_raw_checkpoint(path: Path, key: str | None = None) -> RawCheckpoint:
    """Read safetensors (single or sharded), files of `torch.save`, folders of Hugging Face, DeepSpeed and our runs.

    Args:
        path: file or folder.
        key: entry of a file of `torch.save` that holds the weights, where several do.

    Raises:
        UserError: the path does not exist, is damaged, of an unknown kind or without tensors, is a pickle that contains
            code, or holds several models.
    """
    if path.is_dir():
        source = _read_folder(path)
    elif path.is_file():
        source = _read_file(path, key)
    else:
        raise UserError(f"checkpoint {path} does not exist: expected a file of weights or a folder that contains one")
    if not source.tensors:
        raise UserError(f"{path} holds no tensors: expected the weights of a model")
    return source


def _read_folder(path: Path) -> RawCheckpoint:
    for name in _WEIGHTS:
        if (path / name).is_file():
            source = _read_file(path / name)
            _log_choice(path, path / name)
            return RawCheckpoint(path, source.tensors, source.metadata, source.config, source.recipe)
    for name in _INDICES:
        if (path / name).is_file():
            _log_choice(path, path / name)
            return _read_file(path / name)
    if is_tensor_folder(path):
        _log_choice(path, path)
        tensors, metadata = read_model(path)
        return RawCheckpoint(path, tensors, metadata, recipe=recipe_near(path))
    deepspeed = find_deepspeed(path)
    if deepspeed is not None:
        _log_choice(path, deepspeed)
        return RawCheckpoint(path, load_deepspeed(deepspeed), recipe=recipe_near(deepspeed))
    steps = sorted(step for step in path.glob("checkpoints/step_*") if not step.suffix)
    if steps:
        return _read_newest(steps)
    named = "".join(
        f". Its {name}, {meaning}, is read if that file is named"
        for name, meaning in _BY_NAME.items()
        if (path / name).is_file()
    )
    students = sorted(student for student in path.glob("students/*") if student.is_dir())
    if students:
        raise UserError(
            f"{path} is a run of {len(students)} students: give the folder of one of them, such as {students[0]}"
        )
    others = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.name not in _BY_NAME)
    hint = f". Of other files, give the file itself, such as {others[0]}" if others else ""
    raise UserError(
        f"{path} holds no checkpoint: expected a run folder, a DeepSpeed folder, "
        f"{', '.join((*_INDICES, *_WEIGHTS))}{named}{hint}"
    )


@cache
def _log_choice(folder: Path, chosen: Path) -> None:
    """Log once which file of a folder is read, and which files of its run are not unless they are named."""
    others = "; ".join(
        f"not {folder / name}, {meaning}" for name, meaning in _BY_NAME.items() if (folder / name).is_file()
    )
    logger.info("%s: reads %s%s", folder, chosen, f" ({others})" if others else "")


def _read_newest(steps: Sequence[Path]) -> RawCheckpoint:
    """Read the newest checkpoint of a run that can be read.

    Raises:
        UserError: none can; the message is about the newest.
    """
    faults: list[UserError] = []
    for step in reversed(steps):
        try:
            source = _read_folder(step)
        except UserError as error:
            faults.append(error)
            continue
        for fault in faults:
            logger.warning("a torn checkpoint is passed over, and the one before it is used: %s", fault)
        return source
    raise faults[0]


def _read_file(path: Path, key: str | None = None) -> RawCheckpoint:
    if path.name.endswith(".index.json"):
        tensors = _read_shards(path)
        return RawCheckpoint(path, tensors, config=_read_json(path.with_name("config.json")))
    with path.open("rb") as file:
        head = file.read(9)
    config = _read_json(path.with_name("config.json"))
    if head[8:9] == b"{":
        tensors, metadata = _read_safetensors(path)
        tensors = unwrap(nested(tensors), path, key) if any(SEPARATOR in name for name in tensors) or key else tensors
        return RawCheckpoint(path, tensors, metadata, config, recipe_near(path.parent))
    refuse_other_kinds(path)
    if head[:2] not in (b"PK", b"\x80\x02") and newer_protocol(path) is None:
        raise UserError(
            f"{path} holds no weights: it is neither a safetensors file nor a file of `torch.save` "
            f"({'empty' if not head else f'it begins with {head!r}'}); it may be truncated: download or copy it again"
        )
    if path.suffix == ".safetensors":
        # torch's reader goes by the name.
        raise UserError(f"{path} is a file of `torch.save` under the name of a safetensors file: rename it to .pth")
    return RawCheckpoint(path, unwrap(load_pickle(path), path, key), config=config)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            names, metadata = file.keys(), file.metadata() or {}
        return {name: _map_tensor(path, name) for name in names}, metadata
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({error}); it may be truncated: download or copy it again"
        ) from error


def _map_tensor(path: Path, name: str) -> Tensor:
    """Read one tensor in a memory mapping of its own, which is released with the tensor.

    One mapping for all tensors would keep every page that was read resident until the last tensor is gone.
    """
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} has no `weight_map`: expected the index of sharded weights")
    shards: dict[str, dict[str, Tensor]] = {}
    for name in sorted(set(places.values())):
        # An index that names an index would never be read to its end.
        if not is_plain_name(name) or name.endswith(".index.json") or not index.with_name(name).is_file():
            raise UserError(f"{index} names the shard {name!r}, which is not in the same folder; download all shards")
        shards[name] = _read_file(index.with_name(name)).tensors
    missing = sorted(tensor for tensor, shard in places.items() if tensor not in shards[shard])
    if missing:
        raise UserError(
            f"{index} lists tensors that its shards do not contain: {', '.join(missing)}; download the shards again"
        )
    return {tensor: shards[shard][tensor] for tensor, shard in places.items()}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    return values if isinstance(values, dict) else {}


def recipe_near(folder: Path) -> Path | None:
    """Find the recipe of a run from its folder or from the folder of one of its checkpoints."""
    places = (folder / "recipe.yaml", folder.parent.parent / "recipe.yaml")
    return next((place for place in places if place.is_file()), None)
