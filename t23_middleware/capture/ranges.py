"""The part of the file in a response (RFC 9110, section 14); werkzeug parses the headers."""

from __future__ import annotations

from werkzeug.http import parse_content_range_header, parse_range_header

from ..transfer import Part

UNKNOWN = Part(None, None, None)
#: Longest believable file in bytes: a client may write any number into a Range, and SQLite stores none that is larger.
LONGEST = 1 << 62


def part_of(status: int, length: int | None, content_range: str | None, asked: str | None) -> Part:
    """The part of the file in a response with *status*.

    *length* is its Content-Length in bytes, *content_range* its Content-Range, *asked* the request's Range, each
    ``None`` if absent. A 206 without a valid Content-Range is assumed to contain the requested range.
    """
    if status != 206:
        return Part(0, None if length is None else length - 1, length)
    return _plausible(_content_range_part(content_range) or _range_part(asked))


def asked_part(asked: str | None) -> tuple[Part, int]:
    """The part that the request's Range *asked* for, and the status of a response with that part."""
    if asked is None:
        return Part(0, None, None), 200
    return _plausible(_range_part(asked)), 206


def asked_first(status: int, length: int | None, asked: str | None) -> int | None:
    """The first byte that the request's Range *asked* for, if the response is the whole file (status 200).

    ``None`` for another status, and without a valid Range. *length* is the file's length in bytes, ``None`` if unknown.
    """
    wanted = parse_range_header(asked) if status == 200 else None
    if wanted is None or wanted.units != "bytes":
        return None
    first = wanted.ranges[0][0]  # werkzeug accepts several ranges only in order
    if first < 0:
        if length is None:
            return None
        first = max(length + first, 0)
    return first if first <= LONGEST else None


def asks_several(asked: str | None) -> bool:
    """Whether the request's Range *asked* for several ranges; the response is then ``multipart/byteranges``."""
    wanted = parse_range_header(asked)
    return wanted is not None and len(wanted.ranges) > 1


def _plausible(part: Part) -> Part:
    return UNKNOWN if any(number is not None and number > LONGEST for number in part) else part


def _content_range_part(content_range: str | None) -> Part | None:
    found = parse_content_range_header(content_range)
    if found is None or (found.units or "").lower() != "bytes" or found.start is None or found.stop is None:
        return None
    return Part(found.start, found.stop - 1, found.length)


def _range_part(asked: str | None) -> Part:
    wanted = parse_range_header(asked)
    if wanted is None or wanted.units != "bytes" or len(wanted.ranges) != 1:
        return UNKNOWN
    first, stop = wanted.ranges[0]
    if first < 0:  # a suffix: its offset is unknown without the file's length
        return UNKNOWN
    return Part(first, None if stop is None else stop - 1, None)
