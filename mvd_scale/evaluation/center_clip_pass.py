"""Pass of a model over the middle clips of labelled videos, distributed over all ranks.

Legend: X videos, B videos of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvd_scale.config import DataConfig, ModelConfig
from mvd_scale.config.data import ViewsConfig
from mvd_scale.data.loaders.view_loader import ViewLoader, ViewShape, view_items
from mvd_scale.data.manifest import Manifest
from mvd_scale.distributed.process_group import Ranks, gather_rows


class CenterClipEvaluator:
    """Evaluation of a model on one centre crop of the middle clip of each labelled video of a manifest.

    At ZeRO stage 3 a forward pass is a collective operation, so all ranks run the same number of passes.
    """

    def __init__(self, manifest: Manifest, data: DataConfig, model: ModelConfig, ranks: Ranks, batch: int) -> None:
        self.manifest = manifest
        self.data = data.model_copy(update={"workers": 0})
        self.model = model
        self.ranks = ranks
        self.batch = batch
        self.views = ViewsConfig(
            sampling="uniform" if data.spans_whole_videos else "dense", stride=data.stride, clips=1, crops=1
        )
        items = view_items(manifest, self.views, frames=model.frames)
        self.items = items[manifest.label[items[:, 0]] >= 0]

    def __call__(self, forward: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Apply `forward` to clips, uint8 (B, T, S, S, 3). All ranks must call it.

        Returns:
            on every rank: all outputs (X, ...), labels int64 (X,), and whether the videos could be decoded, bool (X,).
        """
        outputs, labels, decoded = [], [], []
        for pixels, known, fine in self._batches(self.items[self.ranks.rank :: self.ranks.world_size]):
            outputs.append(forward(pixels)[: len(known)])
            labels.append(known)
            decoded.append(fine.to(known.device))
            self.ranks.progress.tick()
        whole = [gather_rows(torch.cat(parts), self.ranks) for parts in (outputs, labels, decoded)]
        return whole[0], whole[1], whole[2]

    def _batches(self, mine: NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield clips, labels, and whether the clips were decoded.

        A rank with fewer batches than others then yields black clips without labels, up to the same number of batches.
        """
        most = math.ceil(math.ceil(len(self.items) / self.ranks.world_size) / self.batch)
        loader = ViewLoader(
            self.manifest,
            self.data,
            self.views,
            mine,
            shape=ViewShape.of(self.model),
            batch=self.batch,
            rank=self.ranks.data_rank,
        )
        with loader:
            for batch in loader:
                most -= 1
                yield batch.pixels.flatten(0, 2), batch.labels, batch.decoded
        shape = (1, self.model.frames, self.model.input_size, self.model.input_size, 3)
        nothing = torch.zeros(shape, dtype=torch.uint8, device=self.ranks.device)
        none = torch.zeros(0, dtype=torch.int64, device=self.ranks.device)
        for _ in range(most):
            yield nothing, none, none.bool()
