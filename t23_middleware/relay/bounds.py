"""The limits of waiting reports, dead letters and journals: age, size, and room on the disk.

Dropped reports are counted by day and reason, with their bytes, in the transaction that drops them, so that
captured = waiting + sent + dead + lost holds at any time. Order: old dead letters, too old reports, the oldest reports.
"""

from __future__ import annotations

import logging
import os
import resource
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .. import owned
from ..state import StateFolder
from ..transfer import LONGEST_LINE
from .elapsed import Elapsed
from .journals import PIECE
from .outbox import LONG_LOG, EarlyLoss, Ingest, OutboxError, OutboxFull, SQLiteOutbox, readers
from .report import CLOCK_SET_MS

log = logging.getLogger(__name__)

#: Seconds between two checks.
CHECK_EVERY = 1.0
#: Seconds between two checks of the ages of all reports, or a hundredth of ``T23_MAX_AGE`` if that is less.
CHECK_AGE_EVERY = 60.0
#: Most reports that are dropped in one transaction: more would delay delivery.
MOST_AT_ONCE = 2000
#: Approximate bytes of a report in the outbox, without its viewing.
REPORT_BYTES = 128
#: Share of ``T23_MAX_BYTES`` that reports may always use: viewings and history need room too.
LEAST_SHARE = 4
#: Most dead letters, and how long they are kept, in ms.
MOST_DEAD = 10_000
DEAD_MS = 30 * 86_400_000
#: Most bytes in the journals while the outbox can't be written.
MOST_UNREAD = 64 << 20
#: Below this many free bytes the disk is nearly full; on a small disk, a share of its size. The last part of that is
#: reserved for journals and acknowledgements.
LOW_WATER, LOW_SHARE, LAST_SHARE = 64 << 20, 16, 64
#: Bytes that are read from a journal at once while the disk is nearly full: a transaction is first written to the
#: write-ahead log, where many small ones need less room than a large one.
SMALL_PIECE = 2 * LONGEST_LINE
#: The outbox must be able to grow by this many bytes for pieces of the usual size, one per journal.
USUAL_GROWTH = 16 << 20
#: Bytes that must be free in the outbox's file, or on its disk, before journals are read.
LEAST_ROOM = 64 << 10
#: Size of the reserve, in bytes.
RESERVE = 512 << 10
#: Seconds after a failed write before the outbox may grow again.
RETRY_FULL_EVERY = 10.0
#: Free pages that the outbox's file keeps as its own room; on a small disk, a share of its size.
FREE_PAGES, FREE_SHARE = 256, 1 << 18
#: Pages that it returns to the disk at once, and how many if the disk is nearly full: each may need room in the log.
SHRINK_PAGES, SMALL_SHRINK_PAGES = 1024, 64
#: From this size of the write-ahead log, in bytes, only acknowledgements are written; with a small ``T23_MAX_BYTES``,
#: a share of that.
MOST_LOG, MOST_LOG_SHARE = 64 << 20, 4
#: Seconds for which the log must be long to mean a reader, not one large transaction.
LONG_FOR = 2.0
#: Bytes of the log at which transactions are a second apart, and the longest pause between them, in seconds.
LOG_FOR_A_SECOND, LONGEST_REST = 8 << 20, 30.0
#: Seconds between two log lines with the same reason.
LOG_EVERY = 3600.0

_WHY = {
    "too_old": "they waited longer than T23_MAX_AGE",
    "outbox_full": "the outbox is larger than T23_MAX_BYTES",
    "journals_full": "the outbox can't be written, and the journals have more than 64 MiB",
    "dead_too_old": "the API refused them over 30 days ago; see 't23-middleware dead'",
    "dead_full": f"the API refused over {MOST_DEAD} reports; see 't23-middleware dead list'",
}


