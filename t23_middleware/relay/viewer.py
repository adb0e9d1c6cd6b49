"""The state of each session at a video: its viewings. All states are kept in the order of their latest fact."""

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

#: Version of the format in the outbox; other versions are refused.
STATE_FORMAT = 2
#: Number of ended responses that are remembered, so that a line that is read twice is counted once.
MOST_ENDED = 8
#: A time that is further in the future than this was taken before the clock was set back.
CLOCK_SET_BACK_NS = 60_000_000_000


def key_of(play: Play) -> Key:
    """The key of the session state that *play* belongs to."""
    return intern(play.host), play.session_id, intern(play.photo_id)


@dataclass(slots=True, eq=False)
class SessionState:
    """The state of one key: the current viewing, and former viewings whose responses are still open."""

    key: tuple[str, str, str]
    #: Time of its latest fact, in ns.
    last_ns: int
    #: Time of its latest report, in ms since the epoch.
    last_ms: int = 0
    #: Its viewings, in the order of their start; the last one is current.
    viewings: tuple[Viewing, ...] = ()
    #: Hashes of its latest responses that ended.
    ended: tuple[int, ...] = ()
    #: The boot that its times belong to.
    clock: tuple[str, int] = NO_CLOCK
    format: int = STATE_FORMAT

    def at(self, time_ns: int) -> Viewing | None:
        """The viewing that was current at *time_ns*."""
        for viewing in reversed(self.viewings):
            if viewing.started_ns <= time_ns:
                return viewing
        return self.viewings[0] if self.viewings else None

    def find(self, writer: str, number: int) -> tuple[Viewing, OpenResponse] | None:
        """The open response with this writer and number, and its viewing."""
        for viewing in self.viewings:
            for response in viewing.open:
                if response.number == number and response.writer == writer:
                    return viewing, response
        return None

    def add(self, response: OpenResponse, skip: int | None) -> Viewing:
        """Add *response* to the viewing that it belongs to or starts. Returns that viewing.

        A response from byte 0 starts a new viewing if the player already plays. *skip* is the app's own value, or
        ``None``.
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
        """The draining response with this writer and number, and its viewing."""
        for viewing in self.viewings:
            for drain in viewing.draining:
                if drain.number == number and drain.writer == writer:
                    return viewing, drain
        return None

    def drop_unplayed(self, viewing: Viewing, response: OpenResponse, ended_ns: int) -> None:
        """Remove *response*, of which nothing was played. If *viewing* began with it, remove that viewing too."""
        seed = viewing.open[0] is response and not (viewing.sent or viewing.beginning_counted)
        viewing.remove_open(response, ended_ns)
        if seed:
            self.remove(viewing)
            for other in viewing.open:
                self.add(other, None)

    def remove(self, viewing: Viewing) -> None:
        """Remove *viewing*."""
        self.viewings = tuple(other for other in self.viewings if other is not viewing)

    def has_ended(self, writer: str, number: int) -> bool:
        """Whether the response with this writer and number has ended."""
        return _mark(writer, number) in self.ended

    def note_ended(self, writer: str, number: int) -> None:
        """Remember that the response with this writer and number has ended."""
        self.ended = (*self.ended[1 - MOST_ENDED :], _mark(writer, number))

    def report(self, time_ms: int, sent: int, skip: int, player: Player) -> Report:
        """A report with the time *time_ms*, or 1 ms after the previous report if that is later."""
        self.last_ms = max(time_ms, self.last_ms + 1)
        return Report(self.last_ms, *self.key, sent, skip, *player)

    def clamp_times(self, now_ns: int) -> None:
        """The clock was set back: limit all times to *now_ns*."""
        self.last_ns = min(self.last_ns, now_ns)
        for viewing in self.viewings:
            viewing.last_ns = min(viewing.last_ns, now_ns)

    def rebase(self, clock: BootClock, now_ns: int) -> None:
        """If its times are from another boot, convert them by the wall clock; the latest possible is *now_ns*."""
        if self.clock[0] != clock[0]:
            shift_times(self, self.clock[1] - clock[1], now_ns)
            for viewing in self.viewings:
                viewing.rebase(clock)

    def dump(self, clock: BootClock) -> str:
        """Its state as compact JSON; its times belong to *clock*."""
        self.clock = clock
        return dumps(self)

    @classmethod
    def load(cls, key: Key, text: str) -> SessionState:
        """The state that :meth:`dump` wrote as *text*. Raises ValueError or TypeError for any other text."""
        session = loads(cls, text)
        if session.format != STATE_FORMAT or session.key != key:
            raise ValueError("not the state of this key")
        return session


class Sessions:
    """All session states, by key."""

    def __init__(self) -> None:
        #: States that :meth:`fall_idle` has not yielded since their latest fact; the oldest fact first.
        self._active: OrderedDict[Key, SessionState] = OrderedDict()
        #: The other states; the oldest fact first.
        self._idle: OrderedDict[Key, SessionState] = OrderedDict()

    def __len__(self) -> int:
        return len(self._active) + len(self._idle)

    def __iter__(self) -> Iterator[SessionState]:
        return chain(self._idle.values(), self._active.values())

    def get(self, key: Key) -> SessionState | None:
        """The state of *key*, or ``None``."""
        return self._active.get(key) or self._idle.get(key)

    def touch(self, session: SessionState) -> None:
        """Keep *session*, which has the latest fact."""
        self._idle.pop(session.key, None)
        self._active[session.key] = session
        self._active.move_to_end(session.key)

    def remove(self, session: SessionState) -> None:
        """Remove *session*."""
        self._active.pop(session.key, None)
        self._idle.pop(session.key, None)

    def oldest(self) -> SessionState:
        """The state without a fact for the longest time."""
        return next(iter(self))

    def fall_idle(self, now_ns: int, after_ns: int) -> Iterator[SessionState]:
        """The states without a fact for *after_ns*; each is yielded once until it has a new fact."""
        for session in _silent(self._active, now_ns, after_ns):
            self._idle[session.key] = self._active.pop(session.key)
            yield session

    def silent(self, now_ns: int, for_ns: int) -> Iterator[SessionState]:
        """The states without a fact for *for_ns*. One that the caller keeps is yielded again after another *for_ns*."""
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
    """A hash of a response; two of one session with the same number collide once in 2**32."""
    return zlib.crc32(writer.encode()) << 32 | number & 0xFFFFFFFF
