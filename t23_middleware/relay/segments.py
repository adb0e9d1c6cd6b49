"""The runs of a viewing: the first one, and one after each scrub. With one report per stream, each run is a report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from ..transfer import Play, Transfer

#: ``user_player_type``, ``_version`` and ``_resolution``.
Player: TypeAlias = tuple[str | None, str | None, str | None]

#: Most runs that wait for a response that started before them. If there are more, the oldest is reported at once.
MOST_RUNS = 64


def player_of(play: Play) -> Player:
    """The player's type, version and resolution in *play*."""
    return _shared((play.player_type, play.player_version, play.player_resolution))


@lru_cache(maxsize=1024)
def _shared(player: Player) -> Player:
    """One object for equal values: each run keeps one, and there are few players."""
    return player


@dataclass(slots=True, eq=False)
class Run:
    """A part of a viewing without a scrub. It adds up the bytes of all responses that belong to it."""

    #: 0 for a viewing's first run, 1 for a run after a scrub.
    skip: int
    started_ns: int
    #: The player of its first response.
    player: Player
    #: End of its last response, in ms since the epoch.
    ended_ms: int = 0
    sent: int = 0
    reported: bool = False


@dataclass(slots=True, eq=False)
class Runs:
    """The runs of one viewing, in the order of their start. A reported one is removed, unless it is the last."""

    all: tuple[Run, ...] = ()
    #: Bytes that came after their run was reported.
    late: int = 0

    def open(self, skip: int, started_ns: int, transfer: Transfer) -> Run:
        """Add a new run, whose first response is *transfer*; the bytes of *transfer* are not added here."""
        run = Run(skip, started_ns, player_of(transfer.opening.play))
        self.all = tuple(sorted((*self.all, run), key=lambda run: run.started_ns))
        return run

    def at(self, time_ns: int) -> Run | None:
        """The run that was current at *time_ns*; ``None`` if it was removed."""
        return next((run for run in reversed(self.all) if run.started_ns <= time_ns), None)

    def add(self, run: Run | None, sent: int, ended_ms: int) -> None:
        """Add a response's bytes to *run*; they are late if it was reported or removed."""
        if run is None or run.reported:
            self.late += sent
        else:
            run.sent += sent
            run.ended_ms = max(run.ended_ms, ended_ms)

    def concluded(self, oldest_open_ns: int | None, *, over: bool) -> Iterator[Run]:
        """The unreported runs that can't grow any more, the last run only if the viewing is *over*.

        *oldest_open_ns* is the start of the viewing's oldest open response.
        """
        too_many = len(self.all) - MOST_RUNS
        for at, run in enumerate(self.all):
            is_last = at + 1 == len(self.all)
            ends_ns = None if is_last else self.all[at + 1].started_ns
            free = oldest_open_ns is None or (ends_ns is not None and ends_ns <= oldest_open_ns)
            if not run.reported and ((free and (over or not is_last)) or at < too_many):
                yield run

    def take_unreported(self, run: Run) -> int:
        """Mark *run* as reported. Returns the bytes to report, which include the late ones."""
        sent = run.sent + self.late
        run.reported = True
        run.sent = self.late = 0
        self.all = tuple(each for each in self.all if not each.reported or each is self.all[-1])
        return sent

    @property
    def unreported(self) -> int:
        """Bytes that no report contains."""
        return self.late + sum(run.sent for run in self.all)
