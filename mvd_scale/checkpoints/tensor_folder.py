"""Folders of `torch.distributed.checkpoint`: whole tensors by name, in pieces that many ranks wrote.

torch's own writer describes the pieces in a pickle. Here they are described in JSON, `tensors.json`, and torch reads
the pieces themselves as tensors only, so that no code is ever unpickled.
"""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import WriteResult

from mvd_scale.errors import UserError
from mvd_scale.utils.io import is_plain_name, write_atomic

DESCRIPTION = "tensors.json"
"""File that lists the tensors of a folder, with dtype, shape and pieces: offsets, sizes, file, first byte, bytes."""

STATE = "state.json"
"""File beside it in the checkpoint of a run: numbers of the training's state, and metadata of the model's weights."""

MODEL = "model."
"""Prefix of the names of the model's weights."""

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}


class TensorFolderWriter(FileSystemWriter):
    """Writer of one rank's pieces by `torch.distributed.checkpoint`, which flushes files to disk.

    Args:
        folder: folder to write to, the same one on all ranks.
        rank: number of this rank, which names its files.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        # With a copy ahead, torch would synchronise a stream of GPU 0 in this thread; the pieces are on the CPU.
        super().__init__(folder, per_thread_copy_ahead=0)
        self._rank = rank

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Name the files by the rank."""
        return [replace(plan, storage_data=_StoragePrefix(f"__{self._rank}_")) for plan in plans]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the description of this rank's pieces."""
        written = [result for of_file in results for result in of_file]
        write_description_part(Path(self.path), self._rank, metadata, written)


class TensorFolderReader(FileSystemReader):
    """Reader of `torch.distributed.checkpoint.load` for folders that `TensorFolderWriter` wrote."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the description.

        Raises:
            UserError: it is missing or damaged.
        """
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, _StorageInfo] = {}
        for name, tensor in read_description(Path(self.path)).items():
            chunks = []
            for piece in tensor["pieces"]:
                offsets = torch.Size(piece["offsets"])
                chunks.append(ChunkStorageMetadata(offsets, torch.Size(piece["sizes"])))
                places[MetadataIndex(name, offsets)] = _StorageInfo(piece["file"], piece["start"], piece["bytes"])
            properties = TensorProperties(dtype=_DTYPES[tensor["dtype"]])
            tensors[name] = TensorStorageMetadata(properties, torch.Size(tensor["shape"]), chunks)
        return Metadata(tensors, storage_data=places, storage_meta=StorageMeta())


def save_pieces(state: dict[str, Any], folder: Path, planner: DefaultSavePlanner, rank: int) -> None:
    """Write the pieces of this rank; every rank plans for itself, as pieces are disjoint.

    torch's own function would gather all plans on rank 0 and send the description of all pieces to every rank, which
    grows with the square of the number of ranks. After it, `complete_description` must be called once.

    Args:
        state: objects by name of which the planner makes pieces.
        folder: folder to write to, the same one on all ranks.
        planner: planner of the pieces.
        rank: number of this rank.

    Raises:
        OSError: the files cannot be written.
    """
    writer = TensorFolderWriter(folder, rank)
    planner.set_up_planner(state, is_coordinator=True)
    writer.set_up_storage_writer(True)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    (plan,) = writer.prepare_global_plan(plans)
    writer.finish(metadata, [writer.write_data(planner.finish_plan(plan), planner).wait()])


def write_description_part(folder: Path, rank: int, metadata: Metadata, results: list[WriteResult]) -> None:
    """Write the description of the pieces of one rank.

    Args:
        folder: folder of the pieces.
        rank: number of the rank.
        metadata: tensors and pieces.
        results: place of each piece.
    """
    places = {(result.index.fqn, tuple(result.index.offset or ())): result.storage_data for result in results}
    tensors = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        pieces = []
        for chunk in tensor.chunks:
            place = places[name, tuple(chunk.offsets)]
            pieces.append(
                {
                    "offsets": list(chunk.offsets),
                    "sizes": list(chunk.sizes),
                    "file": place.relative_path,
                    "start": place.offset,
                    "bytes": place.length,
                }
            )
        dtype = str(tensor.properties.dtype).removeprefix("torch.")
        tensors[name] = {"dtype": dtype, "shape": list(tensor.size), "pieces": pieces}
    write_atomic(_part(folder, rank), json.dumps(tensors))


