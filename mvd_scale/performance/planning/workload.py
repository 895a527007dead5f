"""Workload of a recipe: the layers of each model of the training step, per clip.

The clips of a micro batch share the first projections of their mask tokens: see `Workload.in_batches_of`. The
descriptions of models in this module must be kept consistent with the models themselves.

Legend: N tokens of a clip, V visible tokens, M tokens at which a target is predicted, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mvd_scale.config import DecoderConfig, FinetuneRecipe, ModelConfig, Recipe, TokenHeadConfig
from mvd_scale.errors import UserError
from mvd_scale.models import Classifier, Student
from mvd_scale.models.quantization import quantizable_weights
from mvd_scale.models.timm_vit import TimmViT
from mvd_scale.performance.planning.layers import BlockCost, ElementwiseCost, LayerCost, LinearCost
from mvd_scale.targets import FrozenTeacher, Target, build_targets
from mvd_scale.targets.build import init_teacher
from mvd_scale.targets.image_teacher import ImageTeacher
from mvd_scale.targets.target import EncoderTeacher
from mvd_scale.training.capabilities import teacher_of
from mvd_scale.training.placement import Teacher


@dataclass(frozen=True)
class ModelPart:
    """One model or head of the step; all figures are per clip."""

    name: str
    width: int
    layers: tuple[LayerCost, ...]

    predicted: int = 0
    """Number of values that it predicts, or that a teacher computes, for the loss."""

    counted: int = 0
    """FLOPs of a forward pass as torch counts them, for models of other libraries, which have no `layers`."""

    opaque: int = 0
    """Number of values at the memory peak of a forward pass of such a model."""

    parameters: int = 0
    """Number of parameters of a teacher; the student's are in `Workload.parameters`."""

    unsharded: int = 0
    """Number of parameters in tensors that are too small to be sharded."""

    largest: int = 0
    """Number of parameters of its largest block."""

    linear: int = 0
    """Number of weights of linear layers in blocks, which can be quantized to 8 bits."""

    channels: int = 0
    """Number of output channels of these layers."""

    products: int = 0
    """FLOPs in these layers."""

    standardized: bool = False
    """Whether the features of a teacher are standardised, into a float32 copy."""

    teacher: Teacher | None = None
    """Properties of a teacher that its placement depends on; None for other parts."""

    mask_tokens: int = 0
    """Mask tokens per clip of a decoder."""

    positions: int = 0
    """Positions that its mask tokens may have."""

    @property
    def blocks(self) -> list[BlockCost]:
        """Transformer blocks among `layers`."""
        return [layer for layer in self.layers if isinstance(layer, BlockCost)]

    @property
    def forward(self) -> float:
        """FLOPs of a forward pass."""
        return self.counted + sum(layer.forward for layer in self.layers)

    def in_batches_of(self, clips: int) -> ModelPart:
        """Count what the clips of a micro batch share, see `decoder.first_tokens`, with a share of it for each clip."""
        if clips * self.mask_tokens <= self.positions:
            return self
        first = self.blocks[0]
        rows = first.keys - self.mask_tokens + self.positions / clips
        layers = list(self.layers)
        layers[layers.index(first)] = replace(first, shared_projections=rows)
        return replace(self, layers=tuple(layers))


@dataclass(frozen=True)
class Workload:
    """All parts of a training step: the trained encoder and heads, and the teachers."""

    trained: tuple[ModelPart, ...]
    teachers: tuple[ModelPart, ...]

    parameters: int
    """Number of trained parameters."""

    tensors: int
    """Number of trained parameter tensors."""

    unsharded: int
    """Number of trained parameters in tensors that are too small to be sharded at ZeRO stage 3."""

    pixels: int
    """Bytes of a loaded clip, at all input sizes together."""

    def in_batches_of(self, clips: int) -> Workload:
        """Return the workload of a clip in a micro batch of `clips`, which compute some tokens once for all."""
        return replace(self, trained=tuple(part.in_batches_of(clips) for part in self.trained))


PERSISTENT = 100_000
"""`stage3_param_persistence_threshold` of the package's DeepSpeed files: smaller tensors are not sharded."""


