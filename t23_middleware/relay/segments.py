"""The segments of a viewing: its first run, and the run after each scrub. Each is one report per stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from ..transfer import Play, Transfer

#: ``user_player_type``, ``_version`` and ``_resolution``.
Player: TypeAlias = tuple[str | None, str | None, str | None]

#: Segments that wait for a response that started before them; the oldest does not wait for more.
MOST_SEGMENTS = 64


def player_of(play: Play) -> Player:
    """What *play* says of the player."""
    return _shared((play.player_type, play.player_version, play.player_resolution))


@lru_cache(maxsize=1024)
def _shared(player: Player) -> Player:
    """One object for all who say the same: it is kept per segment, and there are few players."""
    return player


@dataclass(slots=True, eq=False)
class Segment:
    """One run: it gets the bytes of all responses that belong to it."""

    #: 0 for a viewing's first run, 1 for a scrub's.
    skip: int
    started_ns: int
    #: Of its first response.
    player: Player
    #: Wall clock in ms, of its last response.
    ended_ms: int = 0
    sent: int = 0
    told: bool = False


@dataclass(slots=True, eq=False)
class Segments:
    """Those of one viewing, in the order of their start; what was told and is not the last is forgotten."""

    all: tuple[Segment, ...] = ()
    #: Bytes whose segment was told before they came.
    late: int = 0

    def open(self, skip: int, started_ns: int, transfer: Transfer) -> Segment:
        """A new segment; its first response is *transfer*, whose bytes are not added yet."""
        segment = Segment(skip, started_ns, player_of(transfer.opening.play))
        self.all = tuple(sorted((*self.all, segment), key=lambda segment: segment.started_ns))
        return segment

    def at(self, time_ns: int) -> Segment | None:
        """The segment that was current then; ``None`` where it is forgotten."""
        return next((segment for segment in reversed(self.all) if segment.started_ns <= time_ns), None)

    def add(self, segment: Segment | None, sent: int, ended_ms: int) -> None:
        """Give *segment* the bytes of a response; they are late where it was told or forgotten."""
        if segment is None or segment.told:
            self.late += sent
        else:
            segment.sent += sent
            segment.ended_ms = max(segment.ended_ms, ended_ms)

    def concluded(self, oldest_open_ns: int | None, *, over: bool) -> Iterator[Segment]:
        """Those to which nothing can be added, the last one only if the viewing is *over*.

        *oldest_open_ns* is the start of the oldest response that is open in the viewing.
        """
        too_many = len(self.all) - MOST_SEGMENTS
        for at, segment in enumerate(self.all):
            is_last = at + 1 == len(self.all)
            ends_ns = None if is_last else self.all[at + 1].started_ns
            free = oldest_open_ns is None or (ends_ns is not None and ends_ns <= oldest_open_ns)
            if not segment.told and ((free and (over or not is_last)) or at < too_many):
                yield segment

    def take(self, segment: Segment) -> int:
        """The bytes to tell of *segment*, the late ones with it."""
        sent = segment.sent + self.late
        segment.told = True
        segment.sent = self.late = 0
        self.all = tuple(each for each in self.all if not each.told or each is self.all[-1])
        return sent

    @property
    def untold(self) -> int:
        """Bytes that nothing was told of."""
        return self.late + sum(segment.sent for segment in self.all)