class DiskSpace(NamedTuple):
    """Room on a disk, in bytes."""

    free: int
    size: int

    @property
    def low_water(self) -> int:
        """Below this many free bytes, the disk is nearly full."""
        return min(LOW_WATER, self.size // LOW_SHARE)

    @property
    def growth(self) -> int:
        """Bytes by which the outbox may grow in one transaction.

        Half of the free bytes, since the write-ahead log needs as many: a log that can't be checkpointed would leave no
        room for acknowledgements.
        """
        return max(self.free - self.low_water // LAST_SHARE, 0) // 2


def space_at(path: Path) -> DiskSpace:
    """The room on the disk of *path*. Raises :class:`OSError`."""
    found = os.statvfs(path)
    free = found.f_bfree if os.geteuid() == 0 else found.f_bavail
    return DiskSpace(free * found.f_frsize, found.f_blocks * found.f_frsize)


class Reserve:
    """A file that reserves room: when the disk is full it is removed, so that acknowledgements can be written.

    Without it SQLite could not even delete on a full disk, and sent reports would be sent again. *mark* is an empty
    file that stays when the reserve is removed: a worker that meets a quota removes the reserve too, and workers write
    nothing until it is back.
    """

    def __init__(self, path: Path, mark: Path) -> None:
        self._path = path
        self._new = path.with_suffix(".new")
        self._mark = mark
        self._released = False

    def release(self) -> bool:
        """Remove it. Returns whether it existed."""
        try:
            if not owned.remove(self._path):
                return False
        except OSError:
            return False
        self._released = True
        log.error(
            "the disk is full: the reserve %s was removed to make room for acknowledgements; free the disk",
            self._path,
            extra={"t23_event": "disk_full", "t23_path": str(self._path)},
        )
        return True

    @property
    def is_released(self) -> bool:
        """Whether it was removed and not made again since: then the disk is full, whatever its free space is."""
        if not self._released:  # not Path.exists(), which raises an error if the folder can't be read
            self._released = os.access(self._mark, os.F_OK) and not os.access(self._path, os.F_OK)
        return self._released

    def ensure(self, space: DiskSpace, *, something_waits: bool = False) -> None:
        """Create it if it is missing and there is room.

        After a full disk the room is tested by writing, since a quota may allow less than the disk has. With
        *something_waits* twice the size is tested, since workers then write as well.
        """
        if self._is_there():
            return
        was_released = self.is_released
        if space.free < space.low_water + RESERVE:
            with suppress(OSError):
                self._mark.unlink()  # the disk itself has too little room, not a quota: workers may write
            return
        try:
            self._write(RESERVE * 2 if was_released and something_waits else RESERVE)
            self._mark.touch(mode=0o600)
            self._new.replace(self._path)  # not earlier: workers write as soon as it exists
        except OSError:
            with suppress(OSError):
                owned.remove(self._new)
            return
        if was_released:
            self._released = False
            log.warning("there is room on the disk again", extra={"t23_event": "disk_free"})

    def _is_there(self) -> bool:
        try:
            return owned.lstat(self._path).st_size == RESERVE
        except OSError:
            return False

    def _write(self, size: int) -> None:
        descriptor = owned.open_file(self._new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            left = memoryview(os.urandom(size))  # zeros need no room on a disk that compresses
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)  # some file systems report a full disk only here
            os.ftruncate(descriptor, RESERVE)
        finally:
            os.close(descriptor)


class Limits:
    """Keeps *outbox* and the journals in *folder* within limits.

    *max_age* is in seconds, *max_bytes* in bytes; *monotonic* is a clock in seconds, *wall_ms* one in ms since the
    epoch; *space* returns the room on the folder's disk. Ages are times of *elapsed*, which starts now by default.
    """

    def __init__(
        self,
        outbox: SQLiteOutbox,
        folder: StateFolder,
        reserve: Reserve,
        *,
        max_age: float,
        max_bytes: int,
        monotonic: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        space: Callable[[Path], DiskSpace] = space_at,
        elapsed: Elapsed | None = None,
    ) -> None:
        self._outbox = outbox
        self._folder = folder
        self._reserve = reserve
        self._max_age_ms = int(max_age * 1000)
        self._max_bytes = max_bytes
        self._age_every = min(max_age / 100, CHECK_AGE_EVERY)
        self._monotonic = monotonic
        self._wall_ms = wall_ms
        self._space_at = space
        self._elapsed = elapsed or Elapsed({}, "", monotonic)
        self._check_at = self._check_age_at = self._try_reserve_at = self._full_until = float("-inf")
        self._logged_at: dict[str, float] = {}
        self._shift_ms: int | None = None
        self._log_is_long_since: float | None = None
        self._logged_long = False

    def enforce(self) -> None:
        """Drop what is over the limits, up to ``MOST_AT_ONCE`` per call and kind. Raises :class:`OutboxError`."""
        now = self._monotonic()
        if now < self._check_at:
            return
        self._check_at = now + CHECK_EVERY
        space = self._space()
        if now >= self._try_reserve_at:
            self._reserve.ensure(self._reported_space(), something_waits=bool(self._outbox.hosts()))
            self._try_reserve_at = now + (RETRY_FULL_EVERY if self._reserve.is_released else 0)
        full = self._drop_old(now) >= MOST_AT_ONCE
        if self._drop_excess() or full:
            self._check_at = now  # there may be more
        else:
            self._shrink(space)

    @property
    def elapsed_ms(self) -> int:
        """The current time of the clock for ages, in ms."""
        return self._elapsed.now_ms()

    @property
    def piece_bytes(self) -> int:
        """Bytes to read from a journal at once."""
        return PIECE if self._space().growth >= USUAL_GROWTH else SMALL_PIECE

    def has_room(self) -> bool:
        """Whether to try an :meth:`ingest`. One that fails costs time, since everything is judged again.

        Always true if no report waits that this would delay, and if the journals are full, since their oldest lines
        must then be dropped. Raises :class:`OutboxError`.
        """
        log_size = self._outbox.log_size()
        if self.log_is_full or (log_size > LONG_LOG and log_size + self._outbox.size() > self._max_bytes):
            return self._unread() > MOST_UNREAD
        growth = self._space().growth
        if growth >= LEAST_ROOM or growth + self._outbox.free() >= LEAST_ROOM:
            return True
        return not self._outbox.hosts() or self._unread() > MOST_UNREAD

    @property
    def log_is_full(self) -> bool:
        """Whether a reader has made the write-ahead log so long that nothing more should be written."""
        return self._outbox.log_size() > min(MOST_LOG, self._max_bytes // MOST_LOG_SHARE + LONG_LOG)

    def pause_seconds(self) -> float:
        """Seconds to wait before the next transaction: while a reader blocks checkpoints, each makes the log longer."""
        size, now = self._outbox.log_size(), self._monotonic()
        if size <= LONG_LOG:
            if self._logged_long:
                log.warning("the outbox's log is short again", extra={"t23_event": "log_short"})
            self._log_is_long_since, self._logged_long = None, False
            return 0.0
        self._log_is_long_since = self._log_is_long_since or now
        if now < self._log_is_long_since + LONG_FOR:
            return 0.0
        self._log_long(size)
        return min((size / LOG_FOR_A_SECOND) ** 2, LONGEST_REST)

    def _log_long(self, size: int) -> None:
        if self._logged_long:
            return
        self._logged_long = True
        who = ", ".join(readers(self._folder.outbox)) or "a process that can't be seen from here"
        log.error(
            "%s keeps the outbox open for reading, so its log (%s-wal, %d MiB) can't be reused: stop that process."
            " Until then delivery is slower, and stops from %d MiB on",
            who,
            self._folder.outbox,
            size >> 20,
            MOST_LOG >> 20,
            extra={"t23_event": "log_long", "t23_reason": who, "t23_path": f"{self._folder.outbox}-wal"},
        )

    def ingest(self, batch: Ingest) -> None:
        """Store *batch*. Raises :class:`OutboxError` if the disk has too little room.

        If no report waits, the reserve may be used for it, since there is nothing to acknowledge. Once the journals are
        full, the batch's reports are dropped instead: they are the oldest that are not in the outbox.
        """
        batch = self._dated(batch)
        if batch.since_ms is None:
            batch = batch._replace(since_ms=self._elapsed.now_ms())
        growth = self._space().growth
        try:
            with self._outbox.growing_by(growth, may_make_room=not self._outbox.hosts()):
                self._outbox.ingest(batch)
        except OutboxError as error:
            if isinstance(error, OutboxFull) and growth >= USUAL_GROWTH:
                self._full_until = self._monotonic() + RETRY_FULL_EVERY
            if self._unread() <= MOST_UNREAD:
                raise
            self._outbox.ingest(batch._replace(lost_as="journals_full", at_ms=self._wall_ms()))
            self._log_dropped("journals_full", len(batch.reports))

    def _shrink(self, space: DiskSpace) -> None:
        most = SHRINK_PAGES if space.free >= space.low_water else SMALL_SHRINK_PAGES
        with suppress(OutboxFull):
            if self._outbox.shrink(min(FREE_PAGES, space.size // FREE_SHARE), most):
                self._check_at = self._monotonic()

    def _dated(self, batch: Ingest) -> Ingest:
        """*batch* with new times for reports from before the host's clock was set: the time of their storing."""
        undated = [report.time_ms for report in batch.reports if report.time_ms < CLOCK_SET_MS]
        if not undated or self._wall_ms() < CLOCK_SET_MS:
            return batch
        shift = self._shift(max(undated))
        dated = (
            report._replace(time_ms=report.time_ms + shift) if report.time_ms < CLOCK_SET_MS else report
            for report in batch.reports
        )
        return batch._replace(reports=list(dated))

    def _date_waiting(self) -> None:
        """The same for waiting reports that were stored before the clock was set."""
        if self._wall_ms() >= CLOCK_SET_MS and (latest := self._outbox.latest_undated()) is not None:
            self._outbox.date(self._shift(latest))

    def _shift(self, latest_ms: int) -> int:
        """The shift in ms; one for all reports, so that times of the same session and video stay different."""
        if self._shift_ms is None:
            self._shift_ms = self._wall_ms() - latest_ms
        return self._shift_ms

    def _drop_old(self, now: float) -> int:
        """Drop too old reports and dead letters. This reads all of them, so it is not done at every check."""
        if now < self._check_age_at:
            return 0
        self._date_waiting()
        outbox, elapsed_ms = self._outbox, self._elapsed.now_ms()
        outbox.note(self._elapsed.note())
        outbox.start_ages(elapsed_ms)
        dropped = [
            self._drop("dead_too_old", outbox.drop_dead_older, elapsed_ms - DEAD_MS, MOST_AT_ONCE),
            self._drop("dead_full", outbox.drop_oldest_dead, MOST_AT_ONCE, MOST_DEAD),
            self._drop("too_old", outbox.drop_older, elapsed_ms - self._max_age_ms, MOST_AT_ONCE),
        ]
        self._check_age_at = now + (0 if max(dropped) >= MOST_AT_ONCE else self._age_every)
        return sum(dropped)

    def _drop_excess(self) -> int:
        over = self._outbox.size() - self._max_bytes
        if over <= 0:
            return 0
        most = min(over // REPORT_BYTES + 1, MOST_AT_ONCE)
        kept = self._max_bytes // LEAST_SHARE // REPORT_BYTES
        return self._drop("outbox_full", self._outbox.drop_oldest, most, kept)

    def _drop(self, reason: str, lose: Callable[[int, int, str, int], int], first: int, second: int) -> int:
        dropped = lose(first, second, reason, self._wall_ms())
        self._log_dropped(reason, dropped)
        return dropped

    def _log_dropped(self, reason: str, dropped: int) -> None:
        now = self._monotonic()
        if dropped and now >= self._logged_at.get(reason, float("-inf")) + LOG_EVERY:
            self._logged_at[reason] = now
            log.error(
                "reports are dropped and counted as lost (%s): %s",
                reason,
                _WHY[reason],
                extra={"t23_event": "reports_lost", "t23_reason": reason, "t23_count": dropped},
            )

    def _space(self) -> DiskSpace:
        """The usable room: none after a failed write, whatever the disk reports (a quota, a limit on file size).

        If no report waits, a little is tried, since no acknowledgement needs the room.
        """
        space = self._reported_space()
        failed = self._reserve.is_released or self._monotonic() < self._full_until
        if not failed or space.free < space.low_water:
            return space
        return space._replace(free=0 if self._outbox.hosts() else USUAL_GROWTH)

    def _reported_space(self) -> DiskSpace:
        try:
            space = self._space_at(self._folder.path)
        except OSError:  # the folder was removed, which the relay detects by its lock
            return DiskSpace(0, 0)
        largest, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        if largest == resource.RLIM_INFINITY:
            return space
        # Pages beyond that could never leave the log.
        left = max(largest - self._outbox.size() - self._outbox.free(), 0)
        return DiskSpace(min(space.free, left), min(space.size, largest))

    def _unread(self) -> int:
        """Bytes in the journals that are not in the outbox."""
        offsets, total = self._outbox.offsets(), 0
        for path in self._folder.readable_journals():
            with suppress(FileNotFoundError):
                total += max(owned.lstat(path).st_size - offsets.get(path.name, 0), 0)
        return total


def take_losses(counts: Counter[str]) -> list[EarlyLoss]:
    """Remove the lost plays from *counts* and return them as losses.

    They are plays that workers could neither write nor buffer, and plays without a line in the proxy's log.
    """
    reports, size = counts.pop("capture_lost", 0), counts.pop("capture_lost_bytes", 0)
    losses = [
        EarlyLoss("capture_lost", reports, size),
        EarlyLoss("no_proxy_line", counts.pop("no_proxy_line", 0), 0),
    ]
    return [loss for loss in losses if loss.reports > 0]
