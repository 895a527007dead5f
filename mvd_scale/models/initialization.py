"""Initial weights as published: those of pre-training (MVD, VideoMAE, MAE) and of fine-tuning.

The linear layer that embeds tubelets has the default initial weights of the published convolution: PyTorch draws
weights and biases of both uniformly in +-1 / sqrt(inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvd_scale.config import ModelConfig
from mvd_scale.models.blocks import QKV, Blocks


def init_pretrain_weights(module: nn.Module) -> None:
    """Initialise one module for pre-training (linear layers Xavier uniform, biases 0); meant for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_patch_embed(layer: nn.Linear, config: ModelConfig) -> None:
    """Initialise a patch embedding: an image model's weights Xavier uniform (MAE); all else stays PyTorch's default."""
    if config.is_image_model:
        nn.init.xavier_uniform_(layer.weight)


def init_mask_token(token: Tensor, encoder: ModelConfig) -> None:
    """Initialise a mask token (1, 1, D) from a normal distribution of deviation 0.02.

    For clips it is cut at one deviation (MVD, VideoMAE), which leaves a deviation of 0.0108.
    """
    if encoder.is_image_model:
        nn.init.normal_(token, std=0.02)
    else:
        nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)


def init_finetune_weights(blocks: Blocks, head: nn.Linear, head_scale: float) -> None:
    """Initialise blocks and head for fine-tuning, before an encoder is loaded: normal of deviation 0.02, biases 0.

    Args:
        blocks: blocks of the encoder, whose patch embedding stays as it is.
        head: linear layer of the task.
        head_scale: factor on the head's weights.
    """
    blocks.apply(_init_finetune_module)
    _init_finetune_module(head)
    with torch.no_grad():
        head.weight *= head_scale


def _init_finetune_module(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | QKV):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