def build_workload(recipe: Recipe | FinetuneRecipe, *, all_tokens: bool = False) -> Workload:
    """Build the workload of a recipe; models are built on torch's meta device, without memory.

    Args:
        recipe: recipe of one student.
        all_tokens: whether teachers compute features at all tokens, for students with masks of their own.

    Raises:
        UserError: a teacher's shape or the number of classes is missing, or shapes do not fit each other.
    """
    if isinstance(recipe, FinetuneRecipe):
        return _finetuning(recipe)
    with torch.device("meta"):
        targets = build_targets(recipe, lambda name: init_teacher(recipe, name))
        student = Student.from_recipe(recipe, targets)
    sides = {recipe.model.input_size}
    sides |= {target.input_size for target in targets.values() if isinstance(target, FrozenTeacher)}
    return Workload(
        trained=(encoder_part(recipe.model, recipe.visible_tokens), *_head_parts(recipe, targets)),
        teachers=tuple(
            _teacher_part(name, target, recipe, all_tokens=all_tokens and target.prefetchable)
            for name, target in targets.items()
            if isinstance(target, FrozenTeacher)
        ),
        parameters=_count(student),
        tensors=len(list(student.parameters())),
        unsharded=_count(student, below=PERSISTENT),
        pixels=sum(recipe.model.frames * side**2 * 3 for side in sides),
    )


def _finetuning(recipe: FinetuneRecipe) -> Workload:
    classes = recipe.classifier.classes
    if classes is None:
        raise UserError("classifier.classes is missing: a plan needs their number, `--classifier.classes N`")
    with torch.device("meta"):
        model = Classifier(recipe.model, classes)
    tokens = recipe.model.grid[0] * recipe.model.grid[1] * recipe.model.grid[2]
    encoder = encoder_part(recipe.model, tokens, final_norm=False)
    head = ModelPart(
        "head", encoder.width, (ElementwiseCost(1, encoder.width, 2), LinearCost(1, encoder.width, classes)), classes
    )
    return Workload(
        trained=(encoder, head),
        teachers=(),
        parameters=_count(model),
        tensors=len(list(model.parameters())),
        unsharded=_count(model, below=PERSISTENT),
        pixels=recipe.model.frames * recipe.model.input_size**2 * 3,
    )


def masked_tokens(recipe: Recipe) -> int:
    """Number of masked tokens of a clip that are decoded."""
    mask = recipe.data.mask
    return round((recipe.tokens - recipe.visible_tokens) * (mask.decode_ratio if mask is not None else 1))


def encoder_part(model: ModelConfig, tokens: int, *, final_norm: bool = True) -> ModelPart:
    """Describe an encoder that is applied to `tokens` tokens of a clip."""
    width = _width(model)
    seen = tokens + model.class_token
    return ModelPart(
        "encoder",
        width,
        (
            LinearCost(tokens, 3 * model.tubelet * model.patch_size**2, width, input_grad=False),
            *encoder_blocks(model, seen, outputs=seen),
            *([ElementwiseCost(seen, width, 2)] if final_norm else []),
        ),
    )


def encoder_blocks(
    model: ModelConfig, tokens: int, *, outputs: int, sequences: int = 1, depth: int | None = None
) -> tuple[BlockCost, ...]:
    """Describe the blocks of an encoder, or the first `depth` of them; the last one computes only `outputs` tokens of
    each sequence."""
    assert model.depth is not None
    assert model.heads is not None
    last = (tokens, outputs)
    return _stack(_width(model), depth or model.depth, model.heads, model.mlp_ratio, tokens, last, sequences)


@dataclass(frozen=True)
class DecoderTokens:
    """Tokens of a decoder per clip."""

    visible: int
    masked: int
    predicted: int


def decoder_part(
    name: str, decoder: DecoderConfig, model: ModelConfig, tokens: DecoderTokens, channels: int
) -> ModelPart:
    """Describe a decoder with its linear head."""
    visible, masked, outputs = tokens.visible, tokens.masked, tokens.predicted
    seen = visible + model.class_token + masked
    blocks = _stack(decoder.width, decoder.depth, decoder.heads, model.mlp_ratio, seen, (outputs, outputs))
    time, height, width = model.grid
    return ModelPart(
        f"{name} decoder",
        decoder.width,
        (
            LinearCost(visible + model.class_token, _width(model), decoder.width, input_kept=False),
            *blocks,
            ElementwiseCost(outputs, decoder.width, 2),
            LinearCost(outputs, decoder.width, channels),
        ),
        predicted=outputs * channels,
        mask_tokens=masked,
        positions=time * height * width,
    )


def _head_part(name: str, head: TokenHeadConfig, model: ModelConfig, tokens: int, channels: int) -> ModelPart:
    width = _width(model)
    hidden = head.hidden or width
    layers: tuple[LayerCost, ...] = (LinearCost(tokens, width, channels, input_kept=False),)
    if head.kind == "mlp":
        first = LinearCost(tokens, width, hidden, input_kept=False)
        layers = (first, ElementwiseCost(tokens, hidden), LinearCost(tokens, hidden, channels))
    return ModelPart(f"{name} head", width, layers, predicted=tokens * channels)