def complete_description(folder: Path, ranks: int) -> None:
    """Merge the descriptions of the pieces of all ranks to that of the whole tensors.

    Args:
        folder: folder to which each rank has written its pieces.
        ranks: number of ranks that wrote.

    Raises:
        OSError: a description is missing, or the pieces of a tensor are not all of it.
    """
    parts = [_part(folder, rank) for rank in range(ranks)]
    tensors: dict[str, Any] = {}
    for part in parts:
        for name, tensor in json.loads(part.read_text(encoding="utf-8")).items():
            tensors.setdefault(name, {**tensor, "pieces": []})["pieces"] += tensor["pieces"]
    for name, tensor in tensors.items():
        held, whole = sum(math.prod(piece["sizes"]) for piece in tensor["pieces"]), math.prod(tensor["shape"])
        if held != whole:
            raise OSError(f"the {ranks} ranks hold {held} of the {whole} elements of {name}")
    write_atomic(folder / DESCRIPTION, json.dumps(tensors))
    for part in parts:
        part.unlink()


def _part(folder: Path, rank: int) -> Path:
    return folder / f"tensors.{rank}.json"


def is_tensor_folder(folder: Path) -> bool:
    """Whether a folder holds tensors that `TensorFolderWriter` wrote."""
    return (folder / DESCRIPTION).is_file()


def read_description(folder: Path) -> dict[str, Any]:
    """Read the description of a folder's tensors: dtype, shape and pieces by name.

    Raises:
        UserError: it is missing or damaged, or names a file outside of the folder.
    """
    path = folder / DESCRIPTION
    try:
        tensors: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files = {piece["file"] for tensor in tensors.values() for piece in tensor["pieces"]}
        unknown = {tensor["dtype"] for tensor in tensors.values()} - _DTYPES.keys()
        if unknown:
            raise ValueError(f"its dtypes are {', '.join(_DTYPES)}, not {', '.join(map(str, unknown))}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): copy the whole checkpoint again") from error
    for file in files:
        if not is_plain_name(file):
            raise UserError(
                f"{path} names {file!r}, which is no file beside it: get the checkpoint from its author again"
            )
    return tensors


def load_pieces(state: dict[str, Any], folder: Path, planner: DefaultLoadPlanner) -> None:
    """Fill the tensors of a state in place; every process plans for itself, as what it needs depends on no other.

    Raises:
        UserError: a tensor is missing or misshapen, or a file cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(state, storage_reader=TensorFolderReader(folder), planner=planner, no_dist=True)
    except CheckpointException as error:
        raise UserError(f"{folder} cannot be loaded ({reasons(error)}): copy the whole checkpoint again") from error


def reasons(error: CheckpointException) -> str:
    """The reasons of all ranks that failed in saving or loading, in one line."""
    return "; ".join(f"rank {rank}: {_reason(failure[0])}" for rank, failure in error.failures.items())


def _reason(failure: BaseException) -> str:
    # torch's own text proposes to unpickle the file without restriction.
    if isinstance(failure, pickle.UnpicklingError):
        return "a piece is damaged, or holds something else than a tensor"
    return str(failure)


def read_tensors(folder: Path, choose: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Read whole tensors from a folder, on the CPU, without a process group.

    Args:
        folder: folder that `TensorFolderWriter` wrote.
        choose: function that says by a tensor's name whether to read it.

    Returns:
        tensors by name.

    Raises:
        UserError: a file is missing or damaged.
    """
    tensors: dict[str, Any] = {
        name: torch.empty(tensor["shape"], dtype=_DTYPES[tensor["dtype"]])
        for name, tensor in read_description(folder).items()
        if choose(name)
    }
    load_pieces(tensors, folder, DefaultLoadPlanner(flatten_state_dict=False))
    return tensors


def read_model(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read weights and metadata of the model of a run's checkpoint, as its exported file would hold them.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        metadata: dict[str, str] = json.loads((folder / STATE).read_text(encoding="utf-8"))["weights"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder / STATE} is missing or damaged ({error}): copy the whole checkpoint again") from error
    tensors = read_tensors(folder, lambda name: name.startswith(MODEL))
    return {name.removeprefix(MODEL): tensor for name, tensor in tensors.items()}, metadata
