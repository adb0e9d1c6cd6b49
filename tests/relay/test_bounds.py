"""The limits of what waits: what is beyond them goes, the oldest first, and is counted to the byte."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from t23_middleware.errors import ConfigurationError
from t23_middleware.ops.standin import StandInServer
from t23_middleware.relay import bounds as module
from t23_middleware.relay.bounds import (
    DEAD_MS,
    LONG_FOR,
    MOST_DEAD,
    PIECE,
    RESERVE,
    RETRY_FULL_EVERY,
    SMALL_PIECE,
    DiskSpace,
    Limits,
    Reserve,
    take_losses,
)
from t23_middleware.relay.elapsed import Elapsed
from t23_middleware.relay.outbox import (
    LONG_LOG,
    Acked,
    Dead,
    DeadLetters,
    EarlyLoss,
    Ingest,
    Loss,
    OutboxError,
    OutboxFull,
    OutboxView,
    Retry,
    SQLiteOutbox,
    Stats,
    readers,
)
from t23_middleware.relay.process import Relay
from t23_middleware.relay.report import Report
from t23_middleware.settings import Settings
from t23_middleware.state import StateFolder
from t23_middleware.transfer import Counts

from ..ports import free_port
from .writers import MS, journal, transfer

NOW = 1_764_000_000_000
TODAY, TOMORROW = "2025-11-24", "2025-11-25"
DAY_MS = 86_400_000
PLENTY = DiskSpace(1 << 40, 1 << 41)


def report(number: int, at_ms: int = NOW, sent: int = 100) -> Report:
    return Report(at_ms, "", f"session-{number}", "7", sent, 0, "html5", None, "720p")


def batch(*reports: Report, **options: Any) -> Ingest:
    return Ingest(
        **({"reports": reports, "viewings": [], "offsets": {}, "counts": {}, "at_ms": NOW} | options)
    )


class World:
    """An outbox with its limits, and the clock and the disk that they see."""

    def __init__(self, state: Path) -> None:
        self.folder = StateFolder(state)
        self.folder.create()
        self.reserve = Reserve(self.folder.reserve, self.folder.reserved)
        self.outbox = SQLiteOutbox(self.folder.outbox, self.reserve.release)
        self.seconds = 1000.0
        self.now_ms = NOW
        self.disk = PLENTY

    def limits(self, max_age: float = 604_800, max_bytes: int = 1 << 28, **more: Any) -> Limits:
        return Limits(
            self.outbox,
            self.folder,
            self.reserve,
            max_age=max_age,
            max_bytes=max_bytes,
            monotonic=lambda: self.seconds,
            wall_ms=lambda: self.now_ms,
            space=lambda path: self.disk,
            **more,
        )

    def pass_by(self, ms: int) -> None:
        """Let time pass by both clocks."""
        self.now_ms += ms
        self.seconds += ms / 1000

    def keep(self, limits: Limits, looks: int = 1) -> None:
        """So many looks, each a minute after the one before."""
        for _ in range(looks):
            self.seconds += 60
            limits.enforce()

    def claim(self, count: int) -> list[int]:
        return [entry.id for entry in self.outbox.claim(count, self.now_ms, [""])]

    def bury(self, count: int, at_ms: int) -> None:
        ids = self.claim(count)
        assert len(ids) == count
        self.outbox.settle([Dead(id, "no_such_photo", "answer") for id in ids], at_ms)

    def stats(self) -> Stats:
        stats = self.outbox.stats()
        assert stats.captured == stats.waiting + stats.sent + stats.dead + stats.lost
        return stats

    def losses(self) -> list[Loss]:
        with OutboxView(self.folder.outbox) as view:
            return list(view.snapshot().losses)

    def waiting(self) -> list[str]:
        rows = self.outbox._db.execute("SELECT session_id FROM reports ORDER BY id")
        return [session.removeprefix("session-") for (session,) in rows]


@pytest.fixture
def world(state: Path) -> Iterator[World]:
    world = World(state)
    yield world
    world.outbox.close()


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


# Age.


def at(time_ms: int, session: str = "s") -> Report:
    return report(0)._replace(time_ms=time_ms, session_id=session)


def test_age_counts_from_ingestion(world):
    """A report from before the host's clock was set is as old as the time since its ingestion.

    Both happen at boot: the worker's clock shows 1970, the relay's is right already.
    """
    limits = world.limits(max_age=3600)
    limits.ingest(batch(at(5_000), at(7_000), at(6_000, "t"), report(1)))
    limits.ingest(batch(at(8_000)))
    world.keep(limits)
    assert world.stats() == Stats(5, 5, 0, 0, 0)
    times = world.outbox._db.execute("SELECT time_ms - ? FROM reports ORDER BY id", (NOW,))
    assert [time for (time,) in times] == [-2000, 0, -1000, 0, 1000]
    world.pass_by(3_600_001)
    world.keep(limits)
    assert world.stats() == Stats(5, 0, 0, 0, 5)


def test_age_corrected_when_clock_is_set(world):
    """A report that was stored before the clock was set gets its right age when it is set."""
    limits = world.limits(max_age=3600)
    world.now_ms = 9_000
    limits.ingest(batch(*(at(1_000 + n) for n in range(4))))
    world.keep(limits)
    (tried,) = world.claim(1)
    world.outbox.settle([Retry(tried, 0, 1)], world.now_ms)
    world.outbox.settle([Dead(tried + 1, "no_such_photo", "answer")], world.now_ms)
    world.now_ms = NOW
    world.keep(limits)
    assert world.stats() == Stats(4, 3, 0, 1, 0)
    times = [time for (time,) in world.outbox._db.execute("SELECT time_ms FROM reports ORDER BY id")]
    assert times[0] == 1_000, "what may have arrived keeps its time in every retry"
    assert times[2] - times[1] == 1
    assert NOW - 10_000 < times[1] < NOW
    world.pass_by(3_600_001)
    world.keep(limits)
    assert world.stats() == Stats(4, 0, 0, 1, 3)


def test_too_old_reports_are_lost(world, caplog):
    """A report that is older than the limit is lost, and counted by day with its bytes."""
    limits = world.limits(max_age=7 * 86_400)
    for n in range(4):
        limits.ingest(batch(report(n, NOW + n * DAY_MS, sent=10**n)))
        world.pass_by(DAY_MS)
    world.pass_by(3 * DAY_MS - 60_000)
    world.keep(limits)
    assert world.stats() == Stats(4, 4, 0, 0, 0), "to the millisecond"
    world.pass_by(1)
    world.keep(limits)
    assert world.waiting() == ["1", "2", "3"]
    world.pass_by(2 * DAY_MS)
    world.keep(limits)
    assert world.waiting() == ["3"]
    assert world.losses() == [
        Loss("2025-12-01", "too_old", 1, 1),
        Loss("2025-12-03", "too_old", 2, 110),
    ]
    assert world.stats() == Stats(4, 1, 0, 0, 3)
    said = errors(caplog)
    assert len(said) == 2
    assert "(too_old)" in said[0]
    assert "T23_MAX_AGE" in said[0]


def test_a_wrong_clock_gives_up_nothing(world):
    """Neither one that is ahead, for however long, nor one that is back, nor reports that tell of another time."""
    world.outbox.ingest(batch(*[report(n) for n in range(3)]))
    world.bury(1, NOW)
    limits = world.limits()
    world.keep(limits)
    for off_ms in (8 * DAY_MS, 31 * DAY_MS, 4000 * DAY_MS, -3_600_000, -400 * DAY_MS):
        world.now_ms = NOW + off_ms
        limits.ingest(batch(report(100, world.now_ms), report(101, NOW), report(102, NOW - 8 * DAY_MS)))
        world.keep(limits, looks=30)
    world.now_ms = NOW
    world.keep(limits)
    assert world.stats() == Stats(18, 17, 0, 1, 0)


@pytest.mark.parametrize("boot", ["this boot", "the next"])
def test_ages_go_on_over_relays(world, boot):
    """What one relay saw pass counts for the next, and within a boot the time between them too."""

    def limits(boot: str) -> Limits:
        elapsed = Elapsed(world.outbox.notes(), boot, lambda: world.seconds)
        return world.limits(elapsed=elapsed)

    first = limits("this boot")
    first.ingest(batch(report(1)))
    world.pass_by(4 * DAY_MS)
    world.keep(first)
    world.pass_by(4 * DAY_MS)
    if boot == "the next":
        world.seconds = 30.0
    second = limits(boot)
    world.keep(second)
    assert world.stats().waiting == (0 if boot == "this boot" else 1)
    world.pass_by(4 * DAY_MS)
    world.keep(second)
    assert world.stats().waiting == 0


def test_a_note_that_is_damaged_begins_anew():
    """A clock that can't be read gives up nothing."""
    for text in ("", "x", "[]", "[1, 2, 3, 4]", '["a", "b", 1]', "[1e999, 0, 0]"):
        assert Elapsed({"elapsed": text}, "boot", lambda: 7.0).now_ms() in (0, 1)


