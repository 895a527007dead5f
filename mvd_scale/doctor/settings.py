"""Settings of an examination."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mvd_scale.config import FinetuneRecipe, Recipe
from mvd_scale.doctor.findings import GROUPS, Group


@dataclass(frozen=True)
class Settings:
    """Settings of an examination, the same on all hosts."""

    folder: Path
    """Folder that runs write into, on all hosts."""

    recipe: Recipe | FinetuneRecipe | None = None
    """Recipe whose needs are compared with what there is."""

    groups: frozenset[Group] = frozenset(GROUPS)

    rounds: int = 32
    """Largest number of rounds in which pairs of hosts measure; 0 for none."""

    between: tuple[str, ...] = ()
    """Labels of the hosts whose pairs are measured; all if empty."""

    wait: float = 60.0
    """Seconds that ranks wait for each other at the start."""

    hosts: Mapping[str, int] = field(default_factory=dict)
    """Number of ranks by name of host, in the order of the launcher; empty if it is not known."""
