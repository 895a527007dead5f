"""Statistics of a manifest, as text and as a picture: classes, codecs, durations, sizes, and reasons of exclusion."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvd_scale.data.decoding.backends import DecodeBackend, Decoders, count_backends, count_unaligned, find_shared_sizes
from mvd_scale.data.manifest import WHOLE_FILE, Manifest

_ACCESS = {
    "packets": "the index of their packets",
    "times": "times, which the whole file was decoded for",
    "count": "counting, times cannot be relied on",
}
"""Ways in which frames are found, by `Row.access`."""

_DECODERS = {
    DecodeBackend.PYAV: "PyAV",
    DecodeBackend.DALI_VIDEO: "DALI's video decoder",
    DecodeBackend.DALI_IMAGE: "DALI's image decoder",
}
_SHOWN = 10
"""Largest number of entries of a list that are shown; the others are summed up in one line."""

_BAR = 40
"""Length of the longest bar, in characters."""


_DISTINCT = 100_000
"""Number of different values from which on a distribution rounds them to hundredths."""


class Distribution:
    """Numbers of equal values, from which quantiles and histograms follow: it needs no array of all values."""

    def __init__(self) -> None:
        self.values: NDArray[Any] = np.zeros(0)
        """Values that differ, ascending: (values,)."""
        self.counts: NDArray[np.int64] = np.zeros(0, np.int64)
        """Number of times that each occurs: int64 (values,)."""

    def add(self, values: NDArray[Any], counts: NDArray[np.int64] | None = None) -> None:
        """Count values, each once or as often as `counts` says."""
        once = np.ones(len(values), np.int64) if counts is None else counts
        self.values, places = np.unique(np.concatenate([self.values, values]), return_inverse=True)
        counted = np.bincount(places, np.concatenate([self.counts, once]), len(self.values))
        self.counts = counted.astype(np.int64)
        if len(self.values) > _DISTINCT and (rounded := np.round(self.values, 2)).tolist() != self.values.tolist():
            counts, self.values, self.counts = self.counts, np.zeros(0), np.zeros(0, np.int64)
            self.add(rounded, counts)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def quantile(self, share: float) -> float:
        """Value below which a share of the values lies, interpolated between neighbours; there must be one."""
        place = share * (len(self) - 1)
        below, above = self.values[np.searchsorted(self.counts.cumsum(), [int(place), -(-place // 1)], side="right")]
        return float(below + (above - below) * (place - int(place)))


@dataclass(frozen=True)
class Statistics:
    """Statistics of the usable videos of a manifest."""

    videos: int
    """Number of usable videos."""
    left_out: int
    """Number of videos that cannot be used."""
    hours: float
    """Total duration in hours."""
    gigabytes: float
    """Total size in GB (10^9 bytes)."""
    classes: list[tuple[str, int]]
    """Name and number of videos of each class, largest first, including empty classes; no entries without labels."""
    unlabelled: int
    """Number of videos without a class."""
    codecs: list[tuple[str, int]]
    """Codec and number of videos, most frequent first."""
    pixel_formats: list[tuple[str, int]]
    """Pixel format and number of videos, most frequent first."""
    durations: Distribution
    """Durations in seconds."""
    sizes: list[tuple[tuple[int, int], int]]
    """Height and width in pixels, and number of videos, most frequent first."""
    keyframe_intervals: Distribution
    """Largest numbers of frames between keyframes."""
    variable_rate: int
    """Number of videos of variable frame rate."""
    rotated: int
    """Number of videos that are displayed rotated or mirrored."""
    access: list[tuple[str, int]]
    """Way in which frames are found (`_ACCESS`) and number of videos, most frequent first; without still images."""
    slow: int
    """Number of videos whose frames are counted from the start of the file, for every clip."""
    decoders: list[tuple[str, int]]
    """Implementation that decodes on the CPU, or on the GPU, and number of videos."""
    unaligned: int
    """Number of videos with a side that is no multiple of 16 pixels, for whose clips DALI makes new NVDEC decoders."""
    in_shards: int
    """Number of videos that are ranges of a shard."""
    reasons: list[tuple[str, int, str]]
    """Reason, number of videos and name of one of them, for the videos that cannot be used; most frequent first."""

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> Statistics:
        """Compute the statistics of a manifest, in blocks."""
        sums: Counter[str] = Counter()
        labels, codecs, formats, access, sizes = (Counter[Any]() for _ in range(5))
        durations, keyframe_intervals = Distribution(), Distribution()
        for kind, count in manifest.kinds.items():
            codecs[kind.codec] += count
            formats[kind.pixel_format] += count
        for rows in manifest.usable_blocks():
            durations.add(manifest.duration[rows])
            keyframe_intervals.add(manifest.keyframe_interval[rows])
            labels.update(_counted(manifest.label[rows]))
            sides = _counted(manifest.height[rows] << 32 | manifest.width[rows])
            sizes.update({divmod(side, 1 << 32): count for side, count in sides.items()})
            codes, ways = manifest.codes("access", rows)
            access.update({_ACCESS[ways[code]]: n for code, n in _counted(codes[~manifest.still[rows]]).items()})
            sums.update(
                {
                    "seconds": float(manifest.duration[rows].sum()),
                    "bytes": int(manifest.size[rows].sum()),
                    "variable": int(manifest.variable_rate[rows].sum()),
                    "rotated": int(((manifest.rotation[rows] != 0) | manifest.mirrored[rows]).sum()),
                    "slow": sum(n for code, n in _counted(codes).items() if ways[code] == "count"),
                    "in shards": int((manifest.offset[rows] != WHOLE_FILE).sum()),
                }
            )
        return cls(
            videos=len(manifest.usable),
            left_out=len(manifest) - len(manifest.usable),
            hours=sums["seconds"] / 3600,
            gigabytes=sums["bytes"] / 1e9,
            classes=_classes(manifest, labels),
            unlabelled=sum(count for label, count in labels.items() if label < 0),
            codecs=codecs.most_common(),
            pixel_formats=formats.most_common(),
            durations=durations,
            sizes=sizes.most_common(),
            keyframe_intervals=keyframe_intervals,
            variable_rate=sums["variable"],
            rotated=sums["rotated"],
            access=access.most_common(),
            slow=sums["slow"],
            decoders=[
                (f"{_DECODERS[backend]} on {place}", count)
                for place, decoders in (
                    ("a CPU", Decoders()),
                    ("a GPU that has the codec", Decoders("mixed", "mixed", shared_sizes=find_shared_sizes(manifest))),
                )
                for backend, count in sorted(count_backends(manifest, decoders).items())
            ],
            unaligned=count_unaligned(manifest),
            in_shards=sums["in shards"],
            reasons=_reasons(manifest),
        )

    def to_text(self) -> str:
        """Statistics as plain text of about one page."""
        lines = [
            f"{self.videos} videos, {self.hours:.3g} hours, {self.gigabytes:.3g} GB; {self.left_out} left out",
            f"{self.in_shards} in shards, {self.variable_rate} of variable frame rate, "
            f"{self.rotated} rotated or mirrored",
            *_section("codecs", self.codecs),
            *_section("pixel formats", self.pixel_formats),
            *_section("frames are found by", self.access),
            *_section("decoded by", self.decoders),
        ]
        if self.slow:
            lines += [
                "",
                f"{self.slow} videos are decoded from their start for every clip: their times cannot be relied on.",
                "Files made of them by `mvd-scale data shard --encode h264` are read at once.",
            ]
        if self.unaligned:
            lines += [
                "",
                f"{self.unaligned} videos have a side that is no multiple of 16 pixels: on a GPU, each of their clips",
                "gets a new NVDEC decoder. `mvd-scale data shard --encode h264` rounds sides to multiples of 32.",
            ]
        if self.videos:
            lines += _section("duration in seconds", _histogram(self.durations))
            lines += _section("height x width", [(f"{height} x {width}", n) for (height, width), n in self.sizes])
            lines += _section("largest number of frames between keyframes", _histogram(self.keyframe_intervals))
        if self.classes:
            counts = [count for _, count in self.classes]
            lines += [
                "",
                f"{len(counts)} classes: {min(counts)} to {max(counts)} videos, median {np.median(counts):g}; "
                f"{counts.count(0)} without any; {self.unlabelled} videos without a class",
            ]
            lines += [f"  {count:>8}  {name}" for name, count in self.classes[:_SHOWN]]
            if len(counts) > _SHOWN:
                rest = self.classes[max(len(counts) - _SHOWN, _SHOWN) :]
                lines += ["       ..."] * (len(counts) > 2 * _SHOWN)
                lines += [f"  {count:>8}  {name}" for name, count in rest]
        if self.reasons:
            lines += ["", f"left out: {self.left_out}"]
            lines += [f"  {count:>8}  {reason}, such as {example}" for reason, count, example in self.reasons]
        return "\n".join(lines)

    def draw(self, out: Path) -> None:
        """Draw the statistics as one picture and write it to `out` (PNG)."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        panels = [_draw_durations, _draw_sizes, _draw_counts("codec", self.codecs), _draw_keyframes]
        if self.classes:
            panels.append(_draw_classes)
        if self.reasons:
            panels.append(_draw_counts("left out because", [(reason, count) for reason, count, _ in self.reasons]))
        rows = -(-len(panels) // 2)
        figure = Figure(figsize=(11, 3.4 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, 2, squeeze=False).ravel()
        for axis, panel in zip(axes, panels, strict=False):
            panel(axis, self)
            axis.spines[["top", "right"]].set_visible(False)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        figure.suptitle(f"{self.videos:,} videos, {self.hours:,.1f} hours, {self.left_out:,} left out")
        figure.savefig(out, dpi=110)


def _reasons(manifest: Manifest) -> list[tuple[str, int, str]]:
    """Reason, count and example of each kind of exclusion; reasons that differ only in numbers count as one kind."""
    found: dict[str, tuple[str, int, str]] = {}
    for row in manifest.unusable.tolist():
        name, reason = manifest.name[row], str(manifest.left_out[row])
        kind = re.sub(r"\d+", "n", reason)
        first, count, example = found.get(kind, (reason, 0, name))
        found[kind] = (first, count + 1, example)
    merged = [(kind if count > 1 else first, count, example) for kind, (first, count, example) in found.items()]
    return sorted(merged, key=lambda entry: -entry[1])


def _section(title: str, counts: Sequence[tuple[str, int]]) -> list[str]:
    most = max((count for _, count in counts), default=1)
    width = max((len(name) for name, _ in counts[:_SHOWN]), default=0)
    lines = ["", title]
    for name, count in counts[:_SHOWN]:
        lines.append(f"  {name or 'unknown':<{width}}  {count:>8}  {'#' * round(_BAR * count / max(most, 1))}")
    if len(counts) > _SHOWN:
        lines.append(f"  {len(counts) - _SHOWN} more: {sum(count for _, count in counts[_SHOWN:])}")
    return lines


def _counted(values: NDArray[Any]) -> dict[int, int]:
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _classes(manifest: Manifest, labels: Counter[int]) -> list[tuple[str, int]]:
    """Name and number of videos of each class, largest first."""
    known = range(len(manifest.classes)) if manifest.classes else sorted(label for label in labels if label >= 0)
    named = {label: manifest.classes[label] if manifest.classes else str(label) for label in known}
    return sorted(((named[label], labels[label]) for label in known), key=lambda pair: (-pair[1], pair[0]))


def _histogram(values: Distribution) -> list[tuple[str, int]]:
    """Histogram of up to eight bins, as text of the range and count; the last bin holds the largest 2 % as well."""
    low, high, most = float(values.values[0]), values.quantile(0.98), float(values.values[-1])
    if high <= low:
        return [(f"{low:g}", len(values))]
    edges = np.linspace(low, high, 9)
    counts = np.histogram(np.minimum(values.values, high), edges, weights=values.counts)[0]
    digits = 0 if high - low > 16 else 2
    return [
        (f"{left:.{digits}f} to {right:.{digits}f}{' or more' if right == high < most else ''}", int(count))
        for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


_COLOUR = "#3b6ea5"


def _draw_durations(axis: Any, statistics: Statistics) -> None:
    _draw_histogram(axis, statistics.durations, "duration in seconds")


def _draw_keyframes(axis: Any, statistics: Statistics) -> None:
    _draw_histogram(axis, statistics.keyframe_intervals, "largest number of frames between keyframes")


def _draw_histogram(axis: Any, values: Distribution, title: str) -> None:
    if len(values):
        axis.hist(np.minimum(values.values, values.quantile(0.99)), bins=40, weights=values.counts, color=_COLOUR)
    axis.set_title(title, fontsize=10)
    axis.set_ylabel("videos")


def _draw_sizes(axis: Any, statistics: Statistics) -> None:
    if statistics.sizes:
        counts = np.array([count for _, count in statistics.sizes], float)
        places = np.array([(width, height) for (height, width), _ in statistics.sizes])
        axis.scatter(places[:, 0], places[:, 1], s=12 + 250 * counts / counts.max(), alpha=0.5, color=_COLOUR, lw=0)
        axis.set_xlim(0, places[:, 0].max() * 1.15)
        axis.set_ylim(0, places[:, 1].max() * 1.25)
    axis.set_title("width and height in pixels (area of a dot: videos)", fontsize=10)


def _draw_classes(axis: Any, statistics: Statistics) -> None:
    counts = [count for _, count in statistics.classes]
    axis.bar(range(len(counts)), counts, width=1.0 if len(counts) > 40 else 0.8, color=_COLOUR)
    axis.set_title(f"videos of each of {len(counts)} classes", fontsize=10)
    if len(counts) <= 12:
        names = [_shorten(name, 14) for name, _ in statistics.classes]
        axis.set_xticks(range(len(counts)), names, rotation=30, ha="right", fontsize=8)
    else:
        axis.set_xlabel("class, largest first")


def _draw_counts(title: str, counts: Sequence[tuple[str, int]]) -> Any:
    def draw(axis: Any, statistics: Statistics) -> None:
        shown = list(counts[:8])
        rest = sum(count for _, count in counts[8:])
        shown += [("others", rest)] * bool(rest)
        bars = axis.barh(range(len(shown)), [count for _, count in shown], color=_COLOUR, height=0.6)
        axis.bar_label(bars, fontsize=8, padding=3)
        axis.set_yticks(range(len(shown)), [_shorten(name or "unknown", 26) for name, _ in shown], fontsize=8)
        axis.set_ylim(max(len(shown), 4) - 0.5, -0.5)
        axis.margins(x=0.15)
        axis.set_title(title, fontsize=10)

    return draw


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
