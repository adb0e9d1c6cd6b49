"""A relay's one run by hand: what waits gets a try, whatever breaker and pause say, and then the run is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from ..settings import Settings
from ..state import StateFolder
from .intake import LATE_NS
from .outbox import Stats
from .process import POLL, STORE_RETRY, Relay

#: Seconds without any movement after which what is left is left: its next try is not soon.
QUIET = 3.0
#: Seconds between two looks at the figures.
SHOW_EVERY = 0.25


class RunProgress(NamedTuple):
    """How far the run is, in reports."""

    waiting: int
    sent: int
    refused: int
    lost: int


class RunResult(NamedTuple):
    """How the run ended."""

    progress: RunProgress
    #: Why something is left, in one sentence; empty where nothing is.
    why: str


class RelayOnce(Relay):
    """Delivers what waits on *folder* by *deadline* (``time.monotonic()``), and tells how far it is.

    Raises :class:`~t23_middleware.relay.process.AnotherRelay` where another relay works on it.
    """

    def __init__(
        self, settings: Settings, folder: StateFolder, *, deadline: float, show: Callable[[RunProgress], None]
    ) -> None:
        super().__init__(settings, folder, automatic=False)
        self._deadline = deadline
        self._show = show
        self._shown_at = 0.0
        self._first: Stats | None = None
        self._ingested_all = False
        self._why = ""

    def run_once(self) -> RunResult:
        """Work until nothing is left, the API refuses, or the deadline."""
        self.run()
        return RunResult(
            self._progress, "" if self._ingested_all and not self._progress.waiting else self._why
        )

    def _work_while_needed(self) -> None:
        self._begin()
        self._first = self._first or self._outbox.stats()
        self._ingest_all()
        self._outbox.make_due()
        self._deliver()
        # An answer that does not come in time is the next relay's: the report may have arrived, and is sent again.
        self._delivery.stop(max(min(self._settings.exit_seconds, self._left()), 0.0))
        self._show_progress()
        self._end()

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _ingest_all(self) -> None:
        """All that the journals held when this run began, and what dead writers left open."""
        begun_ns = time.monotonic_ns()
        while not self._ending and self._left() > self._settings.exit_seconds:
            read_to_ns = time.monotonic_ns() - LATE_NS
            pause = self._ingest()
            self._ingested_all = pause == POLL and read_to_ns >= begun_ns
            if self._ingested_all or pause == STORE_RETRY:
                break
            time.sleep(pause)
        self._intake.check_writers_now()
        self._ingest()
        self._ingested_all = self._ingested_all and not self._store_fails
        self._conclude(streams=not self._intake.has_live_writer())

    def _deliver(self) -> None:
        moved = time.monotonic()
        while True:
            if self._delivery.step() or self._delivery.in_flight:
                moved = time.monotonic()
            self._show_sometimes()
            if self._is_over(moved):
                return
            self._delivery.wait(0.02)

    def _is_over(self, moved: float) -> bool:
        """Whether to go no further; says why."""
        if self._ending:
            self._why = "it was told to stop"
        elif self._left() <= self._settings.exit_seconds:
            self._why = "the time is up; run it again, or let the relay go on"
        elif self._delivery.in_flight:
            return False
        elif self._delivery.store_fails or self._store_fails:
            self._why = f"the outbox {self._folder.outbox} can't be written; see 't23-middleware check'"
        elif refusals := self._refusals():
            self._why = "; ".join(refusals)
        elif self._outbox.hosts():
            self._why = f"{self._delivery.last_failure.rstrip('.') or 'not due yet'}; tried again later"
            return time.monotonic() - moved > QUIET
        return True

    def _refusals(self) -> list[str]:
        """Why each API with reports takes none; nothing where one of them still may."""
        breakers = dict(self._delivery.breakers())
        waiting = [breakers.get(host) for host in self._outbox.hosts()]
        found = [breaker.paused or breaker.failure for breaker in waiting if breaker and breaker.is_open]
        return list(dict.fromkeys(found)) if len(found) == len(waiting) else []

    def _show_sometimes(self) -> None:
        if time.monotonic() - self._shown_at >= SHOW_EVERY:
            self._show_progress()
            self._shown_at = time.monotonic()

    def _show_progress(self) -> None:
        first, now = self._first or self._outbox.stats(), self._outbox.stats()
        self._progress = RunProgress(
            now.waiting, now.sent - first.sent, now.dead - first.dead, now.lost - first.lost
        )
        self._show(self._progress)
