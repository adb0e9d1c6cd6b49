"""The part of the playback machine that waits for final counts, and for the connections of workers that died.

All decisions about a response (its ``skip``, the run that gets its bytes) are made when it closes. Only its byte count
waits, so the order in which connections drain changes no decision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable

from ..transfer import Acknowledged, Opening, Progress, Transfer, decode, encode
from .drains import GONE_COOKIE, Drain, Drains, Id, WatchedConnection, interrupted_count
from .report import Report
from .viewer import CLOCK_SET_BACK_NS, Key, Sessions, SessionState
from .viewing import MOST_OPEN, OpenResponse, Viewing

#: Earlier than any other time: times of another boot may be negative.
BEFORE_ALL_TIME_NS = -(1 << 63)


class DrainingPlayback(ABC):
    """The half of :class:`~.playback.Playback` for draining responses, each of which waits *wait_s* seconds at most."""

    def __init__(self, wait_s: float) -> None:
        #: The watched connections and the draining responses.
        self.drains = Drains(wait_s)
        self.counts: Counter[str] = Counter()
        self._sessions = Sessions()
        self._changed: dict[Key, None] = {}
        self._clock_ns = BEFORE_ALL_TIME_NS
        #: Draining response -> its session state's key. Orphans, whose writers died, are not in it.
        self._draining_keys: dict[Id, Key] = {}

    @abstractmethod
    def closed(self, writer: str, transfer: Transfer) -> list[Report]:
        """A counted response is over."""

    @abstractmethod
    def _find(
        self, writer: str, number: int
    ) -> tuple[SessionState | None, tuple[Viewing, OpenResponse] | None]: ...

    @abstractmethod
    def _finish_fact(self, session: SessionState) -> list[Report]: ...

    @abstractmethod
    def _end_uncounted(
        self, session: SessionState, viewing: Viewing, response: OpenResponse, at_ns: int
    ) -> list[Report]: ...

    # Facts.

    def acknowledged(self, ack: Acknowledged) -> list[Report]:
        """The kernel reports how much of a connection was acknowledged, or that it is closed."""
        reports: list[Report] = []
        for id in self.drains.responses_on(ack.cookie):
            session, found = self._find(*id)
            if id in self._draining_keys:
                reports += self._drain_acknowledged(id, ack)
            elif session is not None and found is not None and ack.gone:
                reports += self._connection_ended(session, *found, ack)
        return reports

    def end_draining(self, ids: Iterable[Id] | None = None) -> list[Report]:
        """Stop waiting for *ids*, or for all with ``None``: each ends with its latest known count."""
        reports: list[Report] = []
        for id in self.drains.ids() if ids is None else ids:
            reports += self._stop_waiting(id)
        return reports

    def _end_overdue_drains(self, now_ms: int) -> list[Report]:
        reports: list[Report] = []
        for id in self.drains.overdue(now_ms, CLOCK_SET_BACK_NS // 1_000_000):
            self.counts["drain_wait_over"] += self.drains.is_watched(id)
            reports += self._stop_waiting(id)
        return reports

    # Responses that the server has ended.

    def _drain(
        self, session: SessionState, viewing: Viewing, response: OpenResponse, drain: Drain
    ) -> list[Report]:
        """Let *drain* wait for its final count, unless its connection is closed already."""
        viewing.draining = (*viewing.draining, drain)
        self._draining_keys[drain.id] = session.key
        if response.connection_gone:
            return self._count_drained(session, viewing, drain, response.acked, viewing.last_ns)
        self.drains.watch(drain.id, drain.watched)
        self.drains.wait(drain.id, drain.ended_ms)
        draining = [(each, drain) for each in session.viewings for drain in each.draining]
        return self._end_drain(session, *draining[0]) if len(draining) > MOST_OPEN else []

    def _drain_acknowledged(self, id: Id, ack: Acknowledged) -> list[Report]:
        session = self._sessions.get(self._draining_keys[id])
        found = None if session is None else session.draining(*id)
        if session is None or found is None:
            return []
        viewing, drain = found
        if not ack.gone and (ack.acked is None or ack.acked < drain.position):
            return []
        return self._count_drained(session, viewing, drain, ack.acked, ack.at_ns) + self._finish_fact(session)

    def _end_drain(self, session: SessionState, viewing: Viewing, drain: Drain) -> list[Report]:
        at_ns = max(self._clock_ns, viewing.last_ns)
        return self._count_drained(session, viewing, drain, self.drains.last_acked_of(drain.id), at_ns)

    def _count_drained(
        self, session: SessionState, viewing: Viewing, drain: Drain, acked: int | None, at_ns: int
    ) -> list[Report]:
        count = drain.count(acked)
        self._forget_drain(drain.id)
        viewing.draining = tuple(other for other in viewing.draining if other is not drain)
        viewing.drained_ns = at_ns if viewing.drained_ns is None else max(viewing.drained_ns, at_ns)
        session.last_ns = max(session.last_ns, at_ns)
        self._sessions.touch(session)
        self._changed[session.key] = None
        if acked is None:
            self.counts["unknown_end"] += 1
        if count <= 0:
            self.counts["ignored_empty"] += 1
            return []
        if drain.skip is None:
            viewing.add_drained(drain, count)
            return []
        return [Report(drain.time_ms, *session.key, count, drain.skip, *drain.player)]

    def _end_drains_of(self, session: SessionState, viewing: Viewing) -> list[Report]:
        return [report for drain in viewing.draining for report in self._end_drain(session, viewing, drain)]

    def _forget_drain(self, id: Id) -> None:
        self.drains.forget(id)
        self._draining_keys.pop(id, None)

    def _stop_waiting(self, id: Id) -> list[Report]:
        key = self._draining_keys.get(id)
        session = None if key is None else self._sessions.get(key)
        draining = None if session is None else session.draining(*id)
        if session is not None and draining is not None:
            return self._end_drain(session, *draining) + self._finish_fact(session)
        session, found = self._find(*id)
        if session is None or found is None:
            self.drains.forget(id)
            return []
        return self._end_orphan(session, *found)

    # Responses that a dead worker left open.

    def _watch(self, response: OpenResponse, opening: Opening) -> None:
        """Watch the connection of a response that opens, and keep its open line in case its writer dies."""
        if opening.connection is not None:
            response.last_line = encode(opening).decode().rstrip()
            self._watch_again(response)

    def _watch_again(self, response: OpenResponse) -> None:
        opening = _opening_of(response)
        if opening is not None and opening.connection is not None:
            cookie, port, _, _ = opening.connection
            watched = WatchedConnection(cookie, port, opening.started_ns, None)
            self.drains.watch((response.writer, response.number), watched)

    def _connection_ended(
        self, session: SessionState, viewing: Viewing, response: OpenResponse, ack: Acknowledged
    ) -> list[Report]:
        response.connection_gone, response.acked = True, ack.acked
        self._changed[session.key] = None
        if response.orphaned_since_ms is None:
            return []
        return self._interrupt(session, viewing, response, ack.at_ns, ack.at_ms)

    def _add_orphan(
        self, session: SessionState, viewing: Viewing, response: OpenResponse, at_ns: int, at_ms: int
    ) -> list[Report]:
        """The writer of *response* died: wait for the end of its connection, which may still be open."""
        id = response.writer, response.number
        if response.connection_gone or not self.drains.is_watched(id):
            return self._interrupt(session, viewing, response, at_ns, at_ms)
        response.orphaned_since_ms = at_ms
        self.drains.wait(id, at_ms)
        self._changed[session.key] = None
        return []

    def _end_orphan(self, session: SessionState, viewing: Viewing, response: OpenResponse) -> list[Report]:
        response.acked = self.drains.last_acked_of((response.writer, response.number))
        since_ms = response.orphaned_since_ms or 0
        return self._interrupt(session, viewing, response, self._clock_ns, since_ms)

    def _interrupt(
        self, session: SessionState, viewing: Viewing, response: OpenResponse, at_ns: int, at_ms: int
    ) -> list[Report]:
        """End *response* with the latest count of the kernel or, without one, of its writer.

        If neither is known, it makes no report, and later reports of its viewing have ``skip=1``.
        """
        last = None if response.last_line is None else decode(response.last_line.encode())
        opening = _opening_of(response)
        if isinstance(last, (Opening, Progress)) and response.acked is not None:
            count = interrupted_count(last, response.acked)
        elif isinstance(last, Progress):
            count, at_ms = last.sent, last.at_ms
        else:
            opening = None
        if opening is not None:
            self.counts["interrupted"] += 1
            return self.closed(response.writer, Transfer(opening, at_ns, at_ms, count))
        session.last_ns = max(session.last_ns, at_ns)
        self._sessions.touch(session)
        self.counts["interrupted_unknown"] += 1
        return self._end_uncounted(session, viewing, response, at_ns)

    def _restore_draining(self) -> None:
        """Find the draining responses and the orphans in the restored sessions."""
        since: dict[Id, int] = {}
        for session in self._sessions:
            for viewing in session.viewings:
                for drain in viewing.draining:
                    self._draining_keys[drain.id] = session.key
                    since[drain.id] = BEFORE_ALL_TIME_NS if drain.cookie == GONE_COOKIE else drain.ended_ms
                    if drain.cookie != GONE_COOKIE:
                        self.drains.watch(drain.id, drain.watched)
                for response in viewing.open:
                    self._watch_again(response)
                    if response.orphaned_since_ms is not None:
                        since[response.writer, response.number] = response.orphaned_since_ms
        self.drains.restore(since.items())


def _opening_of(response: OpenResponse) -> Opening | None:
    """The opening in the latest journal line of *response*, if any."""
    last = None if response.last_line is None else decode(response.last_line.encode())
    if isinstance(last, Opening):
        return last
    return last.opening if isinstance(last, (Progress, Transfer)) else None
