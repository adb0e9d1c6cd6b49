"""What the app's process tells the relay: the one format between the two processes.

A journal is a file of lines, each ``<crc32 of the rest, 8 hex digits> <JSON array>\\n``. A line is written by a
single ``write(2)``; the checksum tells a line that was torn by a full disk or a kill from one that is whole.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

#: Version of this format. A relay skips the journals of another version, and leaves them alone.
FORMAT = 3

#: Who counts the bytes of a response: the app; the proxy, whose log confirms the app's count; or the proxy alone, since
#: the app handed it a file's name and no bytes (``X-Accel-Redirect``).
APP, PROXY, OFFLOADED = "app", "proxy", "offloaded"
_COUNTERS = (APP, PROXY, OFFLOADED)

#: The response header that names the play to the proxy, which writes it into its log.
PLAY_HEADER = "X-T23-Play"
_PLAY_ID = re.compile(r"([0-9A-Za-z-]{1,64})\.(0|[1-9][0-9]{0,17})")


def play_id(writer: str, number: int) -> str:
    """What :data:`PLAY_HEADER` says of the response *number* of *writer*: ``<writer>.<number>``."""
    return f"{writer}.{number}"


def parse_play_id(text: str) -> tuple[str, int] | None:
    """Writer and number in *text*; ``None`` where it is not what :func:`play_id` makes."""
    found = _PLAY_ID.fullmatch(text)
    return (found[1], int(found[2])) if found else None


#: Longest line that is written or believed, in bytes.
LONGEST_LINE = 8192


class Play(NamedTuple):
    """Who plays what, as the request told it."""

    session_id: str
    photo_id: str
    #: Host that the request named; ``""`` where all reports go to one site.
    host: str = ""
    #: 0 or 1 where the media URL or the app decided it, else ``None``.
    skip: int | None = None
    player_type: str | None = None
    player_version: str | None = None
    player_resolution: str | None = None


class Part(NamedTuple):
    """What part of the file a response carries: offsets of its first and last byte, and the file's length."""

    first: int | None
    last: int | None
    total: int | None

    @property
    def size(self) -> int | None:
        """Bytes of the part, where both ends are known."""
        return None if self.first is None or self.last is None else self.last - self.first + 1


class Connection(NamedTuple):
    """The TCP connection of a response, as the kernel names it. It holds no address of the viewer."""

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

    #: Its number among the responses of its writer.
    number: int
    #: CLOCK_MONOTONIC in ns: the order of the responses of one boot.
    started_ns: int
    #: Wall clock in ms since the epoch.
    started_ms: int
    play: Play
    part: Part
    status: int
    #: Content-Length in bytes, where the app gave one.
    length: int | None
    #: :data:`APP`, :data:`PROXY` or :data:`OFFLOADED`; of the last, *part* and *status* are what the request asked for.
    counted_by: str = APP
    #: First byte that the request's Range asked for, where the answer is the whole file all the same (status 200).
    asked_first: int | None = None
    #: ``None`` where the kernel can't be asked about it.
    connection: Connection | None = None


class Transfer(NamedTuple):
    """A counted response that is over."""

    opening: Opening
    ended_ns: int
    ended_ms: int
    #: Body bytes that the client's kernel acknowledged, or that the server handed over where *position* is given or
    #: the kernel can't be asked.
    sent: int
    #: 1 where *sent* is what the app declared (``T23_COUNT=declared``), 0 where it was counted.
    declared: int = 0
    #: The connection's position after the body, where the client's kernel had not acknowledged all of it yet.
    position: int | None = None


class Progress(NamedTuple):
    """How far a response is: what is known of it if its writer dies."""

    opening: Opening
    at_ns: int
    at_ms: int
    #: Body bytes that the server handed over so far.
    sent: int
    #: The connection's position then; ``None`` where the kernel can't be asked.
    position: int | None = None


class Acknowledged(NamedTuple):
    """What the relay learned from the kernel about a connection; the relay writes it into a journal of its own."""

    cookie: int
    at_ns: int
    at_ms: int
    #: Bytes of the connection that the client's kernel acknowledged; ``None`` where it is gone without a final count.
    acked: int | None
    #: 1 where the connection is gone, so that *acked* is final.
    gone: int


class Writer(NamedTuple):
    """First line of each journal: who writes it, and which relay it wants."""

    name: str
    format: int
    #: Version of the package.
    version: str
    #: The kernel's boot id: CLOCK_MONOTONIC compares only within one boot.
    boot: str
    #: Wall clock in ms when the writer began; the newest-started live writer decides the relay's settings.
    started_ms: int
    #: :meth:`~t23_middleware.settings.Settings.relay_digest` of the writer's settings.
    digest: str
    #: Inode of the network namespace that the writer is in; 0 where it has none (macOS).
    network: int


class Counts(NamedTuple):
    """What happened in the app's process and is no transfer: counter name -> how often since the last such line."""

    counts: dict[str, int]


JournalLine: TypeAlias = Writer | Opening | Progress | Transfer | Acknowledged | Counts


class NotALine(ValueError):
    """These bytes are not a line of a journal."""


class TornLine(NotALine):
    """The line was cut short, or overwritten: its checksum does not fit."""


class ForeignLine(NotALine):
    """The line is whole, but not one that this version knows."""


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
    """The line of a :class:`Progress`, whole without the open line."""
    return _framed(f'["progress",{opening},{at_ns},{at_ms},{sent},{_number(position)}]')


def opening_text(opening: Opening) -> str:
    """An opening as JSON, which its open line and its close line share: encoding costs more than writing."""
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
    """The line of a response that is over, whole without its open line."""
    return _framed(f'["close",{opening},{ended_ns},{ended_ms},{sent},{declared},{_number(position)}]')


def _framed(text: str) -> bytes:
    payload = text.encode()
    return b"%08x %b\n" % (zlib.crc32(payload), payload)


_dump = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_string: Callable[[str], str] = json.encoder.encode_basestring  # type: ignore[attr-defined,unused-ignore]


def _number(value: int | None) -> str:
    return "null" if value is None else str(value)


def decode(line: bytes) -> JournalLine:
    """The line in *line* (without its newline).

    Raises :class:`TornLine` where the checksum does not fit, :class:`ForeignLine` where the content is unknown.
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
    """Reader of a tuple of plain values; a JSON ``true`` is an ``int`` to Python, but not to us."""

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
    """One of another format may say more, or other things: its journal is left alone, not taken for damaged."""
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
