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
from .axis import NO_CLOCK, BootClock
from .drains import Drain
from .report import Report
from .segments import Player
from .stored import dumps, loads, shift_times
from .viewing import OpenResponse, Viewing

#: Host, session and photo.
Key: TypeAlias = tuple[str, str, str]

#: Version of the format form; what another one format is not believed.
STATE_FORMAT = 2
#: Ends that are remembered, so that a line that is read twice is told once.
MOST_ENDED = 8
#: What lies further ahead than this comes from before the clock was set back.
CLOCK_SET_BACK_NS = 60_000_000_000


def key_of(play: Play) -> Key:
    """Whose viewing *play* belongs to."""
    return intern(play.host), play.session_id, intern(play.photo_id)


@dataclass(slots=True, eq=False)
class SessionState:
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
    #: What its times count from; as it was format.
    clock: tuple[str, int] = NO_CLOCK
    format: int = STATE_FORMAT

    def at(self, time_ns: int) -> Viewing | None:
        """The viewing that it was at then."""
        for viewing in reversed(self.viewings):
            if viewing.started_ns <= time_ns:
                return viewing
        return self.viewings[0] if self.viewings else None

    def find(self, writer: str, number: int) -> tuple[Viewing, OpenResponse] | None:
        """The open response of that name, and its viewing."""
        for viewing in self.viewings:
            for response in viewing.open:
                if response.number == number and response.writer == writer:
                    return viewing, response
        return None

    def add(self, response: OpenResponse, skip: int | None) -> Viewing:
        """Put *response* into the viewing that it belongs to, or that it starts.

        From byte 0 on it starts one, once the player plays; *skip* is the app's own word, if it gave one.
        """
        viewing = self.at(response.started_ns)
        again = response.first == 0 and skip != 1
        if viewing is not None and again and skip is None:
            again = not viewing.is_first_piece(response)
        if viewing is None or (again and viewing.is_playing(response.started_ns)):
            at_beginning = response.starts_at_beginning or skip == 0
            viewing = Viewing(response.started_ns, response.started_ns, at_beginning)
            self.viewings = tuple(sorted((*self.viewings, viewing), key=lambda viewing: viewing.started_ns))
        viewing.add(response)
        return viewing

    def draining(self, writer: str, number: int) -> tuple[Viewing, Drain] | None:
        """What drains of that name, and its viewing."""
        for viewing in self.viewings:
            for drain in viewing.draining:
                if drain.number == number and drain.writer == writer:
                    return viewing, drain
        return None

    def drop_unplayed(self, viewing: Viewing, response: OpenResponse, ended_ns: int) -> None:
        """*response* handed over nothing: where *viewing* began with it, that viewing never was."""
        seed = viewing.open[0] is response and not (viewing.sent or viewing.beginning_counted)
        viewing.remove_open(response, ended_ns)
        if seed:
            self.remove(viewing)
            for other in viewing.open:
                self.add(other, None)

    def remove(self, viewing: Viewing) -> None:
        """*viewing* is over."""
        self.viewings = tuple(other for other in self.viewings if other is not viewing)

    def has_ended(self, writer: str, number: int) -> bool:
        """Whether that response was told to have ended."""
        return _mark(writer, number) in self.ended

    def note_ended(self, writer: str, number: int) -> None:
        """That response has ended."""
        self.ended = (*self.ended[1 - MOST_ENDED :], _mark(writer, number))

    def report(self, time_ms: int, sent: int, skip: int, player: Player) -> Report:
        """A report; its time is *time_ms*, or just after the report before."""
        self.last_ms = max(time_ms, self.last_ms + 1)
        return Report(self.last_ms, *self.key, sent, skip, *player)

    def clamp_times(self, now_ns: int) -> None:
        """The clock was set back: nothing was later than *now_ns*."""
        self.last_ns = min(self.last_ns, now_ns)
        for viewing in self.viewings:
            viewing.last_ns = min(viewing.last_ns, now_ns)

    def rebase(self, clock: BootClock, now_ns: int) -> None:
        """Where its times are another boot's, place them by the wall clock; none is later than *now_ns*."""
        if self.clock[0] != clock[0]:
            shift_times(self, self.clock[1] - clock[1], now_ns)
            for viewing in self.viewings:
                viewing.rebase(clock)

    def dump(self, clock: BootClock) -> str:
        """Its state as compact JSON; its times are on *clock*."""
        self.clock = clock
        return dumps(self)

    @classmethod
    def load(cls, key: Key, text: str) -> SessionState:
        """The session whose :meth:`dump` *text* is; raises ValueError or TypeError where it is none."""
        session = loads(cls, text)
        if session.format != STATE_FORMAT or session.key != key:
            raise ValueError("not the state of this key")
        return session


class Sessions:
    """All that are kept, by key."""

    def __init__(self) -> None:
        #: Those that time has something to do to once they are idle; the one with the oldest fact first.
        self._lively: OrderedDict[Key, SessionState] = OrderedDict()
        #: Those to whom that was done; likewise.
        self._idle: OrderedDict[Key, SessionState] = OrderedDict()

    def __len__(self) -> int:
        return len(self._lively) + len(self._idle)

    def __iter__(self) -> Iterator[SessionState]:
        return chain(self._idle.values(), self._lively.values())

    def get(self, key: Key) -> SessionState | None:
        """The session of *key*, if it is kept."""
        return self._lively.get(key) or self._idle.get(key)

    def touch(self, session: SessionState) -> None:
        """*session* is kept, and has the latest fact."""
        self._idle.pop(session.key, None)
        self._lively[session.key] = session
        self._lively.move_to_end(session.key)

    def remove(self, session: SessionState) -> None:
        """*session* is kept no longer."""
        self._lively.pop(session.key, None)
        self._idle.pop(session.key, None)

    def oldest(self) -> SessionState:
        """The one that was silent longest."""
        return next(iter(self))

    def fall_idle(self, now_ns: int, after_ns: int) -> Iterator[SessionState]:
        """Those that were silent for so long, each once until it has a new fact."""
        for session in _silent(self._lively, now_ns, after_ns):
            self._idle[session.key] = self._lively.pop(session.key)
            yield session

    def silent(self, now_ns: int, for_ns: int) -> Iterator[SessionState]:
        """Those that were silent for so long; who is not removed then is looked at again as late."""
        for session in _silent(self._idle, now_ns, for_ns):
            session.last_ns = now_ns
            self._idle.move_to_end(session.key)
            yield session


def _silent(queue: OrderedDict[Key, SessionState], now_ns: int, for_ns: int) -> Iterator[SessionState]:
    while queue:
        session = next(iter(queue.values()))
        if session.last_ns - now_ns > CLOCK_SET_BACK_NS:
            session.clamp_times(now_ns)
            queue.move_to_end(session.key)
        elif now_ns - session.last_ns >= for_ns:
            yield session
        else:
            break


def _mark(writer: str, number: int) -> int:
    """A number for a response; two of one session with the same number collide once in 2**32."""
    return zlib.crc32(writer.encode()) << 32 | number & 0xFFFFFFFF
