"""The part of the playback machine that waits for final counts, and for the connections of workers that died.

What a response decides (``skip``, which segment gets its bytes) is decided as it closes; only its bytes wait. So the
order in which connections drain changes no decision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable

from ..transfer import Acknowledged, Opening, Progress, Transfer, decode, encode
from .drains import GONE, Drain, Drains, Id, Watched, interrupted_count
from .report import Report
from .viewer import CLOCK_FELL_NS, Key, Viewer, Viewers
from .viewing import MOST_OPEN, Response, Viewing

#: Before any time: those of another boot lie before this one's beginning.
BEFORE_ALL_NS = -(1 << 63)


class DrainingPlayback(ABC):
    """What :class:`~t23_middleware.relay.playback.Playback` does for responses that drain, for *wait_s* seconds each."""

    def __init__(self, wait_s: float) -> None:
        #: The connections that matter, and what drains.
        self.drains = Drains(wait_s)
        self.counts: Counter[str] = Counter()
        self._viewers = Viewers()
        self._changed: dict[Key, None] = {}
        self._clock_ns = BEFORE_ALL_NS
        #: Whose each is that drains and whose writer said that it is over.
        self._keys: dict[Id, Key] = {}

    @abstractmethod
    def closed(self, writer: str, transfer: Transfer) -> list[Report]:
        """A counted response is over."""

    @abstractmethod
    def _find(self, writer: str, number: int) -> tuple[Viewer | None, tuple[Viewing, Response] | None]: ...

    @abstractmethod
    def _settle(self, viewer: Viewer) -> list[Report]: ...

    @abstractmethod
    def _lose_unknown(
        self, viewer: Viewer, viewing: Viewing, response: Response, at_ns: int
    ) -> list[Report]: ...

    # Facts.

    def acknowledged(self, told: Acknowledged) -> list[Report]:
        """The kernel told how far a connection is, or that it is gone."""
        reports: list[Report] = []
        for id in self.drains.on(told.cookie):
            viewer, found = self._find(*id)
            if id in self._keys:
                reports += self._hear_of_drain(id, told)
            elif viewer is not None and found is not None and told.gone:
                reports += self._hear_of_end(viewer, *found, told)
        return reports

    def end_draining(self, ids: Iterable[Id] | None = None) -> list[Report]:
        """Wait no longer for *ids*, or for anything: the counts that are known last are told."""
        reports: list[Report] = []
        for id in self.drains.ids() if ids is None else ids:
            reports += self._give_up_drain(id)
        return reports

    def _end_overdue(self, now_ms: int) -> list[Report]:
        reports: list[Report] = []
        for id in self.drains.overdue(now_ms, CLOCK_FELL_NS // 1_000_000):
            self.counts["drain_wait_over"] += self.drains.knows(id)
            reports += self._give_up_drain(id)
        return reports

    # What the server is done with.

    def _drain(self, viewer: Viewer, viewing: Viewing, response: Response, drain: Drain) -> list[Report]:
        """*drain* waits, unless all is known of its connection."""
        viewing.draining = (*viewing.draining, drain)
        self._keys[drain.id] = viewer.key
        if response.is_gone:
            return self._tell_drained(viewer, viewing, drain, response.acked, viewing.last_ns)
        self.drains.watch(drain.id, drain.watched)
        self.drains.wait(drain.id, drain.ended_ms)
        all_of_viewer = [(each, drain) for each in viewer.viewings for drain in each.draining]
        return self._end_drain(viewer, *all_of_viewer[0]) if len(all_of_viewer) > MOST_OPEN else []

    def _hear_of_drain(self, id: Id, told: Acknowledged) -> list[Report]:
        viewer = self._viewers.get(self._keys[id])
        found = None if viewer is None else viewer.draining(*id)
        if viewer is None or found is None:
            return []
        viewing, drain = found
        if not told.gone and (told.acked is None or told.acked < drain.position):
            return []
        return self._tell_drained(viewer, viewing, drain, told.acked, told.at_ns) + self._settle(viewer)

    def _end_drain(self, viewer: Viewer, viewing: Viewing, drain: Drain) -> list[Report]:
        at_ns = max(self._clock_ns, viewing.last_ns)
        return self._tell_drained(viewer, viewing, drain, self.drains.last_of(drain.id), at_ns)

    def _tell_drained(
        self, viewer: Viewer, viewing: Viewing, drain: Drain, acked: int | None, at_ns: int
    ) -> list[Report]:
        count = drain.count(acked)
        self._forget_drain(drain.id)
        viewing.draining = tuple(other for other in viewing.draining if other is not drain)
        viewing.drained_ns = at_ns if viewing.drained_ns is None else max(viewing.drained_ns, at_ns)
        viewer.last_ns = max(viewer.last_ns, at_ns)
        self._viewers.touch(viewer)
        self._changed[viewer.key] = None
        if acked is None:
            self.counts["unknown_end"] += 1
        if count <= 0:
            self.counts["ignored_empty"] += 1
            return []
        if drain.skip is None:
            viewing.add_drained(drain, count)
            return []
        return [Report(drain.time_ms, *viewer.key, count, drain.skip, *drain.player)]

    def _end_drains_of(self, viewer: Viewer, viewing: Viewing) -> list[Report]:
        return [report for drain in viewing.draining for report in self._end_drain(viewer, viewing, drain)]

    def _forget_drain(self, id: Id) -> None:
        self.drains.forget(id)
        self._keys.pop(id, None)

    def _give_up_drain(self, id: Id) -> list[Report]:
        key = self._keys.get(id)
        viewer = None if key is None else self._viewers.get(key)
        draining = None if viewer is None else viewer.draining(*id)
        if viewer is not None and draining is not None:
            return self._end_drain(viewer, *draining) + self._settle(viewer)
        viewer, found = self._find(*id)
        if viewer is None or found is None:
            self.drains.forget(id)
            return []
        return self._give_up_orphan(viewer, *found)

    # What a worker that died left open.

    def _watch(self, response: Response, opening: Opening) -> None:
        """A response opens; its open line is kept with it, for its writer may die."""
        if opening.connection is not None:
            response.known = encode(opening).decode().rstrip()
            self._watch_again(response)

    def _watch_again(self, response: Response) -> None:
        opening = _opening_of(response)
        if opening is not None and opening.connection is not None:
            cookie, port, _, _ = opening.connection
            watched = Watched(cookie, port, opening.started_ns, None)
            self.drains.watch((response.writer, response.number), watched)

    def _hear_of_end(
        self, viewer: Viewer, viewing: Viewing, response: Response, told: Acknowledged
    ) -> list[Report]:
        response.is_gone, response.acked = True, told.acked
        self._changed[viewer.key] = None
        if response.draining_since_ms is None:
            return []
        return self._interrupt(viewer, viewing, response, told.at_ns, told.at_ms)

    def _orphan(
        self, viewer: Viewer, viewing: Viewing, response: Response, at_ns: int, at_ms: int
    ) -> list[Report]:
        """The writer of *response* died; its connection may go on."""
        id = response.writer, response.number
        if response.is_gone or not self.drains.knows(id):
            return self._interrupt(viewer, viewing, response, at_ns, at_ms)
        response.draining_since_ms = at_ms
        self.drains.wait(id, at_ms)
        self._changed[viewer.key] = None
        return []

    def _give_up_orphan(self, viewer: Viewer, viewing: Viewing, response: Response) -> list[Report]:
        response.acked = self.drains.last_of((response.writer, response.number))
        since_ms = response.draining_since_ms or 0
        return self._interrupt(viewer, viewing, response, self._clock_ns, since_ms)

    def _interrupt(
        self, viewer: Viewer, viewing: Viewing, response: Response, at_ns: int, at_ms: int
    ) -> list[Report]:
        """It ends with what the kernel or else its writer told of it last.

        Where nothing is known it makes no report, and what follows of its viewing is ``skip=1``.
        """
        known = None if response.known is None else decode(response.known.encode())
        opening = _opening_of(response)
        if isinstance(known, (Opening, Progress)) and response.acked is not None:
            count = interrupted_count(known, response.acked)
        elif isinstance(known, Progress):
            count, at_ms = known.sent, known.at_ms
        else:
            opening = None
        if opening is not None:
            self.counts["interrupted"] += 1
            return self.closed(response.writer, Transfer(opening, at_ns, at_ms, count))
        viewer.last_ns = max(viewer.last_ns, at_ns)
        self._viewers.touch(viewer)
        self.counts["interrupted_unknown"] += 1
        return self._lose_unknown(viewer, viewing, response, at_ns)

    def _restore_draining(self) -> None:
        """After the viewers were restored."""
        since: dict[Id, int] = {}
        for viewer in self._viewers:
            for viewing in viewer.viewings:
                for drain in viewing.draining:
                    self._keys[drain.id] = viewer.key
                    since[drain.id] = BEFORE_ALL_NS if drain.cookie == GONE else drain.ended_ms
                    if drain.cookie != GONE:
                        self.drains.watch(drain.id, drain.watched)
                for response in viewing.open:
                    self._watch_again(response)
                    if response.draining_since_ms is not None:
                        since[response.writer, response.number] = response.draining_since_ms
        self.drains.restore(since.items())


def _opening_of(response: Response) -> Opening | None:
    """What is known of its start."""
    known = None if response.known is None else decode(response.known.encode())
    if isinstance(known, Opening):
        return known
    return known.opening if isinstance(known, (Progress, Transfer)) else None
