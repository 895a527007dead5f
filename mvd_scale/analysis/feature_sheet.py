"""Pictures of the rows of a clip: a sheet with a column for each time slice, and a moving picture over the slices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mvd_scale.analysis.clip_rows import Section
from mvd_scale.analysis.similarity_plot import INK
from mvd_scale.errors import UserError
from mvd_scale.visualization.moving import check_moving, write_moving
from mvd_scale.visualization.predictions import Images

_CELL = 112
"""Side of an image in pixels, about: a multiple of the tokens, so that all tokens are squares of one size."""

_LEAST = 560
"""Least width of a sheet in pixels, for headings and notes."""

_COLUMNS = 8
"""Largest number of slices on a sheet; of more, as many are chosen evenly."""

_PANELS = 4
"""Largest number of panels in a row of a moving picture."""

_RATE = 3
"""Time slices per second of a moving picture."""

_LEFT, _GAP, _LINE, _TEXT, _HEAD = 168, 4, 17, 13, 16
"""Margin of titles, gap between images, height of a line, and sizes of letters and headings, in pixels."""

_NIGHT, _PALE = "#181818", "#b4b4b4"
"""Background and text of moving pictures, which cannot be transparent."""

Picture = NDArray[np.uint8]


def check_picture(out: Path, moving: Path | None) -> None:
    """Check the names of the files to write, before anything is computed.

    Raises:
        UserError: a suffix is another than .png, or .gif and .mp4, or there is no such folder.
    """
    if out.suffix != ".png":
        raise UserError(f"--out {out}: expected a file name that ends in .png")
    if moving is not None:
        check_moving(moving)
    for file in (out, moving):
        if file is not None and not file.parent.is_dir():
            raise UserError(f"{file} cannot be written: there is no folder {file.parent}; make it first")


def draw_sheet(sections: list[Section], out: Path) -> None:
    """Draw all rows, a column for each time slice, on a transparent background (PNG)."""
    side = _side(sections)
    slices = len(sections[0].rows[0].images)
    shown = np.unique(np.linspace(0, slices - 1, min(slices, _COLUMNS)).round().astype(int))
    width = max(_LEFT + len(shown) * (side + _GAP), _LEAST)
    notes = [_wrapped(section.missing, width - _LEFT) for section in sections]
    height = _LINE + sum(
        _LINE + _GAP + len(section.rows) * (side + _GAP) + _LINE * len(lines) + 2 * _GAP
        for section, lines in zip(sections, notes, strict=True)
    )
    # Transparent, but of the ink's colour, which the smoothed edges of letters take.
    sheet = Image.new("RGBA", (width, height), (*_rgb(INK), 0))
    draw, font, heading = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT), ImageFont.load_default(_HEAD)
    for column, number in enumerate(shown):
        middle = _LEFT + column * (side + _GAP) + side // 2
        draw.text((middle, 1), f"slice {number + 1}", INK, font, anchor="ma")
    top = _LINE
    for section, lines in zip(sections, notes, strict=True):
        draw.text((4, top), section.title, INK, heading)
        top += _LINE + _GAP
        for row in section.rows:
            draw.multiline_text((4, top + 2), "\n".join(row.title), INK, font, spacing=4)
            for column, image in enumerate(_cells(row.images[shown], side)):
                sheet.paste(image, (_LEFT + column * (side + _GAP), top))
            top += side + _GAP
        for line in lines:
            draw.text((_LEFT, top), line, INK, font)
            top += _LINE
        top += 2 * _GAP
    sheet.save(out)


def write_moving_sheet(sections: list[Section], out: Path) -> None:
    """Write a moving picture, GIF or MP4, of one panel per row, over all time slices."""
    side = 2 * _side(sections)
    write_moving(list(_moments(sections, side)), out, rate=_RATE)


def _moments(sections: list[Section], side: int) -> Iterator[Picture]:
    """Yield the picture of each time slice: uint8 (height, width, 3)."""
    panels = [(section, row) for section in sections for row in section.rows]
    # As equal rows as possible.
    columns = math.ceil(len(panels) / math.ceil(len(panels) / _PANELS))
    lines = 2 + max(len(row.title) for _, row in panels)
    step = side + _GAP + lines * _LINE
    size = (_GAP + columns * (side + _GAP), _GAP + math.ceil(len(panels) / columns) * step)
    cells = [_cells(row.images, side) for _, row in panels]
    font = ImageFont.load_default(_TEXT)
    for moment in range(len(panels[0][1].images)):
        sheet = Image.new("RGB", size, _NIGHT)
        draw = ImageDraw.Draw(sheet)
        for number, ((section, row), images) in enumerate(zip(panels, cells, strict=True)):
            left, top = _GAP + number % columns * (side + _GAP), _GAP + number // columns * step
            sheet.paste(images[moment], (left, top))
            words = "\n".join([section.title.partition(":")[0], *row.title])
            draw.multiline_text((left + 2, top + side + 3), words, _PALE, font, spacing=4)
        yield np.asarray(sheet)


def _side(sections: list[Section]) -> int:
    """Side of an image: frames of few pixels whole times, otherwise a multiple of the tokens near `_CELL`."""
    frames = sections[0].rows[0].images.shape[2]
    if frames <= _CELL:
        return int(frames * max(round(_CELL / frames), 1))
    tokens = min(row.images.shape[2] for section in sections for row in section.rows)
    return int(tokens * max(round(_CELL / tokens), 1))


def _cells(images: Images, side: int) -> list[Image.Image]:
    """Bring images (t, height, width, 3) in 0..1 to a size: enlarged with sharp edges, or reduced."""
    filters = Image.Resampling.LANCZOS if images.shape[2] > side else Image.Resampling.NEAREST
    return [Image.fromarray((image * 255).round().astype(np.uint8)).resize((side, side), filters) for image in images]


def _wrapped(notes: list[str], width: int) -> list[str]:
    """Break notes into lines of a width in pixels."""
    font, lines = ImageFont.load_default(_TEXT), []
    for note in notes:
        line = ""
        for word in note.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = f"  {word}"
            line = longer
        lines.append(line)
    return lines


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))
