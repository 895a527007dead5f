"""Adaptation to other clips: positions are resized, image models are inflated, tubelets of video models are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mvd_scale.checkpoints import (
    Checkpoint,
    Hints,
    adapt,
    build_encoder,
    build_student,
    export_checkpoint,
    import_checkpoint,
    read_checkpoint,
    to_published,
)
from mvd_scale.checkpoints.native import save_weights
from mvd_scale.checkpoints.weights import load_initial_encoder
from mvd_scale.config import DecoderConfig, ModelConfig
from mvd_scale.errors import UserError
from mvd_scale.models import Classifier, Encoder, Student
from mvd_scale.models.positions import position_table

VIDEO = ModelConfig(width=32, depth=1, heads=2, frames=4, input_size=32)
IMAGE = ModelConfig(
    width=32, depth=1, heads=2, frames=1, tubelet=1, input_size=48, positions="sincos2d", class_token=True
)


def saved(folder: Path, encoder: Encoder) -> Checkpoint:
    save_weights(folder / "encoder.safetensors", encoder.state_dict(), encoder.config)
    return read_checkpoint(folder / "encoder.safetensors")


def learned(config: ModelConfig) -> Encoder:
    encoder = Encoder(config)
    encoder.store_positions(torch.randn_like(encoder.positions))
    return encoder


@pytest.mark.parametrize("positions", ["sincos3d", "sinusoid"])
def test_fixed_tables_are_rebuilt_at_the_new_grid(tmp_path: Path, positions: str) -> None:
    config = ModelConfig.model_validate(VIDEO.model_dump() | {"positions": positions})
    encoder = Encoder(config)
    saved(tmp_path, encoder)
    checkpoint = read_checkpoint(tmp_path / "encoder.safetensors", Hints(frames=8, input_size=64))
    larger = build_encoder(checkpoint, final_norm=True)
    assert larger.config.grid == (4, 4, 4)
    assert torch.equal(larger.positions, position_table(config.positions, (4, 4, 4), 32))
    assert larger(torch.rand(1, 8, 64, 64, 3)).shape == (1, 64, 32)


def test_learned_positions_are_kept_and_interpolated(tmp_path: Path) -> None:
    encoder = learned(VIDEO)
    checkpoint = saved(tmp_path, encoder)
    pixels = torch.rand(1, 4, 32, 32, 3)
    assert torch.equal(build_encoder(checkpoint, final_norm=True)(pixels), encoder(pixels))

    larger = adapt(checkpoint, frames=8, input_size=64)
    table = encoder.positions.view(2, 2, 2, 32).permute(0, 3, 1, 2)
    spatial = F.interpolate(table, size=(4, 4), mode="bicubic", antialias=True)
    expected = F.interpolate(spatial.permute(1, 2, 3, 0).flatten(0, 1), size=4, mode="linear")
    expected = expected.view(32, 4, 4, 4).permute(3, 1, 2, 0).flatten(0, 2)
    torch.testing.assert_close(build_encoder(larger, final_norm=True).positions, expected)
    same = adapt(checkpoint, frames=4, input_size=32)
    assert torch.equal(same.encoder["positions"], encoder.positions)


def test_an_image_model_inflates_to_clips_that_embed_still_frames_alike(tmp_path: Path) -> None:
    encoder = Encoder(IMAGE)
    checkpoint = adapt(saved(tmp_path, encoder), frames=4, tubelet=2)
    assert (checkpoint.model.frames, checkpoint.model.tubelet, checkpoint.model.positions) == (4, 2, "sincos3d")
    video = build_encoder(checkpoint, final_norm=True)
    frame = torch.rand(1, 1, 48, 48, 3)
    embedded: list[torch.Tensor] = []
    for model in (encoder, video):
        model.patch_embed.register_forward_hook(lambda module, taken, given: embedded.append(given))
    encoder(frame)
    video(frame.expand(-1, 4, -1, -1, -1).contiguous())
    torch.testing.assert_close(embedded[1], embedded[0].repeat(2, 1))


def test_what_cannot_be_is_refused_with_the_reason(tmp_path: Path) -> None:
    video, image = saved(tmp_path, Encoder(VIDEO)), saved(tmp_path, Encoder(IMAGE))
    with pytest.raises(UserError, match="tubelets of 2 frames, not 4"):
        adapt(video, tubelet=4)
    with pytest.raises(UserError, match="inflate it"):
        adapt(image, frames=4)
    with pytest.raises(UserError, match="not a multiple of patch_size"):
        adapt(video, input_size=40)
    with pytest.raises(UserError, match="not a multiple of tubelet"):
        adapt(video, frames=5)


def test_exports_that_would_behave_otherwise_are_refused(tmp_path: Path) -> None:
    video, image = saved(tmp_path, Encoder(VIDEO)), saved(tmp_path, Encoder(IMAGE))
    with pytest.raises(UserError, match="adds sinusoid"):
        to_published(video, "videomae")
    with pytest.raises(UserError, match="a model of clips"):
        to_published(video, "timm")
    with pytest.raises(UserError, match="a model of images"):
        to_published(image, "mvd")
    plain = saved(tmp_path, Encoder(IMAGE.model_copy(update={"class_token": False})))
    with pytest.raises(UserError, match="no class token"):
        to_published(plain, "mae")
    with pytest.raises(UserError, match="learned positions"):
        to_published(saved(tmp_path, learned(VIDEO)), "mvd")
    with pytest.raises(UserError, match="ends in"):
        export_checkpoint(video, "mvd", tmp_path / "out.ckpt")
    with pytest.raises(UserError, match="folder"):
        export_checkpoint(image, "hf", tmp_path / "out.safetensors")


def test_decoders_without_a_place_are_named(tmp_path: Path) -> None:
    decoder = DecoderConfig(width=32, depth=1, heads=2)
    student = Student(VIDEO, {"image": (decoder, 16), "dino": (decoder, 16)})
    save_weights(tmp_path / "s.safetensors", student.state_dict(), VIDEO, {"image": decoder, "dino": decoder})
    with pytest.raises(UserError, match=r"no tensors for decoders\.dino"):
        to_published(read_checkpoint(tmp_path / "s.safetensors"), "mvd")


def test_a_run_tells_the_heads_of_its_decoders(tmp_path: Path) -> None:
    decoder = DecoderConfig(width=48, depth=1, heads=3)
    student = Student(VIDEO, {"pixels": (decoder, 1536)})
    step = tmp_path / "checkpoints" / "step_00000005"
    step.mkdir(parents=True)
    save_weights(step / "student.safetensors", student.state_dict(), VIDEO)
    with pytest.raises(UserError, match="--decoder-heads"):
        read_checkpoint(step)
    (tmp_path / "recipe.yaml").write_text(
        "run: {folder: unused}\n"
        "model: {width: 32, depth: 1, heads: 2, frames: 4, input_size: 32}\n"
        "data: {mask: {ratio: 0.5}}\n"
        "targets: {pixels: {kind: pixels, decoder: {width: 48, depth: 1, heads: 3}}}\n"
        "training: {epochs: 2, global_batch: 4, base_lr: 1e-3, warmup_epochs: 0}\n"
    )
    pixels, tokens = torch.rand(1, 4, 32, 32, 3), torch.arange(8).view(1, 8)
    expected = student(pixels, tokens[:, :4], tokens[:, 4:])["pixels"]
    for path in (tmp_path, step, step / "student.safetensors"):
        checkpoint = read_checkpoint(path)
        assert checkpoint.decoders["pixels"].config == decoder
        again = build_student(checkpoint)
        assert torch.equal(again(pixels, tokens[:, :4], tokens[:, 4:])["pixels"], expected)
    import_checkpoint(read_checkpoint(step), "student", tmp_path / "alone.safetensors")
    moved = tmp_path / "elsewhere" / "alone.safetensors"
    moved.parent.mkdir()
    (tmp_path / "alone.safetensors").rename(moved)
    assert read_checkpoint(moved).decoders["pixels"].config == decoder


def test_roles_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    video, out = saved(tmp_path, Encoder(VIDEO)), tmp_path / "out.safetensors"
    with pytest.raises(UserError, match="import it as video_teacher"):
        import_checkpoint(video, "image_teacher", out)
    with pytest.raises(UserError, match="no decoders"):
        import_checkpoint(video, "student", out)
    with pytest.raises(UserError, match="no classification head"):
        import_checkpoint(video, "classifier", out)
    assert not out.exists()


@pytest.mark.parametrize(("positions", "family"), [("sincos3d", "mvd"), ("sinusoid", "videomae")])
def test_fine_tuned_files_of_videomae_and_mvd_differ_by_the_hint_alone(
    tmp_path: Path, positions: str, family: str
) -> None:
    config = VIDEO.model_copy(update={"positions": positions})
    save_weights(tmp_path / "native.safetensors", Classifier(config, 5).state_dict(), config)
    export_checkpoint(read_checkpoint(tmp_path / "native.safetensors"), family, tmp_path / "out.pth")
    hints = Hints(heads=2, frames=4, input_size=32, positions=positions)  # type: ignore[arg-type]
    checkpoint = read_checkpoint(tmp_path / "out.pth", hints)
    assert (checkpoint.format, checkpoint.model, checkpoint.classes) == (family, config, 5)
    with pytest.raises(UserError, match=r"fine-tuned classifier of MVD or of VideoMAE.*say which with --positions"):
        read_checkpoint(tmp_path / "out.pth", Hints(heads=2, frames=4, input_size=32))


def test_training_starts_from_a_fine_tuned_file_whose_positions_the_recipe_states(tmp_path: Path) -> None:
    config = ModelConfig(width=384, depth=1, heads=6, frames=4, input_size=32)
    classifier = Classifier(config, 5)
    save_weights(tmp_path / "native.safetensors", classifier.state_dict(), config)
    export_checkpoint(read_checkpoint(tmp_path / "native.safetensors"), "mvd", tmp_path / "out.pth")
    encoder = Encoder(config, final_norm=False)
    with pytest.raises(UserError, match=r"by training\.initial_positions in a recipe"):
        load_initial_encoder(encoder, tmp_path / "out.pth")
    with pytest.raises(UserError, match=r"with positions sinusoid, the recipe has model\.positions sincos3d"):
        load_initial_encoder(encoder, tmp_path / "out.pth", "sinusoid")
    load_initial_encoder(encoder, tmp_path / "out.pth", "sincos3d")
    for name, tensor in classifier.encoder.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor)


@pytest.mark.parametrize(("frames", "side"), [(4, 64), (16, 32), (64, 16)])
def test_a_stored_table_tells_the_grid_of_as_many_tokens(tmp_path: Path, frames: int, side: int) -> None:
    config = VIDEO.model_copy(update={"frames": frames, "input_size": side})
    export_checkpoint(saved(tmp_path, Encoder(config)), "mvd", tmp_path / "out.pth")
    assert read_checkpoint(tmp_path / "out.pth", Hints(heads=2)).model == config


def test_a_hint_that_contradicts_the_file_is_refused(tmp_path: Path) -> None:
    export_checkpoint(saved(tmp_path, Encoder(VIDEO)), "mvd", tmp_path / "out.pth")
    with pytest.raises(UserError, match="holds the position table sincos3d"):
        read_checkpoint(tmp_path / "out.pth", Hints(heads=2, positions="sinusoid"))


def test_weights_in_half_precision_are_loaded_as_float32(tmp_path: Path) -> None:
    encoder = Encoder(VIDEO)
    published = {n: t.half() for n, t in to_published(saved(tmp_path, encoder), "mvd").items()}
    torch.save({"model": published}, tmp_path / "half.pth")
    checkpoint = read_checkpoint(tmp_path / "half.pth", Hints(heads=2))
    assert checkpoint.model == VIDEO
    loaded = build_encoder(checkpoint, final_norm=True)
    assert loaded.patch_embed.weight.dtype == torch.float32
    torch.testing.assert_close(loaded.patch_embed.weight, encoder.patch_embed.weight, rtol=1e-3, atol=1e-4)
