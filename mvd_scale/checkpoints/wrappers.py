"""Choice of the weights in a file of `torch.save`: the dictionaries around them, and several models side by side."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import Tensor

from mvd_scale.errors import UserError

logger = logging.getLogger("mvd_scale")

_WRAPPERS = ("model", "module", "state_dict", "model_state", "model_state_dict", "net", "network", "weights")
"""Keys under which a file has its weights, and beside them states of optimizers, settings and averages."""

_PATCHES = "patch_embed"
"""Part of the names of every model of patches, Hugging Face's `patch_embeddings` among them."""

_DEEPEST = 8
"""More levels than any file has; ends the search in a dictionary that contains itself."""

_FAMILIES = (
    ({"ema_encoder", "predictor"}, "a file of V-JEPA 2.1: published features are those of ema_encoder"),
    ({"encoder", "target_encoder", "predictor"}, "a file of I-JEPA or V-JEPA: published tests use target_encoder"),
    ({"student", "teacher"}, "a file of DINO, iBOT or the like: published tests use teacher"),
)


SEPARATOR = "/"
"""Between the keys of nested dictionaries, in a safetensors file that was converted from them."""


def nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The dictionaries that a file was converted from, by the separators in its names.

    A name that leads through a tensor, which no dictionary has, stays as it is.
    """
    whole: dict[str, Any] = {}
    for name, tensor in sorted(tensors.items()):
        *keys, last = name.split(SEPARATOR)
        place: Any = whole
        for key in keys:
            place = place.setdefault(key, {}) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place[last] = tensor
        else:
            whole[name] = tensor
    return whole


def unwrap(loaded: object, path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The tensors of the one model in a file, by name.

    Args:
        loaded: content of the file.
        path: path of the file, for messages.
        key: entry that holds the weights, where several do.

    Raises:
        UserError: several entries hold a model and none is chosen, or the chosen one holds none.
    """
    wanted = key
    for _ in range(_DEEPEST):
        if not isinstance(loaded, dict):
            break
        if wanted is not None:
            chosen = loaded.get(wanted)
            chosen = chosen if isinstance(chosen, dict) else _below(loaded, wanted)
            if chosen:
                loaded, wanted = chosen, None
                continue
        inner = _in_wrapper(loaded, path)
        if inner is None:
            tensors = {k: v for k, v in loaded.items() if isinstance(k, str) and isinstance(v, Tensor)}
            inner = _by_prefix(tensors)
            if tensors and not inner and wanted is None:
                return tensors
            inner = inner or _only_model(loaded, path, wanted)
        if inner is None:
            break
        loaded = inner
    if wanted is not None:
        raise UserError(f"{path} has no weights under the key {wanted!r}: leave --key out to see what it holds")
    return {}


def _in_wrapper(loaded: Mapping[Any, Any], path: Path) -> dict[str, Any] | None:
    """The entry that holds weights by its name; the log says which other models are not read."""
    filled = {name: part for name, part in _parts(loaded).items() if any(True for _ in _names(part))}
    chosen = next((name for name in _WRAPPERS if name in filled), None)
    if chosen is None:
        return None
    others = sorted(name for name, part in filled.items() if name != chosen and _has_patches(part))
    if others:
        logger.info("%s: reads %s, not %s, which `--key` would choose", path, chosen, ", ".join(others))
    return filled[chosen]


def _by_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Models side by side in one flat dictionary, by the prefixes of their names; empty if there are no two.

    Lightning and MoCo write them so: `student.backbone.patch_embed...` beside `teacher.backbone.patch_embed...`.
    """
    starts = {tuple(name[: name.index(_PATCHES)].split(".")[:-1]) for name in tensors if _PATCHES in name}
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, zip(*starts, strict=False)))
    if any(len(start) == shared for start in starts):
        return {}  # one model, which may hold others
    prefixes = sorted({".".join(start[: shared + 1]) for start in starts})
    return {prefix: _below(tensors, prefix) for prefix in prefixes}


def _below(loaded: Mapping[Any, Any], prefix: str) -> dict[str, Any]:
    """Return the entries whose names begin with a prefix and a dot, without these."""
    start = f"{prefix}."
    return {k.removeprefix(start): v for k, v in loaded.items() if isinstance(k, str) and k.startswith(start)}


def _only_model(loaded: Mapping[Any, Any], path: Path, key: str | None) -> dict[str, Any] | None:
    """The only entry of a dictionary that holds a model; None if no entry does.

    Raises:
        UserError: several entries do.
    """
    parts = _parts(loaded)
    models = {name: part for name, part in parts.items() if _has_patches(part)}
    models = models or {name: part for name, part in parts.items() if any(True for _ in _names(part))}
    if len(models) > 1:
        names = sorted(models)
        family = next((f". It seems to be {said}" for marks, said in _FAMILIES if len(marks & parts.keys()) > 1), "")
        told = f", and none is called {key!r}" if key is not None else ""
        raise UserError(
            f"{path} holds several models, {', '.join(names)}{told}: choose one with `mvd-scale import {path} --key "
            f"{names[-1]} --as ROLE --out FILE`, and name that file instead{family}"
        )
    return next(iter(models.values()), None)


def _parts(loaded: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    return {name: part for name, part in loaded.items() if isinstance(name, str) and isinstance(part, dict)}


def _has_patches(part: Mapping[Any, Any]) -> bool:
    return any(_PATCHES in name for name in _names(part))


def _names(part: Mapping[Any, Any], depth: int = 0) -> Iterator[str]:
    """Names of the tensors of a dictionary and of those within it."""
    for name, value in part.items():
        if isinstance(value, Tensor):
            yield str(name)
        elif isinstance(value, dict) and depth < _DEEPEST:
            yield from _names(value, depth + 1)
