"""The format of the journal, by which the app's process passes data to the relay.

A journal is a file of lines, each ``<crc32 of the rest, 8 hex digits> <JSON array>\\n``. A line is written by a
single ``write(2)``. The checksum detects a line that is incomplete because the disk was full or the process was killed.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

#: Version of this format. A relay does not read or remove journals of another version.
FORMAT = 3

#: What counts the bytes of a response: the app; the proxy, whose log confirms the app's count; or the proxy alone,
#: because the app gave it only a file's name (``X-Accel-Redirect``).
APP, PROXY, OFFLOADED = "app", "proxy", "offloaded"
_COUNTERS = (APP, PROXY, OFFLOADED)

#: The response header with the play id; the proxy writes it to its log.
PLAY_HEADER = "X-T23-Play"
_PLAY_ID = re.compile(r"([0-9A-Za-z-]{1,64})\.(0|[1-9][0-9]{0,17})")


def play_id(writer: str, number: int) -> str:
    """The value of :data:`PLAY_HEADER` for the response *number* of *writer*: ``<writer>.<number>``."""
    return f"{writer}.{number}"


def parse_play_id(text: str) -> tuple[str, int] | None:
    """Writer and number in *text*; ``None`` if *text* is not in the form of :func:`play_id`."""
    found = _PLAY_ID.fullmatch(text)
    return (found[1], int(found[2])) if found else None


#: Longest line that is written or accepted, in bytes.
LONGEST_LINE = 8192


class Play(NamedTuple):
    """The session, photo and player of a request."""

    session_id: str
    photo_id: str
    #: Host of the request; ``""`` if all reports go to one site.
    host: str = ""
    #: 0 or 1 if the media URL or the app set it, else ``None``.
    skip: int | None = None
    player_type: str | None = None
    player_version: str | None = None
    player_resolution: str | None = None


class Part(NamedTuple):
    """The part of the file in a response: offsets of its first and last byte, and the file's length, in bytes."""

    first: int | None
    last: int | None
    total: int | None

    @property
    def size(self) -> int | None:
        """Bytes of the part; ``None`` if one end is unknown."""
        return None if self.first is None or self.last is None else self.last - self.first + 1


class Connection(NamedTuple):
    """The kernel's identifiers of a response's TCP connection, without the viewer's address."""

    #: SO_COOKIE as a signed 64-bit number: unique in one network namespace and boot.
    cookie: int
    #: The server's own port.
    port: int
    #: ``socket.AF_INET`` or ``socket.AF_INET6``.
    family: int
    #: Bytes that the server wrote to the connection before the first byte of this response's body.
    position: int


class Opening(NamedTuple):
    """A counted response that started."""

    #: Its number among the responses of its writer, from 1.
    number: int
    #: CLOCK_MONOTONIC in ns; orders the responses of one boot.
    started_ns: int
    #: Wall clock in ms since the epoch.
    started_ms: int
    play: Play
    part: Part
    status: int
    #: Content-Length in bytes, ``None`` if the app gave none.
    length: int | None
    #: :data:`APP`, :data:`PROXY` or :data:`OFFLOADED`; for the last, *part* and *status* are those that the request
    #: asked for.
    counted_by: str = APP
    #: First byte of the request's Range if the response is the whole file all the same (status 200).
    asked_first: int | None = None
    #: ``None`` if the kernel has no counters of it.
    connection: Connection | None = None


class Transfer(NamedTuple):
    """A counted response that has ended."""

    opening: Opening
    ended_ns: int
    ended_ms: int
    #: Body bytes that the client's kernel acknowledged; or that the server handed over, if *position* is given or the
    #: kernel has no counters.
    sent: int
    #: 1 if *sent* is what the app declared (``T23_COUNT=declared``), 0 if it was counted.
    declared: int = 0
    #: The connection's position after the body, ``None`` if the client's kernel had acknowledged all of it.
    position: int | None = None


class Progress(NamedTuple):
    """How far a response is; the relay uses it if the writer dies."""

    opening: Opening
    at_ns: int
    at_ms: int
    #: Body bytes that the server handed over so far.
    sent: int
    #: The connection's position at that time; ``None`` if the kernel has no counters.
    position: int | None = None


class Acknowledged(NamedTuple):
    """The kernel's counter of a connection as the relay read it; the relay writes it to a journal of its own."""

    cookie: int
    at_ns: int
    at_ms: int
    #: Bytes of the connection that the client's kernel acknowledged; ``None`` if it is gone without a final count.
    acked: int | None
    #: 1 if the connection is gone, so that *acked* is final.
    gone: int


class Writer(NamedTuple):
    """First line of each journal: its writer, and the settings for the relay."""

    name: str
    format: int
    #: Version of the package.
    version: str
    #: The kernel's boot id: CLOCK_MONOTONIC can be compared only within one boot.
    boot: str
    #: Wall clock in ms when the writer started; the relay uses the settings of the live writer that started last.
    started_ms: int
    #: :meth:`~t23_middleware.settings.Settings.relay_digest` of the writer's settings.
    digest: str
    #: Inode of the writer's network namespace; 0 on systems without namespaces (macOS).
    network: int


class Counts(NamedTuple):
    """Events in the app's process that are not transfers: counter name -> how often since the last such line."""

    counts: dict[str, int]


JournalLine: TypeAlias = Writer | Opening | Progress | Transfer | Acknowledged | Counts


class NotALine(ValueError):
    """The bytes are not a line of a journal."""


class TornLine(NotALine):
    """The line is incomplete or was overwritten: its checksum does not match."""


class ForeignLine(NotALine):
    """The line is complete, but this version does not know its content."""


