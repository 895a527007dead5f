"""Settings of runs, and their differences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Settings = dict[str, str]
"""Values of a recipe as JSON by their dotted keys."""

_OWN = "run.folder"
"""Key that no two runs share; the report names runs by it."""


def flatten(document: Mapping[Any, Any], prefix: str = "") -> Settings:
    """Flatten nested sections to dotted keys; lists and empty sections stay values."""
    flat: Settings = {}
    for key, value in document.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        elif name != _OWN:
            flat[name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


@dataclass(frozen=True)
class Differences:
    """Settings of several runs side by side."""

    differing: list[tuple[str, list[str | None]]]
    """Keys whose values differ, with the value of each run; None where its recipe has no such key."""

    equal: list[tuple[str, str]]
    """Keys and values that all runs share."""


def compare_settings(settings: Sequence[Settings]) -> Differences:
    """Sort the keys of runs into those that differ and those that all have with one value."""
    keys = sorted({key for each in settings for key in each})
    rows = [(key, [each.get(key) for each in settings]) for key in keys]
    differing = [(key, values) for key, values in rows if len(set(values)) > 1]
    equal = [(key, value) for key, (value, *rest) in rows if value is not None and set(rest) <= {value}]
    return Differences(differing, equal)
