"""Reader for DeepSpeed checkpoint folders of any ZeRO stage that does not use DeepSpeed.

DeepSpeed's own converter unpickles the files without restriction, which executes any code they contain.

The layout of the shards is that of DeepSpeed's `utils/zero_to_fp32.py`.
"""

from __future__ import annotations

import math
import re
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvd_scale.checkpoints.pickles import load_pickle
from mvd_scale.errors import UserError
from mvd_scale.utils.io import is_plain_name

_WHOLE = "mp_rank_00_model_states.pt"
_PARTED = "mp_rank_01_model_states.pt"
_MODEL = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
_OPTIMIZER = "*zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def find_deepspeed(folder: Path) -> Path | None:
    """Return the folder with the files of a checkpoint: this folder, or the subfolder that its file `latest` names.

    Returns:
        the folder, or None if neither holds a DeepSpeed checkpoint.

    Raises:
        UserError: `latest` names a folder that does not exist.
    """
    if (folder / _WHOLE).is_file() or (folder / _MODEL.format(0)).is_file():
        return folder
    latest = folder / "latest"
    if not latest.is_file():
        return None
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not is_plain_name(tag) or find_deepspeed(folder / tag) is None:
        raise UserError(f"{latest} names the checkpoint {tag!r}, which is not in {folder}; give a complete folder")
    return folder / tag


def load_deepspeed(folder: Path) -> dict[str, Tensor]:
    """Return all parameters by name.

    Stages 0 to 2 keep the parameters in one file, in the dtype of the run; stage 3 keeps float32 shards of all ranks,
    which are joined here.

    Raises:
        UserError: a file is missing, unreadable or does not fit the others.
    """
    if (folder / _PARTED).is_file():
        raise UserError(
            f"{folder} was written with tensor parallelism: each file mp_rank_*_model_states.pt holds a part of the "
            "tensors. Expected one part; merge them first with the tools of the project that wrote them"
        )
    if (folder / _WHOLE).is_file():
        module = _dictionary(folder / _WHOLE).get("module")
        if not isinstance(module, dict):
            raise UserError(f"{folder / _WHOLE} has no `module`: expected the model states of a DeepSpeed checkpoint")
        return {name: tensor for name, tensor in module.items() if isinstance(tensor, Tensor)}
    first = _dictionary(folder / _MODEL.format(0))
    shards = _shards(folder)
    try:
        tensors = {name: tensor for name, tensor in first["module"].items() if name in first["buffer_names"]}
        shapes = {name: shape for group in first["param_shapes"] for name, shape in group.items()}
        tensors |= _join(shapes, shards)
        frozen = first.get("frozen_param_shapes") or {}
        if frozen:
            models = [_dictionary(folder / _MODEL.format(rank)) for rank in range(len(shards))]
            for name, shape in frozen.items():
                pieces = torch.cat([model["frozen_param_fragments"][name] for model in models])
                tensors[name] = pieces[: shape.numel()].view(shape)
        tensors |= {name: tensors[same] for name, same in first["shared_params"].items() if same in tensors}
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{folder} is not a complete ZeRO-3 checkpoint: its files do not fit together ({error!r}); "
            "copy the whole folder again"
        ) from error
    return tensors


def _dictionary(file: Path) -> dict[str, Any]:
    content = load_pickle(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no dictionary: expected the states of a DeepSpeed checkpoint")
    return content


def _shards(folder: Path) -> list[list[Tensor]]:
    """Read the flat float32 sub-groups of every rank, in the order of the ranks; the first file tells their number."""
    shards: list[list[Tensor]] = []
    ranks = 1
    while len(shards) < ranks:
        files = list(folder.glob(_OPTIMIZER.format(len(shards))))
        if not files:
            raise UserError(
                f"{folder} lacks the file {_OPTIMIZER.format(len(shards)).lstrip('*')}: "
                f"a ZeRO-3 checkpoint needs one per rank{f', {ranks} here' if shards else ''}; copy the whole folder"
            )
        state: dict[str, Any] = _dictionary(files[0]).get("optimizer_state_dict", {})
        if "fp32_flat_groups" not in state or "partition_count" not in state:
            raise UserError(f"{files[0]} has no `fp32_flat_groups`: expected the optimizer states of ZeRO-3")
        ranks = int(re.sub(r"\D", "", str(state["partition_count"])) or 0)
        groups = state["fp32_flat_groups"]
        shards.append([groups] if isinstance(groups, Tensor) else list(groups))
    return shards


def _join(shapes: dict[str, torch.Size], shards: list[list[Tensor]]) -> dict[str, Tensor]:
    """Join the shards of each parameter, by name.

    ZeRO-3 divides every parameter into equal shares, one per rank, pads the last one, and stores it at the same offset
    in the concatenated sub-groups of all ranks.
    """
    ends = list(accumulate(group.numel() for group in shards[0]))
    joined, offset = {}, 0
    for name, shape in shapes.items():
        share = math.ceil(shape.numel() / len(shards))
        pieces = []
        for groups in shards:
            for group, end in zip(groups, ends, strict=True):
                start = end - group.numel()
                # A share may cross the border between two sub-groups: take the overlap with each of them.
                pieces.append(group[max(offset - start, 0) : max(offset + share - start, 0)])
        joined[name] = torch.cat(pieces)[: shape.numel()].view(shape)
        offset += share
    if offset != ends[-1]:
        raise RuntimeError(f"the parameters cover {offset} of {ends[-1]} values per rank")
    return joined
