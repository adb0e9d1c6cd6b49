"""The runs of a viewing: its first run, and the run after each scrub. Each is one report per stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from ..transfer import Play, Transfer

#: ``user_player_type``, ``_version`` and ``_resolution``.
Player: TypeAlias = tuple[str | None, str | None, str | None]

#: Runs that wait for a response that started before them; the oldest does not wait for more.
MOST_RUNS = 64


def player_of(play: Play) -> Player:
    """What *play* says of the player."""
    return _shared((play.player_type, play.player_version, play.player_resolution))


@lru_cache(maxsize=1024)
def _shared(player: Player) -> Player:
    """One object for all who say the same: it is kept per run, and there are few players."""
    return player


@dataclass(slots=True, eq=False)
class Run:
    """One run: it gets the bytes of all responses that belong to it."""

    #: 0 for a viewing's first run, 1 for a scrub's.
    skip: int
    started_ns: int
    #: Of its first response.
    player: Player
    #: Wall clock in ms, of its last response.
    ended_ms: int = 0
    sent: int = 0
    reported: bool = False


@dataclass(slots=True, eq=False)
class Runs:
    """Those of one viewing, in the order of their start; what was told and is not the last is forgotten."""

    all: tuple[Run, ...] = ()
    #: Bytes whose run was told before they came.
    late: int = 0

    def open(self, skip: int, started_ns: int, transfer: Transfer) -> Run:
        """A new run; its first response is *transfer*, whose bytes are not added yet."""
        run = Run(skip, started_ns, player_of(transfer.opening.play))
        self.all = tuple(sorted((*self.all, run), key=lambda run: run.started_ns))
        return run

    def at(self, time_ns: int) -> Run | None:
        """The run that was current then; ``None`` where it is forgotten."""
        return next((run for run in reversed(self.all) if run.started_ns <= time_ns), None)

    def add(self, run: Run | None, sent: int, ended_ms: int) -> None:
        """Give *run* the bytes of a response; they are late where it was told or forgotten."""
        if run is None or run.reported:
            self.late += sent
        else:
            run.sent += sent
            run.ended_ms = max(run.ended_ms, ended_ms)

    def concluded(self, oldest_open_ns: int | None, *, over: bool) -> Iterator[Run]:
        """Those to which nothing can be added, the last one only if the viewing is *over*.

        *oldest_open_ns* is the start of the oldest response that is open in the viewing.
        """
        too_many = len(self.all) - MOST_RUNS
        for at, run in enumerate(self.all):
            is_last = at + 1 == len(self.all)
            ends_ns = None if is_last else self.all[at + 1].started_ns
            free = oldest_open_ns is None or (ends_ns is not None and ends_ns <= oldest_open_ns)
            if not run.reported and ((free and (over or not is_last)) or at < too_many):
                yield run

    def take_unreported(self, run: Run) -> int:
        """The bytes to tell of *run*, the late ones with it."""
        sent = run.sent + self.late
        run.reported = True
        run.sent = self.late = 0
        self.all = tuple(each for each in self.all if not each.reported or each is self.all[-1])
        return sent

    @property
    def unreported(self) -> int:
        """Bytes that nothing was told of."""
        return self.late + sum(run.sent for run in self.all)
