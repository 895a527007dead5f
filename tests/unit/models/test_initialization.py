"""Standard deviations of initial weights, layer by layer, are those of the published code."""

from __future__ import annotations

import math
from functools import cache

import pytest
from torch import Tensor, nn

from mvd_scale.config import DecoderConfig, DetectorConfig, ModelConfig
from mvd_scale.models import Classifier, Student

# Widths of ViT-B, so that the figures are those of the published notes; the depth changes none.
VIDEO = {"width": 768, "depth": 2, "heads": 12, "frames": 4, "input_size": 32}
CLIP_PATCH = 1 / math.sqrt(3 * 1536)
"""0.0147: uniform in +-1 / sqrt(inputs) for 3 x 2 x 16 x 16 inputs."""

IMAGE_PATCH = 1 / math.sqrt(3 * 768)
CUT_NORMAL = 0.0108
"""Deviation of a normal distribution of deviation 0.02 that is cut at +-0.02."""


def xavier(outputs: int, inputs: int) -> float:
    return math.sqrt(2 / (outputs + inputs))


BLOCK = {
    "attn.qkv.weight": xavier(3 * 768, 768),
    "attn.proj.weight": xavier(768, 768),
    "mlp.fc1.weight": xavier(3072, 768),
    "mlp.fc2.weight": xavier(768, 3072),
}
MVD = {
    "encoder.patch_embed.weight": CLIP_PATCH,
    "encoder.patch_embed.bias": CLIP_PATCH,
    **{f"encoder.blocks.1.{name}": deviation for name, deviation in BLOCK.items()},
    **{f"decoders.video.blocks.1.{name}": deviation for name, deviation in BLOCK.items()},
    "decoders.video.embed.weight": xavier(768, 768),
    "decoders.video.embed.bias": 0,
    "decoders.video.mask_token": CUT_NORMAL,
    "decoders.video.head.weight": xavier(1536, 768),
}
VIDEOMAE = {
    "encoder.patch_embed.weight": CLIP_PATCH,
    "encoder.patch_embed.bias": CLIP_PATCH,
    "encoder.blocks.1.mlp.fc1.weight": xavier(3072, 768),
    "decoders.video.embed.weight": 1 / math.sqrt(3 * 768),
    "decoders.video.mask_token": CUT_NORMAL,
    "decoders.video.head.weight": xavier(1536, 384),
}
MAE = {
    "encoder.patch_embed.weight": xavier(768, 768),
    "encoder.patch_embed.bias": IMAGE_PATCH,
    "encoder.class_token": 0.02,
    "encoder.blocks.1.mlp.fc1.weight": xavier(3072, 768),
    "decoders.video.embed.weight": xavier(512, 768),
    "decoders.video.embed.bias": 0,
    "decoders.video.mask_token": 0.02,
    "decoders.video.head.weight": xavier(1536, 512),
}
FINE_TUNED = {
    "encoder.patch_embed.weight": CLIP_PATCH,
    "encoder.patch_embed.bias": CLIP_PATCH,
    **{f"encoder.blocks.1.{name}": 0.02 for name in BLOCK},
    "head.weight": 0.02 * 0.001,
}


@cache
def made(kind: str) -> nn.Module:
    video = ModelConfig.model_validate(VIDEO)
    if kind == "classifier":
        return Classifier(video, 400, init_scale=0.001)
    if kind == "detector":
        pytest.importorskip("torchvision", reason="needs torchvision: the detection extra")
        from mvd_scale.models.detector import Detector

        return Detector(video, DetectorConfig())
    decoder = {"mvd": (768, 12, True), "videomae": (384, 6, False), "mae": (512, 16, True)}[kind]
    shape = {
        "mvd": video,
        "videomae": video.model_copy(update={"positions": "sinusoid"}),
        "mae": ModelConfig.model_validate(
            VIDEO | {"frames": 1, "tubelet": 1, "positions": "sincos2d", "class_token": True}
        ),
    }[kind]
    width, heads, bias = decoder
    return Student(shape, {"video": (DecoderConfig(width=width, depth=2, heads=heads, embed_bias=bias), 1536)})


def deviation(values: Tensor) -> float:
    return values.std(correction=0).item()


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        (kind, name, expected)
        for kind, layers in {
            "mvd": MVD, "videomae": VIDEOMAE, "mae": MAE, "classifier": FINE_TUNED, "detector": FINE_TUNED
        }.items()
        for name, expected in layers.items()
    ],
)  # fmt: skip
def test_a_layer_begins_as_published(kind: str, name: str, expected: float) -> None:
    values = made(kind).get_parameter(name)
    # The deviation of n values is known to 1 / sqrt(2 n) of itself; 4 of these.
    assert deviation(values) == pytest.approx(expected, rel=4 / math.sqrt(2 * values.numel()))


@pytest.mark.parametrize("kind", ["mvd", "videomae", "mae", "classifier", "detector"])
def test_all_other_biases_are_zero_and_norms_do_nothing(kind: str) -> None:
    for name, parameter in made(kind).named_parameters():
        if parameter.ndim > 1 or name == "encoder.patch_embed.bias":
            continue
        assert (parameter == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name


def test_the_figures_are_those_of_the_published_notes() -> None:
    assert pytest.approx(0.0147, abs=5e-5) == CLIP_PATCH
    assert VIDEOMAE["decoders.video.embed.weight"] == pytest.approx(0.0208, abs=5e-5)
    assert pytest.approx(0.0208, abs=5e-5) == IMAGE_PATCH


@pytest.mark.parametrize("kind", ["mvd", "videomae"])
def test_mask_tokens_of_clips_are_cut_at_one_deviation(kind: str) -> None:
    token = made(kind).get_parameter("decoders.video.mask_token")
    assert 0.0195 < token.abs().max() <= 0.02
    assert made("mae").get_parameter("decoders.video.mask_token").abs().max() > 0.03
