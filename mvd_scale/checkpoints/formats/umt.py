"""UMT (OpenGVLab/unmasked_teacher): encoders and fine-tuned classifiers with tubelets of one frame; read only.

The names are VideoMAE's. Fine-tuning at other clips than 8 frames of 224 pixels stores an interpolated position table.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mvd_scale.checkpoints.formats.format import SPLIT_LEAVES, Format
from mvd_scale.checkpoints.formats.videomae import FINETUNED_MODULES, has_split_biases


def _recognise(tensors: Mapping[str, Tensor]) -> bool:
    patches = tensors.get("patch_embed.proj.weight")
    return has_split_biases(tensors) and patches is not None and patches.ndim == 5 and patches.shape[2] == 1


UMT = Format(
    name="umt",
    recognise=_recognise,
    modules=(*FINETUNED_MODULES, ("pos_embed", "encoder.positions")),
    leaves=SPLIT_LEAVES,
    attention="split",
    positions="sinusoid",
    kinds=("encoder", "classifier"),
    frames=8,
    input_size=224,
    # Linear heads that predict the features of its teacher.
    ignored=("clip_decoder.",),
)
