"""The parts of a training step by their layers: what a recipe computes for one clip.

This is the place that follows the models: when a model learns to skip work, its part changes here.

Legend: N tokens of a clip, V visible, M those at which a target is predicted, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mvd_scale.config import DecoderConfig, FinetuneRecipe, ModelConfig, Recipe, TokenHeadConfig
from mvd_scale.errors import UserError
from mvd_scale.models import Classifier, Encoder, Student
from mvd_scale.models.eight_bit import eight_bit_weights
from mvd_scale.models.timm_vit import TimmViT
from mvd_scale.performance.layers import Block, Elementwise, Layer, Linear
from mvd_scale.performance.rehearsal import random_teacher
from mvd_scale.targets import FrozenTeacher, Target, build_targets
from mvd_scale.targets.image_teacher import ImageTeacher
from mvd_scale.training.device import teacher_of
from mvd_scale.training.placement import Teacher


@dataclass(frozen=True)
class Part:
    """One model of the step, or one head of it, per clip."""

    name: str
    width: int
    layers: tuple[Layer, ...]

    predicted: int = 0
    """Numbers that it predicts, or as a teacher gives, for the loss."""

    counted: int = 0
    """FLOPs of a forward pass as torch counts them, for models of other libraries; these have no `layers`."""

    opaque: int = 0
    """Numbers at the peak of a forward pass of such a model."""

    parameters: int = 0
    """Of a teacher; the student's are counted together."""

    vectors: int = 0
    """Parameters among them in tensors small enough to stay whole on every rank."""

    largest: int = 0
    """Parameters of its largest block."""

    linear: int = 0
    """Weights among its parameters that are of linear layers in blocks: those that 8 bits can hold."""

    channels: int = 0
    """Output channels of these layers."""

    products: int = 0
    """FLOPs of a clip in these layers."""

    teacher: Teacher | None = None
    """The facts that the placement of a teacher depends on."""

    @property
    def blocks(self) -> list[Block]:
        """Its transformer blocks."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    @property
    def forward(self) -> int:
        """FLOPs of a clip."""
        return self.counted + sum(layer.forward for layer in self.layers)


@dataclass(frozen=True)
class Workload:
    """What one clip takes: the encoder and the heads that are trained, and the teachers."""

    trained: tuple[Part, ...]
    teachers: tuple[Part, ...]

    parameters: int
    """That are trained."""

    vectors: int
    """Parameters among them in tensors small enough to stay whole at ZeRO stage 3."""

    pixels: int
    """Bytes of a clip as it is loaded, at all input sizes."""


PERSISTENT = 100_000
"""`stage3_param_persistence_threshold` of the DeepSpeed files that come with the program."""


def describe(recipe: Recipe | FinetuneRecipe) -> Workload:
    """The parts of a recipe's step; models are built without memory, on torch's meta device.

    Raises:
        UserError: a teacher's shape or the number of classes is missing, or they do not fit together.
    """
    if isinstance(recipe, FinetuneRecipe):
        return _finetuning(recipe)
    with torch.device("meta"):
        targets = build_targets(recipe, lambda name: random_teacher(recipe, name))
        heads = {name: (recipe.targets[name].head_config, target.channels) for name, target in targets.items()}
        student = Student(recipe.model, heads)
    sides = {recipe.model.input_size}
    sides |= {target.input_size for target in targets.values() if isinstance(target, FrozenTeacher)}
    return Workload(
        trained=(encoder_part(recipe.model, recipe.visible_tokens), *_head_parts(recipe, targets)),
        teachers=tuple(
            _teacher_part(name, target, recipe) for name, target in targets.items() if isinstance(target, FrozenTeacher)
        ),
        parameters=_count(student),
        vectors=_count(student, below=PERSISTENT),
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
    head = Part("head", encoder.width, (Elementwise(1, encoder.width, 2), Linear(1, encoder.width, classes)), classes)
    return Workload(
        trained=(encoder, head),
        teachers=(),
        parameters=_count(model),
        vectors=_count(model, below=PERSISTENT),
        pixels=recipe.model.frames * recipe.model.input_size**2 * 3,
    )


def masked_tokens(recipe: Recipe) -> int:
    """Masked tokens of a clip that are decoded."""
    mask = recipe.data.mask
    return round((recipe.tokens - recipe.visible_tokens) * (mask.decode if mask is not None else 1))


def encoder_part(model: ModelConfig, tokens: int, *, final_norm: bool = True) -> Part:
    """An encoder over some tokens of a clip."""
    width = _width(model)
    seen = tokens + model.class_token
    return Part(
        "encoder",
        width,
        (
            Linear(tokens, 3 * model.tubelet * model.patch_size**2, width, input_grad=False),
            *encoder_blocks(model, seen, outputs=seen),
            *([Elementwise(seen, width, 2)] if final_norm else []),
        ),
    )


def encoder_blocks(model: ModelConfig, tokens: int, *, outputs: int, sequences: int = 1) -> tuple[Block, ...]:
    """The blocks of an encoder; of the last one only some tokens come out."""
    assert model.depth is not None
    assert model.heads is not None
    dropped = model.drop_path > 0
    last = (tokens, outputs)
    return _stack(_width(model), model.depth, model.heads, model.mlp_ratio, tokens, last, sequences, dropped=dropped)


def decoder_part(
    name: str, decoder: DecoderConfig, model: ModelConfig, visible: int, masked: int, channels: int
) -> Part:
    """A decoder with its linear head; it sees visible and mask tokens."""
    tokens = visible + model.class_token + masked
    blocks = _stack(decoder.width, decoder.depth, decoder.heads, model.mlp_ratio, tokens, (masked, masked))
    return Part(
        f"{name} decoder",
        decoder.width,
        (
            Linear(visible + model.class_token, _width(model), decoder.width, input_kept=False),
            *blocks,
            Elementwise(masked, decoder.width, 2),
            Linear(masked, decoder.width, channels),
        ),
        predicted=masked * channels,
    )


def _head_part(name: str, head: TokenHeadConfig, model: ModelConfig, tokens: int, channels: int) -> Part:
    width = _width(model)
    hidden = head.hidden or width
    layers: tuple[Layer, ...] = (Linear(tokens, width, channels, input_kept=False),)
    if head.kind == "mlp":
        first = Linear(tokens, width, hidden, input_kept=False)
        layers = (first, Elementwise(tokens, hidden), Linear(tokens, hidden, channels))
    return Part(f"{name} head", width, layers, predicted=tokens * channels)


def _head_parts(recipe: Recipe, targets: Mapping[str, Target]) -> list[Part]:
    visible, parts = recipe.visible_tokens, []
    for name, target in targets.items():
        head = recipe.targets[name].head_config
        if isinstance(head, DecoderConfig):
            parts.append(decoder_part(name, head, recipe.model, visible, masked_tokens(recipe), target.channels))
        else:
            parts.append(_head_part(name, head, recipe.model, visible, target.channels))
    # The encoder's output, which all of them read, is kept once.
    parts[0] = _keeping_input(parts[0])
    return parts


def _keeping_input(part: Part) -> Part:
    first = part.layers[0]
    assert isinstance(first, Linear)
    kept = Linear(first.rows, first.inputs, first.outputs)
    return Part(part.name, part.width, (kept, *part.layers[1:]), part.predicted)


def _teacher_part(target_name: str, target: FrozenTeacher, recipe: Recipe) -> Part:
    name, teacher = f"{target_name} teacher", target.teacher
    largest = max(
        _count(block) for path, block in teacher.named_modules() if path.rpartition(".")[0].endswith("blocks")
    )
    linear = eight_bit_weights(teacher)
    counts = {
        "parameters": _count(teacher),
        "vectors": _count(teacher, below=PERSISTENT),
        "largest": largest,
        "linear": sum(weight.numel() for weight in linear),
        "channels": sum(len(weight) for weight in linear),
    }
    wanted = {"masked": masked_tokens(recipe), "visible": recipe.visible_tokens, "all": recipe.tokens}
    given = wanted[target.config.tokens] * target.channels
    if isinstance(teacher, TimmViT):
        seen = recipe.tokens + teacher.vit.num_prefix_tokens * recipe.model.grid[0]
        counts |= {"products": 2 * seen * counts["linear"], "counted": _counted(teacher, recipe.model)}
        # As a block of MLP ratio 4 needs; timm's models have ratios of about that.
        opaque = 12 * seen * teacher.width
        return Part(name, teacher.width, (), given, opaque=opaque, teacher=teacher_of(target_name, target), **counts)
    assert isinstance(teacher, Encoder)
    model = teacher.config
    sequences = recipe.model.grid[0] if isinstance(target, ImageTeacher) else 1
    tokens = recipe.tokens // sequences
    seen = tokens + model.class_token
    outputs = seen if target.config.tokens == "all" else wanted[target.config.tokens] // sequences
    if isinstance(target, ImageTeacher) and not target.tubes:
        outputs = seen
    embedding = Linear(sequences * tokens, 3 * model.tubelet * model.patch_size**2, _width(model))
    blocks = encoder_blocks(model, seen, outputs=outputs, sequences=sequences)
    counts["products"] = sum(block.products for block in blocks)
    return Part(name, _width(model), (embedding, *blocks), given, teacher=teacher_of(target_name, target), **counts)


def _counted(teacher: TimmViT, model: ModelConfig) -> int:
    """FLOPs of all front frames of a clip."""
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
    *,
    dropped: bool = False,
) -> tuple[Block, ...]:
    """Blocks in which all tokens ask and come out, but for the last one's (queries, outputs)."""
    hidden = int(width * mlp_ratio)
    return tuple(
        Block(
            keys=tokens,
            queries=tokens if i < depth - 1 else last[0],
            outputs=tokens if i < depth - 1 else last[1],
            width=width,
            hidden=hidden,
            heads=heads,
            sequences=sequences,
            # The first block's rate is 0.
            drop_path=dropped and i > 0,
        )
        for i in range(depth)
    )


def _width(model: ModelConfig) -> int:
    assert model.width is not None
    return model.width


def _count(module: nn.Module, below: int | None = None) -> int:
    sizes = [parameter.numel() for parameter in module.parameters()]
    return sum(size for size in sizes if below is None or size < below)
