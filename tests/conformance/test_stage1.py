"""VideoMAE and MAE as their authors' code computes them: targets, predictions, losses, every gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mvd_scale.checkpoints import Hints, build_student, export_checkpoint, read_checkpoint
from mvd_scale.checkpoints.checkpoint import Checkpoint
from mvd_scale.config import DecoderConfig, PixelTarget
from mvd_scale.data.batch import ClipBatch
from mvd_scale.models import Student
from mvd_scale.targets.pixels import Pixels

from .conftest import LOSS, OUTPUT, Vectors, assert_gradients, publish, published_gradients

UNUSED = DecoderConfig(width=16, depth=1, heads=1)


def batch_of(vectors: Vectors, pixels: Tensor) -> ClipBatch:
    visible, masked = vectors.tokens()
    nothing = torch.zeros(len(visible), dtype=torch.int64)
    return ClipBatch(pixels, visible, masked, nothing, nothing)


def imported(vectors: Vectors, folder: Path, form: str, *, video: bool) -> tuple[Checkpoint, Student]:
    config = vectors.config
    hints = Hints(heads=config["heads"], decoder_heads=config["dec_heads"])
    if video:
        hints = Hints(hints.heads, hints.decoder_heads, frames=config["T"], input_size=config["S"])
    checkpoint = read_checkpoint(publish(folder, vectors.under("model."), form), hints)
    return checkpoint, build_student(checkpoint)


def assert_same_file(published: dict[str, Tensor], file: Path, *, cancels: str = "") -> None:
    there = torch.load(file, weights_only=True)["model"]
    assert there.keys() == published.keys()
    for name, tensor in published.items():
        if cancels and name.endswith(cancels):
            there[name], tensor = (torch.cat(t.chunk(3)[::2]) for t in (there[name], tensor))
        torch.testing.assert_close(there[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_videomae(videomae: Vectors, tmp_path: Path, form: str) -> None:
    checkpoint, student = imported(videomae, tmp_path, form, video=True)
    assert (checkpoint.format, checkpoint.model.positions, checkpoint.unexpected) == ("videomae", "sinusoid", {})
    batch = batch_of(videomae, videomae.clips("video"))
    target = Pixels(PixelTarget(decoder=UNUSED), checkpoint.model)
    torch.testing.assert_close(target.features(batch), videomae["target"], **OUTPUT)
    predictions = student(batch.pixels, batch.visible, batch.masked)["pixels"]
    torch.testing.assert_close(predictions.detach(), videomae["pred"], **OUTPUT)
    loss = target.distance(predictions, target.raw_features(batch))
    assert loss.item() == pytest.approx(float(videomae.metadata["loss"]), **LOSS)
    plain = Pixels(PixelTarget(decoder=UNUSED, normalize="none"), checkpoint.model)
    raw = plain.distance(predictions, plain.raw_features(batch))
    assert raw.item() == pytest.approx(float(videomae.metadata["loss_raw_pixels"]), **LOSS)
    loss.backward()
    assert_gradients(videomae, published_gradients(checkpoint, student, "videomae"))
    export_checkpoint(checkpoint, "videomae", tmp_path / "out.pth")
    assert_same_file(videomae.under("model."), tmp_path / "out.pth")


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_mae(mae: Vectors, tmp_path: Path, form: str) -> None:
    checkpoint, student = imported(mae, tmp_path, form, video=False)
    model = checkpoint.model
    assert (checkpoint.format, model.positions, model.class_token) == ("mae", "sincos2d", True)
    assert (model.patch_size, model.input_size, checkpoint.unexpected) == (mae.config["ipatch"], mae.config["iS"], {})
    batch = batch_of(mae, mae.clips("image"))

    # The reference encodes visible tokens in the order of its shuffle, class token first.
    order = mae["ids_restore"].argsort(dim=1)[:, : batch.visible.shape[1]]
    place = (batch.visible.unsqueeze(1) == order.unsqueeze(2)).int().argmax(dim=2) + 1
    latent = student.encoder(batch.pixels, batch.visible).detach()
    shuffled = latent.gather(1, torch.cat([torch.zeros_like(place[:, :1]), place], dim=1)[..., None].expand_as(latent))
    torch.testing.assert_close(shuffled, mae["latent"], **OUTPUT)

    predictions = student(batch.pixels, batch.visible, batch.masked)["pixels"]
    torch.testing.assert_close(predictions.detach(), mae["pred"].gather(1, _rows(batch.masked, mae["pred"])), **OUTPUT)
    # MAE's head also speaks at visible patches; nothing asks for them but the reference and `visible_weight`.
    decoder = student.decoders["pixels"]
    decoder.predicts_visible = True
    whole = student(batch.pixels, batch.visible, batch.masked)["pixels"].detach()
    decoder.predicts_visible = False
    every = torch.cat([batch.visible, batch.masked], dim=1)
    torch.testing.assert_close(whole, mae["pred"].gather(1, _rows(every, mae["pred"])), **OUTPUT)

    target = Pixels(PixelTarget(decoder=UNUSED, normalize="patch"), model)
    loss = target.distance(predictions, target.raw_features(batch))
    assert loss.item() == pytest.approx(float(mae.metadata["loss"]), **LOSS)
    loss.backward()
    assert_gradients(mae, published_gradients(checkpoint, student, "mae"))
    export_checkpoint(checkpoint, "mae", tmp_path / "out.pth")
    assert_same_file(mae.under("model."), tmp_path / "out.pth", cancels="qkv.bias")


def _rows(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens.unsqueeze(-1).expand(-1, -1, like.shape[-1])
