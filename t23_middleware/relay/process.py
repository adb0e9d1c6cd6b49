"""The relay: one process per state folder that takes in the journals, decides, and delivers."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NamedTuple

from ..media import MediaTypes
from ..settings import Settings
from ..state import Holder, StateFolder, boot_id, hold_lock
from ..transfer import Opening, Progress
from ..version import VERSION
from .axis import Axis
from .bounds import Bounds, Reserve, taken_as_lost
from .client import AnalyticsClient
from .crash import crash_point
from .delivery import Delivery
from .health import AWAITED, AWAITED_SINCE, LAST_LINE, OPEN_RESPONSES
from .history import MINUTE_MS
from .journals import Fact, Journals, Reading
from .outbox import Ingest, OutboxCorrupt, OutboxError, OutboxFull, SQLiteOutbox, set_aside
from .playback import Playback
from .proxy_join import Logged, ProxyJoin
from .report import Report
from .watchdog import Watchdog

log = logging.getLogger(__name__)

#: Seconds between two looks at the journals.
POLL = 0.1
#: How late a line may be, in ns: a worker that was put to sleep between taking the time and writing it.
LATE_NS = 250_000_000
MS = 1_000_000
#: How many lines of the proxy's log are odd changes all the time, and is not worth a line of ours.
_WITHOUT_FIGURES = re.compile(r"\d+")
#: Seconds between two tries while the outbox can't be written.
TRY_STORE_AGAIN = 1.0
#: Seconds between two lines of the log that say so.
SAY_AGAIN_EVERY = 60.0
#: Seconds between two looks for responses that dead workers left open.
LOOK_FOR_DEAD_EVERY = 1.0
#: Seconds without anything to do before an automatic relay leaves.
LEAVE_AFTER = 1.0
#: The same while plays wait for the proxy's log. What the proxy still sends may take hours, so nobody stays for that:
#: the plays and the log's place are kept, and the relay that the app's next request starts reads on.
LEAVE_AWAITED_AFTER = 10.0


class AnotherRelay(Exception):
    """Another relay works on the folder."""


class _Look(NamedTuple):
    """One look at the journals."""

    #: When, in ns since the epoch.
    wall_ns: int
    #: Bytes that it took from each journal at most.
    piece: int
    reading: Reading
    #: What became of it, once it is judged.
    batch: Ingest | None = None


class Relay:
    """Works on *folder* while it holds the lock; raises :class:`AnotherRelay` where another one does."""

    def __init__(self, settings: Settings, folder: StateFolder, *, automatic: bool) -> None:
        self._settings = settings
        self._folder = folder
        self._automatic = automatic
        self._ending = False
        self._told_to_stop = False
        self._store_fails = False
        self._say_again = 0.0
        self._moved = time.monotonic()
        self._looked_for_dead = 0.0
        self._minute = 0
        #: What the outbox did not take yet, and the journals that are gone and that it still names.
        self._in_hand: _Look | None = None
        self._gone: list[str] = []
        self._foreign: dict[str, str] = {}
        self._boot = boot_id()[:8]  # enough to tell one from the next, in each viewing that is kept
        self.watchdog = Watchdog(settings.exit_seconds)
        self._told_awaited = False
        self._log_problems: dict[str, str | None] = {}
        folder.create()
        self._lock = self._take_lock()

    def run(self) -> None:
        """Work until told to stop, or, if automatic, until nothing is left to do."""
        mended = False
        while True:
            try:
                with self._opened():
                    return self._work_while_needed()
            except OutboxCorrupt as error:
                log.error("%s", error, extra={"t23_event": "outbox_corrupt"})
                if mended:  # it was opened again since, and what is wrong with it was not found
                    set_aside(self._folder.outbox, error)
                mended = not mended

    def _work_while_needed(self) -> None:
        self._work()
        # A worker that saw the lock held a moment ago relies on us: look once more.
        while not self._ending and self._journals.has_news() and self._retake_lock():
            self._work()

    def stop(self) -> None:
        """End after what is in flight; safe in a signal handler."""
        self._ending = self._told_to_stop = True

    def _work(self) -> None:
        """All that is done with the lock held, which is given up at the end."""
        self._begin()
        next_look = 0.0
        while not (self._ending or self._should_leave()):
            self.watchdog.came_round()
            now = time.monotonic()
            if now >= next_look:
                next_look = now + self._take_in()
            if not self._ending and not self._delivery.step():
                self._delivery.wait(max(next_look - time.monotonic(), 0.001))
            if self._delivery.in_flight:
                self._moved = now
        if self._told_to_stop and self._conclude():
            self._delivery.step()
        self._delivery.stop(self._settings.exit_seconds)
        self._say_whether_finished()
        os.close(self._lock)

    def _begin(self) -> None:
        with suppress(OSError):  # a full disk: the outbox says it
            self._folder.unfinished.touch(mode=0o600)
        self._outbox.recover_leases(self._settings.retry_ambiguous, _wall_ms())
        self._begin_reading()

    def _take_in(self) -> float:
        """Journals into the outbox; seconds until the next look."""
        if not self._keep_bounds():
            self._ending = self._ending or self._must_end()
            return TRY_STORE_AGAIN
        look = self._in_hand or self._look()
        if self._must_end():
            self._ending = True
            return 0.0
        try:
            self._keep(look)
            self._gone += self._journals.remove_finished()
            self._outbox.forget_journals(self._gone)
            self._gone = []
            self._note_foreign()
            self._begin_minute()
            if self._settings.ephemeral:
                self._say_delivered(look.wall_ns)
        except (OutboxError, OSError) as error:
            self._say_store_fails(error)
            if self._in_hand and self._bounds.piece < look.piece:
                self._begin_reading()  # read and judged again: less at once may find room
            return TRY_STORE_AGAIN
        self._store_fails = False
        return 0.0 if look.reading.more or self._join.has_more else POLL

    def _look(self) -> _Look:
        wall_ns, piece = time.time_ns(), self._bounds.piece
        self._join.look(time.monotonic_ns(), _wall_ms())
        self._say_log_problems()
        until_ns = self._join.until(time.monotonic_ns() - LATE_NS)
        return _Look(wall_ns, piece, self._journals.read(until_ns, piece))

    def _keep(self, look: _Look) -> None:
        """Judge it and take it into the outbox; what that refuses stays in hand, for nothing is judged twice."""
        batch = look.batch or self._batch(look.reading)
        if batch.reports or batch.viewings or batch.places or batch.counts or batch.losses or batch.proxy:
            self._in_hand = look._replace(batch=batch)
            self._bounds.ingest(batch)
            crash_point("after_ingest_commit")
            self._journals.taken(look.reading)
            self._join.taken()
        if batch.reports or batch.viewings or batch.places:
            self._moved = time.monotonic()
        self._in_hand = None

    def _batch(self, reading: Reading) -> Ingest:
        reports = self._judge(reading)
        counts = self._counts(reading)
        return Ingest(
            reports,
            list(self._playback.changed(self._axis())),
            reading.places,
            counts,
            self._notes(),
            losses=taken_as_lost(counts),
            proxy=self._join.changed(),
            at_ms=_wall_ms(),
        )

    def _keep_bounds(self) -> bool:
        """Whether there is room for more."""
        try:
            self._bounds.keep()
            if self._bounds.has_room():
                return True
            self._say_store_fails(OutboxFull("the disk is full"))
        except OutboxError as error:
            self._say_store_fails(error)
        return False

    def _say_delivered(self, until_ns: int) -> None:
        """Workers that end look at this file's time, and go when all that they wrote is delivered."""
        if not self._all_read() or self._playback.awaited:
            return
        if not self._delivery.in_flight and not self._outbox.hosts():
            self._folder.delivered.touch(mode=0o600)
            os.utime(self._folder.delivered, ns=(until_ns, until_ns))

    def _all_read(self) -> bool:
        return self._journals.all_read() and self._join.all_read

    def _judge(self, reading: Reading) -> list[Report]:
        """Time passes no further than *reading* tells: of a backlog's rest, nothing is known yet."""
        reports = []
        facts: list[Fact | Logged] = [*reading.facts, *self._join.due(reading.until_ns)]
        for fact in sorted(facts, key=lambda fact: fact.at_ns):
            if isinstance(fact, Logged):
                reports += self._join.judge(fact)
            elif isinstance(fact.what, Opening):
                reports += self._playback.opened(fact.writer, fact.what)
            elif isinstance(fact.what, Progress):
                self._playback.progressed(fact.writer, fact.what)
            else:
                reports += self._playback.closed(fact.writer, fact.what)
                reading.counts["declared"] += fact.what.declared
        reports += self._end_what_the_dead_left(reading.until_ns)
        reports += self._join.hold(reading.until_ns)
        passed_ms = (time.monotonic_ns() - reading.until_ns) // MS
        return reports + self._playback.advance(reading.until_ns, _wall_ms() - passed_ms)

    def _end_what_the_dead_left(self, at_ns: int) -> list[Report]:
        if time.monotonic() - self._looked_for_dead < LOOK_FOR_DEAD_EVERY:
            return []
        self._looked_for_dead = time.monotonic()
        reports = []
        for writer, number in self._left_by_the_dead():
            reports += self._playback.lost(writer, number, at_ns, _wall_ms())
        return reports

    def _left_by_the_dead(self) -> list[tuple[str, int]]:
        """Writer and number of each open response that nobody will close."""
        open_responses = list(self._playback.open_responses())
        dead = self._journals.dead_writers({writer for writer, _ in open_responses})
        return [(writer, number) for writer, number in open_responses if writer in dead]

    def _counts(self, reading: Reading) -> Counter[str]:
        counts = reading.counts + self._playback.counts + self._join.take_counts()
        self._playback.counts.clear()
        return counts

    def _notes(self) -> dict[str, str]:
        notes = {OPEN_RESPONSES: str(len(list(self._playback.open_responses())))}
        if self._settings.proxy_log or self._playback.awaited or self._told_awaited:
            self._told_awaited = self._playback.awaited > 0
            notes[AWAITED] = str(self._playback.awaited)
            notes[AWAITED_SINCE] = str(self._playback.awaited_since_ms or 0)
        if self._join.last_line_ms:
            notes[LAST_LINE] = str(self._join.last_line_ms)
        return notes

    def _note_foreign(self) -> None:
        """Journals of another version wait for its relay, for as long as reports may wait; each is told once."""
        if foreign := self._journals.foreign():
            before_s = time.time() - self._settings.max_age
            if gone := self._journals.give_up_foreign(before_s):
                log.error(
                    "%s are given up: no relay of their version came for T23_MAX_AGE",
                    ", ".join(gone),
                    extra={"t23_event": "journals_given_up", "t23_count": len(gone)},
                )
                self._outbox.ingest(Ingest([], [], {}, {"journals_given_up": len(gone)}))
                foreign = self._journals.foreign()
        if foreign == self._foreign:
            return
        for name in foreign.keys() - self._foreign.keys():
            log.warning(
                "%s is of another version (format %s); it waits for that one",
                name,
                foreign[name],
                extra={"t23_event": "journal_foreign", "t23_path": name},
            )
        with suppress(OSError):  # workers then start a relay for nothing, and that is all
            self._folder.keep_foreign_journals(foreign)
        self._foreign = foreign

    def _begin_minute(self) -> None:
        """The history's gauges, once a minute; pages tell by them when a relay ran."""
        now_ms = _wall_ms()
        if now_ms // MINUTE_MS != self._minute:
            self._outbox.begin_minute(now_ms, len(list(self._playback.open_responses())))
            self._minute = now_ms // MINUTE_MS

    def _should_leave(self) -> bool:
        if not self._automatic or self._in_hand:
            return False
        stays = LEAVE_AWAITED_AFTER if self._playback.awaited else LEAVE_AFTER
        if time.monotonic() - self._moved < stays or self._journals.has_live_writer():
            return False
        if not self._all_read() or self._left_by_the_dead() or self._delivery.can_deliver():
            return False
        return not self._conclude()

    def _conclude(self) -> bool:
        """Tell of the streams that are not over, since nobody may be here when they are; whether there were any."""
        if self._in_hand:  # the next relay judges that anew, and all that follows from it
            return False
        reports = self._playback.conclude(_wall_ms())
        try:
            if reports:
                self._bounds.ingest(Ingest(reports, list(self._playback.changed(self._axis())), {}, {}))
        except OutboxError as error:
            self._say_store_fails(error)
            return False
        self._moved = time.monotonic()
        return bool(reports)

    def _must_end(self) -> bool:
        """Whether the folder is, or should be, another relay's; looked at before anything is taken in."""
        if not self._holds_folder():
            log.error(
                "%s was removed or replaced; this relay ends. Leave the state folder alone while app or relay run",
                self._folder.relay_lock,
                extra={"t23_event": "relay_lock_removed", "t23_path": str(self._folder.relay_lock)},
            )
            return True
        if self._automatic and self._is_outdated():
            log.info(
                "a worker wants a relay of another version or with other settings; this one ends",
                extra={"t23_event": "relay_outdated"},
            )
            return True
        return False

    def _holds_folder(self) -> bool:
        """Whether our lock is still the one that others look at: somebody may have tidied up."""
        try:
            return os.path.samestat(self._folder.relay_lock.stat(), os.fstat(self._lock))
        except FileNotFoundError:
            return False

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
        reserve = Reserve(self._folder.reserve)
        self._outbox = SQLiteOutbox(self._folder.outbox, reserve.give_up)
        self._bounds = Bounds(
            self._outbox,
            self._folder,
            reserve,
            max_age=self._settings.max_age,
            max_bytes=self._settings.max_bytes,
        )
        client = AnalyticsClient(self._settings)
        self._delivery = Delivery(
            self._outbox,
            client.send,
            retry_ambiguous=self._settings.retry_ambiguous,
            monotonic=time.monotonic,
            wall_ms=_wall_ms,
            notes=self._outbox.notes(),
        )
        try:
            yield
        finally:
            client.close()
            self._outbox.close()

    def _say_whether_finished(self) -> None:
        """Still with the lock: the next relay's word must not be taken back."""
        try:
            if not self._outbox.stats().waiting and not self._playback.awaited:
                self._folder.unfinished.unlink(missing_ok=True)
        except OutboxError as error:
            self._say_store_fails(error)

    def _begin_reading(self) -> None:
        """Journals and playback as the outbox knows them."""
        self._in_hand, self._gone = None, []
        self._foreign = self._folder.foreign_journals()
        self._journals = Journals(self._folder, self._outbox.places())
        self._playback = Playback(
            per=self._settings.report_per,
            idle_s=self._settings.stream_idle,
            min_bytes=self._settings.min_bytes,
            proxy_wait_s=self._settings.proxy_wait,
            counts_type=MediaTypes(self._settings.media_types).counts,
        )
        self._playback.restore(self._outbox.viewings(), self._axis(), time.monotonic_ns())
        self._join = self._joining(self._outbox.proxy_rows())

    def _joining(self, rows: Mapping[str, str]) -> ProxyJoin:
        """The logs that are followed, as *rows* of the outbox know them."""
        return ProxyJoin(self._settings.proxy_log, self._playback, rows, time.monotonic_ns(), _wall_ms())

    def _axis(self) -> Axis:
        return self._boot, time.time_ns() - time.monotonic_ns()

    def _say_log_problems(self) -> None:
        """Each change once."""
        for path, problem in self._join.problems().items():
            what = None if problem is None else _WITHOUT_FIGURES.sub("", problem)
            former, self._log_problems[path] = self._log_problems.get(path), what
            if problem is not None and what != former:
                log.error(
                    "%s. Until then plays wait for their lines, for T23_PROXY_WAIT at most",
                    problem,
                    extra={"t23_event": "proxy_log_unreadable", "t23_path": path},
                )
            elif problem is None and former is not None:
                log.warning(
                    "%s can be read again", path, extra={"t23_event": "proxy_log_readable", "t23_path": path}
                )

    def _say_store_fails(self, error: OutboxError | OSError) -> None:
        new, self._store_fails = not self._store_fails, True
        # On a disk that is almost full some of it can be written.
        if new and time.monotonic() >= self._say_again:
            self._say_again = time.monotonic() + SAY_AGAIN_EVERY
            log.error(
                "%s; until it can be written, what the workers write waits in their journals",
                error,
                extra={"t23_event": "outbox_unwritable", "t23_reason": str(error)},
            )

    def _take_lock(self) -> int:
        lock = hold_lock(self._folder.relay_lock)
        if lock is None:
            raise AnotherRelay
        holder = Holder(os.getpid(), VERSION, self._settings.relay_digest(), self._automatic)
        text = json.dumps(holder._asdict()).encode()
        with suppress(OSError):  # a full disk: workers then know less of us, and that is all
            os.pwrite(lock, text, 0)
            os.ftruncate(lock, len(text))
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
    os.umask(0o077)
    relay = Relay(settings, StateFolder(settings.state_path()), automatic=automatic)
    with relay.watchdog.watching(), stopped_by_signals(relay.stop):
        relay.run()


@contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT call *stop* meanwhile."""

    def handler(number: int, frame: FrameType | None) -> None:
        stop()

    # uWSGI blocks signals in its threads, and a relay that one of them starts would inherit that.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
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