def test_retried_dead_letter_is_young(world):
    """A dead letter that is sent again gets a new age.

    An operator who sends a refused report again after weeks wants it to arrive.
    """
    world.outbox.ingest(batch(report(1)))
    world.bury(1, NOW)
    limits = world.limits()
    world.keep(limits)
    world.pass_by(20 * DAY_MS)
    with DeadLetters(world.folder.outbox) as letters:
        assert letters.retry(None) == [1]
    world.keep(limits)
    assert world.stats().waiting == 1
    world.pass_by(8 * DAY_MS)
    world.keep(limits)
    assert world.stats() == Stats(1, 0, 0, 0, 1)


def test_report_in_flight_is_kept(world):
    """A report in flight is not dropped, and counts as sent when it arrives."""
    limits = world.limits(max_bytes=1)
    limits.ingest(batch(*[report(n) for n in range(3)]))
    flying = world.claim(1)
    world.pass_by(8 * DAY_MS)
    world.keep(limits)
    assert world.stats() == Stats(3, 1, 0, 0, 2)
    world.outbox.settle([Acked(flying[0])], NOW)
    assert world.stats() == Stats(3, 0, 1, 0, 2)


def test_ages_checked_once_a_minute(world):
    """The ages of all reports are checked once a minute, and more often if the limit is short."""
    slow, fast = world.limits(max_age=61), world.limits(max_age=1)
    world.outbox.ingest(batch(report(1), since_ms=0))
    slow.enforce()
    world.seconds += 0.5
    fast.enforce()
    slow.enforce()
    assert world.waiting() == ["1"]
    world.seconds += 0.51
    fast.enforce()
    assert world.waiting() == ["1"], "a second has no two looks"
    world.seconds += 0.5
    fast.enforce()
    assert world.waiting() == []


