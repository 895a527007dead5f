"""Launches of the project's Triton kernels during a step on the fake GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mvd_kernels.triton_ops.example_inputs import example_launches
from mvd_kernels.triton_ops.launch import Launch

from .gpu import META


class LaunchRecorder(TorchDispatchMode):
    """Mode that runs the functions of the project's operators up to their launches, and records these.

    Args:
        launches: list that gets each launch, with tensors on the meta device.
    """

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator; one of this project gives tensors of the kind that its fake function promises."""
        promised = func(*args, **(kwargs or {}))
        if func.namespace != "mvd_kernels":
            return promised
        with patch.object(Launch, "run", lambda launch: self.launches.append(without_values(launch))):
            given = OPDEFS[func.name()]._init_fn(*args, **(kwargs or {}))
        assert tree_map_only(Tensor, _kind, given) == tree_map_only(Tensor, _kind, promised), func
        return promised


def without_values(launch: Launch) -> Launch:
    """Return a launch whose tensors have a dtype only."""

    def bare(tensor: Tensor) -> Tensor:
        with unset_fake_temporarily():
            return torch.empty(1, dtype=tensor.dtype, device=META)

    return replace(launch, arguments=tree_map_only(Tensor, bare, launch.arguments))


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device, tensor.stride()


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record the launches of a block of code on the fake GPU."""
    launches: list[Launch] = []
    with LaunchRecorder(launches):
        yield launches


def key(launch: Launch) -> tuple[Any, ...]:
    """What a launch is compiled for: kernel, constants, warps and dtypes. bfloat16 counts as float16."""
    dtypes = tuple(
        (name, value.dtype.itemsize, value.is_floating_point())
        for name, value in launch.arguments.items()
        if isinstance(value, Tensor)
    )
    return launch.kernel.__name__, launch.warps, *sorted(launch.constants.items()), *dtypes


def unknown(launches: list[Launch]) -> set[tuple[Any, ...]]:
    """Keys of launches that the table of registers and spills (`mvd_kernels.compile_report`) does not have."""
    return {key(launch) for launch in launches} - {key(example.launch) for example in example_launches()}
