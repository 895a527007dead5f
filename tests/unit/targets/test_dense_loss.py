"""The loss at visible and masked tokens together, and features of several layers: against computations by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from mvd_scale.config import Recipe, TimmTarget
from mvd_scale.data.batch import ClipBatch
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder, Student
from mvd_scale.models.timm_vit import TimmViT
from mvd_scale.targets import MaskedDistillation, build_targets
from mvd_scale.targets.load import build_timm

from .test_targets import IMAGE, VIDEO, batch, recipe, teacher  # noqa: F401

DEEP = {**VIDEO, "depth": 3}


def built(made: Recipe, **teachers: Encoder | TimmViT) -> tuple[Student, MaskedDistillation]:
    targets = build_targets(made, teachers.__getitem__)
    return Student.from_recipe(made, targets), MaskedDistillation(targets)


def at(features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.stack([features[clip][tokens[clip]] for clip in range(len(features))])


@pytest.mark.parametrize("kind", ["image", "video", "pixels"])
@pytest.mark.parametrize("ahead", [False, True])
def test_visible_tokens_count_with_their_weight(batch: ClipBatch, kind: str, ahead: bool) -> None:  # noqa: F811
    """0.25 of the mean over visible tokens is added to the mean over masked tokens, and both to `weight`."""
    model = teacher(**(IMAGE if kind == "image" else VIDEO))
    kinds = {"image": "image_teacher", "video": "video_teacher", "pixels": "pixels"}
    made = recipe(it={"kind": kinds[kind], "visible_weight": 0.25, "weight": 2.0, "distance": "l1"})
    student, objective = built(made, it=model)
    if kind == "image":
        fronts = model(batch.pixels[:, ::2].flatten(0, 1).unsqueeze(1))[:, 1:]
        truth = fronts.unflatten(0, (2, 2)).flatten(1, 2)
    elif kind == "video":
        truth = model(batch.pixels)
    else:
        whole = ClipBatch(batch.pixels, batch.visible, torch.arange(8).expand(2, -1), batch.labels, batch.video_ids)
        truth = build_targets(recipe(it={"kind": "pixels"}), lambda _: model)["it"].features(whole)
    predictions = student(batch.pixels, batch.visible, batch.masked)["it"]
    assert predictions.shape == (2, 8, truth.shape[2])
    seen, hidden = predictions.split(4, dim=1)
    expected = F.l1_loss(hidden, at(truth, batch.masked)) + 0.25 * F.l1_loss(seen, at(truth, batch.visible))
    loss, distances = objective(student, objective.prefetch_features(batch) if ahead else batch)
    torch.testing.assert_close(distances["it"], expected)
    torch.testing.assert_close(loss, 2 * expected)


def test_masked_tokens_are_predicted_as_without_the_visible_ones(batch: ClipBatch) -> None:  # noqa: F811
    model = teacher(**VIDEO)
    torch.manual_seed(0)
    plain, _ = built(recipe(video={"kind": "video_teacher"}), video=model)
    dense, _ = built(recipe(video={"kind": "video_teacher", "visible_weight": 1.0}), video=model)
    dense.load_state_dict(plain.state_dict())
    tokens = (batch.pixels, batch.visible, batch.masked)
    torch.testing.assert_close(dense(*tokens)["video"][:, 4:], plain(*tokens)["video"])


def test_only_decoders_of_the_same_tokens_are_batched(batch: ClipBatch) -> None:  # noqa: F811
    dense = {"kind": "video_teacher", "visible_weight": 1.0}
    targets: dict[str, Any] = {"a": dense, "b": dense, "c": {"kind": "video_teacher"}}
    student, _ = built(recipe(**targets), **dict.fromkeys(targets, teacher(**VIDEO)))
    assert [list(group) for group in student.groups_by_shape()] == [["a", "b"]]
    tokens = (batch.pixels, batch.visible, batch.masked)
    expected = student(*tokens)
    student.batch_decoders()
    torch.testing.assert_close(student(*tokens), expected, rtol=1e-4, atol=1e-5)


def test_a_head_of_visible_tokens_has_no_masked_ones_to_add_them_to() -> None:
    with pytest.raises(ValidationError, match="visible_weight has no effect with `head: linear`"):
        recipe(it={"kind": "pixels", "head": "linear", "tokens": "visible", "decoder": None, "visible_weight": 0.5})


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_each_layer_is_normalised_and_compared_by_itself(batch: ClipBatch, norm: bool, distance: str) -> None:  # noqa: F811
    model = teacher(**DEEP)
    made = recipe(video={"kind": "video_teacher", "layers": [1, 3], "norm": norm, "distance": distance})
    student, objective = built(made, video=model)
    outputs = []
    for layer in (1, 3):
        model.layers = (layer,)
        features = at(model(batch.pixels), batch.masked)
        outputs.append(F.layer_norm(features, (48,), eps=1e-6) if norm else features)
    model.layers = (1, 3)
    truth = torch.cat(outputs, dim=2)
    torch.testing.assert_close(objective.targets["video"].features(batch), truth)
    predictions = student(batch.pixels, batch.visible, batch.masked)["video"]
    assert predictions.shape == (2, 4, 96)
    pairs = list(zip(predictions.chunk(2, dim=2), outputs, strict=True))
    if distance == "l2":
        expected = sum(F.mse_loss(*pair) for pair in pairs) / 2
    else:
        expected = sum(1 - F.cosine_similarity(*pair, dim=2).mean() for pair in pairs) / 2
    loss, _ = objective(student, batch)
    torch.testing.assert_close(loss, torch.as_tensor(expected))


def test_layers_are_the_outputs_of_their_blocks_and_later_blocks_do_not_run(batch: ClipBatch) -> None:  # noqa: F811
    model, outputs = teacher(**DEEP), list[torch.Tensor]()
    for block in model.blocks:
        block.register_forward_hook(lambda *call: outputs.append(call[2]))
    model.layers = (1, 2)
    found = model(batch.pixels, output_tokens=batch.masked)
    assert len(outputs) == 2
    torch.testing.assert_close(found[..., :48], at(outputs[0], batch.masked))
    # The last one computes no other tokens.
    torch.testing.assert_close(found[..., 48:], outputs[1])


def test_the_last_norm_is_applied_to_each_layer(batch: ClipBatch) -> None:  # noqa: F811
    model = Encoder(teacher(**DEEP).config, final_norm=True)
    torch.nn.init.normal_(model.norm.weight)  # type: ignore[union-attr, arg-type]
    model.layers = (2, 3)
    both = model(batch.pixels)
    for place, layer in enumerate((2, 3)):
        model.layers = (layer,)
        torch.testing.assert_close(both[..., 48 * place : 48 * place + 48], model(batch.pixels))


def test_layers_of_a_model_of_timm(batch: ClipBatch) -> None:  # noqa: F811
    made = recipe(it={"kind": "timm", "vit": "vit_tiny_patch16_224", "layers": [2, 12], "final_norm": True})
    config = made.targets["it"]
    assert isinstance(config, TimmTarget)
    model = build_timm(config, made.model, pretrained=False).eval()
    (target,) = build_targets(made, lambda _: model).values()
    assert target.channels == 2 * 192
    features = target.features(batch)
    model.layers = ()
    last = model(batch.pixels[:, ::2].flatten(0, 1).unsqueeze(1)).unflatten(0, (2, 2)).flatten(1, 2)
    torch.testing.assert_close(features[..., 192:], at(last, batch.masked), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(features[..., :192], features[..., 192:], atol=0.1)


@pytest.mark.parametrize("layers", [[2, 1], [1, 1], [0, 2]])
def test_layers_are_named_once_in_their_order(layers: list[int]) -> None:
    with pytest.raises(ValidationError, match="expected numbers of blocks from 1, each once and ascending"):
        recipe(video={"kind": "video_teacher", "layers": layers})


def test_a_layer_that_a_teacher_lacks_is_named() -> None:
    made = recipe(video={"kind": "video_teacher", "layers": [1, 4]})
    with pytest.raises(UserError, match=r"targets\.video\.layers names block 4, but its teacher has 3 blocks"):
        build_targets(made, lambda _: teacher(**DEEP))


def test_pixels_have_no_layers() -> None:
    with pytest.raises(ValidationError, match="layers"):
        recipe(pixels={"kind": "pixels", "layers": [1]})