def test_large_backlog_dropped_in_pieces(world, monkeypatch):
    """A large backlog is dropped in pieces, without a pause between them."""
    monkeypatch.setattr(module, "MOST_AT_ONCE", 10)
    limits = world.limits()
    limits.ingest(batch(*[report(n) for n in range(35)]))
    world.pass_by(8 * DAY_MS)
    seen = []
    for _ in range(5):
        limits.enforce()  # the clock stands still
        seen.append(world.stats().waiting)
    assert seen == [25, 15, 5, 0, 0]


# Size.


def full(world: World, count: int = 6000) -> int:
    """An outbox with so many reports; its size."""
    world.outbox.ingest(batch(*[report(n, sent=n) for n in range(count)]))
    return world.outbox.size()


def test_full_outbox_drops_oldest(world, caplog):
    """Above the byte limit the oldest reports are dropped until the outbox is within it, and no more."""
    size, count = full(world), 6000
    bound = size * 3 // 4
    limits = world.limits(max_bytes=bound)
    world.keep(limits, 20)
    assert bound - 32_768 < world.outbox.size() <= bound
    stats = world.stats()
    assert world.waiting() == [str(n) for n in range(stats.lost, count)], "the oldest"
    assert world.losses() == [Loss(TODAY, "outbox_full", stats.lost, sum(range(stats.lost)))]
    assert [said for said in errors(caplog) if "outbox_full" in said and "T23_MAX_BYTES" in said]
    assert len(errors(caplog)) == 1


def test_reports_keep_quarter_of_limit(world):
    """If other tables fill the limit, a quarter of it is left for reports."""
    full(world, 3000)
    viewings = [(("", f"s{n}", "1"), "x" * 1000) for n in range(1000)]
    world.outbox.ingest(batch(viewings=viewings))
    bound = 1 << 19
    assert world.outbox.size() > 2 * bound
    world.keep(world.limits(max_bytes=bound), 20)
    assert world.stats().waiting == bound // 4 // 128


