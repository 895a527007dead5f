"""Similarity of time slices: the hand-computed matrix of hand-made features, and ones for a still clip."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from mvd_scale.analysis.similarity import Similarity, SimilarityMatrix, SliceEncoder, resize_clips, slice_similarity
from mvd_scale.analysis.subjects import ClipShape, Subject, read_subjects
from mvd_scale.checkpoints.weights import save_weights
from mvd_scale.config import ModelConfig
from mvd_scale.config.data import ViewsConfig
from mvd_scale.errors import UserError
from mvd_scale.evaluation.features import FeatureOptions
from mvd_scale.models import Encoder

VIDEO = ModelConfig(width=48, depth=2, heads=3, frames=6, input_size=32)
IMAGE = ModelConfig(
    width=32, depth=2, heads=2, frames=1, tubelet=1, input_size=48, positions="sincos2d", class_token=True
)
OPTIONS = FeatureOptions(ViewsConfig(clips=1, crops=1), pool="none", norm=False)


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    paths = {}
    long = VIDEO.model_copy(update={"frames": 8})
    models = {"image": IMAGE, "video": VIDEO, "long": long, "coarse": long.model_copy(update={"tubelet": 4})}
    for name, model in models.items():
        paths[name] = tmp_path / name / "encoder.safetensors"
        paths[name].parent.mkdir()
        save_weights(paths[name], Encoder(model).state_dict(), model)
    return paths


def encoder_of(subject: Subject, clip: ClipShape) -> SliceEncoder:
    return SliceEncoder(subject, clip, OPTIONS, torch.device("cpu"), torch.float32)


def test_hand_made_features_give_the_hand_computed_matrix() -> None:
    # Two slices of two places: cosines 0.6 and 0 at the first place between slices, 0.8 and 1 at the second.
    features = torch.tensor([[[[2.0, 0], [0, 5]], [[3, 4], [4, 3]], [[0, 1], [0, 9]]]])
    expected = torch.tensor([[1, (0.6 + 0.6) / 2, (0 + 1) / 2], [0.6, 1, (0.8 + 0.6) / 2], [0.5, 0.7, 1]])
    torch.testing.assert_close(slice_similarity(features), expected.unsqueeze(0))
    # Places are compared with themselves only: a slice whose places are exchanged is another one.
    exchanged = torch.stack([features[0, 0], features[0, 0].flip(0)]).unsqueeze(0)
    torch.testing.assert_close(slice_similarity(exchanged), torch.eye(2).unsqueeze(0))


def test_a_still_clip_is_the_same_in_all_slices_for_an_image_model_only(saved: dict[str, Path]) -> None:
    (image, video), clip, _ = read_subjects([f"image={saved['image']}", f"video={saved['video']}"])
    assert (clip.frames, clip.tubelet, clip.side, clip.slices) == (6, 2, 48, 3)
    frame = torch.randint(0, 256, (2, 1, 48, 48, 3), dtype=torch.uint8)
    still = frame.expand(-1, 6, -1, -1, -1)
    torch.testing.assert_close(slice_similarity(encoder_of(image, clip)(still)), torch.ones(2, 3, 3))
    # Positions tell the slices of a video model apart.
    of_video = slice_similarity(encoder_of(video, clip)(still))
    assert of_video.shape == (2, 3, 3)
    assert (of_video[:, 0, 1] < 0.9999).all()
    moving = torch.randint(0, 256, (2, 6, 48, 48, 3), dtype=torch.uint8)
    assert (slice_similarity(encoder_of(image, clip)(moving))[:, 0, 1] < 0.9999).all()


def test_an_image_model_sees_the_front_frames_without_its_class_token(saved: dict[str, Path]) -> None:
    (image, _), clip, _ = read_subjects([f"image={saved['image']}", str(saved["video"])])
    clips = torch.randint(0, 256, (2, 6, 48, 48, 3), dtype=torch.uint8)
    encode = encoder_of(image, clip)
    features = encode(clips)
    assert features.shape == (2, 3, 9, 32)
    torch.testing.assert_close(features[1, 2], encode.extract.encoder(clips[1:2, 4:5])[0, 1:])


def test_a_smaller_input_gets_the_clip_resized_without_aliasing() -> None:
    clips = torch.zeros(1, 2, 48, 48, 3, dtype=torch.uint8)
    clips[:, :, ::2] = 200
    small = resize_clips(clips, 16)
    assert small.shape == (1, 2, 16, 16, 3)
    assert small.float().mean() == pytest.approx(100, abs=2)
    assert small.float().std() < 40
    assert resize_clips(clips, 48) is clips


def test_names_are_given_or_those_of_the_files(saved: dict[str, Path]) -> None:
    subjects, *_ = read_subjects([str(saved["image"]), f"teacher={saved['video']}", str(saved["video"])])
    assert [subject.name for subject in subjects] == ["image/encoder", "teacher", "video/encoder"]
    with pytest.raises(UserError, match="two models are called a: name them apart, as in NAME=PATH"):
        read_subjects([f"a={saved['image']}", f"a={saved['video']}"])


def test_models_of_other_slices_are_left_out_and_named_unless_they_are_adapted(saved: dict[str, Path]) -> None:
    words = [str(saved["video"]), f"long={saved['long']}", str(saved["image"])]
    subjects, clip, left_out = read_subjects(words)
    assert [subject.name for subject in subjects] == ["video/encoder", "image/encoder"]
    assert (clip.frames, clip.slices) == (6, 3)
    assert list(left_out) == ["long"]
    assert re.search(r"6 frames in 3 time slices, .*8 frames in 4 time slices.*`--frames N`", left_out["long"])
    subjects, clip, left_out = read_subjects(words, frames=4)
    assert [subject.model.frames for subject in subjects] == [4, 4, 1]
    assert [subject.own_frames for subject in subjects] == [6, 8, 1]
    assert clip.slices == 2
    assert left_out == {}


def test_models_that_cannot_be_adapted_are_left_out_and_an_error_if_nothing_is_left(saved: dict[str, Path]) -> None:
    # Tubelets of 4 frames do not divide a clip of 6.
    words = [f"coarse={saved['coarse']}", f"fine={saved['long']}"]
    (fine,), clip, left_out = read_subjects(words, frames=6)
    assert (fine.name, clip.slices) == ("fine", 3)
    assert "cannot take clips of 6 frames" in left_out["coarse"]
    with pytest.raises(UserError, match="cannot take clips of 6 frames"):
        read_subjects(words[:1], frames=6)


def test_the_result_names_models_that_were_left_out() -> None:
    model = SimilarityMatrix("a", "a.pth", "0", "sincos3d", 6, 32, [[1.0, 0.5], [0.5, 1.0]], None)
    found = Similarity([model], 3, {}, {"long": "takes other clips"}, {})
    assert "left out: model long: takes other clips" in found.to_text()
    assert json.loads(found.to_json())["models_left_out"] == {"long": "takes other clips"}


def test_clips_that_no_model_can_take_are_refused(saved: dict[str, Path]) -> None:
    _, alone, _ = read_subjects([str(saved["image"])])
    assert (alone.frames, alone.tubelet) == (16, 2)
    with pytest.raises(UserError, match="--frames 5: expected a multiple of 2"):
        read_subjects([str(saved["image"])], frames=5)


def test_a_wrong_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.safetensors"):
        read_subjects([f"a={tmp_path / 'nothing.safetensors'}"])
