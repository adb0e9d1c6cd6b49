"""Responses that the server is done with, and the client's kernel is not: what waits for the final count.

Pure. A connection's position is what the server wrote into it, acknowledged is what the client's kernel took of that.
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
#: A cookie of a connection that is gone for sure: it was another boot's.
GONE_COOKIE = 0


def final_count(sent: int, base: int, position: int, acked: int) -> int:
    """Body bytes that the client's kernel took of a response that is over for the server.

    The server handed over *sent* body bytes between the connection's positions *base* and *position*, and *acked*
    bytes of the connection were acknowledged: at the position, all was; an acknowledged FIN adds 1.
    """
    missing = min(max(position - acked, 0), max(position - base, 0))
    return max(sent - _scaled(missing, sent, position - base), 0)


def interrupted_count(known: Opening | Progress, acked: int) -> int:
    """The same of a response whose writer died, from the last that it wrote; 0 where its connection is not known."""
    opening = known.opening if isinstance(known, Progress) else known
    if opening.connection is None:
        return 0
    base = opening.connection.position
    if isinstance(known, Progress) and known.position is not None:
        count = known.sent + _scaled(acked - known.position, known.sent, known.position - base)
    else:
        count = acked - base
    if opening.length is not None:
        count = min(count, opening.length)
    return max(count, 0)


def _scaled(bytes: int, sent: int, written: int) -> int:
    """*bytes* of the connection in body bytes: chunked framing and TLS write more than the body.

    A difference that may be the head, which is estimated, is none of the framing.
    """
    return bytes * sent // written if 0 <= sent < written - HEAD_DOUBT else bytes


class WatchedConnection(NamedTuple):
    """A response whose connection matters."""

    cookie: int
    #: The server's own port.
    port: int
    started_ns: int
    #: The connection's position when the response is done; ``None`` where only the connection's end tells.
    position: int | None


@dataclass(slots=True, eq=False)
class Drain:
    """A response that waits for its final count; all that it decides is decided."""

    writer: str
    number: int
    #: :data:`GONE_COOKIE` where nothing more will be told of it.
    cookie: int
    port: int
    #: The connection's positions before and after the body, and the body bytes between them.
    base: int
    position: int
    sent: int
    started_ns: int
    #: When the server was done with it.
    ended_ms: int
    #: Per response: of its report.
    time_ms: int = 0
    skip: int | None = None
    player: Player = (None, None, None)
    #: Per stream: start of the run that gets its bytes; ``None`` where that is told.
    run_ns: int | None = None

    @classmethod
    def of(cls, writer: str, transfer: Transfer) -> Drain | None:
        """What waits after *transfer*; ``None`` where its count is final."""
        opening, connection = transfer.opening, transfer.opening.connection
        if connection is None or transfer.position is None:
            return None
        place = (connection.cookie, connection.port, connection.position, transfer.position)
        return cls(writer, opening.number, *place, transfer.sent, opening.started_ns, transfer.ended_ms)

    @property
    def id(self) -> Id:
        """Of its response."""
        return self.writer, self.number

    @property
    def watched(self) -> WatchedConnection:
        """What is to be known of its connection."""
        return WatchedConnection(self.cookie, self.port, self.started_ns, self.position)

    def keep_report(self, report: Report) -> None:
        """Its *report* waits for the count."""
        self.time_ms, self.skip = report.time_ms, report.skip
        self.player = (report.player_type, report.player_version, report.player_resolution)

    def count(self, acked: int | None) -> int:
        """Its body bytes that the client's kernel took; ``None``: the kernel can't tell any more."""
        return self.sent if acked is None else final_count(self.sent, self.base, self.position, acked)


class Drains:
    """Which connections matter: those of open responses and of those that drain, for *wait_s* seconds each.

    Another thread may look into :attr:`cookies`.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_ms = int(wait_s * 1000)
        #: Cookie -> the responses on that connection.
        self.cookies: dict[int, tuple[Id, ...]] = {}
        #: Local ports of all connections that there were.
        self.ports: set[int] = set()
        #: The latest that the kernel told of a connection that lives: cookie -> acknowledged bytes.
        self.last_acked: dict[int, int] = {}
        self._new: list[int] = []
        self._watched: dict[Id, WatchedConnection] = {}
        #: Responses that drain, since when in ms since the epoch; the oldest first.
        self._since: dict[Id, int] = {}

    def __len__(self) -> int:
        return len(self._since)

    def watch(self, id: Id, watched: WatchedConnection) -> None:
        """A response is open or drains; a port that can't be is no connection's."""
        if not 0 < watched.port < 1 << 16:
            return
        self.ports.add(watched.port)
        self._watched[id] = watched
        others = self.cookies.get(watched.cookie)
        if others is None:
            self._new.append(watched.cookie)
        self.cookies[watched.cookie] = (*(others or ()), id)

    def take_new(self) -> list[int]:
        """Connections that became known since the last call."""
        new, self._new = self._new, []
        return [cookie for cookie in new if cookie in self.cookies]

    def is_watched(self, id: Id) -> bool:
        """Whether its connection is known."""
        return id in self._watched

    def wait(self, id: Id, since_ms: int) -> None:
        """It drains."""
        self._since[id] = since_ms

    def since_ms(self, id: Id) -> int:
        """Since when it drains, in ms since the epoch."""
        return self._since[id]

    def forget(self, id: Id) -> None:
        """It is over."""
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
        """The responses on that connection."""
        return self.cookies.get(cookie, ())

    def last_acked_of(self, id: Id) -> int | None:
        """The acknowledged bytes of its connection, as they were known last."""
        watched = self._watched.get(id)
        return None if watched is None else self.last_acked.get(watched.cookie)

    def ids(self) -> list[Id]:
        """All that drain."""
        return list(self._since)

    def draining(self) -> list[WatchedConnection]:
        """The same with their connections, but for those that are gone."""
        return [watched for id in self._since if (watched := self._watched.get(id))]

    def overdue(self, now_ms: int, clock_fell_ms: int) -> list[Id]:
        """Those that drained long enough; what began at a time that has not come yet is of a clock that was set back."""
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
        """What drained before, in any order."""
        self._since = dict(sorted(since, key=lambda item: item[1]))
