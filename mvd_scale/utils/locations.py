"""Paths and URLs for others to read: without credentials, or cut to their end."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_SCHEME = re.compile(r"((?:::)?[A-Za-z][A-Za-z0-9+.-]*://)")
"""Start of a URL; of chained ones with the colons before it."""

_HOST = re.compile(r"([^:@]*|\[[^\]@]*\])(:\d+)?")


def cut_location(text: str) -> str:
    """Cut an absolute path, a path that leads upwards, or a URL to its last two parts; other text is returned as it is.

    Of a URL the path alone is kept, without host, user, password, query and fragment; of chained URLs the last one's.
    """
    _, url, path = text.rpartition("://")
    if url:
        # A slash in a password does not end the host.
        path = re.split("[?#]", path)[0].rpartition("@")[2].partition("/")[2]
    elif not re.search("(^|::)[/~]", text) and ".." not in text.split("/"):
        return text
    parts = [part for part in path.split("/") if part not in ("", ".", "..") and not part.startswith("~")]
    return "/".join(parts[-2:]) or "..."


def cut_locations(value: Any) -> Any:
    """Cut the locations in nested values; see `cut_location`."""
    return _map_texts(value, cut_location)


def without_credentials(value: Any) -> Any:
    """Remove user, password, query and fragment of all URLs in nested values; hosts and paths stay.

    Of a URL in which the end of a password cannot be told, the scheme alone is kept.
    """
    return _map_texts(value, _strip_urls)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _map_texts(each, change) for key, each in value.items()}
    if isinstance(value, list):
        return [_map_texts(each, change) for each in value]
    return change(value) if isinstance(value, str) else value


def _strip_urls(text: str) -> str:
    before, *rest = _SCHEME.split(text)
    return before + "".join(scheme + _strip_url(after) for scheme, after in zip(rest[::2], rest[1::2], strict=True))


def _strip_url(after: str) -> str:
    """Strip what follows the scheme of a URL."""
    kept = re.split("[?#]", after)[0]
    host = kept.partition("/")[0]
    if "@" in host or not _HOST.fullmatch(host):
        # A slash in a password does not end the host.
        kept = kept.rpartition("@")[2]
    return kept if _HOST.fullmatch(kept.partition("/")[0]) else "..."
