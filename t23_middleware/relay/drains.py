"""Responses that drain: the server has ended them, and the client's kernel has not acknowledged all of their bytes.

Pure. A connection's position is the number of bytes that the server wrote into it; *acked* is the number of these that
the client's kernel acknowledged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from ..tcp_info import HEAD_DOUBT
from ..transfer import Opening, Progress, Transfer
from .report import Report
from .segments import Player

#: Writer and number of a response.
Id: TypeAlias = tuple[str, int]
#: The cookie of a connection that is closed for certain, since it is from another boot.
GONE_COOKIE = 0


def final_count(sent: int, base: int, position: int, acked: int) -> int:
    """Body bytes that the client's kernel acknowledged of a response that the server has ended.

    The server handed over *sent* body bytes between the connection's positions *base* and *position*. *acked* bytes of
    the connection were acknowledged: at *position*, all are; an acknowledged FIN adds 1.
    """
    missing = min(max(position - acked, 0), max(position - base, 0))
    return max(sent - _scaled(missing, sent, position - base), 0)


def interrupted_count(last: Opening | Progress, acked: int) -> int:
    """The same for a response whose writer died, by its *last* journal line; 0 if its connection is unknown."""
    opening = last.opening if isinstance(last, Progress) else last
    if opening.connection is None:
        return 0
    base = opening.connection.position
    if isinstance(last, Progress) and last.position is not None:
        count = last.sent + _scaled(acked - last.position, last.sent, last.position - base)
    else:
        count = acked - base
    if opening.length is not None:
        count = min(count, opening.length)
    return max(count, 0)


def _scaled(bytes: int, sent: int, written: int) -> int:
    """*bytes* of the connection, converted to body bytes: chunked framing and TLS write more than the body.

    A difference that is small enough to be the estimated response head does not count as framing.
    """
    return bytes * sent // written if 0 <= sent < written - HEAD_DOUBT else bytes


class WatchedConnection(NamedTuple):
    """The connection of an open or draining response."""

    cookie: int
    #: The server's own port.
    port: int
    started_ns: int
    #: The connection's position at the end of the response; ``None`` while that is unknown.
    position: int | None


@dataclass(slots=True, eq=False)
class Drain:
    """A response that waits for its final byte count. Every other decision about it is made."""

    writer: str
    number: int
    #: :data:`GONE_COOKIE` if its connection is closed for certain.
    cookie: int
    port: int
    #: The connection's positions before and after the body, and the body bytes between them.
    base: int
    position: int
    sent: int
    started_ns: int
    #: When the server ended it, in ms since the epoch.
    ended_ms: int
    #: Per response: the time, ``skip`` and player of its report.
    time_ms: int = 0
    skip: int | None = None
    player: Player = (None, None, None)
    #: Per stream: start of the run that gets its bytes; ``None`` if that was reported.
    run_ns: int | None = None

    @classmethod
    def of(cls, writer: str, transfer: Transfer) -> Drain | None:
        """The draining response of *transfer*; ``None`` if its count is final already."""
        opening, connection = transfer.opening, transfer.opening.connection
        if connection is None or transfer.position is None:
            return None
        values = (connection.cookie, connection.port, connection.position, transfer.position)
        return cls(writer, opening.number, *values, transfer.sent, opening.started_ns, transfer.ended_ms)

    @property
    def id(self) -> Id:
        """Writer and number of its response."""
        return self.writer, self.number

    @property
    def watched(self) -> WatchedConnection:
        """Its connection, as :class:`Drains` watches it."""
        return WatchedConnection(self.cookie, self.port, self.started_ns, self.position)

    def keep_report(self, report: Report) -> None:
        """Keep *report* until the count is final."""
        self.time_ms, self.skip = report.time_ms, report.skip
        self.player = (report.player_type, report.player_version, report.player_resolution)

    def count(self, acked: int | None) -> int:
        """Its acknowledged body bytes; with *acked* ``None``, which means unknown, all that was sent."""
        return self.sent if acked is None else final_count(self.sent, self.base, self.position, acked)


class Drains:
    """The connections of open and of draining responses. A response drains for at most *wait_s* seconds.

    Another thread may read :attr:`cookies`.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_ms = int(wait_s * 1000)
        #: Cookie -> the responses on that connection.
        self.cookies: dict[int, tuple[Id, ...]] = {}
        #: Local ports of all connections since the start.
        self.ports: set[int] = set()
        #: Cookie of an open connection -> acknowledged bytes, by the latest dump.
        self.last_acked: dict[int, int] = {}
        self._new: list[int] = []
        self._watched: dict[Id, WatchedConnection] = {}
        #: Responses that drain, since when in ms since the epoch; the oldest first.
        self._since: dict[Id, int] = {}

    def __len__(self) -> int:
        return len(self._since)

    def watch(self, id: Id, watched: WatchedConnection) -> None:
        """Watch the connection of a response that opens or drains; an impossible port is ignored."""
        if not 0 < watched.port < 1 << 16:
            return
        self.ports.add(watched.port)
        self._watched[id] = watched
        others = self.cookies.get(watched.cookie)
        if others is None:
            self._new.append(watched.cookie)
        self.cookies[watched.cookie] = (*(others or ()), id)

    def take_new(self) -> list[int]:
        """The new connections since the previous call."""
        new, self._new = self._new, []
        return [cookie for cookie in new if cookie in self.cookies]

    def is_watched(self, id: Id) -> bool:
        """Whether the connection of *id* is watched."""
        return id in self._watched

    def wait(self, id: Id, since_ms: int) -> None:
        """Let *id* drain."""
        self._since[id] = since_ms

    def since_ms(self, id: Id) -> int:
        """Since when *id* drains, in ms since the epoch."""
        return self._since[id]

    def forget(self, id: Id) -> None:
        """Remove *id*, which is over."""
        self._since.pop(id, None)
        watched = self._watched.pop(id, None)
        if watched is None:
            return
        others = tuple(other for other in self.cookies[watched.cookie] if other != id)
        if others:
            self.cookies[watched.cookie] = others
        else:
            del self.cookies[watched.cookie]
            self.last_acked.pop(watched.cookie, None)

    def responses_on(self, cookie: int) -> tuple[Id, ...]:
        """The responses on the connection *cookie*."""
        return self.cookies.get(cookie, ())

    def last_acked_of(self, id: Id) -> int | None:
        """The latest known number of acknowledged bytes of the connection of *id*."""
        watched = self._watched.get(id)
        return None if watched is None else self.last_acked.get(watched.cookie)

    def ids(self) -> list[Id]:
        """All draining responses."""
        return list(self._since)

    def draining(self) -> list[WatchedConnection]:
        """The connections of the draining responses, without the closed ones."""
        return [watched for id in self._since if (watched := self._watched.get(id))]

    def overdue(self, now_ms: int, clock_fell_ms: int) -> list[Id]:
        """Responses that drained for too long. A start in the future was taken before the clock was set back."""
        ids = []
        for id, since_ms in list(self._since.items()):
            if since_ms - now_ms > clock_fell_ms:
                del self._since[id]
                self._since[id] = now_ms
            elif now_ms - since_ms < self._wait_ms:
                break
            else:
                ids.append(id)
        return ids

    def restore(self, since: Iterable[tuple[Id, int]]) -> None:
        """Load the responses that drained before, in any order."""
        self._since = dict(sorted(since, key=lambda item: item[1]))