def test_emptied_file_shrinks(world):
    """The file of an emptied outbox shrinks and keeps some free pages."""
    full(world, 80_000)
    world.outbox._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    before = world.folder.outbox.stat().st_size
    while ids := world.claim(2000):
        world.outbox.settle([Acked(id) for id in ids], NOW)
    limits = world.limits()
    world.keep(limits, 10)
    after = world.folder.outbox.stat().st_size
    assert before > 5 << 20
    assert (1 << 20) <= after < before / 2
    assert world.stats() == Stats(80_000, 0, 80_000, 0, 0)


def test_file_shrinks_slowly_without_space(world):
    """The file shrinks in small steps while the disk is short of space.

    Pages that move are written to the write-ahead log first, which has no space to grow.
    """
    full(world, 20_000)
    while ids := world.claim(2000):
        world.outbox.settle([Acked(id) for id in ids], NOW)
    limits, pages = world.limits(), []
    world.disk = DiskSpace(0, 8 << 20)
    for _ in range(30):
        pages.append(world.outbox._db.execute("PRAGMA page_count").fetchone()[0])
        world.keep(limits)
    steps = [before - after for before, after in zip(pages, pages[1:], strict=False)]
    assert max(steps) == 64
    assert pages[-1] < pages[0] / 2


def test_write_ahead_log_shrinks_again(world):
    """The write-ahead log does not stay large after one large transaction."""
    full(world, 60_000)
    log = world.folder.outbox.with_name("outbox.db-wal")
    assert log.stat().st_size > 3 << 20
    for number in range(3):
        world.outbox.ingest(batch(report(number)))
    assert log.stat().st_size <= 1 << 20


# Dead letters.


def test_dead_letters_dropped_after_30_days(world):
    """Dead letters are dropped after 30 days, and before all reports that wait."""
    world.outbox.ingest(batch(*[report(n, NOW + 31 * DAY_MS, sent=10**n) for n in range(3)]))
    limits = world.limits(max_age=60 * 86_400)
    world.bury(1, NOW)
    world.keep(limits)
    world.pass_by(2 * DAY_MS)
    world.bury(1, world.now_ms)
    world.keep(limits)
    world.pass_by(DEAD_MS - 2 * DAY_MS)
    world.keep(limits)
    assert world.stats() == Stats(3, 1, 0, 1, 1)
    assert world.losses() == [Loss("2025-12-24", "dead_too_old", 1, 1)]


def test_newest_ten_thousand_dead_letters_kept(world):
    """Of the dead letters the latest ten thousand are kept."""
    world.outbox.ingest(batch(*[report(n, sent=1) for n in range(MOST_DEAD + 5)]))
    world.bury(MOST_DEAD, NOW + 1)
    world.bury(5, NOW)  # refused before the others
    limits = world.limits()
    world.keep(limits)
    assert world.stats() == Stats(MOST_DEAD + 5, 0, 0, MOST_DEAD, 5)
    assert world.losses() == [Loss(TODAY, "dead_full", 5, 5)]
    dead = world.outbox._db.execute("SELECT min(died_ms) FROM dead").fetchone()
    assert dead == (NOW + 1,)


# The disk.


