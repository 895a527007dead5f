"""Ways in which a CPU computes bfloat16 in linear layers and attention: choice from a trial, and setting on a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from mvd_kernels import AttentionWays, Linear, LinearWays
from mvd_kernels.cpu_trial import SHAPES
from mvd_scale.models.blocks import QKV, Attention

_NOT_WORSE = 1.1
"""Factor on the time of the fastest way up to which an earlier one of the trial is taken: chance in the times of nearly
equal ways shall not decide."""

Way = TypeVar("Way", bound=str)


@dataclass(frozen=True)
class Bf16Ways:
    """Ways in which the models of a run compute bfloat16 on a CPU. Results are bfloat16 in any case."""

    products: LinearWays

    attention: AttentionWays | None
    """None for the default of the CPU, see `mvd_kernels.attention_backend`."""

    def __str__(self) -> str:
        return f"{self.products}{'' if self.attention is None else f', attention {self.attention}'}"


AS_THEY_ARE = Bf16Ways(LinearWays(), None)
IN_FLOAT32 = Bf16Ways(LinearWays("float32", "float32", "float32"), AttentionWays("sdpa in float32", "sdpa in float32"))


@dataclass(frozen=True)
class Bf16Trial:
    """CPU seconds of calls by each way, the preferred way first; see `mvd_kernels.cpu_trial`."""

    products: Mapping[str, Mapping[Any, float]]
    """{field of `LinearWays`: {way: seconds}}."""

    attention: Mapping[str, Mapping[Any, float]]
    """{field of `AttentionWays`: {way: seconds}}."""

    def choose(self) -> Bf16Ways:
        """Choose the way of each call: the first one that takes at most 1.1 times as long as the fastest."""
        return Bf16Ways(
            LinearWays(**{name: _first_good(times) for name, times in self.products.items()}),
            AttentionWays(**{name: _first_good(times) for name, times in self.attention.items()}),
        )

    def __str__(self) -> str:
        """The times in milliseconds."""
        return "; ".join(
            f"{calls} ({SHAPES[calls]}) "
            + ", ".join(
                f"{name.replace('_', ' ')} {' / '.join(f'{way} {1000 * took:.1f}' for way, took in times.items())}"
                for name, times in table.items()
            )
            for calls, table in (("products", self.products), ("attention", self.attention))
        )


def _first_good(times: Mapping[Way, float]) -> Way:
    return next(way for way, took in times.items() if took <= _NOT_WORSE * min(times.values()))


def set_bf16_ways(model: nn.Module, ways: Bf16Ways) -> None:
    """Set the ways in which a model on a CPU computes bfloat16.

    Its `torch.nn.Linear` layers are replaced by `mvd_kernels.Linear` with the same parameters. Attention of timm's
    models and the products of batched decoders remain as they are.
    """
    for parent in list(model.modules()):
        if isinstance(parent, QKV):
            parent.ways = ways.products
        if isinstance(parent, Attention):
            parent.ways = ways.attention
        for name, child in list(parent.named_children()):
            # No subclasses: they compute in a way of their own.
            if type(child) is nn.Linear:
                setattr(parent, name, Linear.of(child, ways.products))