def encode(line: JournalLine) -> bytes:
    """The bytes of one journal line, its newline included."""
    if isinstance(line, Opening):
        return open_line(opening_text(line))
    if isinstance(line, Transfer):
        return close_line(opening_text(line.opening), *line[1:])
    if isinstance(line, Progress):
        return progress_line(opening_text(line.opening), *line[1:])
    return _framed(_dump((_WORDS[type(line)], *line)))


def progress_line(opening: str, at_ns: int, at_ms: int, sent: int, position: int | None) -> bytes:
    """The line of a :class:`Progress`; it can be read without the open line."""
    return _framed(f'["progress",{opening},{at_ns},{at_ms},{sent},{_number(position)}]')


def opening_text(opening: Opening) -> str:
    """An opening as JSON. Its open line and its close line share it, because encoding costs more than writing."""
    number, started_ns, started_ms, play, part, status, length, counted_by, asked_first, connection = opening
    session_id, photo_id, host, skip, *player = play
    first, last, total = part
    who = f"{_string(session_id)},{_string(photo_id)},{_string(host)},{_number(skip)}"
    if player == _NO_PLAYER:
        player_text = "null,null,null"
    else:
        player_text = ",".join(["null" if text is None else _string(text) for text in player])
    where = "null"
    if connection is not None:
        cookie, port, family, position = connection
        where = f"[{cookie},{port},{family},{position}]"
    return (
        f"[{number},{started_ns},{started_ms},[{who},{player_text}],"
        f"[{_number(first)},{_number(last)},{_number(total)}],{status},{_number(length)},"
        f'"{counted_by}",{_number(asked_first)},{where}]'
    )


_NO_PLAYER = [None, None, None]


def open_line(opening: str) -> bytes:
    """The line of a response that starts; *opening* is its :func:`opening_text`."""
    return _framed(f'["open",{opening[1:]}')


def close_line(
    opening: str, ended_ns: int, ended_ms: int, sent: int, declared: int, position: int | None
) -> bytes:
    """The line of a response that has ended; it can be read without its open line."""
    return _framed(f'["close",{opening},{ended_ns},{ended_ms},{sent},{declared},{_number(position)}]')


def _framed(text: str) -> bytes:
    payload = text.encode()
    return b"%08x %b\n" % (zlib.crc32(payload), payload)


_dump = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_string: Callable[[str], str] = json.encoder.encode_basestring  # type: ignore[attr-defined,unused-ignore]


def _number(value: int | None) -> str:
    return "null" if value is None else str(value)


def decode(line: bytes) -> JournalLine:
    """Parse *line* (without its newline).

    Raises :class:`TornLine` if the checksum does not match, :class:`ForeignLine` if the content is unknown.
    """
    checksum, payload = line[:8], line[9:]
    if len(line) > LONGEST_LINE or b"%08x" % zlib.crc32(payload) != checksum or line[8:9] != b" ":
        raise TornLine(f"{len(line)} bytes")
    try:
        word, *fields = json.loads(payload)
        return _READERS[word](fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ForeignLine(f"{len(line)} bytes") from error


def _plain(kind: Callable[..., Any], *types: type | tuple[type, ...]) -> Callable[[Sequence[Any]], Any]:
    """Reader of a tuple of plain values; rejects ``true``, which Python accepts as an ``int``."""

    def read(fields: Sequence[Any]) -> Any:
        for value, allowed in zip(fields, types, strict=True):
            if not isinstance(value, allowed) or isinstance(value, bool):
                raise TypeError("type")
        return kind(*fields)

    return read


_INT = (int, type(None))
_STR = (str, type(None))
_read_play = _plain(Play, str, str, str, _INT, _STR, _STR, _STR)
_read_part = _plain(Part, _INT, _INT, _INT)


def _opening(fields: list[Any]) -> Opening:
    number, started_ns, started_ms, play, part, status, length, counted_by, asked_first, connection = fields
    if counted_by not in _COUNTERS:
        raise ValueError("counted by")
    where = None if connection is None else _read_connection(connection)
    parts = (number, started_ns, started_ms, _read_play(play), _read_part(part), status, length)
    opening: Opening = _read_opening((*parts, counted_by, asked_first, where))
    return opening


_read_connection = _plain(Connection, int, int, int, int)
_read_opening = _plain(Opening, int, int, int, Play, Part, int, _INT, str, _INT, (Connection, type(None)))


def _transfer(fields: list[Any]) -> Transfer:
    opening, *rest = fields
    transfer: Transfer = _read_transfer([_opening(opening), *rest])
    return transfer


_read_transfer = _plain(Transfer, Opening, int, int, int, int, _INT)


def _progress(fields: list[Any]) -> Progress:
    opening, *rest = fields
    progress: Progress = _read_progress([_opening(opening), *rest])
    return progress


_read_progress = _plain(Progress, Opening, int, int, int, _INT)
_read_acknowledged = _plain(Acknowledged, int, int, int, _INT, int)


def _counts(fields: list[Any]) -> Counts:
    (counts,) = fields
    if not all(type(value) is int for value in counts.values()):
        raise TypeError("type")
    return Counts(counts)


def _writer(fields: list[Any]) -> Writer:
    """A header of another format may have other fields: it is not damage, so only name and format are read."""
    name, format = fields[:2]
    if type(name) is str and type(format) is int and format != FORMAT:
        return Writer(name, format, "", "", 0, "", 0)
    writer: Writer = _read_writer(fields)
    return writer


_read_writer = _plain(Writer, str, int, str, str, int, str, int)

_READERS: dict[str, Callable[[list[Any]], JournalLine]] = {
    "writer": _writer,
    "open": _opening,
    "progress": _progress,
    "close": _transfer,
    "acked": _read_acknowledged,
    "counts": _counts,
}
_WORDS: dict[type, str] = {Writer: "writer", Acknowledged: "acked", Counts: "counts"}
