"""Who is at a video: for one session its viewings, and all of them in the order of their latest fact."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from sys import intern
from typing import TypeAlias

from ..transfer import Play
from .axis import NO_AXIS, Axis
from .drains import Drain
from .report import Report
from .segments import Player
from .stored import dumps, loads, move_times
from .viewing import Response, Viewing

#: Host, session and photo.
Key: TypeAlias = tuple[str, str, str]

#: Version of the stored form; what another one stored is not believed.
STORED = 2
#: Ends that are remembered, so that a line that is read twice is told once.
REMEMBERED = 8
#: What lies further ahead than this comes from before the clock was set back.
CLOCK_FELL_NS = 60_000_000_000


def key_of(play: Play) -> Key:
    """Whose viewing *play* belongs to."""
    return intern(play.host), play.session_id, intern(play.photo_id)


@dataclass(slots=True, eq=False)
class Viewer:
    """What is kept of one key: the viewing that it is at, and former ones whose responses are still open."""

    key: tuple[str, str, str]
    #: Its latest fact.
    last_ns: int
    #: Time of its latest report.
    last_ms: int = 0
    #: In the order of their start; the last one is current.
    viewings: tuple[Viewing, ...] = ()
    #: Marks of its latest responses that ended.
    ended: tuple[int, ...] = ()
    #: What its times count from; as it was stored.
    axis: tuple[str, int] = NO_AXIS
    stored: int = STORED

    def at(self, time_ns: int) -> Viewing | None:
        """The viewing that it was at then."""
        for viewing in reversed(self.viewings):
            if viewing.started_ns <= time_ns:
                return viewing
        return self.viewings[0] if self.viewings else None

    def find(self, writer: str, number: int) -> tuple[Viewing, Response] | None:
        """The open response of that name, and its viewing."""
        for viewing in self.viewings:
            for response in viewing.open:
                if response.number == number and response.writer == writer:
                    return viewing, response
        return None

    def place(self, response: Response, skip: int | None) -> Viewing:
        """Put *response* into the viewing that it belongs to, or that it starts.

        From byte 0 on it starts one, once the player plays; *skip* is the app's own word, if it gave one.
        """
        viewing = self.at(response.started_ns)
        again = response.first == 0 and skip != 1
        if viewing is not None and again and skip is None:
            again = not viewing.joins_pieces(response)
        if viewing is None or (again and viewing.is_playing(response.started_ns)):
            known = response.may_begin or skip == 0
            viewing = Viewing(response.started_ns, response.started_ns, known)
            self.viewings = tuple(sorted((*self.viewings, viewing), key=lambda viewing: viewing.started_ns))
        viewing.admit(response)
        return viewing

    def draining(self, writer: str, number: int) -> tuple[Viewing, Drain] | None:
        """What drains of that name, and its viewing."""
        for viewing in self.viewings:
            for drain in viewing.draining:
                if drain.number == number and drain.writer == writer:
                    return viewing, drain
        return None

    def take_back(self, viewing: Viewing, response: Response, ended_ns: int) -> None:
        """*response* handed over nothing: where *viewing* began with it, that viewing never was."""
        seed = viewing.open[0] is response and not (viewing.sent or viewing.begun)
        viewing.leave(response, ended_ns)
        if seed:
            self.remove(viewing)
            for other in viewing.open:
                self.place(other, None)

    def remove(self, viewing: Viewing) -> None:
        """*viewing* is over."""
        self.viewings = tuple(other for other in self.viewings if other is not viewing)

    def has_ended(self, writer: str, number: int) -> bool:
        """Whether that response was told to have ended."""
        return _mark(writer, number) in self.ended

    def remember(self, writer: str, number: int) -> None:
        """That response has ended."""
        self.ended = (*self.ended[1 - REMEMBERED :], _mark(writer, number))

    def report(self, time_ms: int, sent: int, skip: int, player: Player) -> Report:
        """A report; its time is *time_ms*, or just after the report before."""
        self.last_ms = max(time_ms, self.last_ms + 1)
        return Report(self.last_ms, *self.key, sent, skip, *player)

    def believe_clock(self, now_ns: int) -> None:
        """The clock was set back: nothing was later than *now_ns*."""
        self.last_ns = min(self.last_ns, now_ns)
        for viewing in self.viewings:
            viewing.last_ns = min(viewing.last_ns, now_ns)

    def move_to(self, axis: Axis, now_ns: int) -> None:
        """Where its times are another boot's, place them by the wall clock; none is later than *now_ns*."""
        if self.axis[0] != axis[0]:
            move_times(self, self.axis[1] - axis[1], now_ns)
            for viewing in self.viewings:
                viewing.move_to(axis)

    def dump(self, axis: Axis) -> str:
        """Its state as compact JSON; its times are on *axis*."""
        self.axis = axis
        return dumps(self)

    @classmethod
    def load(cls, key: Key, text: str) -> Viewer:
        """The viewer whose :meth:`dump` *text* is; raises ValueError or TypeError where it is none."""
        viewer = loads(cls, text)
        if viewer.stored != STORED or viewer.key != key:
            raise ValueError("not the state of this key")
        return viewer


class Viewers:
    """All that are kept, by key."""

    def __init__(self) -> None:
        #: Those that time has something to do to once they are idle; the one with the oldest fact first.
        self._lively: OrderedDict[Key, Viewer] = OrderedDict()
        #: Those to whom that was done; likewise.
        self._idle: OrderedDict[Key, Viewer] = OrderedDict()

    def __len__(self) -> int:
        return len(self._lively) + len(self._idle)

    def __iter__(self) -> Iterator[Viewer]:
        return chain(self._idle.values(), self._lively.values())

    def get(self, key: Key) -> Viewer | None:
        """The viewer of *key*, if it is kept."""
        return self._lively.get(key) or self._idle.get(key)

    def touch(self, viewer: Viewer) -> None:
        """*viewer* is kept, and has the latest fact."""
        self._idle.pop(viewer.key, None)
        self._lively[viewer.key] = viewer
        self._lively.move_to_end(viewer.key)

    def remove(self, viewer: Viewer) -> None:
        """*viewer* is kept no longer."""
        self._lively.pop(viewer.key, None)
        self._idle.pop(viewer.key, None)

    def oldest(self) -> Viewer:
        """The one that was silent longest."""
        return next(iter(self))

    def fall_idle(self, now_ns: int, after_ns: int) -> Iterator[Viewer]:
        """Those that were silent for so long, each once until it has a new fact."""
        for viewer in _silent(self._lively, now_ns, after_ns):
            self._idle[viewer.key] = self._lively.pop(viewer.key)
            yield viewer

    def silent(self, now_ns: int, for_ns: int) -> Iterator[Viewer]:
        """Those that were silent for so long; who is not removed then is looked at again as late."""
        for viewer in _silent(self._idle, now_ns, for_ns):
            viewer.last_ns = now_ns
            self._idle.move_to_end(viewer.key)
            yield viewer


def _silent(queue: OrderedDict[Key, Viewer], now_ns: int, for_ns: int) -> Iterator[Viewer]:
    while queue:
        viewer = next(iter(queue.values()))
        if viewer.last_ns - now_ns > CLOCK_FELL_NS:
            viewer.believe_clock(now_ns)
            queue.move_to_end(viewer.key)
        elif now_ns - viewer.last_ns >= for_ns:
            yield viewer
        else:
            break


def _mark(writer: str, number: int) -> int:
    """A number for a response; two of one session with the same number collide once in 2**32."""
    return zlib.crc32(writer.encode()) << 32 | number & 0xFFFFFFFF
