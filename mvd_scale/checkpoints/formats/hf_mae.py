"""Hugging Face `ViTMAEModel` and `ViTMAEForPreTraining`.

Their LayerNorms default to eps 1e-12, whereas MAE uses 1e-6: the exported `config.json` sets 1e-6.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mvd_scale.checkpoints.checkpoint import Checkpoint, Hints
from mvd_scale.checkpoints.formats.format import HF_LEAVES, Format, int_or_none, patch_axes

_PATCHES = "embeddings.patch_embeddings.projection."


def _recognise(tensors: Mapping[str, Tensor]) -> bool:
    return patch_axes(tensors, f"vit.{_PATCHES}weight", f"{_PATCHES}weight") == 4


def _facts(config: Mapping[str, Any]) -> Hints:
    return Hints(
        heads=int_or_none(config, "num_attention_heads"),
        decoder_heads=int_or_none(config, "decoder_num_attention_heads"),
    )


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    model = checkpoint.model
    assert model.width is not None
    config: dict[str, Any] = {
        "architectures": ["ViTMAEForPreTraining" if checkpoint.decoders else "ViTMAEModel"],
        "model_type": "vit_mae",
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": int(model.width * model.mlp_ratio),
        "layer_norm_eps": 1e-6,
        "image_size": model.input_size,
        "patch_size": model.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
    }
    for decoder in checkpoint.decoders.values():
        config |= {
            "decoder_hidden_size": decoder.config.width,
            "decoder_num_hidden_layers": decoder.config.depth,
            "decoder_num_attention_heads": decoder.config.heads,
            "decoder_intermediate_size": int(decoder.config.width * model.mlp_ratio),
        }
    return config


HF_MAE = Format(
    name="hf_mae",
    recognise=_recognise,
    modules=(
        (f"vit.{_PATCHES}", "encoder.patch_embed."),
        (_PATCHES, "encoder.patch_embed."),
        ("vit.embeddings.cls_token", "encoder.class_token"),
        ("embeddings.cls_token", "encoder.class_token"),
        ("vit.embeddings.position_embeddings", "encoder.positions"),
        ("embeddings.position_embeddings", "encoder.positions"),
        ("vit.encoder.layer.", "encoder.blocks."),
        ("encoder.layer.", "encoder.blocks."),
        ("vit.layers.", "encoder.blocks."),
        ("layers.", "encoder.blocks."),
        ("vit.layernorm.", "encoder.norm."),
        ("layernorm.", "encoder.norm."),
        ("decoder.decoder_embed.", "decoders.pixels.embed."),
        ("decoder.mask_token", "decoders.pixels.mask_token"),
        ("decoder.decoder_pos_embed", "decoders.pixels.positions"),
        ("decoder.decoder_layers.", "decoders.pixels.blocks."),
        # Name that `save_pretrained` of transformers 5 writes.
        ("decoder.decoder_encoder.layer.", "decoders.pixels.blocks."),
        ("decoder.decoder_norm.", "decoders.pixels.norm."),
        ("decoder.decoder_pred.", "decoders.pixels.head."),
    ),
    leaves=(
        *HF_LEAVES,
        # Module names of transformers 5.
        ("attention.q_proj.", "attn.q."),
        ("attention.k_proj.", "attn.k."),
        ("attention.v_proj.", "attn.v."),
        ("attention.o_proj.", "attn.proj."),
        ("mlp.", "mlp."),
    ),
    attention="separate",
    positions="sincos2d",
    kinds=("encoder", "student"),
    image=True,
    stores_positions=True,
    key_bias=True,
    facts=_facts,
    config=_config,
)
