"""Diagnosis for ``check``: the stored plays that wait for their line in the proxy's log, and the log's last lines."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ..transfer import OFFLOADED, Opening, Part, Progress, Transfer, decode, play_id
from .proxy_line import ProxyLine, parse_line
from .viewer import Key, SessionState

#: Most plays that are read: enough for a diagnosis.
MOST_LOOKED_AT = 1000
#: Bytes that are read at the end of a log: some thousand lines.
TAIL = 1 << 20


class WaitingPlay(NamedTuple):
    """A response that waits for the proxy's line."""

    #: Its play id, which the line contains.
    play: str
    #: Whether the app left the file to the proxy.
    offloaded: bool
    #: When it started and since when it waits, in ms since the epoch.
    started_ms: int
    since_ms: int
    part: Part
    length: int | None


def waiting_plays(rows: Iterable[tuple[Key, str]]) -> list[WaitingPlay]:
    """The waiting plays in the stored session states *rows*; rows that can't be read are skipped."""
    return [*islice(_waiting(rows), MOST_LOOKED_AT)]


def _waiting(rows: Iterable[tuple[Key, str]]) -> Iterator[WaitingPlay]:
    for key, text in rows:
        try:
            session = SessionState.load(key, text)
        except (ValueError, TypeError, RecursionError):
            continue
        for each in [response for viewing in session.viewings for response in viewing.open]:
            opening = _opening(each.last_line)
            if each.awaiting_line_since_ms is not None and opening is not None:
                yield WaitingPlay(
                    play_id(each.writer, each.number),
                    each.counted_by == OFFLOADED,
                    opening.started_ms,
                    each.awaiting_line_since_ms,
                    opening.part,
                    opening.length,
                )


def _opening(known: str | None) -> Opening | None:
    try:
        what = decode((known or "").encode())
    except ValueError:
        return None
    if isinstance(what, (Transfer, Progress)):
        return what.opening
    return what if isinstance(what, Opening) else None


def last_lines(path: Path) -> list[ProxyLine]:
    """Our lines in the last :data:`TAIL` bytes of the file at *path*; none if it can't be read."""
    lines = (parse_line(text) for text in _tail(path).split("\n"))
    return [line for line in lines if isinstance(line, ProxyLine)]


def _tail(path: Path) -> str:
    """The end of the file. It never waits, even for a FIFO."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        there = os.fstat(descriptor)
        if not stat.S_ISREG(there.st_mode):
            return ""
        return os.pread(descriptor, TAIL, max(there.st_size - TAIL, 0)).decode("utf-8", "replace")
    except OSError:
        return ""
    finally:
        os.close(descriptor)
