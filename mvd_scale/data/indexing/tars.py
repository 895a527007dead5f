"""Listing of the videos of a tar file, with the labels that lie beside them as in WebDataset.

The members of one sample have one key: their folder and their name up to its first dot. `000.video.mp4` and `000.cls`
are the sample `000`.
"""

from __future__ import annotations

import logging
import posixpath
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import BinaryIO

from mvd_scale.data.filesystem import MEDIA_SUFFIXES, count_by_kind, is_media, is_nothing, open_file
from mvd_scale.data.indexing.list_tables import label_number
from mvd_scale.data.indexing.listing import Listing
from mvd_scale.data.manifest import Row
from mvd_scale.data.storage import absolute
from mvd_scale.errors import UserError

log = logging.getLogger("mvd_scale")

_CHUNK = 2**20
"""Bytes of the padding after the end of an archive that are read at a time."""

_LABEL = ".cls"
_BESIDE = frozenset({_LABEL, ".json", ".txt"})
"""Suffixes of members that describe a video of the same key; labels are taken from `.cls`."""


@dataclass
class _Members:
    """Members of a tar file that matter."""

    videos: list[Row] = field(default_factory=list)
    """Rows without labels."""

    labels: dict[str, str] = field(default_factory=dict)
    """Contents of label files, by name without suffix."""

    beside: list[str] = field(default_factory=list)
    """Names of all members that describe a video."""

    others: list[str] = field(default_factory=list)
    """Names of all members that are neither videos nor labels."""


def list_tar(path: str) -> Listing:
    """Videos and still images of a tar file, with the label of the `.cls` member of the same key.

    Raises:
        UserError: the file is no whole uncompressed tar file or holds no videos, a label is no number, or the videos of
            one key have several labels.
    """
    members = _read(path)
    others = count_by_kind(members.others)
    if not members.videos:
        holds = f", which holds {others}" if others else ""
        raise UserError(
            f"no videos in {path}{holds}: expected members with one of the suffixes {' '.join(sorted(MEDIA_SUFFIXES))}"
        )
    if others:
        log.info("%d members of %s are not taken, by their suffixes: %s", len(members.others), path, others)
    labels = {stem: _label(path, stem, text) for stem, text in members.labels.items()}
    rows = _labelled(path, members.videos, labels)
    _log_lonely(path, rows, members.beside)
    return Listing(rows)


def _read(path: str) -> _Members:
    members = _Members()
    try:
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isdir() or is_nothing(member.name):
                    continue
                stem, suffix = posixpath.splitext(member.name)
                suffix = suffix.lower()
                if is_media(member.name):
                    video = Row(member.name, absolute(path), offset=member.offset_data, size=member.size)
                    members.videos.append(replace(video, left_out=_why_not_a_range(member)))
                if not member.isreg() or member.issparse():
                    continue
                if suffix in _BESIDE:
                    members.beside.append(member.name)
                if suffix == _LABEL:
                    content = archive.extractfile(member)
                    assert content is not None
                    text = content.read(64).decode(errors="replace").strip()
                    if members.labels.setdefault(stem, text) != text:
                        raise UserError(
                            f"{path}: {member.name} is in it more than once, with other contents: expected one for "
                            "each key, as in a tar file to which nothing was appended"
                        )
                elif not is_media(member.name):
                    members.others.append(member.name)
            _check_end(path, file, archive.offset)
    except tarfile.TarError as error:
        raise UserError(
            f"{path} cannot be read as a tar file: {error}. Expected an uncompressed tar file: videos are read from it "
            "by byte offset"
        ) from error
    return members


def _why_not_a_range(member: tarfile.TarInfo) -> str | None:
    """Reason why the bytes of a member are no range of the tar file; None if they are."""
    if member.islnk() or member.issym():
        return "a link in the tar file: pack it anew with `tar --dereference --hard-dereference`"
    if member.issparse():
        return "stored with holes in the tar file: pack it anew without `--sparse`"
    return None if member.isreg() else "not a file, but a pipe or a device"


def _check_end(path: str, file: BinaryIO, end: int) -> None:
    """Check that nothing follows the last member that was read: `tarfile` takes a damaged header for the end.

    Raises:
        UserError: something does.
    """
    file.seek(end)
    head = file.read(tarfile.BLOCKSIZE)
    if not head:
        log.warning("%s has no end mark: members may be missing at its end", path)
        return
    while head and not head.strip(b"\0"):
        end, head = end + len(head), file.read(_CHUNK)
    if head:
        place = end + len(head) - len(head.lstrip(b"\0"))
        raise UserError(
            f"{path} cannot be read to its end: after its last member, or a damaged one, it goes on at byte {place}. "
            "Expected one whole tar file; unpack files that were joined, with `tar --ignore-zeros`, and pack them anew"
        )


def _label(path: str, stem: str, text: str) -> int:
    number = label_number(text)
    if number is None or not text:
        raise UserError(f"{path}: {stem}.cls holds {text!r}: expected the number of a class, from 0 on")
    return number


def _labelled(path: str, videos: Sequence[Row], labels: Mapping[str, int]) -> list[Row]:
    """Rows with labels: of the member that has the whole name of the video but the suffix, else of that of its key."""
    keyed: dict[str, set[int]] = {}
    for stem, label in labels.items():
        keyed.setdefault(_key(stem), set()).add(label)
    rows = []
    for video in videos:
        stem = posixpath.splitext(video.name)[0]
        choice = {labels[stem]} if stem in labels else keyed.get(_key(video.name), {-1})
        if len(choice) > 1:
            raise UserError(
                f"{path}: {video.name} has several labels, {sorted(choice)}: expected one .cls member for the key "
                f"{_key(video.name)}, which ends at the first dot of a name"
            )
        rows.append(replace(video, label=min(choice)))
    return rows


def _log_lonely(path: str, rows: Sequence[Row], beside: Sequence[str]) -> None:
    """Log descriptions without a video, and videos without a label where others have one."""
    keys = {_key(row.name) for row in rows}
    lonely = [name for name in beside if _key(name) not in keys]
    if lonely:
        log.warning("%d members of %s describe videos that it does not hold, such as %s", len(lonely), path, lonely[0])
    unlabelled = [row.name for row in rows if row.label < 0]
    if 0 < len(unlabelled) < len(rows):
        text = "%d of %d videos of %s have no label, because a .cls member of the same key is missing, such as %s"
        log.warning(text, len(unlabelled), len(rows), path, unlabelled[0])


def _key(name: str) -> str:
    folder, base = posixpath.split(posixpath.normpath(name))
    return posixpath.join(folder, base.partition(".")[0])
