"""DeepSpeed checkpoint folders of any ZeRO stage, without DeepSpeed: its own converter runs code of the file.

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

_WHOLE = "mp_rank_00_model_states.pt"
_MODEL = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
_OPTIMIZER = "*zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def find_deepspeed(folder: Path) -> Path | None:
    """The folder that holds the files of a checkpoint: this one, or the newest by its file `latest`.

    Raises:
        UserError: `latest` names a folder that is not there.
    """
    if (folder / _WHOLE).is_file() or (folder / _MODEL.format(0)).is_file():
        return folder
    latest = folder / "latest"
    if not latest.is_file():
        return None
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if Path(tag).name != tag or find_deepspeed(folder / tag) is None:
        raise UserError(f"{latest} names the checkpoint {tag!r}, which is not in {folder}; give a complete folder")
    return folder / tag


def load_deepspeed(folder: Path) -> dict[str, Tensor]:
    """All parameters by name: as trained at stages 0 to 2, float32 from the shards of all ranks at stage 3.

    Raises:
        UserError: a file is missing, unreadable or does not fit the others.
    """
    if (folder / _WHOLE).is_file():
        module = load_pickle(folder / _WHOLE).get("module")
        if not isinstance(module, dict):
            raise UserError(f"{folder / _WHOLE} has no `module`: expected the model states of a DeepSpeed checkpoint")
        return {name: tensor for name, tensor in module.items() if isinstance(tensor, Tensor)}
    first = load_pickle(folder / _MODEL.format(0))
    shards = _shards(folder)
    try:
        tensors = {name: tensor for name, tensor in first["module"].items() if name in first["buffer_names"]}
        shapes = {name: shape for group in first["param_shapes"] for name, shape in group.items()}
        tensors |= _join(shapes, shards)
        frozen = first.get("frozen_param_shapes") or {}
        if frozen:
            models = [load_pickle(folder / _MODEL.format(rank)) for rank in range(len(shards))]
            for name, shape in frozen.items():
                pieces = torch.cat([model["frozen_param_fragments"][name] for model in models])
                tensors[name] = pieces[: shape.numel()].view(shape)
        tensors |= {name: tensors[same] for name, same in first["shared_params"].items() if same in tensors}
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{folder} is no whole ZeRO-3 checkpoint: its files do not fit together ({error!r})") from error
    return tensors


def _shards(folder: Path) -> list[list[Tensor]]:
    """Flat float32 sub-groups of every rank, in the order of the ranks."""
    shards: list[list[Tensor]] = []
    ranks = 1
    while len(shards) < ranks:
        files = list(folder.glob(_OPTIMIZER.format(len(shards))))
        if not files:
            raise UserError(
                f"{folder} lacks the file {_OPTIMIZER.format(len(shards)).lstrip('*')}: "
                f"a ZeRO-3 checkpoint needs one per rank{f', {ranks} here' if shards else ''}; copy the whole folder"
            )
        state: dict[str, Any] = load_pickle(files[0]).get("optimizer_state_dict", {})
        if "fp32_flat_groups" not in state or "partition_count" not in state:
            raise UserError(f"{files[0]} has no `fp32_flat_groups`: expected the optimizer states of ZeRO-3")
        ranks = int(re.sub(r"\D", "", str(state["partition_count"])) or 0)
        groups = state["fp32_flat_groups"]
        shards.append([groups] if isinstance(groups, Tensor) else list(groups))
    return shards


def _join(shapes: dict[str, torch.Size], shards: list[list[Tensor]]) -> dict[str, Tensor]:
    """Each parameter lies at the same place on all ranks, cut evenly and padded at the end."""
    ends = list(accumulate(group.numel() for group in shards[0]))
    joined, offset = {}, 0
    for name, shape in shapes.items():
        share = math.ceil(shape.numel() / len(shards))
        pieces = []
        for groups in shards:
            for group, end in zip(groups, ends, strict=True):
                start = end - group.numel()
                # A parameter may run over the border of two sub-groups.
                pieces.append(group[max(offset - start, 0) : max(offset + share - start, 0)])
        joined[name] = torch.cat(pieces)[: shape.numel()].view(shape)
        offset += share
    if offset != ends[-1]:
        raise RuntimeError(f"the names take {offset} of {ends[-1]} numbers per rank")
    return joined
