"""Listing of the videos of a tar file, with the labels that lie beside them as in WebDataset.

The members of one sample have one key: their folder and their name up to its first dot. `000.video.mp4` and `000.cls`
are the sample `000`.
"""

from __future__ import annotations

import logging
import posixpath
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import BinaryIO, NamedTuple

from mvd_scale.data.filesystem import MEDIA_SUFFIXES, count_by_kind, is_media, is_nothing, open_file
from mvd_scale.data.indexing.list_tables import label_number
from mvd_scale.data.indexing.listing import Listing, store_rows
from mvd_scale.data.manifest import Row
from mvd_scale.data.spool import Stored, store, store_texts
from mvd_scale.data.storage import absolute
from mvd_scale.errors import UserError

log = logging.getLogger("mvd_scale")

_CHUNK = 2**20
"""Bytes of the padding after the end of an archive that are read at a time."""

_LABEL = ".cls"
_BESIDE = frozenset({_LABEL, ".json", ".txt"})
"""Suffixes of members that describe a video of the same key; labels are taken from `.cls`."""


class _Member(NamedTuple):
    """A member of a tar file that is not nothing, and no folder."""

    name: str
    offset: int
    """Place of its data in the tar file, in bytes."""
    size: int
    """Length of its data in bytes."""
    left_out: str | None
    """Reason why its data are no range of the tar file; None if they are."""
    plain: bool
    """Whether it is a file whose bytes are stored as they are."""
    label: str | None
    """Content of the member if it is a label."""


def list_tar(path: str) -> Listing:
    """Videos and still images of a tar file, with the label of the `.cls` member of the same key.

    Of many members, all lie on disk but the labels and, in a tar file with labels or other descriptions, the keys of
    its videos.

    Raises:
        UserError: the file is no whole uncompressed tar file or holds no videos, a label is no number, or the videos of
            one key have several labels.
    """
    members = store(_read(path), list, lambda values: _Member(*values))
    left = store_texts(one.name for one in members if one.plain and one.label is None and not is_media(one.name))
    others = count_by_kind(left)
    if not any(is_media(member.name) for member in members):
        holds = f", which holds {others}" if others else ""
        raise UserError(
            f"no videos in {path}{holds}: expected members with one of the suffixes {' '.join(sorted(MEDIA_SUFFIXES))}"
        )
    if others:
        log.info("%d members of %s are not taken, by their suffixes: %s", len(left), path, others)
    rows = store_rows(_labelled(path, members, _labels(path, members)))
    _log_lonely(path, rows, [member.name for member in members if member.plain and _suffix(member.name) in _BESIDE])
    return Listing(rows)


def _read(path: str) -> Iterator[_Member]:
    try:
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # kept for listings, one object for each member
                if member.isdir() or is_nothing(member.name):
                    continue
                plain, label = member.isreg() and not member.issparse(), None
                if plain and _suffix(member.name) == _LABEL:
                    content = archive.extractfile(member)
                    assert content is not None
                    label = content.read(64).decode(errors="replace").strip()
                yield _Member(member.name, member.offset_data, member.size, _why_not_a_range(member), plain, label)
            _check_end(path, file, archive.offset)
    except tarfile.TarError as error:
        raise UserError(
            f"{path} cannot be read as a tar file: {error}. Expected an uncompressed tar file: videos are read from it "
            "by byte offset"
        ) from error


def _labels(path: str, members: Iterable[_Member]) -> dict[str, int]:
    """Labels by the names of their members without suffix."""
    texts: dict[str, str] = {}
    for member in members:
        stem = posixpath.splitext(member.name)[0]
        if member.label is not None and texts.setdefault(stem, member.label) != member.label:
            raise UserError(
                f"{path}: {member.name} is in it more than once, with other contents: expected one for each key, as in "
                "a tar file to which nothing was appended"
            )
    return {stem: _label(path, stem, text) for stem, text in texts.items()}


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


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


def _labelled(path: str, members: Iterable[_Member], labels: Mapping[str, int]) -> Iterator[Row]:
    """Rows with labels: of the member that has the whole name of the video but the suffix, else of that of its key."""
    keyed: dict[str, set[int]] = {}
    for stem, label in labels.items():
        keyed.setdefault(_key(stem), set()).add(label)
    for video in members:
        if not is_media(video.name):
            continue
        stem = posixpath.splitext(video.name)[0]
        choice = {labels[stem]} if stem in labels else keyed.get(_key(video.name), {-1})
        if len(choice) > 1:
            raise UserError(
                f"{path}: {video.name} has several labels, {sorted(choice)}: expected one .cls member for the key "
                f"{_key(video.name)}, which ends at the first dot of a name"
            )
        row = Row(video.name, absolute(path), offset=video.offset, size=video.size)
        yield replace(row, label=min(choice), left_out=video.left_out)


def _log_lonely(path: str, rows: Stored[Row], beside: Sequence[str]) -> None:
    """Log descriptions without a video, and videos without a label where others have one."""
    keys = {_key(row.name) for row in rows} if beside else set()
    lonely = [name for name in beside if _key(name) not in keys]
    if lonely:
        log.warning("%d members of %s describe videos that it does not hold, such as %s", len(lonely), path, lonely[0])
    unlabelled = sum(row.label < 0 for row in rows)
    if 0 < unlabelled < len(rows):
        text = "%d of %d videos of %s have no label, because a .cls member of the same key is missing, such as %s"
        log.warning(text, unlabelled, len(rows), path, next(row.name for row in rows if row.label < 0))


def _key(name: str) -> str:
    folder, base = posixpath.split(posixpath.normpath(name))
    return posixpath.join(folder, base.partition(".")[0])