@pytest.mark.parametrize(
    ("space", "growth"),
    [
        (PLENTY, ((1 << 40) - (1 << 20)) // 2),
        (DiskSpace(65 << 20, 1 << 40), 32 << 20),
        (DiskSpace((1 << 20) + 2, 1 << 40), 1),
        (DiskSpace(1 << 20, 1 << 40), 0),
        (DiskSpace(0, 1 << 40), 0),
        (DiskSpace(100 << 10, 4 << 20), 48 << 10),
        (DiskSpace(4 << 10, 4 << 20), 0),
    ],
)
def test_outbox_grows_by_half_of_space(space, growth):
    """The outbox may grow by half of the free disk space at a time."""
    assert space.growth == growth


def test_full_disk_leaves_journals_unread(world):
    """What does not fit in the outbox stays in the journals, and acknowledgements are still stored."""
    limits = world.limits()
    limits.ingest(batch(*[report(n) for n in range(300)]))
    world.disk = DiskSpace(0, 1 << 40)
    with pytest.raises(OutboxFull):
        limits.ingest(batch(*[report(n) for n in range(300, 5000)], offsets={"a": 1}))
    assert (world.stats(), world.outbox.offsets()) == (Stats(300, 300, 0, 0, 0), {})
    ids = world.claim(300)
    world.outbox.settle([Acked(id) for id in ids], NOW)
    limits.ingest(batch(*[report(n) for n in range(100)]))  # into the room that they left
    assert world.stats() == Stats(400, 100, 300, 0, 0)
    world.disk = PLENTY
    limits.ingest(batch(*[report(n) for n in range(300, 5000)], offsets={"a": 1}))
    assert world.stats() == Stats(5100, 4800, 300, 0, 0)


def test_full_disk_waits_for_deliveries(world, monkeypatch):
    """On a full disk nothing is read until delivered reports have made space in the outbox."""
    monkeypatch.setattr(module, "MOST_UNREAD", 10_000)
    limits = world.limits()
    assert (limits.has_room(), limits.piece_bytes) == (True, PIECE)
    limits.ingest(batch(*[report(n) for n in range(3000)]))
    world.disk = DiskSpace(0, 1 << 40)
    assert (limits.has_room(), limits.piece_bytes) == (False, SMALL_PIECE)
    path = journal(world.folder, "1-dead", b"x" * 20_000)
    assert limits.has_room(), "the journals are full"
    path.unlink()
    world.outbox.settle([Acked(id) for id in world.claim(2000)], NOW)
    assert limits.has_room()
    limits.ingest(batch(*[report(n) for n in range(100)]))


def test_full_disk_uses_reserve(world):
    """A full disk with an empty outbox uses the reserve for new reports.

    Otherwise nothing would ever be delivered if the journals fill the disk.
    """
    limits = world.limits()
    world.keep(limits)
    world.disk = DiskSpace(0, 1 << 40)
    assert limits.has_room()
    with pytest.raises(OutboxFull):
        limits.ingest(batch(*[report(n) for n in range(5000)]))
    assert not world.folder.reserve.exists()
    world.disk = DiskSpace((1 << 20) + (512 << 10), 1 << 40)
    limits.ingest(batch(*[report(n) for n in range(1000)]))
    assert world.stats().waiting == 1000


def test_reserve_made_and_logged(world, caplog):
    """The reserve is created if there is space. Its removal and its return are logged once each."""
    limits = world.limits()
    world.disk = DiskSpace((64 << 20) + (512 << 10) - 1, 1 << 40)
    world.keep(limits)
    assert not world.folder.reserve.exists()
    world.disk = PLENTY
    world.keep(limits)
    assert world.folder.reserve.stat().st_size == 512 << 10
    assert world.folder.reserve.stat().st_mode & 0o777 == 0o600
    assert caplog.records == []
    assert world.reserve.release()
    assert not world.reserve.release()
    world.disk = DiskSpace(1 << 20, 1 << 40)
    world.keep(limits)
    assert not world.folder.reserve.exists()
    world.disk = PLENTY
    world.keep(limits, 2)
    assert world.folder.reserve.exists()
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


def test_short_reserve_is_replaced(world):
    """A reserve file that is too short is replaced."""
    world.folder.reserve.write_bytes(b"short")
    world.keep(world.limits())
    assert world.folder.reserve.stat().st_size == 512 << 10


def test_failed_reserve_leaves_no_file(world, monkeypatch):
    """A reserve that the disk refuses while it is written leaves no file."""

    def refused(descriptor: int, data: Any) -> int:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    limits = world.limits()
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "write", refused)
        world.keep(limits)
    assert not world.folder.reserve.exists()
    world.keep(limits)
    assert world.folder.reserve.exists()


