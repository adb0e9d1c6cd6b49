"""The relay: one process per state folder that takes in the journals, decides, and delivers."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ..settings import Settings
from ..state import Holder, StateFolder, hold_lock
from ..transfer import Opening
from ..version import VERSION
from .client import AnalyticsClient
from .delivery import Delivery
from .journals import Journals, Reading
from .outbox import Ingest, OutboxError, SQLiteOutbox
from .playback import Playback
from .report import Report

log = logging.getLogger(__name__)

#: Seconds between two looks at the journals.
POLL = 0.1
#: How late a line may be, in ns: a worker that was put to sleep between taking the time and writing it.
LATE_NS = 250_000_000
#: Seconds without anything to do before an automatic relay leaves.
LEAVE_AFTER = 1.0


class AnotherRelay(Exception):
    """Another relay works on the folder."""


class Relay:
    """Works on *folder* while it holds the lock; raises :class:`AnotherRelay` where another one does."""

    def __init__(self, settings: Settings, folder: StateFolder, *, automatic: bool) -> None:
        self._settings = settings
        self._folder = folder
        self._automatic = automatic
        self._ending = False
        self._store_fails = False
        self._moved = time.monotonic()
        folder.create()
        self._lock = self._take_lock()

    def run(self) -> None:
        """Work until told to stop, or, if automatic, until nothing is left to do."""
        with self._opened():
            self._work()
            os.close(self._lock)
            # A worker that saw the lock held a moment ago relies on us: look once more.
            while not self._ending and self._journals.has_news() and self._retake_lock():
                self._begin_reading()
                self._work()
                os.close(self._lock)

    def stop(self) -> None:
        """End after what is in flight; safe in a signal handler."""
        self._ending = True

    def _work(self) -> None:
        next_look = 0.0
        while not (self._ending or self._should_leave()):
            now = time.monotonic()
            if now >= next_look:
                next_look = now if self._take_in() else now + POLL
            if not self._ending and not self._delivery.step():
                self._delivery.wait(max(next_look - time.monotonic(), 0.001))
            if self._delivery.in_flight:
                self._moved = now
        self._delivery.stop(self._settings.exit_seconds)

    def _take_in(self) -> bool:
        """Journals into the outbox; whether there is more to take at once."""
        until_ns = time.monotonic_ns() - LATE_NS
        reading = self._journals.read(until_ns)
        if self._automatic and self._is_outdated():
            log.info("a worker wants a relay of another version or with other settings; this one ends")
            self._ending = True
            return False
        reports = self._judge(reading, until_ns)
        batch = Ingest(reports, list(self._playback.changed()), reading.places, self._counts(reading))
        if not (batch.reports or batch.viewings or batch.places or batch.counts):
            self._outbox.forget_journals(self._journals.remove_finished())
            return False
        try:
            self._outbox.ingest(batch)
        except OutboxError as error:
            self._say_store_fails(error)
            self._begin_reading()  # what was judged did not happen; it is read and judged again
            return False
        self._store_fails = False
        self._journals.taken(reading)
        self._outbox.forget_journals(self._journals.remove_finished())
        self._moved = time.monotonic()
        return reading.more

    def _judge(self, reading: Reading, now_ns: int) -> list[Report]:
        reports = []
        for fact in reading.facts:
            if isinstance(fact.what, Opening):
                reports += self._playback.opened(fact.writer, fact.what)
            else:
                reports += self._playback.closed(fact.writer, fact.what)
        reports += self._end_what_the_dead_left()
        return reports + self._playback.advance(now_ns, _wall_ms())

    def _end_what_the_dead_left(self) -> list[Report]:
        open_responses = list(self._playback.open_responses())
        dead = self._journals.dead_writers({writer for writer, _ in open_responses})
        reports = []
        for writer, number in open_responses:
            if writer in dead:
                reports += self._playback.lost(writer, number, time.monotonic_ns(), _wall_ms())
        return reports

    def _counts(self, reading: Reading) -> Counter[str]:
        counts = reading.counts + self._playback.counts
        self._playback.counts.clear()
        return counts

    def _should_leave(self) -> bool:
        if not self._automatic:
            return False
        if time.monotonic() - self._moved < LEAVE_AFTER or self._journals.has_live_writer():
            return False
        return self._journals.all_read() and not self._delivery.can_deliver()

    def _is_outdated(self) -> bool:
        """The newest-started live writer decides what relay is wanted."""
        writers = self._journals.live_writers()
        if not writers:
            return False
        newest = writers[-1]
        return newest.digest != self._settings.relay_digest() or _parts(newest.version) > _parts(VERSION)

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """The files and connections of a relay that holds the lock."""
        self._folder.unfinished.touch(mode=0o600)
        self._outbox = SQLiteOutbox(self._folder.outbox)
        client = AnalyticsClient(self._settings)
        try:
            self._outbox.recover_leases(self._settings.retry_ambiguous, _wall_ms())
            self._begin_reading()
            self._delivery = Delivery(
                self._outbox,
                client.send,
                retry_ambiguous=self._settings.retry_ambiguous,
                monotonic=time.monotonic,
                wall_ms=_wall_ms,
            )
            yield
            if not self._outbox.stats().waiting:
                self._folder.unfinished.unlink(missing_ok=True)
        finally:
            client.close()
            self._outbox.close()

    def _begin_reading(self) -> None:
        """Journals and playback as the outbox knows them."""
        self._journals = Journals(self._folder, self._outbox.places())
        self._playback = Playback()
        self._playback.restore(self._outbox.viewings())

    def _say_store_fails(self, error: OutboxError) -> None:
        if not self._store_fails:
            self._store_fails = True
            log.error(
                "the outbox can't be written (%s); what the workers write waits in their journals", error
            )

    def _take_lock(self) -> int:
        lock = hold_lock(self._folder.relay_lock)
        if lock is None:
            raise AnotherRelay
        holder = Holder(os.getpid(), VERSION, self._settings.relay_digest(), self._automatic)
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(holder._asdict()).encode(), 0)
        return lock

    def _retake_lock(self) -> bool:
        try:
            self._lock = self._take_lock()
        except AnotherRelay:
            return False
        self._moved = time.monotonic()
        return True


def run_relay(settings: Settings, *, automatic: bool) -> None:
    """A relay in this process until it is told to stop. Raises :class:`AnotherRelay`."""
    relay = Relay(settings, StateFolder(settings.state_path()), automatic=automatic)
    with _stopped_by_signals(relay.stop):
        relay.run()


@contextmanager
def _stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    def handler(number: int, frame: FrameType | None) -> None:
        stop()

    former = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, before in former.items():
            signal.signal(number, before)


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


def _parts(version: str) -> tuple[int, ...]:
    """A version's numbers, for comparing; what is no number counts as 0."""
    return tuple(int(part) if part.isdigit() else 0 for part in version.split("."))
