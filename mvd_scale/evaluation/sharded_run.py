"""Resumable pass over test views of many videos, or over key frames, that writes its results in shards.

    list all items -> cut the list into shards -> each rank writes its share of the missing shards

A shard is written under another name and renamed, so it is never partial. A restart with any number of ranks continues
with the missing shards.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mvd_scale.config.data import DataConfig, ViewsConfig
from mvd_scale.data.batch import ViewBatch
from mvd_scale.data.indexing.build import load_source
from mvd_scale.data.loaders.quarantine import Quarantine
from mvd_scale.data.loaders.view_loader import ItemLoader, ViewLoader, ViewShape, view_items
from mvd_scale.data.manifest import Manifest
from mvd_scale.distributed.process_group import Ranks, barrier_via_store, run_on_rank0
from mvd_scale.errors import UserError
from mvd_scale.utils.io import read_metrics, write_atomic

logger = logging.getLogger("mvd_scale")

Batch = TypeVar("Batch")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ResultShards:
    """Folder of a pass: `NAME.json` with its settings, and the shards `NAME_000000.SUFFIX` and so on."""

    out: Path
    name: str
    suffix: str
    size: int
    """Items per shard."""

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Check that the folder is empty or holds results of a pass with the same settings. Only rank 0 calls it.

        Raises:
            UserError: the folder holds results of other settings, or cannot be written.
        """
        described = self.out / f"{self.name}.json"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if described.is_file() and not any(self.out.glob(f"{self.name}_*.{self.suffix}")):
                # An earlier start wrote settings but no shard: its folder may be reused.
                self.manifest.unlink(missing_ok=True)
            elif described.is_file():
                stands = json.loads(described.read_text())
                differing = [key for key, value in settings.items() if stands.get(key) != value]
                if differing:
                    there, here = (", ".join(f"{key} {of.get(key)}" for key in differing) for of in (stands, settings))
                    raise UserError(
                        f"{self.out} holds {self.name} with {there}, but this command has {here}: choose another --out"
                    )
            elif any(self.out.iterdir()):
                raise UserError(f"{self.out} exists and holds no {self.name}: choose an empty or new folder with --out")
            write_atomic(described, json.dumps(settings, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--out {self.out} cannot be written: {error.strerror}") from error

    def open(self, data: DataConfig) -> Manifest:
        """Index the videos of a pass after `claim`. Only rank 0 calls it; the caller checks and saves the manifest.

        Raises:
            UserError: see `load_source`; or the existing shards are of other videos.
        """
        cache = self.out / "index"
        cache.mkdir(exist_ok=True)
        manifest = load_source(data, cache)
        if self.manifest.is_file() and Manifest.load(self.manifest).digest != manifest.digest:
            raise UserError(
                f"{self.out} holds {self.name} of other videos than {manifest.source} contains now: "
                "choose another --out"
            )
        return manifest

    @property
    def manifest(self) -> Path:
        """Path of the list of videos."""
        return self.out / "manifest.parquet"

    def file(self, number: int) -> Path:
        """Path of a shard."""
        return self.out / f"{self.name}_{number:06d}.{self.suffix}"

    @property
    def quarantine(self) -> Path:
        """Path of the list of videos that cannot be decoded."""
        return self.out / "quarantine.jsonl"

    def write_missing(
        self,
        items: NDArray[np.int64],
        ranks: Ranks,
        *,
        load: Callable[[NDArray[np.int64]], ItemLoader[Batch]],
        results: Callable[[Batch], Iterator[Result]],
        write: Callable[[Path, list[Result]], None],
    ) -> list[Path]:
        """Write the missing shards and wait until all ranks have written theirs. All ranks must call it.

        Args:
            items: all items to load, one row each.
            ranks: this process among all; each writes its share.
            load: makes the loader of some of the items.
            results: yields one result per item of a batch.
            write: writes the results of a shard to a file.

        Returns:
            paths of all shards in order.
        """
        parts = [items[start : start + self.size] for start in range(0, len(items), self.size)]
        files = [self.file(number) for number in range(len(parts))]
        # Only rank 0 lists the missing shards: another rank might look after the first new ones were written.
        missing = run_on_rank0(
            ranks, f"missing {self.out}", lambda: [number for number, file in enumerate(files) if not file.is_file()]
        )
        mine = missing[ranks.rank :: ranks.world_size]
        logger.info("%d of %d shards were written before", len(parts) - len(missing), len(parts))
        if mine:
            with load(np.concatenate([parts[number] for number in mine])) as loader:
                stream = (result for batch in loader for result in results(batch))
                for number in mine:
                    partial = files[number].with_name(files[number].name + ".partial")
                    write(partial, [next(stream) for _ in range(len(parts[number]))])
                    os.replace(partial, files[number])
        barrier_via_store(ranks, str(self.out))
        return files

    def write_missing_views(
        self,
        manifest: Manifest,
        data: DataConfig,
        views: ViewsConfig,
        shape: ViewShape,
        ranks: Ranks,
        *,
        batch: int,
        results: Callable[[ViewBatch], Iterator[Result]],
        write: Callable[[Path, list[Result]], None],
    ) -> list[Path]:
        """Write the missing shards of a pass over the test views of videos; see `write_missing`.

        Args:
            manifest: the videos.
            data: workers and time limit of the decoding.
            views: the views of each video.
            shape: frames and side of a view.
            ranks: this process among all; each writes its share.
            batch: items that a rank loads in one batch.
            results: yields one result per item of a batch.
            write: writes the results of a shard to a file.

        Returns:
            paths of all shards in order.
        """

        def load(items: NDArray[np.int64]) -> ViewLoader:
            return ViewLoader(
                manifest,
                data,
                views,
                items,
                shape=shape,
                batch=batch,
                rank=ranks.data_rank,
                quarantine=Quarantine(self.quarantine),
            )

        items = view_items(manifest, views, frames=shape.frames)
        return self.write_missing(items, ranks, load=load, results=results, write=write)


def failures(out: Path, manifest: Manifest) -> dict[int, str]:
    """Return the reasons why labelled videos could not be decoded, or were excluded by the index.

    Args:
        out: folder of the pass.
        manifest: its videos.

    Returns:
        {position among the labelled videos: reason}.
    """
    found = left_out(out, manifest)
    labelled = np.flatnonzero(manifest.label >= 0).tolist()
    return {place: found[row] for place, row in enumerate(labelled) if row in found}


def left_out(out: Path, manifest: Manifest) -> dict[int, str]:
    """Return the reasons why videos could not be decoded, or were excluded by the index: {row of the manifest: reason}.

    Args:
        out: folder of the pass.
        manifest: its videos.
    """
    found = {row: why for row, why in enumerate(manifest.left_out) if why is not None}
    quarantine = out / "quarantine.jsonl"
    if quarantine.is_file():
        found |= {line["row"]: line["error"] for line in read_metrics(quarantine)}
    return found