def refusing(world: World, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A quota: the disk has room, and the outbox still can't grow. The growths that it was asked for."""
    asked: list[int] = []
    growing_by = world.outbox.growing_by

    @contextmanager
    def grows(size: int, **more: bool) -> Iterator[None]:
        asked.append(size)
        with growing_by(0, **more):
            yield

    monkeypatch.setattr(world.outbox, "growing_by", grows)
    return asked


def test_a_write_that_failed_means_full(world, monkeypatch):
    """Whatever the disk says of itself: nothing is taken in for a while but into free pages, then it is tried again."""
    limits = world.limits()
    limits.ingest(batch(report(0)))
    asked = refusing(world, monkeypatch)
    assert (limits.has_room(), limits.piece_bytes) == (True, PIECE)
    with pytest.raises(OutboxFull):
        limits.ingest(batch(*map(report, range(1, 3000))))
    assert (limits.has_room(), limits.piece_bytes) == (False, SMALL_PIECE)
    world.seconds += RETRY_FULL_EVERY
    assert (limits.has_room(), limits.piece_bytes) == (True, PIECE)
    assert asked == [PLENTY.growth]


def test_reserve_under_quota(world, monkeypatch, caplog):
    """A reserve that was removed although there is free space is tried again seldom.

    It is created only if the quota has twice its size.
    """
    limits = world.limits()
    limits.ingest(batch(report(0)))
    limits.enforce()
    assert world.reserve.release()
    quota, write = [RESERVE + 1000], os.write

    def limited(descriptor: int, data: Any) -> int:
        if len(data) > quota[0]:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", limited)
    for _ in range(5):
        world.keep(limits)
        assert not world.folder.reserve.exists()
        assert not limits.has_room()
    quota[0] = 2 * RESERVE
    world.keep(limits)
    assert world.folder.reserve.stat().st_size == RESERVE
    assert limits.has_room()
    assert caplog.records[-1].t23_event == "disk_free"


@pytest.mark.parametrize("restarted", [False, True])
def test_reserve_removed_by_a_worker(world, restarted):
    """It counts as given up, for a relay that starts then too: there is no more room than the quota left."""
    limits = world.limits()
    world.keep(limits)
    assert world.folder.reserved.exists()
    world.folder.reserve.unlink()
    if restarted:
        again = Reserve(world.folder.reserve, world.folder.reserved)
        assert again.is_released
        again.ensure(PLENTY)
        assert not again.is_released
    else:
        world.keep(limits)
    assert world.folder.reserve.stat().st_size == RESERVE


def test_reserve_back_when_nothing_waits(world, monkeypatch):
    """Its own size is room enough then: the viewings in the outbox may keep the rest of a small quota for long."""
    limits, write = world.limits(), os.write
    world.keep(limits)
    world.folder.reserve.unlink()

    def limited(descriptor: int, data: Any) -> int:
        if len(data) > RESERVE + 1000:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", limited)
    world.keep(limits)
    assert world.folder.reserve.stat().st_size == RESERVE


def test_reserve_gone_on_a_small_disk(world):
    """Where the disk itself has too little room the mark goes, so that workers write on."""
    world.keep(world.limits())
    world.folder.reserve.unlink()
    reserve = Reserve(world.folder.reserve, world.folder.reserved)
    reserve.ensure(DiskSpace(1 << 20, 1 << 40))
    assert not world.folder.reserved.exists()
    assert not world.folder.reserve.exists()


def test_a_full_quota_with_an_empty_outbox(world, monkeypatch):
    """What is new may have a little of the room, since nothing is to be acknowledged."""
    limits = world.limits()
    limits.enforce()
    assert world.reserve.release()
    assert limits.has_room()
    limits.ingest(batch(report(0)))
    assert world.stats().waiting == 1


# A reader that keeps the log.


READER = """
import sqlite3, sys
db = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True, isolation_level=None)
db.execute("BEGIN")
db.execute("SELECT count(*) FROM reports").fetchone()
print("reads", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def reader(world: World) -> Iterator[subprocess.Popen[str]]:
    world.outbox.ingest(batch(report(0)))
    command = [sys.executable, "-c", READER, str(world.folder.outbox)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "reads\n"
    yield process
    process.communicate(timeout=30)


def test_who_keeps_the_log_is_named(world, reader, caplog):
    """The longer the log, the longer the rest between two transactions; nothing of it once the reader is gone."""
    limits = world.limits()
    assert limits.pause_seconds() == 0
    number = 0
    while world.outbox.log_size() <= LONG_LOG:
        number += 500
        world.outbox.ingest(batch(*map(report, range(number, number + 500))))
    assert limits.pause_seconds() == 0, "it may be one large transaction"
    world.seconds += LONG_FOR
    first = limits.pause_seconds()
    assert 0 < first < 1
    (found,) = readers(world.folder.outbox)
    assert found.startswith(f"process {reader.pid} (")
    assert f"process {reader.pid} (" in errors(caplog)[0]
    while world.outbox.log_size() <= 2 * LONG_LOG:
        number += 500
        world.outbox.ingest(batch(*map(report, range(number, number + 500))))
    assert limits.pause_seconds() > first
    assert limits.has_room()
    assert not world.limits(max_bytes=1 << 20).has_room(), "the log counts"
    reader.communicate(timeout=30)
    for _ in range(2):
        world.outbox.ingest(batch(report(1)))
    assert limits.pause_seconds() == 0
    assert [record.t23_event for record in caplog.records] == ["log_long", "log_short"]
    assert readers(world.folder.outbox) == []


def test_reserve_kept_for_acknowledgements(world):
    """A full disk uses the reserve for acknowledgements but not for new reports."""
    limits = world.limits()
    world.keep(limits)
    limits.ingest(batch(*[report(n) for n in range(300)]))
    world.disk = DiskSpace(0, 1 << 40)
    with pytest.raises(OutboxFull):
        limits.ingest(batch(*[report(n) for n in range(5000)]))
    assert world.folder.reserve.exists()
    (pages,) = world.outbox._db.execute("PRAGMA page_count").fetchone()
    world.outbox._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(OutboxFull), world.outbox.atomic():
        world.outbox.ingest(batch(*[report(n) for n in range(5000)]))
    assert not world.folder.reserve.exists()


def test_a_locked_outbox_is_no_full_disk(world):
    world.keep(world.limits())
    world.outbox._db.execute("PRAGMA busy_timeout = 1")
    other = SQLiteOutbox(world.folder.outbox)
    with other.atomic(), pytest.raises(OutboxError, match="locked") as error:
        world.claim(1)
    other.close()
    assert not isinstance(error.value, OutboxFull)
    assert world.folder.reserve.exists()


# Journals.


def test_journals_dropped_above_limit(world, monkeypatch):
    """Journals above their limit are dropped only while the outbox refuses new reports."""
    monkeypatch.setattr(module, "MOST_UNREAD", 10_000)
    path = journal(world.folder, "1-dead", b"x" * 20_000)
    limits = world.limits()
    taken = batch(*[report(n) for n in range(300)], offsets={path.name: 100})
    limits.ingest(taken)
    assert world.stats() == Stats(300, 300, 0, 0, 0)
    world.disk = DiskSpace(0, 1 << 40)
    lost = batch(*[report(n, sent=n) for n in range(3000)], offsets={path.name: 15_000}, counts={"late": 2})
    limits.ingest(lost)
    assert world.stats() == Stats(3300, 300, 0, 0, 3000)
    assert world.losses() == [Loss(TODAY, "journals_full", 3000, sum(range(3000)))]
    assert (world.outbox.offsets(), world.outbox.counters()["late"]) == ({path.name: 15_000}, 2)
    with pytest.raises(OutboxFull):
        limits.ingest(lost)  # what is unread is within its bound again
    assert world.stats() == Stats(3300, 300, 0, 0, 3000)


def test_uncounted_loss_is_not_dropped(world, monkeypatch):
    """A report whose loss can't be counted is not dropped."""
    monkeypatch.setattr(module, "MOST_UNREAD", 10_000)
    journal(world.folder, "1-dead", b"x" * 20_000)
    limits = world.limits()
    world.outbox._db.execute("PRAGMA busy_timeout = 1")
    other = SQLiteOutbox(world.folder.outbox)
    with other.atomic(), pytest.raises(OutboxError, match="locked"):
        limits.ingest(batch(report(1)))
    other.close()
    assert (world.stats(), world.losses()) == (Stats(0, 0, 0, 0, 0), [])


def test_worker_losses_captured_and_lost(world):
    """Plays that workers lost count as captured and as lost."""
    counts = Counter({"capture_lost": 3, "capture_lost_bytes": 999, "no_session": 2})
    losses = take_losses(counts)
    assert losses == [EarlyLoss("capture_lost", 3, 999)]
    assert counts == {"no_session": 2}
    assert take_losses(counts) == []
    world.outbox.ingest(batch(report(1), losses=losses, counts=counts))
    world.outbox.ingest(batch(losses=[EarlyLoss("capture_lost", 1, 1)], at_ms=NOW + DAY_MS))
    assert world.stats() == Stats(5, 1, 0, 0, 4)
    assert world.losses() == [Loss(TODAY, "capture_lost", 3, 999), Loss(TOMORROW, "capture_lost", 1, 1)]
    assert "capture_lost" not in world.outbox.counters()


# In the relay.


@pytest.fixture
def relay(state: Path) -> Callable[..., Relay]:
    folder = StateFolder(state)
    folder.create()

    def made(api_url: str, **environ: str) -> Relay:
        given = {"T23_API_URL": api_url, "T23_STATE_DIR": str(state), **environ}
        return Relay(Settings(environ=given), folder, automatic=True)

    return made


def test_relay_drops_old_sends_rest(relay, state):
    """A relay drops the reports that are too old and sends the rest, and its figures add up."""
    folder = StateFolder(state)
    folder.create()
    ages = [8 * DAY_MS, 7 * DAY_MS + 1, 6 * DAY_MS, 0]
    outbox = SQLiteOutbox(folder.outbox)
    for n, age in enumerate(ages, 1):
        waiting = report(n, sent=1000 * n)._replace(session_id=f"s{n}")
        outbox.ingest(batch(waiting, since_ms=30 * DAY_MS - age))
    outbox.note(Elapsed({"elapsed": f"[{30 * DAY_MS}, 0, 0]"}, "", time.monotonic).note())
    outbox.close()
    journal(folder, "1-dead", Counts({"capture_lost": 2, "capture_lost_bytes": 77}))
    with StandInServer() as api:
        relay(api.url).run()
        sent = [report["session_id"] for report in api.recorded()]
    with OutboxView(folder.outbox) as view:
        found = view.snapshot()
    assert sorted(sent) == ["s3", "s4"]
    assert found.stats == Stats(6, 0, 2, 0, 4)
    assert {(loss.reason, loss.reports, loss.bytes) for loss in found.losses} == {
        ("too_old", 2, 3000),
        ("capture_lost", 2, 77),
    }
    assert folder.reserve.exists()


def test_relay_without_api_keeps_limit(relay, state, monkeypatch):
    """A relay whose API is down keeps the outbox within its byte limit."""
    folder = StateFolder(state)
    folder.create()
    # Of the boot before, so that their viewings are over however long this machine has been up.
    hour_ago_ms = time.time_ns() // MS - 3_600_000
    lines = [transfer(n, MS * n, f"session-{n}", at_ms=hour_ago_ms) for n in range(1, 6001)]
    journal(folder, "1-dead", *lines, boot="the-boot-before")
    bound = 400_000
    nowhere = relay(f"http://127.0.0.1:{free_port()}", T23_MAX_BYTES=str(bound))

    def enough(self: Limits, looks: list[int] = []) -> None:  # noqa: B006
        keep(self)
        looks.append(1)
        if nowhere._outbox.stats().captured == 6000 and nowhere._outbox.size() <= bound:
            nowhere.stop()

    keep = Limits.enforce
    monkeypatch.setattr(Limits, "enforce", enough)
    nowhere.run()
    with OutboxView(folder.outbox) as view:
        found = view.snapshot()
    assert found.stats.captured == 6000 == found.stats.waiting + found.stats.lost
    (loss,) = found.losses
    assert (loss.reason, loss.reports, loss.bytes) == (
        "outbox_full",
        found.stats.lost,
        100_000 * found.stats.lost,
    )


# Settings.


@pytest.mark.parametrize(
    ("name", "text"),
    [("T23_MAX_AGE", "0"), ("T23_MAX_AGE", "a week"), ("T23_MAX_BYTES", "65535"), ("T23_MAX_BYTES", "256M")],
)
def test_invalid_limits_are_refused(name, text):
    """Invalid limits are refused with an example of a valid value."""
    with pytest.raises(ConfigurationError, match=f"{name}.+write for example"):
        Settings(environ={"T23_API_URL": "https://a.example", name: text})


def test_the_bounds_decide_what_relay_is_wanted():
    url = {"T23_API_URL": "https://a.example"}
    usual = Settings(environ=url)
    assert (usual.max_age, usual.max_bytes) == (604_800.0, 268_435_456)
    for other in ({"T23_MAX_AGE": "60"}, {"T23_MAX_BYTES": "1000000"}):
        assert Settings(environ=url | other).relay_digest() != usual.relay_digest()
