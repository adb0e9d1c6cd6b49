"""From the journals and the proxy's logs into the outbox: read, judged, and kept in one transaction with the offsets."""

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

#: How late a line may be, in ns: a worker that was put to sleep between taking the time and writing it.
LATE_NS = 250_000_000
MS = 1_000_000
#: Seconds between two looks for responses that dead workers left open.
CHECK_DEAD_EVERY = 1.0
#: Name of the note that says since when journals of another version wait.
FOREIGN_SINCE = "foreign_since"
#: How many lines of the proxy's log are odd changes all the time, and is not worth a line of ours.
_DIGITS = re.compile(r"\d+")


class _Poll(NamedTuple):
    """One look at the journals."""

    #: When, in ns since the epoch.
    wall_ns: int
    #: Bytes that it took from each journal at most.
    piece: int
    reading: Reading
    #: What became of it, once it is judged.
    batch: Ingest | None = None


class Intake:
    """What lies in *folder* and in the proxy's logs, on its way into *outbox*, within *limits*.

    Call :meth:`begin` first, then in turn :meth:`look`, :meth:`keep` and :meth:`tidy`; each of these but
    :meth:`look` raises :class:`~t23_middleware.relay.outbox.OutboxError` where the store fails, and is tried again.
    """

    def __init__(self, settings: Settings, folder: StateFolder, outbox: SQLiteOutbox, limits: Limits) -> None:
        self._settings = settings
        self._folder = folder
        self._outbox = outbox
        self._limits = limits
        self._kernel = Kernel(settings, folder)
        self._boot = boot_id()[:8]  # enough to tell one from the next, in each viewing that is kept
        self._dead_checked_at = 0.0
        self._minute = 0
        self._noted_awaiting = False
        self._proxy_problems: dict[str, str | None] = {}

    def begin(self) -> None:
        """Read on from where the outbox says."""
        #: What the outbox did not take yet, and the journals that are gone and that it still names.
        self._unstored: _Poll | None = None
        self._gone: list[str] = []
        self._foreign = self._folder.foreign_journals()
        self._foreign_since: dict[str, int] = json.loads(self._outbox.notes().get(FOREIGN_SINCE, "{}"))
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
        """Read on, unless the outbox did not take yet what was read last."""
        self._poll = self._unstored or self._read_sources()

    def store(self) -> bool:
        """Judge what was read and take it into the outbox; whether anything had happened.

        What the outbox refuses stays in hand, for nothing is judged twice.
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
        """Remove what is read to the end, and write down what pages read once a minute."""
        self._gone += self._journals.remove_finished()
        self._outbox.forget_journals(self._gone)
        self._gone = []
        self._check_foreign()
        self._folder.forget_leaving()
        self._begin_minute()

    def retry_with_smaller_pieces(self) -> None:
        """The outbox refused what is in hand: read and judge it again where less at once may find room."""
        if self._unstored and self._limits.piece_bytes < self._unstored.piece:
            self.begin()

    def conclude(self, *, streams: bool = True) -> bool:
        """Tell what the kernel knows now of what drains, and with *streams* of those that are not over, since nobody
        may be here when they are; whether there were any."""
        if self._unstored:  # the next relay judges that anew, and all that follows from it
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
        """Ask the kernel no more; what it told and was not judged waits in a journal for the next relay."""
        name = self._kernel.writer_name
        self._kernel.stop()
        if name:
            self._outbox.forget_journals(self._journals.remove_committed(name))

    def stop(self) -> None:
        """Ask the kernel no more, whatever happened."""
        self._kernel.stop()

    # What is known now.

    @property
    def read_at_ns(self) -> int:
        """When the last look was, in ns since the epoch."""
        return self._poll.wall_ns

    @property
    def has_more(self) -> bool:
        """Whether a backlog is left that can be read at once."""
        return self._poll.reading.more or self._join.has_more

    @property
    def has_unstored(self) -> bool:
        """Whether the outbox did not take yet what was read last."""
        return self._unstored is not None

    @property
    def awaiting_line(self) -> int:
        """Responses that only the proxy's line is missing of."""
        return self._playback.awaiting_line

    @property
    def draining(self) -> int:
        """Responses that only the client's kernel is not done with."""
        return len(self._playback.drains)

    def all_read(self) -> bool:
        """Whether nothing is written that was not taken."""
        return self._journals.all_read() and self._join.all_read

    def has_news(self, *, of_writers: bool) -> bool:
        """Whether anything was written that was not taken or, with *of_writers*, a writer lives."""
        return self._journals.has_news(of_writers=of_writers)

    def has_live_writer(self) -> bool:
        """Whether any writer lives."""
        return self._journals.has_live_writer()

    def newest_writer(self) -> Writer | None:
        """The newest-started live writer, if there is one."""
        writers = self._journals.live_writers()
        return writers[-1] if writers else None

    def orphaned_responses(self) -> list[tuple[str, int]]:
        """Writer and number of each open response that nobody will close."""
        open_responses = list(self._playback.open_responses())
        dead = self._journals.dead_writers({writer for writer, _ in open_responses})
        return [(writer, number) for writer, number in open_responses if writer in dead]

    def check_writers_now(self) -> None:
        """With the next look, however short ago that was done."""
        self._dead_checked_at = 0.0

    # How it is read and judged.

    def _make_join(self, rows: Mapping[str, str]) -> ProxyJoin:
        """The logs that are followed, as *rows* of the outbox know them."""
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
        """Time passes no further than *reading* tells: of a backlog's rest, nothing is known yet."""
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
        """Of what drains: all where the kernel can't be asked, and what workers that wait to end are done with."""
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
        """Writers whose connections can't be asked about, for they are in another network namespace."""
        network = self._kernel.network
        if network is None:
            return 0
        return sum(writer.network != network for writer in self._journals.live_writers())

    def _begin_minute(self) -> None:
        """The history's gauges, once a minute; pages tell by them when a relay ran."""
        now_ms = time.time_ns() // MS
        if now_ms // MINUTE_MS != self._minute:
            self._outbox.begin_minute(now_ms, len(list(self._playback.open_responses())))
            self._minute = now_ms // MINUTE_MS

    # What operators are told.

    def _check_foreign(self) -> None:
        """Journals of another version wait for its relay, for as long as reports may wait; each is told once."""
        self._drop_foreign()
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

    def _drop_foreign(self) -> None:
        known, elapsed_ms = self._foreign_since, self._limits.elapsed_ms
        self._foreign_since = {name: known.get(name, elapsed_ms) for name in self._journals.foreign()}
        if self._foreign_since != known:
            self._outbox.note({FOREIGN_SINCE: json.dumps(self._foreign_since)})
        before_ms = elapsed_ms - self._settings.max_age * 1000
        old = [name for name, since_ms in self._foreign_since.items() if since_ms < before_ms]
        if gone := self._journals.remove_foreign(old):
            log.error(
                "%s are given up: no relay of their version came for T23_MAX_AGE",
                ", ".join(gone),
                extra={"t23_event": "journals_given_up", "t23_count": len(gone)},
            )
            self._outbox.ingest(Ingest([], [], {}, {"journals_given_up": len(gone)}))

    def _log_proxy_problems(self) -> None:
        """Each change once."""
        for path, problem in self._join.problems().items():
            what = None if problem is None else _DIGITS.sub("", problem)
            former, self._proxy_problems[path] = self._proxy_problems.get(path), what
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
