"""The report of an evaluation is self-contained, shows the same figures, and escapes all names."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mvd_scale.cli import cli
from mvd_scale.data.indexing.build import build_manifest
from mvd_scale.data.manifest import Manifest, Row
from mvd_scale.evaluation.evaluate import ensemble_results
from mvd_scale.evaluation.metrics import Predictions
from mvd_scale.evaluation.results import EvalResult as FinishedTest
from mvd_scale.evaluation.results import Origin, percent
from mvd_scale.visualization.html_report import TABLE, class_results, confusions, hard_videos, render, write_report
from mvd_scale.visualization.thumbnails import HEIGHT, thumbnails

EVIL = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Parser that collects what a browser would see: tags, their links, and the text of some of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.alts: list[str] = []
        self.ids: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        self.links += [named[key] or "" for key in ("src", "href", "xlink:href", "srcset", "action") if key in named]
        self.ids += [named["id"] or ""] if "id" in named else []
        self.alts += [named.get("alt") or ""] if tag == "img" else []
        assert not [key for key in named if key.startswith("on")]

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.setdefault(self.tags[-1], []).append(data.strip())


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Row:
    file = tmp_path_factory.mktemp("video") / "one.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in range(0, 240, 20):
            frame = np.full((48, 64, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return build_manifest(file.parent, workers=1).row(0)


Make = Callable[..., tuple[FinishedTest, Manifest]]


@pytest.fixture
def make(video: Row, tmp_path: Path) -> Make:
    """A test of as many videos as there are labels, all of them the same file."""

    def made(
        labels: list[int],
        classes: list[str],
        *,
        right: float = 0.5,
        decoded: list[bool] | None = None,
        path: str | None = None,
        name: str = "videos/{}.mp4",
        views: int = 3,
    ) -> tuple[FinishedTest, Manifest]:
        draw = np.random.default_rng(0)
        scores = draw.dirichlet(np.ones(len(classes)), (len(labels), views)).astype(np.float32)
        fine = np.ones(len(labels), bool) if decoded is None else np.array(decoded)
        for place in np.flatnonzero(draw.random(len(labels)) < right):
            scores[place] = 0.2 * scores[place]
            scores[place, :, labels[place]] += 0.8
        scores[~fine] = 0
        names = [name.format(k) for k in range(len(labels))]
        rows = [
            Row(**{**vars(video), "name": each, "label": label, "path": path or video.path})
            for each, label in zip(names, labels, strict=True)
        ]
        manifest = Manifest.from_rows(rows, classes=tuple(classes))
        origin = Origin(
            f"mvd-scale evaluate {EVIL}",
            [EVIL],
            EVIL,
            "fp32",
            "dense",
            [f"view {k} {EVIL}" for k in range(views)],
        )
        reasons = {int(k): "moov atom not found" for k in np.flatnonzero(~fine)}
        out = tmp_path / f"test{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        manifest.save(out / "manifest.parquet")
        tested = FinishedTest(out, Predictions(np.array(labels), fine, scores), names, classes, origin, reasons)
        tested.write()
        return tested, manifest

    return made


def names(count: int) -> list[str]:
    return [f"class {k}" for k in range(count)]


@pytest.mark.parametrize("classes", [2, TABLE, TABLE + 1, 200, 700])
def test_a_page_stands_alone(make: Make, classes: int) -> None:
    page = Page(render(*make([k % classes for k in range(classes + 10)], names(classes), right=0), hardest=2))
    assert page.links
    assert all(link.startswith(("data:image/", "#")) for link in page.links), page.links
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("img") == 12
    assert all(page.alts)


def test_its_figures_are_those_of_the_test(make: Make) -> None:
    tested, manifest = make([k % 4 for k in range(40)], names(4), decoded=[k not in (3, 9) for k in range(40)])
    page = Page(render(tested, manifest, hardest=1))
    summary = tested.predictions.summary()
    shares = [percent(summary[key]) for key in ("top1", "top5", "mean_class_accuracy", "calibration_error")]
    shown = page.texts["dd"]
    assert shown[shown.index("40") :][:6] == ["40", "2", *shares]
    assert all(text in tested.to_text() for text in shares)
    text = " ".join(text for texts in page.texts.values() for text in texts)
    assert all(percent(accuracy) in text for accuracy in tested.predictions.view_accuracy)
    assert "mvd-scale evaluate" in text
    for name in ("videos/3.mp4", "videos/9.mp4", "moov atom not found"):
        assert name in text


def test_classes_worst_first_and_pairs_most_frequent_first(make: Make) -> None:
    tested, _ = make([0, 0, 0, 0, 1, 1, 2], names(4), right=1)
    views = np.zeros((7, 3, 4), np.float32)
    for video, prediction in enumerate([0, 1, 1, 2, 1, 0, 2]):
        views[video, :, prediction] = 1
    counted = FinishedTest(
        tested.out, Predictions(tested.predictions.labels, tested.predictions.decoded, views), tested.names,
        tested.classes, tested.origin, {},
    )  # fmt: skip
    assert [(row.name, row.videos, row.accuracy, row.taken_for) for row in class_results(counted)] == [
        ("class 0", 4, 0.25, "class 1"), ("class 1", 2, 0.5, "class 0"), ("class 2", 1, 1.0, ""),
    ]  # fmt: skip
    assert [(pair.label, pair.prediction, pair.videos, pair.share) for pair in confusions(counted)] == [
        ("class 0", "class 1", 2, 0.5), ("class 1", "class 0", 1, 0.5), ("class 0", "class 2", 1, 0.25),
    ]  # fmt: skip


def test_the_hardest_videos(make: Make) -> None:
    tested, manifest = make([0, 0, 0, 1], names(2), decoded=[True, True, True, False], views=1)
    views = np.array([[0.3, 0.7], [0.1, 0.9], [0.8, 0.2], [0, 0]], np.float32)[:, None]
    test = FinishedTest(
        tested.out, Predictions(tested.predictions.labels, tested.predictions.decoded, views), tested.names,
        tested.classes, tested.origin, tested.reasons,
    )  # fmt: skip
    sure, low = hard_videos(test, manifest, 1)
    assert [(video.name, video.prediction, video.label) for video in sure] == [("videos/1.mp4", "class 1", "class 0")]
    assert sure[0].prediction_score == pytest.approx(0.9)
    assert len(sure[0].pictures) == 3
    assert len(set(sure[0].pictures)) == 3
    assert [(video.name, round(video.label_score, 3)) for video in low] == [("videos/0.mp4", 0.3)]
    sure, low = hard_videos(test, manifest, 9)
    assert [video.name for video in (*sure, *low)] == [f"videos/{k}.mp4" for k in (1, 0, 2)]


@pytest.mark.parametrize("classes", [2, TABLE + 1])
def test_names_are_text(make: Make, classes: int) -> None:
    tested, manifest = make(
        [k % classes for k in range(3 * classes)],
        [f"{EVIL}$_{k}" for k in range(classes)],
        name=EVIL + "{}",
        decoded=[k != 1 for k in range(3 * classes)],
    )
    text = render(tested, manifest, hardest=3)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    page = Page(text)
    assert "script" not in page.tags
    assert any(EVIL in alt for alt in page.alts)


def test_without_a_wrong_video(make: Make) -> None:
    text = render(*make([0, 1, 0, 1], names(2), right=1), hardest=2)
    assert text.count("No decoded video was taken for another class.") == 2
    assert "Every video was decoded." in text
    assert "Lowest score of the true class" in text


def test_without_a_decoded_video(make: Make) -> None:
    text = render(*make([0, 1], names(2), decoded=[False, False]), hardest=2)
    assert text.count("moov atom not found") == 2
    assert "Lowest score of the true class" not in text


def test_a_video_that_is_gone_is_told(make: Make) -> None:
    tested, manifest = make([0, 1, 0, 1], names(2), path=f"/nowhere/{EVIL}.mp4")
    text = render(tested, manifest, hardest=9)
    assert text.count("the video cannot be decoded any more") == 4
    assert "No such file" in text
    assert "<img" not in text
    assert "<script" not in text


def test_a_turned_video_is_shown_upright(make: Make, video: Row) -> None:
    turned = Row(**{**vars(video), "rotation": 90, "height": video.width, "width": video.height})
    for row, width in ((video, HEIGHT * 64 // 48), (turned, HEIGHT * 48 // 64)):
        for url in thumbnails(row):
            picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
            assert picture.size == (width, HEIGHT)


def test_one_command_for_a_test_and_for_a_merged_one(make: Make, tmp_path: Path) -> None:
    tested, _ = make([0, 1, 0, 1], names(2))
    both = ensemble_results([tested.out, tested.out], tmp_path / "both", "mvd-scale ensemble a a")
    np.testing.assert_allclose(both.predictions.scores, tested.predictions.scores, atol=1e-6)
    for folder, command in ((tested.out, "mvd-scale evaluate"), (both.out, "mvd-scale ensemble a a")):
        result = CliRunner().invoke(cli, ["report", str(folder), "--hardest", "1"], catch_exceptions=False)
        assert result.stdout.strip() == str(folder / "report.html")
        assert command in (folder / "report.html").read_text()
    text = (both.out / "report.html").read_text()
    assert "Test of 2 models" in text
    assert "the mean of 2 tests" in text


def test_the_same_test_gives_the_same_page(make: Make, tmp_path: Path) -> None:
    tested, _ = make([k % 30 for k in range(60)], names(30))
    pages = [tmp_path / "deep" / name for name in ("one.html", "two.html")]
    for page in pages:
        write_report(tested.out, page, hardest=1)
    assert pages[0].read_text() == pages[1].read_text()


def test_a_folder_without_a_test_is_one_message(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["report", str(tmp_path)])
    assert result.exit_code != 0
    assert "holds no run and no finished evaluation" in str(result.exception)


def test_videos_of_one_name_keep_their_own_pictures_and_reasons(make: Make) -> None:
    tested, manifest = make([0, 0, 1], names(2), decoded=[True, True, False], name="twin.mp4", views=1)
    manifest = Manifest.from_rows(
        [manifest.row(0), Row(**{**vars(manifest.row(1)), "path": "gone.mp4"}), manifest.row(2)], classes=names(2)
    )
    shown = [video for half in hard_videos(tested, manifest, 2) for video in half]
    assert {bool(video.pictures) for video in shown} == {True, False}
    assert tested.failures() == [(2, "twin.mp4", "moov atom not found")]
    assert FinishedTest.load(tested.out).reasons == tested.reasons
