"""Settings of runs, and their differences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mvd_scale.config.reading import flatten_sections
from mvd_scale.utils.locations import without_credentials

Settings = dict[str, str]
"""Values of a recipe as JSON by their dotted keys."""

_OWN = "run.folder"
"""Key that no two runs share; the report names runs by it."""


def flatten(document: Mapping[Any, Any]) -> Settings:
    """Convert a recipe to the values of its dotted keys; lists and empty sections stay values.

    URLs lose user, password, query and fragment: a page is sent to others.
    """
    return {
        name: value if isinstance(value, str) else json.dumps(value, default=str)
        for name, value in flatten_sections(without_credentials(document)).items()
        if name != _OWN
    }


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
