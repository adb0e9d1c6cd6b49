"""Intake: reads the journals and the proxy's logs, lets the playback machine decide, and stores the reports.

The reports and the offsets of what was read are stored in one transaction.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

from ..media import MediaTypes
from ..settings import Settings
from ..state import StateFolder, boot_id
from ..transfer import Acknowledged, Opening, Progress, Writer
from .axis import BootClock
from .bounds import Limits, take_losses
from .crash import crash_point
from .health import ACKED, AWAITED, AWAITED_SINCE, DRAINING, ELSEWHERE, LAST_LINE, OPEN_RESPONSES
from .history import MINUTE_MS
from .journals import Fact, Journals, Reading
from .kernel import Kernel
from .outbox import Ingest, SQLiteOutbox
from .playback import Playback
from .proxy_join import LoggedLine, ProxyJoin
from .report import Report

log = logging.getLogger(__name__)

#: How late a line may be, in ns: a worker may be suspended between taking the time and writing the line.
LATE_NS = 250_000_000
MS = 1_000_000
#: Seconds between two checks for responses that dead workers left open.
CHECK_DEAD_EVERY = 1.0
#: Name of the note with the times since when journals of another version wait.
FOREIGN_SINCE = "foreign_since"
#: A problem whose figures alone changed is not logged again.
_DIGITS = re.compile(r"\d+")


class _Poll(NamedTuple):
    """The result of one poll of the journals."""

    #: Its time, in ns since the epoch.
    wall_ns: int
    #: Most bytes that it read from each journal.
    piece: int
    reading: Reading
    #: The batch that was made of it, if any yet.
    batch: Ingest | None = None


class Intake:
    """Moves what the workers wrote to *folder*, and the proxy's logs, into *outbox*, within *limits*.

    Call :meth:`begin` first, then in turn :meth:`read`, :meth:`store` and :meth:`clean_up`. All but :meth:`read` raise
    :class:`~t23_middleware.relay.outbox.OutboxError` if the outbox fails; call them again then.
    """

    def __init__(self, settings: Settings, folder: StateFolder, outbox: SQLiteOutbox, limits: Limits) -> None:
        self._settings = settings
        self._folder = folder
        self._outbox = outbox
        self._limits = limits
        self._kernel = Kernel(settings, folder)
        self._boot = boot_id()[:8]  # short, since each session state stores it
        self._dead_checked_at = 0.0
        self._minute = 0
        self._noted_awaiting = False
        self._proxy_problems: dict[str, str | None] = {}

    def begin(self) -> None:
        """Start from the offsets and the state in the outbox."""
        #: The poll that the outbox has not stored yet, and removed journals whose offsets it still has.
        self._unstored: _Poll | None = None
        self._gone: list[str] = []
        self._foreign = self._folder.foreign_journals()
        self._foreign_since: dict[str, int] = _read_since(self._outbox.notes().get(FOREIGN_SINCE, "{}"))
        self._playback = Playback(
            per=self._settings.report_per,
            idle_s=self._settings.stream_idle,
            min_bytes=self._settings.min_bytes,
            proxy_wait_s=self._settings.proxy_wait,
            counts_type=MediaTypes(self._settings.media_types).counts,
            drain_wait_s=self._settings.drain_wait,
        )
        self._playback.restore(self._outbox.viewings(), self._clock(), time.monotonic_ns())
        self._kernel.begin(self._playback.drains)
        self._journals = Journals(
            self._folder,
            self._outbox.offsets(),
            own_writer=lambda: self._kernel.writer_name,
            network=self._kernel.network,
        )
        self._join = self._make_join(self._outbox.proxy_rows())

    def read(self) -> None:
        """Read the next lines, unless the previous ones are not stored yet."""
        self._poll = self._unstored or self._read_sources()

    def store(self) -> bool:
        """Judge what was read and store it in the outbox. Returns whether there was anything.

        A batch that the outbox refuses is kept for the next call, since nothing may be judged twice.
        """
        batch = self._poll.batch or self._batch(self._poll.reading)
        if batch.reports or batch.viewings or batch.offsets or batch.counts or batch.losses or batch.proxy:
            self._unstored = self._poll._replace(batch=batch)
            self._limits.ingest(batch)
            crash_point("after_ingest_commit")
            self._journals.committed(self._poll.reading)
            self._join.committed()
        self._unstored = None
        return bool(batch.reports or batch.viewings or batch.offsets)

    def clean_up(self) -> None:
        """Remove journals that are read to the end, and write the history's gauges once a minute."""
        self._gone += self._journals.remove_finished()
        self._outbox.forget_journals(self._gone)
        self._gone = []
        self._check_foreign()
        self._folder.remove_old_leaving()
        self._begin_minute()

    def retry_with_smaller_pieces(self) -> None:
        """The outbox refused a batch: read and judge again if smaller pieces may fit."""
        if self._unstored and self._limits.piece_bytes < self._unstored.piece:
            self.begin()

    def conclude(self, *, streams: bool = True) -> bool:
        """Report the draining responses with the kernel's current counts; with *streams*, report open streams too.

        Returns whether there were any. The relay ends, so that it could not report them later.
        """
        if self._unstored:  # the next relay judges it again, and everything after it
            return False
        self._kernel.poll(now=True)
        reports = self._playback.conclude(time.time_ns() // MS) if streams else self._playback.end_draining()
        changed = list(self._playback.changed(self._clock()))
        if changed:
            counts = dict(self._playback.counts)
            self._limits.ingest(Ingest(reports, changed, {}, counts, self._notes()))
            self._playback.counts.clear()
        return bool(reports)

    def end(self) -> None:
        """Stop polling the kernel. Its events that were not judged wait in a journal for the next relay."""
        name = self._kernel.writer_name
        self._kernel.stop()
        if name:
            self._outbox.forget_journals(self._journals.remove_committed(name))

    def stop(self) -> None:
        """Stop polling the kernel, also after an error."""
        self._kernel.stop()

    # State.

    @property
    def read_at_ns(self) -> int:
        """Time of the latest poll, in ns since the epoch."""
        return self._poll.wall_ns

    @property
    def has_more(self) -> bool:
        """Whether a backlog is left that can be read at once."""
        return self._poll.reading.more or self._join.has_more

    @property
    def has_unstored(self) -> bool:
        """Whether the outbox has not stored the latest poll yet."""
        return self._unstored is not None

    @property
    def awaiting_line(self) -> int:
        """Number of responses that wait for the proxy's line."""
        return self._playback.awaiting_line

    @property
    def draining(self) -> int:
        """Number of responses that wait for the client's kernel."""
        return len(self._playback.drains)

    def all_read(self) -> bool:
        """Whether everything that was written is stored."""
        return self._journals.all_read() and self._join.all_read

    def has_news(self, *, of_writers: bool) -> bool:
        """Whether there are unread lines or, with *of_writers*, a live writer."""
        return self._journals.has_news(of_writers=of_writers)

    def has_live_writer(self) -> bool:
        """Whether there is a live writer."""
        return self._journals.has_live_writer()

    def newest_writer(self) -> Writer | None:
        """The live writer that started last, if any."""
        writers = self._journals.live_writers()
        return writers[-1] if writers else None

    def orphaned_responses(self) -> list[tuple[str, int]]:
        """Writer and number of each open response whose writer died."""
        open_responses = list(self._playback.open_responses())
        dead = self._journals.dead_writers({writer for writer, _ in open_responses})
        return [(writer, number) for writer, number in open_responses if writer in dead]

    def check_writers_now(self) -> None:
        """Check for dead writers at the next poll, without the usual pause."""
        self._dead_checked_at = 0.0

    # Reading and judging.

    def _make_join(self, rows: Mapping[str, str]) -> ProxyJoin:
        """The followed logs, continued from *rows* of the outbox."""
        now_ns, now_ms = time.monotonic_ns(), time.time_ns() // MS
        return ProxyJoin(self._settings.proxy_log, self._playback, rows, now_ns, now_ms)

    def _clock(self) -> BootClock:
        return self._boot, time.time_ns() - time.monotonic_ns()

    def _read_sources(self) -> _Poll:
        wall_ns, piece = time.time_ns(), self._limits.piece_bytes
        self._join.read(time.monotonic_ns(), wall_ns // MS)
        self._log_proxy_problems()
        self._kernel.poll()
        until_ns = self._join.until(time.monotonic_ns() - LATE_NS)
        return _Poll(wall_ns, piece, self._journals.read(until_ns, piece))

    def _batch(self, reading: Reading) -> Ingest:
        reports = self._judge(reading)
        counts = self._counts(reading)
        return Ingest(
            reports,
            list(self._playback.changed(self._clock())),
            reading.offsets,
            counts,
            self._notes(),
            losses=take_losses(counts),
            proxy=self._join.changed(),
            at_ms=time.time_ns() // MS,
            since_ms=self._limits.elapsed_ms,
        )

    def _judge(self, reading: Reading) -> list[Report]:
        """Reports for *reading*. Time passes only as far as *reading* reaches: the rest of a backlog is unknown."""
        reports = []
        facts: list[Fact | LoggedLine] = [*reading.facts, *self._join.due(reading.until_ns)]
        for fact in sorted(facts, key=lambda fact: fact.at_ns):
            if isinstance(fact, LoggedLine):
                reports += self._join.judge(fact)
            elif isinstance(fact.event, Opening):
                reports += self._playback.opened(fact.writer, fact.event)
            elif isinstance(fact.event, Progress):
                self._playback.progressed(fact.writer, fact.event)
            elif isinstance(fact.event, Acknowledged):
                reports += self._playback.acknowledged(fact.event)
            else:
                reports += self._playback.closed(fact.writer, fact.event)
                reading.counts["declared"] += fact.event.declared
        reports += self._end_orphaned(reading.until_ns)
        reports += self._end_unneeded_drains()
        reports += self._join.retry_unmatched(reading.until_ns)
        passed_ns = time.monotonic_ns() - reading.until_ns
        return reports + self._playback.advance(reading.until_ns, (time.time_ns() - passed_ns) // MS)

    def _end_orphaned(self, at_ns: int) -> list[Report]:
        if time.monotonic() - self._dead_checked_at < CHECK_DEAD_EVERY:
            return []
        self._dead_checked_at = time.monotonic()
        reports = []
        for writer, number in self.orphaned_responses():
            reports += self._playback.writer_died(writer, number, at_ns, time.time_ns() // MS)
        return reports

    def _end_unneeded_drains(self) -> list[Report]:
        """End draining responses early: all if the kernel can't be asked, else those of workers that wait to exit."""
        drains = self._playback.drains
        if self._kernel.network is None:
            return self._playback.end_draining()
        if not (self._settings.ephemeral and drains and (leaving := self._folder.leaving_workers())):
            return []
        ids = [
            id for id in drains.ids() if drains.since_ms(id) * MS <= leaving.get(id[0].partition("-")[0], 0)
        ]
        if ids:
            self._kernel.poll(now=True)
        return self._playback.end_draining(ids)

    def _counts(self, reading: Reading) -> Counter[str]:
        counts = reading.counts + self._playback.counts + self._join.take_counts()
        self._playback.counts.clear()
        return counts

    def _notes(self) -> dict[str, str]:
        notes = {OPEN_RESPONSES: str(len(list(self._playback.open_responses())))}
        notes[DRAINING] = str(self.draining)
        notes[ACKED] = self._kernel.problem
        notes[ELSEWHERE] = str(self._writers_elsewhere())
        if self._settings.proxy_log or self.awaiting_line or self._noted_awaiting:
            self._noted_awaiting = self.awaiting_line > 0
            notes[AWAITED] = str(self.awaiting_line)
            notes[AWAITED_SINCE] = str(self._playback.awaiting_line_since_ms or 0)
        if self._join.last_line_ms:
            notes[LAST_LINE] = str(self._join.last_line_ms)
        return notes

    def _writers_elsewhere(self) -> int:
        """Number of writers whose connections are in another network namespace, where they can't be asked about."""
        network = self._kernel.network
        if network is None:
            return 0
        return sum(writer.network != network for writer in self._journals.live_writers())

    def _begin_minute(self) -> None:
        """Write the history's gauges once a minute; pages also use them to see when a relay ran."""
        now_ms = time.time_ns() // MS
        if now_ms // MINUTE_MS != self._minute:
            self._outbox.begin_minute(now_ms, len(list(self._playback.open_responses())))
            self._minute = now_ms // MINUTE_MS

    # Log lines.

    def _check_foreign(self) -> None:
        """Log each journal of another version once. It waits for that version's relay, up to ``T23_MAX_AGE``."""
        self._drop_foreign()
        foreign = self._journals.foreign()
        if foreign == self._foreign:
            return
        for name in foreign.keys() - self._foreign.keys():
            log.warning(
                "%s was written by another version (format %s) and is left for that version's relay",
                name,
                foreign[name],
                extra={"t23_event": "journal_foreign", "t23_path": name},
            )
        with suppress(OSError):  # then workers start a relay without need, which is harmless
            self._folder.write_foreign_journals(foreign)
        self._foreign = foreign

    def _drop_foreign(self) -> None:
        known, elapsed_ms = self._foreign_since, self._limits.elapsed_ms
        self._foreign_since = {name: known.get(name, elapsed_ms) for name in self._journals.foreign()}
        if self._foreign_since != known:
            self._outbox.note({FOREIGN_SINCE: json.dumps(self._foreign_since)})
        before_ms = elapsed_ms - self._settings.max_age * 1000
        old = [name for name, since_ms in self._foreign_since.items() if since_ms < before_ms]
        if gone := self._journals.remove_foreign(old):
            log.error(
                "%s were removed: no relay of their version read them within T23_MAX_AGE",
                ", ".join(gone),
                extra={"t23_event": "journals_given_up", "t23_count": len(gone)},
            )
            self._outbox.ingest(Ingest([], [], {}, {"journals_given_up": len(gone)}))

    def _log_proxy_problems(self) -> None:
        """Log each change once."""
        for path, problem in self._join.problems().items():
            what = None if problem is None else _DIGITS.sub("", problem)
            former, self._proxy_problems[path] = self._proxy_problems.get(path), what
            if problem is not None and what != former:
                log.error(
                    "%s. Until then plays wait for their lines, up to T23_PROXY_WAIT",
                    problem,
                    extra={"t23_event": "proxy_log_unreadable", "t23_path": path},
                )
            elif problem is None and former is not None:
                log.warning(
                    "%s can be read again", path, extra={"t23_event": "proxy_log_readable", "t23_path": path}
                )


def _read_since(note: str) -> dict[str, int]:
    """The times in the note :data:`FOREIGN_SINCE`; none if it is damaged, so that they start again."""
    try:
        return {name: int(since_ms) for name, since_ms in json.loads(note).items()}
    except (ValueError, TypeError, AttributeError, OverflowError):
        return {}
