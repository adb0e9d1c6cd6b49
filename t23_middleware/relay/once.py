"""One run of a relay by hand: it tries each waiting report, also if its breaker is open or paused, and then ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from ..settings import Settings
from ..state import StateFolder
from .intake import LATE_NS
from .outbox import Stats
from .process import POLL, STORE_RETRY, Relay

#: Seconds without progress after which the run ends: the next retry of the remaining reports is not soon.
QUIET = 3.0
#: Seconds between two updates of the shown progress.
SHOW_EVERY = 0.25


class RunProgress(NamedTuple):
    """The progress of the run, in reports."""

    waiting: int
    sent: int
    refused: int
    lost: int


class RunResult(NamedTuple):
    """The result of the run."""

    progress: RunProgress
    #: Why reports are left, in one sentence; empty if none are.
    why: str


class RelayOnce(Relay):
    """Delivers the waiting reports of *folder* by *deadline* (``time.monotonic()``). Calls *show* with the progress.

    Raises :class:`~t23_middleware.relay.process.AnotherRelay` if another relay works on it.
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
        """Work until nothing is left, the API accepts nothing, or the deadline is reached."""
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
        # A report without an answer by then may have arrived; the next relay sends it again.
        self._delivery.stop(max(min(self._settings.exit_seconds, self._left()), 0.0))
        self._show_progress()
        self._end()

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _ingest_all(self) -> None:
        """Read all lines that were in the journals when this run began, and end what dead writers left open."""
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
        """Whether the run is over. Sets the reason."""
        if self._ending:
            self._why = "it was stopped"
        elif self._left() <= self._settings.exit_seconds:
            self._why = "the time is up; run it again, or let the relay continue"
        elif self._delivery.in_flight:
            return False
        elif self._delivery.store_fails or self._store_fails:
            self._why = f"the outbox {self._folder.outbox} can't be written; see 't23-middleware check'"
        elif refusals := self._refusals():
            self._why = "; ".join(refusals)
        elif self._outbox.hosts():
            self._why = f"{self._delivery.last_failure.rstrip('.') or 'not due yet'}; it is retried later"
            return time.monotonic() - moved > QUIET
        return True

    def _refusals(self) -> list[str]:
        """Why each API with waiting reports accepts none; empty if one of them may accept some."""
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
