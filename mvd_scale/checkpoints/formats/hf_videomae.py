"""Hugging Face `VideoMAEModel`, `VideoMAEForPreTraining` and `VideoMAEForVideoClassification`.

Their LayerNorms default to eps 1e-12 (1e-5 after the decoder); VideoMAE itself and this project use 1e-6.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from mvd_scale.checkpoints.checkpoint import Checkpoint, Hints
from mvd_scale.checkpoints.formats.format import (
    HF_LEAVES,
    Format,
    int_or_none,
    patch_axes,
    processor_config,
    unnamed_classes,
)

_PATCHES = "embeddings.patch_embeddings.projection."
_CLASSES = {
    "encoder": "VideoMAEModel",
    "student": "VideoMAEForPreTraining",
    "classifier": "VideoMAEForVideoClassification",
}


def _recognise(tensors: Mapping[str, Tensor]) -> bool:
    return patch_axes(tensors, f"videomae.{_PATCHES}weight", f"{_PATCHES}weight") == 5


def _facts(config: Mapping[str, Any]) -> Hints:
    return Hints(
        heads=int_or_none(config, "num_attention_heads"),
        decoder_heads=int_or_none(config, "decoder_num_attention_heads"),
        frames=int_or_none(config, "num_frames"),
        input_size=int_or_none(config, "image_size"),
    )


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    model = checkpoint.model
    assert model.width is not None
    config: dict[str, Any] = {
        "architectures": [_CLASSES[checkpoint.kind]],
        "model_type": "videomae",
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": int(model.width * model.mlp_ratio),
        "layer_norm_eps": 1e-6,
        "image_size": model.input_size,
        "patch_size": model.patch_size,
        "num_frames": model.frames,
        "tubelet_size": model.tubelet,
        "num_channels": 3,
        "qkv_bias": True,
        "qv_bias": True,
        "use_mean_pooling": not checkpoint.final_norm,
    }
    for decoder in checkpoint.decoders.values():
        config |= {
            "decoder_hidden_size": decoder.config.width,
            "decoder_num_hidden_layers": decoder.config.depth,
            "decoder_num_attention_heads": decoder.config.heads,
            "decoder_intermediate_size": int(decoder.config.width * model.mlp_ratio),
        }
    if checkpoint.classes is not None:
        names = checkpoint.class_names or unnamed_classes(checkpoint.classes)
        config["id2label"] = {str(label): name for label, name in enumerate(names)}
        config["label2id"] = {name: label for label, name in enumerate(names)}
    return config


HF_VIDEOMAE = Format(
    name="hf_videomae",
    recognise=_recognise,
    modules=(
        (f"videomae.{_PATCHES}", "encoder.patch_embed."),
        (_PATCHES, "encoder.patch_embed."),
        ("videomae.encoder.layer.", "encoder.blocks."),
        ("encoder.layer.", "encoder.blocks."),
        ("videomae.layernorm.", "encoder.norm."),
        ("layernorm.", "encoder.norm."),
        ("encoder_to_decoder.weight", "decoders.pixels.embed.weight"),
        ("mask_token", "decoders.pixels.mask_token"),
        ("decoder.decoder_layers.", "decoders.pixels.blocks."),
        ("decoder.norm.", "decoders.pixels.norm."),
        ("decoder.head.", "decoders.pixels.head."),
        ("fc_norm.", "norm."),
        ("classifier.", "head."),
    ),
    leaves=(
        # Published files have these names; the modules of transformers 5 name them like the biases of a linear layer.
        ("attention.attention.q_bias", "attn.q.bias"),
        ("attention.attention.v_bias", "attn.v.bias"),
        *HF_LEAVES,
    ),
    attention="separate",
    positions="sinusoid",
    kinds=("encoder", "student", "classifier"),
    facts=_facts,
    config=_config,
    processor=partial(processor_config, "VideoMAEImageProcessor"),
)
