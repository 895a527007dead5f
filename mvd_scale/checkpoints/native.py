"""Files of this project: safetensors that state the model's shape in their metadata or in the recipe of their run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from mvd_scale.checkpoints.checkpoint import Checkpoint, DecoderWeights, Hints
from mvd_scale.checkpoints.reading import RawCheckpoint
from mvd_scale.checkpoints.shapes import decoder_parts, infer_decoder, select_prefix, token_heads
from mvd_scale.config import DecoderConfig, DetectionRecipe, DetectorConfig, ModelConfig, Recipe, load_any_recipe
from mvd_scale.config.data import ViewsConfig
from mvd_scale.errors import UserError

_MODEL_KEY = "mvd_scale.model"
_DECODERS_KEY = "mvd_scale.decoders"
_CLASSES_KEY = "mvd_scale.classes"
_VIEWS_KEY = "mvd_scale.views"
_NAMES = TypeAdapter(tuple[str, ...])
_DETECTOR_KEY = "mvd_scale.detector"


def save_weights(
    path: Path,
    tensors: Mapping[str, Tensor],
    model: ModelConfig,
    decoders: Mapping[str, DecoderConfig] | None = None,
    *,
    classes: Sequence[str] = (),
    views: ViewsConfig | None = None,
    detector: DetectorConfig | None = None,
) -> None:
    """Write a model as safetensors with metadata; arguments as of `write_tensors` and `describe_weights`."""
    write_tensors(path, tensors, describe_weights(model, decoders, classes=classes, views=views, detector=detector))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as safetensors; the file is written under another name and then renamed, so it is never partial.

    Args:
        path: file to write.
        tensors: tensors by the names of `Encoder`, `Student`, `Classifier` or `Detector`.
        metadata: result of `describe_weights`.
    """
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, {**metadata, "format": "pt"})
    partial.chmod(0o644)
    os.replace(partial, path)


def describe_weights(
    model: ModelConfig,
    decoders: Mapping[str, DecoderConfig] | None = None,
    *,
    classes: Sequence[str] = (),
    views: ViewsConfig | None = None,
    detector: DetectorConfig | None = None,
) -> dict[str, str]:
    """Make the metadata of a file of weights, as JSON.

    Args:
        model: shape of the encoder.
        decoders: shapes of the decoders by target name.
        classes: class names in the order of the head's outputs.
        views: views by which a classifier or detector is evaluated.
        detector: shape of the detection head.
    """
    metadata = describe_model(model, classes, views)
    if decoders:
        metadata[_DECODERS_KEY] = json.dumps({name: shape.model_dump() for name, shape in decoders.items()})
    if detector is not None:
        metadata[_DETECTOR_KEY] = detector.model_dump_json()
    return metadata


def describe_model(model: ModelConfig, classes: Sequence[str], views: ViewsConfig | None) -> dict[str, str]:
    """Make the metadata of a file: the model's shape, and its class names and evaluation views if known; as JSON."""
    told = {_MODEL_KEY: json.dumps(model.model_dump(mode="json"))}
    if classes:
        told[_CLASSES_KEY] = json.dumps(list(classes))
    if views is not None:
        told[_VIEWS_KEY] = views.model_dump_json()
    return told


def is_native(source: RawCheckpoint) -> bool:
    """Whether the file's own metadata state the shape of the model."""
    return _MODEL_KEY in source.metadata


def interpret(source: RawCheckpoint, hints: Hints) -> Checkpoint:
    """Convert a file of this project to a `Checkpoint`.

    The number of attention heads of decoders comes from the file, from the recipe of its run or from the hints.

    Raises:
        UserError: neither the file nor a recipe states the model's shape, or the shape is not valid.
    """
    try:
        model, shapes = _described(source)
        names, views, detector = _test(source)
        if not is_native(source) and source.recipe is not None:
            # A DeepSpeed checkpoint has no metadata: the recipe of its run states the shape of the detection head.
            recipe = load_any_recipe(source.recipe)
            detector = recipe.detector if isinstance(recipe, DetectionRecipe) else None
    except (ValidationError, json.JSONDecodeError, AttributeError) as error:
        raise UserError(f"{source.path} describes a model that this version cannot build: {error}") from error
    tensors = source.tensors
    if "encoder.patch_embed.weight" not in tensors:
        return Checkpoint(str(source.path), "mvd-scale", model, tensors)
    decoders = {}
    for name, weights in decoder_parts(tensors).items():
        if name in shapes and "head.weight" in weights:
            decoders[name] = DecoderWeights(shapes[name], len(weights["head.weight"]), weights)
        else:
            decoders[name] = infer_decoder(weights, hints, f"{source.path}: decoder {name}", image=model.class_token)
    head = {name: tensor for name, tensor in tensors.items() if name.startswith(("norm.", "head."))}
    if names and "head.weight" in head and len(names) != len(head["head.weight"]):
        raise UserError(f"{source.path} names {len(names)} classes, but its head has {len(head['head.weight'])}")
    heads = token_heads(tensors)
    known = ("encoder.", "decoders.", *(f"heads.{name}." for name in heads), *head)
    unexpected = {name: tensor for name, tensor in tensors.items() if not name.startswith(known)}
    encoder = select_prefix(tensors, "encoder.")
    return Checkpoint(
        str(source.path),
        "mvd-scale",
        model,
        encoder,
        decoders,
        heads,
        head,
        unexpected,
        class_names=names,
        views=views,
        detector=detector,
    )


def _test(source: RawCheckpoint) -> tuple[tuple[str, ...], ViewsConfig | None, DetectorConfig | None]:
    """Read class names, evaluation views and detection head from the metadata; empty or None if absent."""
    names = _NAMES.validate_json(source.metadata.get(_CLASSES_KEY, "[]"))
    views, detector = source.metadata.get(_VIEWS_KEY), source.metadata.get(_DETECTOR_KEY)
    return (
        names,
        None if views is None else ViewsConfig.model_validate_json(views),
        None if detector is None else DetectorConfig.model_validate_json(detector),
    )


def _described(source: RawCheckpoint) -> tuple[ModelConfig, Mapping[str, DecoderConfig]]:
    if is_native(source):
        model = ModelConfig.model_validate_json(source.metadata[_MODEL_KEY])
        if _DECODERS_KEY in source.metadata:
            written = json.loads(source.metadata[_DECODERS_KEY])
            return model, {name: DecoderConfig.model_validate(shape) for name, shape in written.items()}
        recipe = load_any_recipe(source.recipe) if source.recipe is not None else None
    else:
        ours = {"patch_embed.weight", "encoder.patch_embed.weight"} & source.tensors.keys()
        if source.recipe is None or not ours:
            raise UserError(
                f"{source.path} does not state the shape of its model, and its keys match no known format (MAE, "
                f"VideoMAE, MVD, timm, Hugging Face, mvd-scale); its first keys are "
                f"{', '.join(sorted(source.tensors)[:3])}"
            )
        recipe = load_any_recipe(source.recipe)
        model = recipe.model
    targets = recipe.targets if isinstance(recipe, Recipe) else {}
    return model, {name: target.decoder for name, target in targets.items() if target.decoder is not None}