def _head_parts(recipe: Recipe, targets: Mapping[str, Target]) -> list[ModelPart]:
    visible, parts = recipe.visible_tokens, []
    for name, target in targets.items():
        head = recipe.targets[name].head_config
        if isinstance(head, DecoderConfig):
            masked = masked_tokens(recipe)
            dense = bool(target.config.visible_weight)
            tokens = DecoderTokens(visible, masked, masked + visible if dense else masked)
            parts.append(decoder_part(name, head, recipe.model, tokens, target.channels))
        else:
            parts.append(_head_part(name, head, recipe.model, visible, target.channels))
    # All heads read the encoder's output, which is saved once: it is counted for the first head.
    parts[0] = _keeping_input(parts[0])
    return parts


def _keeping_input(part: ModelPart) -> ModelPart:
    first = part.layers[0]
    assert isinstance(first, LinearCost)
    kept = LinearCost(first.rows, first.inputs, first.outputs)
    return replace(part, layers=(kept, *part.layers[1:]))


def _teacher_part(target_name: str, target: FrozenTeacher, recipe: Recipe, *, all_tokens: bool) -> ModelPart:
    name, teacher = f"{target_name} teacher", target.teacher
    known, standardized = teacher_of(target_name, target), target.statistics is not None
    largest = max(
        _count(block) for path, block in teacher.named_modules() if path.rpartition(".")[0].endswith("blocks")
    )
    linear = quantizable_weights(teacher)
    counts: dict[str, Any] = {
        "parameters": _count(teacher),
        "unsharded": _count(teacher, below=PERSISTENT),
        "largest": largest,
        "linear": sum(weight.numel() for weight in linear),
        "channels": sum(len(weight) for weight in linear),
    }
    token_counts = {"masked": masked_tokens(recipe), "visible": recipe.visible_tokens, "all": recipe.tokens}
    wanted = token_counts[target.config.tokens] + (recipe.visible_tokens if target.config.visible_weight else 0)
    if all_tokens:
        wanted = recipe.tokens
    values = wanted * target.channels
    if isinstance(teacher, TimmViT):
        patches = (teacher.input_size // teacher.patch_size) ** 2
        seen, depth = (patches + teacher.vit.num_prefix_tokens) * recipe.model.grid[0], len(teacher.vit.blocks)
        computed = counts["linear"] * max(target.config.layers, default=depth) // depth
        counts |= {"products": 2 * seen * computed, "counted": _counted(teacher, recipe.model)}
        # The peak of a block with an MLP ratio of 4; timm's models have about that ratio.
        opaque = 12 * seen * teacher.width
        return ModelPart(
            name, teacher.width, (), values, opaque=opaque, teacher=known, standardized=standardized, **counts
        )
    assert isinstance(target, EncoderTeacher)
    model = target.encoder.config
    sequences = recipe.model.grid[0] if isinstance(target, ImageTeacher) else 1
    tokens = model.grid[0] * model.grid[1] * model.grid[2]
    seen = tokens + model.class_token
    outputs = seen if all_tokens or target.config.tokens == "all" else wanted // sequences
    if (isinstance(target, ImageTeacher) and not target.tubes) or target.resampler is not None:
        outputs = seen
    embedding = LinearCost(sequences * tokens, 3 * model.tubelet * model.patch_size**2, _width(model))
    last = max(target.config.layers, default=None)
    blocks = encoder_blocks(model, seen, outputs=outputs, sequences=sequences, depth=last)
    counts["products"] = round(sum(block.products for block in blocks))
    return ModelPart(
        name, _width(model), (embedding, *blocks), values, teacher=known, standardized=standardized, **counts
    )


def _counted(teacher: TimmViT, model: ModelConfig) -> int:
    """Count the FLOPs of a timm teacher for all front frames of a clip, with torch's counter."""
    frames = torch.empty(model.grid[0], 1, teacher.input_size, teacher.input_size, 3, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        teacher(frames)
    return counter.get_total_flops()


def _stack(
    width: int,
    depth: int,
    heads: int,
    mlp_ratio: float,
    tokens: int,
    last: tuple[int, int],
    sequences: int = 1,
) -> tuple[BlockCost, ...]:
    """Describe a stack of blocks on all tokens; `last` gives the number of queries and of outputs of the last block."""
    hidden = int(width * mlp_ratio)
    return tuple(
        BlockCost(
            keys=tokens,
            queries=tokens if i < depth - 1 else last[0],
            outputs=tokens if i < depth - 1 else last[1],
            width=width,
            hidden=hidden,
            heads=heads,
            sequences=sequences,
        )
        for i in range(depth)
    )


def _width(model: ModelConfig) -> int:
    assert model.width is not None
    return model.width


def _count(module: nn.Module, below: int | None = None) -> int:
    sizes = [parameter.numel() for parameter in module.parameters()]
    return sum(size for size in sizes if below is None or size < below)
