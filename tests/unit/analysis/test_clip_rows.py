"""Rows of a clip: equal features in equal colours, what is not there is named, and pictures show tokens as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mvd_scale.analysis import clip_rows
from mvd_scale.analysis.clip_rows import ClipOptions, Section, analyse_clip
from mvd_scale.analysis.feature_sheet import check_picture, draw_sheet, write_moving_sheet
from mvd_scale.analysis.predicted import find_targets, read_run, views_of
from mvd_scale.analysis.subjects import read_subjects
from mvd_scale.checkpoints import adapt, build_encoder, read_checkpoint
from mvd_scale.checkpoints.weights import save_weights
from mvd_scale.config import DecoderConfig, ModelConfig
from mvd_scale.config.data import ViewsConfig
from mvd_scale.data.batch import ClipBatch
from mvd_scale.data.storage import DecodeError
from mvd_scale.errors import UserError
from mvd_scale.models import Encoder, Student
from mvd_scale.targets.load import ema_file
from mvd_scale.targets.target import EncoderTeacher
from mvd_scale.visualization.predictions import HIDDEN

VIDEO = ModelConfig(width=48, depth=2, heads=3, frames=6, input_size=32, patch_size=8)
IMAGE = ModelConfig(
    width=32, depth=2, heads=2, frames=1, tubelet=1, input_size=32, patch_size=8, positions="sincos2d", class_token=True
)
DECODER = DecoderConfig(width=32, depth=1, heads=2)
FRAMES = torch.randint(0, 256, (1, 6, 32, 32, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
ATTENTION = ["features of", "attention, block 2", "attention rollout"]
MASK = 0.5


def save_student(path: Path, model: ModelConfig, channels: dict[str, int]) -> Path:
    student = Student(model, {name: (DECODER, count) for name, count in channels.items()})
    path.parent.mkdir(exist_ok=True)
    save_weights(path, student.state_dict(), model, dict.fromkeys(channels, DECODER))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    other_grid = IMAGE.model_copy(update={"input_size": 48})
    rotary = VIDEO.model_copy(update={"positions": "rotary_vjepa2"})
    models = {"mae": IMAGE, "videomae": VIDEO, "other_grid": other_grid, "rotary": rotary}
    models["long"] = VIDEO.model_copy(update={"frames": 12})
    for name, model in models.items():
        save_weights(folder / f"{name}.safetensors", Encoder(model).state_dict(), model)
    save_student(folder / "mvd.safetensors", VIDEO, {"image": 32, "video": 48})
    save_student(folder / "pixels.safetensors", VIDEO, {"pixels": 2 * 64 * 3})
    save_student(folder / "mae_pixels.safetensors", IMAGE, {"pixels": 64 * 3})
    return {file.stem: file for file in folder.glob("*.safetensors")}


def analyse(
    *words: str | Path, monkeypatch: pytest.MonkeyPatch, frames: int | None = None, **options: Any
) -> list[Section]:
    length = frames or 6
    monkeypatch.setattr(clip_rows, "views_of_file", lambda *_: FRAMES[:, :length])
    subjects, clip, _ = read_subjects([str(word) for word in words], frames=frames)
    clip = type(clip)(length, 2, 32)
    chosen = ClipOptions(ViewsConfig(clips=1, crops=1), **{"mask_ratio": MASK, **options})
    return analyse_clip("clip.mp4", subjects, clip, chosen, torch.device("cpu"))


def titles(section: Section) -> list[str]:
    return [row.title[0] for row in section.rows]


def test_a_prediction_that_equals_its_target_has_its_colours(files: dict[str, Path]) -> None:
    (subject,), *_ = read_subjects([str(files["mvd"])])
    truth = torch.randn(1, 48, 48)
    places = torch.arange(48).view(1, 3, 16)[:, :, ::2].flatten(1)
    predicted = truth.gather(1, places.unsqueeze(-1).expand(-1, -1, 48))
    target, guess = clip_rows._pair("video", truth, predicted, places, subject, None)
    assert target.images.shape == guess.images.shape == (3, 4, 4, 3)
    shown = (guess.images != HIDDEN).any(-1)
    assert shown.reshape(3, 16).tolist() == [[place % 2 == 0 for place in range(16)]] * 3
    np.testing.assert_allclose(guess.images[shown], target.images[shown], atol=1e-6)
    # The same features in all slices: the same colours over time.
    still = truth[:, :16].repeat(1, 3, 1)
    images = clip_rows._pair("video", still, predicted, places, subject, None)[0].images
    np.testing.assert_allclose(images[0], images[2], atol=1e-6)


def test_a_published_student_shows_what_there_is_and_names_the_rest(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    head, section = analyse(files["mvd"], monkeypatch=monkeypatch)
    np.testing.assert_array_equal(head.rows[0].images, FRAMES[0, ::2].numpy() / np.float32(255))
    assert titles(section) == ["what the student", "image: predicted", "video: predicted", *ATTENTION]
    assert section.rows[0].title[1] == "sees: 50%"
    assert len(section.missing) == 2
    assert "the file holds no teacher of video: name one with `--teacher video=FILE`" in section.missing[1]

    teachers = {"image": files["mae"], "video": files["videomae"]}
    _, section = analyse(f"mvd={files['mvd']}", monkeypatch=monkeypatch, teachers=teachers)
    assert section.title == "mvd: video student, width 48, depth 2"
    assert titles(section) == [
        "what the student", "image: target", "image: predicted", "video: target", "video: predicted", *ATTENTION
    ]  # fmt: skip
    assert section.missing == []
    assert [row.images.shape[:3] for row in section.rows] == [(3, 32, 32), *[(3, 4, 4)] * 7]
    # Tubes: the same places are predicted in all slices.
    masked = (section.rows[2].images != HIDDEN).any(-1)
    assert masked[0].sum() == MASK * 16
    assert (masked == masked[0]).all()
    visible = (section.rows[0].images[:, ::8, ::8] == head.rows[0].images[:, ::8, ::8]).all(-1)
    assert (visible != masked).all()


def test_teachers_that_do_not_fit_are_named_and_the_rest_is_shown(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reason(name: str, file: str, student: str = "mvd") -> str:
        _, section = analyse(files[student], monkeypatch=monkeypatch, teachers={name: files[file]})
        assert f"{name}: predicted" in titles(section)
        assert f"{name}: target" not in titles(section)
        (reason,) = (note for note in section.missing if note.startswith(f"{name}, true features: "))
        return reason

    assert "the teacher has 3x6x6 tokens (frames: 1), the student 3x4x4 (frames: 6)" in reason("image", "other_grid")
    assert "the teacher has 6x4x4 tokens (frames: 12), the student 3x4x4 (frames: 6)" in reason("video", "long")
    assert "the student predicts 48 channels of video, but the teacher has 32" in reason("video", "mae")
    assert "how the student saw this teacher (frames, norm) is in the recipe of its run" in reason("video", "rotary")
    assert "pixels takes no file here" in reason("pixels", "mae", "pixels")


def test_teachers_of_no_file_or_no_target_are_refused(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, file, said in (
        ("video", Path("nothing.pth"), r"nothing\.pth"),
        ("depth", files["mae"], "no model here predicts depth; expected one of: image, video"),
    ):
        with pytest.raises(UserError, match=said):
            analyse(files["mvd"], monkeypatch=monkeypatch, teachers={name: file})


def test_models_without_decoders_show_features_and_attention(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, image, video = analyse(files["mae"], files["videomae"], monkeypatch=monkeypatch)
    for section, whose in ((image, "of the class token"), (video, "mean over queries")):
        assert titles(section) == ATTENTION
        assert [row.images.shape for row in section.rows] == [(3, 4, 4, 3)] * 3
        assert section.missing == ["no decoder: no predictions"]
        assert section.rows[1].title[1] == whose


def test_pixels_are_shown_as_they_are_trained(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, video, image = analyse(files["pixels"], files["mae_pixels"], monkeypatch=monkeypatch)
    for section in (video, image):
        assert titles(section) == ["what the student", "pixels: target", "pixels: predicted", *ATTENTION]
        target, predicted = section.rows[1].images, section.rows[2].images
        assert target.shape == predicted.shape == (3, 32, 32, 3)
        # Normalised pixels of a token, two deviations to either side.
        assert target[1, :8, :8].mean() == pytest.approx(0.5, abs=0.03)
        assert (predicted == HIDDEN).all(-1).reshape(3, 4, 8, 4, 8).all(axis=(2, 4)).sum() == 3 * 8


def test_a_run_knows_its_targets_and_names_a_teacher_that_is_gone(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = str(tmp_path / "gone.safetensors")
    save_run(
        tmp_path,
        image={"kind": "image_teacher", "checkpoint": str(files["mae"]), "norm": True},
        video={"kind": "video_teacher", "checkpoint": gone},
    )
    save_student(tmp_path / "student.safetensors", VIDEO, {"image": 32, "video": 48})
    _, section = analyse(tmp_path, monkeypatch=monkeypatch, mask_ratio=None)
    assert titles(section)[:4] == ["what the student", "image: target", "image: predicted", "video: predicted"]
    assert section.rows[0].title[1] == "sees: 25%"
    assert len(section.missing) == 1
    assert "gone.safetensors" in section.missing[0]
    _, section = analyse(tmp_path, monkeypatch=monkeypatch, teachers={"video": files["videomae"]})
    assert section.missing == []


def save_run(folder: Path, data: dict[str, Any] | None = None, **targets: dict[str, Any]) -> None:
    decoder = DECODER.model_dump(exclude_none=True)
    recipe = {
        "run": {"folder": str(folder)},
        "model": VIDEO.model_dump(),
        "data": {"mask": {"ratio": 0.75}, **(data or {})},
        "targets": {name: {**target, "decoder": decoder} for name, target in targets.items()},
        "training": {"epochs": 2, "global_batch": 2, "base_lr": 1e-3, "warmup_epochs": 0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@pytest.mark.parametrize("frames", [None, 4])
def test_teachers_take_the_frames_that_the_student_is_adapted_to(
    frames: int | None, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a run's targets, and a named teacher, are the features of a teacher adapted as the student is."""
    half = VIDEO.model_copy(update={"frames": 3, "tubelet": 1})
    save_weights(tmp_path / "half.safetensors", Encoder(half).state_dict(), half)
    average = ema_file(tmp_path, "average")
    save_weights(average, Encoder(VIDEO).state_dict(), VIDEO)
    save_run(
        tmp_path,
        video={"kind": "video_teacher", "checkpoint": str(files["videomae"])},
        second={"kind": "video_teacher", "checkpoint": str(tmp_path / "half.safetensors")},
        average={"kind": "momentum"},
    )
    student = save_student(tmp_path / "student.safetensors", VIDEO, {"video": 48, "second": 48, "average": 48})
    length = frames or 6
    (subject,), *_ = read_subjects([str(student)], frames=frames)
    found = find_targets(subject, read_run(subject), {})
    assert found.missing == {}
    tokens = torch.arange(length // 2 * 16).unsqueeze(0)
    batch = ClipBatch(FRAMES[:, :length], tokens, tokens, tokens[:, 0], tokens[:, 0])
    for name, file, stride in (
        ("video", "videomae", 1),
        ("second", tmp_path / "half.safetensors", 2),
        ("average", average, 1),
    ):
        read = read_checkpoint(files[file] if isinstance(file, str) else file)
        encoder = build_encoder(adapt(read, frames=length // stride), final_norm=False).eval()
        target = found.targets[name]
        assert isinstance(target, EncoderTeacher)
        with torch.inference_mode():
            torch.testing.assert_close(target.encode(batch, tokens), encoder(FRAMES[:, :length:stride]))

    _, section = analyse(
        files["mvd"],
        monkeypatch=monkeypatch,
        frames=frames,
        teachers={"video": files["videomae"], "image": files["mae"]},
    )
    assert section.missing == []


def test_a_teacher_that_cannot_take_the_frames_is_named(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = VIDEO.model_copy(update={"frames": 2})
    save_weights(tmp_path / "slow.safetensors", Encoder(slow).state_dict(), slow)
    save_run(
        tmp_path, video={"kind": "video_teacher", "checkpoint": str(tmp_path / "slow.safetensors"), "resample": True}
    )
    student = save_student(tmp_path / "student.safetensors", VIDEO, {"video": 48})
    _, section = analyse(student, monkeypatch=monkeypatch, frames=4)
    assert "video: predicted" in titles(section)
    (reason,) = section.missing
    assert "sees 2 frames of the student's 6, in tubelets of 2, and cannot see the same share of 4" in reason


def test_the_clip_is_sampled_as_in_the_run(files: dict[str, Path], tmp_path: Path) -> None:
    student = save_student(tmp_path / "student.safetensors", VIDEO, {"pixels": 2 * 64 * 3})
    subjects, *_ = read_subjects([str(word) for word in (files["mae"], files["videomae"], student)])

    def sampled(sampling: Literal["dense", "uniform"] | None, stride: int | None) -> tuple[str, int]:
        views = views_of(subjects, sampling, stride)
        return views.sampling, views.stride

    assert sampled(None, None) == ("dense", 4)
    save_run(tmp_path, {"stride": 1}, pixels={"kind": "pixels"})
    assert sampled(None, None) == ("dense", 1)
    assert sampled(None, 3) == ("dense", 3)
    assert sampled("uniform", None)[0] == "uniform"
    save_run(tmp_path, {"sampling": "segments"}, pixels={"kind": "pixels"})
    assert sampled(None, None)[0] == "uniform"
    assert sampled(None, 3) == ("dense", 3)


def test_a_run_whose_recipe_cannot_be_read_shows_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_student(tmp_path / "student.safetensors", VIDEO, {"image": 32, "pixels": 2 * 64 * 3})
    for content in (b"model: [", b"model: {size: huge}\ntraining: {}\n", b"\xff\xfe\xfa"):
        (tmp_path / "recipe.yaml").write_bytes(content)
        _, section = analyse(tmp_path, monkeypatch=monkeypatch, mask_ratio=None)
        assert titles(section) == ["what the student", "image: predicted", "pixels: predicted", *ATTENTION]
        assert section.missing[0].startswith("recipe of its run: ")
        assert section.missing[0].endswith("the mask is the published one")
        assert "pixels, true features: how it was computed is in the recipe of its run" in section.missing[2]


def test_what_cannot_be_shown_at_all_is_an_error(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--mask-ratio 0\.01 leaves 48 of 48 tokens"):
        analyse(files["mvd"], monkeypatch=monkeypatch, mask_ratio=0.01)
    subjects, clip, _ = read_subjects([str(files["mvd"])])

    def broken(*_: object) -> None:
        raise DecodeError("clip.mp4", "no such file")

    monkeypatch.setattr(clip_rows, "views_of_file", broken)
    with pytest.raises(UserError, match=r"clip\.mp4 cannot be decoded: no such file"):
        analyse_clip("clip.mp4", subjects, clip, ClipOptions(ViewsConfig(clips=1, crops=1)), torch.device("cpu"))


def test_pictures_show_every_token_as_one_square(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = analyse(f"model={files['videomae']}", monkeypatch=monkeypatch)
    draw_sheet(sections, tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.mode == "RGBA"
    assert sheet.getpixel((sheet.width - 1, 0))[3] == 0
    pixels = np.asarray(sheet)
    colours = (sections[1].rows[0].images * 255).round().astype(np.uint8)
    side = 4 * 32  # the frames of 32 pixels, whole times
    left = sheet.width - 3 * (side + 4)
    top = next(
        y
        for y in range(sheet.height - side)
        if (pixels[y, left : left + side : 32, :3] == colours[0, 0]).all() and (pixels[y, left:, 3] == 255).any()
    )
    for number in range(3):
        at = left + number * (side + 4)
        cell = pixels[top : top + side, at : at + side, :3].reshape(4, 32, 4, 32, 3)
        assert (cell == colours[number][:, None, :, None]).all()


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_a_moving_picture_has_a_frame_for_each_slice(
    suffix: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = analyse(files["videomae"], monkeypatch=monkeypatch)
    out = tmp_path / f"moving.{suffix}"
    write_moving_sheet(sections, out)
    with av.open(str(out)) as container:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert len(frames) == 3
    side = 2 * 128
    for number, frame in enumerate(frames):
        shown = frame[4 : 4 + side, 4 : 4 + side].reshape(32, 8, 32, 8, 3).mean(axis=(1, 3))
        assert abs(shown - FRAMES[0, 2 * number].numpy()).mean() < 16


def test_names_of_pictures_are_checked_first(tmp_path: Path) -> None:
    check_picture(tmp_path / "a.png", tmp_path / "a.gif")
    for out, moving, said in (
        ("a.jpg", None, r"expected a file name that ends in \.png"),
        ("a.png", "a.avi", r"expected \.gif or \.mp4"),
        ("none/a.png", None, "there is no folder"),
    ):
        with pytest.raises(UserError, match=said):
            check_picture(tmp_path / out, tmp_path / moving if moving else None)
