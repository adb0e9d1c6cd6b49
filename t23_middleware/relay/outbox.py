"""The outbox: reports that wait, in a file that survives; the only place that speaks SQL.

One relay at a time writes it, which the relay's lock guarantees; pages and commands only read.
"""

from __future__ import annotations

import logging
import sqlite3
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..errors import StateError
from . import history
from .history import Fatality, History, Series, Watched
from .report import CLOCK_SET_MS, Report

log = logging.getLogger(__name__)

#: A viewing's key: host, session and photo.
Key = tuple[str, str, str]

#: Version of the file's format. It stands in the file twice, as ``user_version`` and as a seal in
#: ``application_id``: one flipped bit is not another version.
SCHEMA_VERSION = 1
#: Latest version whose seal is known, so that the file of a later one than this is told from damage.
NEWEST_KNOWN = 255
_SCHEMA = """
CREATE TABLE IF NOT EXISTS reports (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    time_ms INTEGER NOT NULL, host TEXT NOT NULL, session_id TEXT NOT NULL, photo_id TEXT NOT NULL,
    sent INTEGER NOT NULL, skip INTEGER NOT NULL,
    player_type TEXT, player_version TEXT, player_resolution TEXT,
    tries INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    retimed INTEGER NOT NULL DEFAULT 0,
    due_ms INTEGER NOT NULL DEFAULT 0,
    leased INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS reports_by_host ON reports (host, leased, id);
CREATE TABLE IF NOT EXISTS dead (
    id INTEGER PRIMARY KEY,
    time_ms INTEGER NOT NULL, host TEXT NOT NULL, session_id TEXT NOT NULL, photo_id TEXT NOT NULL,
    sent INTEGER NOT NULL, skip INTEGER NOT NULL,
    player_type TEXT, player_version TEXT, player_resolution TEXT,
    code TEXT NOT NULL, answer TEXT NOT NULL, died_ms INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS viewings (
    host TEXT, session_id TEXT, photo_id TEXT, state TEXT NOT NULL,
    PRIMARY KEY (host, session_id, photo_id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS journals (name TEXT PRIMARY KEY, offset INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS losses (
    day TEXT, reason TEXT, reports INTEGER NOT NULL, bytes INTEGER NOT NULL,
    PRIMARY KEY (day, reason)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS summary (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""
#: What pages read, so that none of it is counted while they wait. Made where it is missing: an outbox of a version
#: before it goes on.
_FOR_PAGES = """
CREATE TABLE IF NOT EXISTS minutes (
    minute INTEGER, name TEXT, value INTEGER NOT NULL, PRIMARY KEY (minute, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS totals (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS videos (
    hour INTEGER, host TEXT, photo_id TEXT, plays INTEGER NOT NULL, bytes INTEGER NOT NULL,
    PRIMARY KEY (hour, host, photo_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS dead_by_time ON dead (died_ms);
CREATE TABLE IF NOT EXISTS sizes (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT OR IGNORE INTO sizes SELECT 'waiting', count(*) FROM reports;
INSERT OR IGNORE INTO sizes SELECT 'dead', count(*) FROM dead;
CREATE TRIGGER IF NOT EXISTS report_in AFTER INSERT ON reports
    BEGIN UPDATE sizes SET value = value + 1 WHERE name = 'waiting'; END;
CREATE TRIGGER IF NOT EXISTS report_out AFTER DELETE ON reports
    BEGIN UPDATE sizes SET value = value - 1 WHERE name = 'waiting'; END;
CREATE TRIGGER IF NOT EXISTS dead_in AFTER INSERT ON dead
    BEGIN UPDATE sizes SET value = value + 1 WHERE name = 'dead'; END;
CREATE TRIGGER IF NOT EXISTS dead_out AFTER DELETE ON dead
    BEGIN UPDATE sizes SET value = value - 1 WHERE name = 'dead'; END;
"""
#: What the relay knows of the proxy's logs, see :mod:`~t23_middleware.relay.proxy_join`. Likewise.
_FOR_PROXY = "CREATE TABLE IF NOT EXISTS proxy (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;"
#: Tables that came later, each of which an outbox may lack.
_LATER = ("sizes", "proxy")
#: Each host that has reports, by a jump through the index: DISTINCT would read all of it.
_HOSTS = """
WITH RECURSIVE found (host) AS (
    SELECT min(host) FROM reports
    UNION ALL
    SELECT (SELECT min(host) FROM reports WHERE host > found.host) FROM found WHERE host IS NOT NULL
)
SELECT host FROM found WHERE host IS NOT NULL
"""
_OLDEST = "SELECT time_ms FROM reports ORDER BY id LIMIT 1"
_UNDATED = f"time_ms < {CLOCK_SET_MS} AND tries = 0 AND leased = 0"
_UNDATED_DEAD = f"died_ms < {CLOCK_SET_MS}"
_LATEST_UNDATED = f"""
SELECT max(at) FROM (
    SELECT max(time_ms) AS at FROM reports WHERE {_UNDATED}
    UNION ALL SELECT max(died_ms) FROM dead WHERE {_UNDATED_DEAD}
)
"""
_STEPS = f"""
SELECT minute / ?, name, CASE WHEN name IN {history.GAUGES} THEN max(value) ELSE CAST(total(value) AS INTEGER) END
FROM minutes WHERE minute >= ? GROUP BY 1, 2
"""
_VIDEOS = """
SELECT host, photo_id, sum(plays), CAST(total(bytes) AS INTEGER) FROM videos WHERE hour >= ? GROUP BY 1, 2
"""
#: Of an hour, the videos that are neither among those with the most bytes nor among those with the most plays.
_FORGET_VIDEOS = """
DELETE FROM videos WHERE hour = :hour
AND (host, photo_id) NOT IN (SELECT host, photo_id FROM videos WHERE hour = :hour ORDER BY bytes DESC LIMIT :most)
AND (host, photo_id) NOT IN (SELECT host, photo_id FROM videos WHERE hour = :hour ORDER BY plays DESC LIMIT :most)
"""
_STATS = """
SELECT
    coalesce((SELECT value FROM counters WHERE name = 'captured'), 0),
    (SELECT value FROM sizes WHERE name = 'waiting'),
    coalesce((SELECT value FROM counters WHERE name = 'sent'), 0),
    (SELECT value FROM sizes WHERE name = 'dead'),
    (SELECT coalesce(sum(reports), 0) FROM losses)
"""
_REPORT = ", ".join(Report._fields)
_MARKS = ", ".join("?" * len(Report._fields))

#: Longest that a retry is ever put off, in ms; a due time beyond it comes from a clock that was set back.
LONGEST_DELAY_MS = 2 * 3600 * 1000
#: Pages of the write-ahead log before it is folded into the file. Small, so that a full disk still takes
#: acknowledgements: 2,000 of 2,000 with 16 pages, 54 with SQLite's default of 1,000.
CHECKPOINT_PAGES = 16
#: Bytes of the write-ahead log that stay after one large transaction: room that acknowledgements have for sure.
LOG_KEPT = 1 << 20
#: Counters: how often the outbox was set aside because it was corrupt, and how often what it held could not be
#: counted in full.
CORRUPT, UNCOUNTED = "outbox_corrupt", "outbox_uncounted"
#: More bytes than a report has.
MOST_BYTES = 1 << 50
#: SQLite's own bound of a file's pages.
MOST_PAGES = (1 << 30) - 1
#: SQLite's words for SQLITE_FULL and SQLITE_IOERR; the codes came to Python with 3.11.
_FULL = ("database or disk is full", "disk I/O error")


class Entry(NamedTuple):
    """A report in the outbox."""

    id: int
    report: Report
    #: How often it was sent so that it may have arrived.
    tries: int
    #: How often the API answered it with something that nobody documents.
    attempts: int
    #: Whether it got a later time because the API had answered from its cache.
    retimed: bool


class GivenUp(NamedTuple):
    """Plays that are lost without ever waiting; they count as captured and lost."""

    reason: str
    reports: int
    bytes: int


class Ingest(NamedTuple):
    """What one look at the journals brought; kept whole or not at all."""

    reports: Sequence[Report]
    #: Changed viewings, ``None`` for one that is dropped.
    viewings: Sequence[tuple[Key, str | None]]
    #: Journal -> offset in bytes up to which it is taken in.
    places: Mapping[str, int]
    counts: Mapping[str, int]
    #: What the relay tells of itself with it, see :meth:`Outbox.note`.
    notes: Mapping[str, str] = {}
    #: What was lost before it could become a report.
    losses: Sequence[GivenUp] = ()
    #: Changed rows of what is known of the proxy's logs, ``None`` for one that is dropped.
    proxy: Sequence[tuple[str, str | None]] = ()
    #: Reason for which its reports are lost at once instead of kept; ``""`` for none.
    lost_as: str = ""
    #: Time of the look, in ms since the epoch; only losses need it.
    at_ms: int = 0


class Acked(NamedTuple):
    """The report was recorded."""

    id: int
    #: Time from the report's making to this answer, in ms.
    took_ms: int | None = None
    #: One of :data:`~t23_middleware.relay.history.ANSWERS`, here and below; ``""`` for none.
    said: str = ""


class Again(NamedTuple):
    """The report is tried again at *due_ms*."""

    id: int
    due_ms: int
    tries: int
    attempts: int = 0
    #: Its new time, where it needs one.
    time_ms: int | None = None
    said: str = ""


class Dead(NamedTuple):
    """The report was refused for good."""

    id: int
    code: str
    answer: str
    said: str = ""


class Lost(NamedTuple):
    """The report is given up, and counted under *reason*."""

    id: int
    reason: str
    said: str = ""


Settlement = Acked | Again | Dead | Lost


class Stats(NamedTuple):
    """Figures that add up: captured = waiting + sent + dead + lost."""

    captured: int
    waiting: int
    sent: int
    dead: int
    lost: int


class Waiting(NamedTuple):
    """A report that was not taken yet."""

    report: Report
    #: Whether it is on its way now.
    in_flight: bool


class Loss(NamedTuple):
    """What was given up on one day for one reason."""

    day: str
    reason: str
    reports: int
    bytes: int


class DeadReport(NamedTuple):
    """A report that the API refused for good."""

    id: int
    report: Report
    code: str
    #: The API's words, without the session.
    answer: str
    died_ms: int


class Snapshot(NamedTuple):
    """All that a look at the outbox tells, of one moment."""

    stats: Stats
    #: Those that reports wait for.
    hosts: Sequence[str]
    #: Time of the oldest report that waits, in ms since the epoch.
    oldest_ms: int | None
    counters: Mapping[str, int]
    losses: Sequence[Loss]
    #: Journal -> offset in bytes up to which it is taken in.
    places: Mapping[str, int]
    #: What the relay told of itself.
    notes: Mapping[str, str]


class Outbox(Protocol):
    """What the relay needs of a store; every method raises :class:`OutboxError` where the store fails."""

    def together(self) -> AbstractContextManager[None]:
        """What is done within happens whole or not at all, at the price of one write to the disk."""

    def places(self) -> dict[str, int]:
        """Journal -> offset up to which it was taken in."""

    def viewings(self) -> Iterator[tuple[Key, str]]:
        """The playback state that was kept."""

    def proxy_rows(self) -> dict[str, str]:
        """What was kept of the proxy's logs."""

    def ingest(self, batch: Ingest) -> None:
        """Keep *batch*, whole or not at all."""

    def forget_journals(self, names: Sequence[str]) -> None:
        """Journals that no longer exist."""

    def claim(self, count: int, now_ms: int, hosts: Iterable[str]) -> list[Entry]:
        """Lease up to *count* reports of *hosts* that are due, the oldest first."""

    def settle(self, settlements: Sequence[Settlement], now_ms: int) -> None:
        """Write down what became of claimed reports."""

    def hosts(self) -> list[str]:
        """Hosts that have reports waiting."""

    def stats(self) -> Stats:
        """The figures."""

    def note(self, notes: Mapping[str, str]) -> None:
        """Keep what the relay tells of itself, by name; commands and pages read it."""

    def begin_minute(self, now_ms: int, open_responses: int) -> None:
        """Write down how full it is and how many responses are open, and forget the history that is too old."""


class OutboxError(StateError):
    """The store failed; what was asked of it did not happen."""


class OutboxFull(OutboxError):
    """The disk, or the file's bound, takes no more; or the disk has a fault, which a quota looks like."""


class NoOutbox(OutboxError):
    """No relay has made one yet."""


class OutboxCorrupt(StateError):
    """The file is no longer a database; the next :class:`SQLiteOutbox` on it begins a new one."""


class SQLiteOutbox:
    """An :class:`Outbox` in one SQLite file, written with ``synchronous=FULL``: off the request path, so it may.

    *make_room* is called when the disk is full; it answers whether there is more room now.
    """

    def __init__(self, path: Path, make_room: Callable[[], bool] = lambda: False) -> None:
        self._make_room = make_room
        self._spares_reserve = False
        try:
            self._db = _open_or_replace(path)
        except OutboxFull:
            if not make_room():
                raise
            self._db = _open_or_replace(path)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def places(self) -> dict[str, int]:
        with _translated():
            return dict(self._db.execute("SELECT name, offset FROM journals"))

    @contextmanager
    def together(self) -> Iterator[None]:
        with self._transaction():
            yield

    def viewings(self) -> Iterator[tuple[Key, str]]:
        with _translated():
            for host, session_id, photo_id, state in self._db.execute("SELECT * FROM viewings"):
                yield (host, session_id, photo_id), state

    def proxy_rows(self) -> dict[str, str]:
        with _translated():
            return dict(self._db.execute("SELECT name, value FROM proxy"))

    def ingest(self, batch: Ingest) -> None:
        with self._transaction():
            losses = list(batch.losses)
            if batch.lost_as:
                sent = sum(report.sent for report in batch.reports)
                losses.append(GivenUp(batch.lost_as, len(batch.reports), sent))
            else:
                self._db.executemany(f"INSERT INTO reports ({_REPORT}) VALUES ({_MARKS})", batch.reports)
            _give_up(self._db, losses, batch.at_ms)
            self._keep_viewings(batch.viewings)
            self._keep_proxy_rows(batch.proxy)
            self._db.executemany("INSERT OR REPLACE INTO journals VALUES (?, ?)", batch.places.items())
            captured = len(batch.reports) + sum(loss.reports for loss in batch.losses)
            _count(self._db, {**batch.counts, "captured": captured})
            _happened(self._db, history.of_reports(batch.reports))
            _happened_now(self._db, batch.at_ms, {history.CAPTURED: captured - len(batch.reports)})
            self._watched(batch.reports)
            self.note(batch.notes)

    def forget_journals(self, names: Sequence[str]) -> None:
        if not names:
            return
        with self._transaction():
            self._db.executemany("DELETE FROM journals WHERE name = ?", ((name,) for name in names))

    def recover_leases(self, retry: bool, now_ms: int) -> int:
        """Reports that a dead relay had in hand may have arrived: send them again, or lose them if *retry* is false."""
        with self._transaction():
            rows = self._db.execute("SELECT id FROM reports WHERE leased != 0").fetchall()
            if not retry:
                _lose(self._db, "reports", [(id, "ambiguous") for (id,) in rows], now_ms)
            self._db.execute("UPDATE reports SET leased = 0, tries = tries + 1 WHERE leased != 0")
        return len(rows)

    def claim(self, count: int, now_ms: int, hosts: Iterable[str]) -> list[Entry]:
        with self._transaction():
            rows = [row for host in hosts for row in self._due(host, now_ms, count)]
            rows = sorted(rows)[:count]
            self._db.executemany("UPDATE reports SET leased = 1 WHERE id = ?", ((row[0],) for row in rows))
        return [Entry(row[0], Report(*row[4:]), row[1], row[2], bool(row[3])) for row in rows]

    def _due(self, host: str, now_ms: int, count: int) -> list[Any]:
        """One host at a time: the index has them in order then, where several would all be read and sorted."""
        return self._db.execute(
            f"SELECT id, tries, attempts, retimed, {_REPORT} FROM reports"
            " WHERE host = ? AND leased = 0 AND (due_ms <= ? OR due_ms > ?) ORDER BY id LIMIT ?",
            (host, now_ms, now_ms + LONGEST_DELAY_MS, count),
        ).fetchall()

    def settle(self, settlements: Sequence[Settlement], now_ms: int) -> None:
        with self._transaction():
            acked = [(item.id,) for item in settlements if isinstance(item, Acked)]
            sent = self._db.executemany("DELETE FROM reports WHERE id = ?", acked).rowcount if acked else 0
            for item in settlements:
                if isinstance(item, Again):
                    self._put_back(item)
                elif isinstance(item, Dead):
                    self._bury(item, now_ms)
            _lose(
                self._db,
                "reports",
                [(item.id, item.reason) for item in settlements if isinstance(item, Lost)],
                now_ms,
            )
            _count(self._db, {"sent": sent})
            tries = [(item.said, item.took_ms if isinstance(item, Acked) else None) for item in settlements]
            _happened_now(self._db, now_ms, {**history.of_tries(tries), history.SENT: sent})

    def hosts(self) -> list[str]:
        with _translated():
            return [host for (host,) in self._db.execute(_HOSTS)]

    def stats(self) -> Stats:
        with _translated():
            return Stats(*self._db.execute(_STATS).fetchone())

    def counters(self) -> dict[str, int]:
        """Every named counter."""
        with _translated():
            return dict(self._db.execute("SELECT name, value FROM counters"))

    def note(self, notes: Mapping[str, str]) -> None:
        if not notes:
            return
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO summary VALUES (?, ?)", notes.items())

    def notes(self) -> dict[str, str]:
        """What :meth:`note` kept."""
        with _translated():
            return dict(self._db.execute("SELECT name, value FROM summary"))

    def begin_minute(self, now_ms: int, open_responses: int) -> None:
        minute, hour = now_ms // history.MINUTE_MS, now_ms // history.HOUR_MS
        with self._transaction():
            oldest = self._db.execute(_OLDEST).fetchone()
            gauges = {
                history.OPEN: open_responses,
                history.WAITING: self.stats().waiting,
                history.OLDEST: max(now_ms - oldest[0], 0) // 1000 if oldest else 0,
            }
            self._db.executemany(
                "INSERT OR REPLACE INTO minutes VALUES (?, ?, ?)",
                [(minute, name, value) for name, value in gauges.items()],
            )
            # What lies in the future came from a clock that was set back.
            kept = minute - history.KEPT_MINUTES, minute + 60
            self._db.execute("DELETE FROM minutes WHERE minute < ? OR minute > ?", kept)
            self._db.execute("DELETE FROM videos WHERE hour < ? OR hour > ?", (kept[0] // 60, kept[1] // 60))
            for each in (hour - 1, hour):
                self._db.execute(_FORGET_VIDEOS, {"hour": each, "most": history.MOST_VIDEOS})

    # Bounds.

    def size(self) -> int:
        """Bytes of the file that hold something."""
        return (self._pragma("page_count") - self._pragma("freelist_count")) * self._pragma("page_size")

    def free(self) -> int:
        """Bytes of the file that are free."""
        return self._pragma("freelist_count") * self._pragma("page_size")

    @contextmanager
    def growing_by(self, size: int, *, may_make_room: bool = False) -> Iterator[None]:
        """Meanwhile the file grows by *size* bytes at most. Without *may_make_room* the reserve is left alone."""
        most = self._pragma("page_count") + size // self._pragma("page_size")
        self._pragma(f"max_page_count = {min(most, MOST_PAGES)}")
        self._spares_reserve = not may_make_room
        try:
            yield
        finally:
            self._spares_reserve = False
            self._pragma(f"max_page_count = {MOST_PAGES}")

    def shrink(self, kept: int, most: int) -> bool:
        """Give up to *most* pages back to the disk where more than *kept*, and more than half of all, are free."""
        free = self._pragma("freelist_count")
        wanted = free > max(kept, self._pragma("page_count") // 2)
        if wanted:
            with _translated():
                # Not execute(): the statement has rows without columns, of which that takes one, and a page with it.
                self._db.executescript(f"PRAGMA incremental_vacuum({min(free - kept, most)});")
            self._fold_log()  # only then the file is shorter
        return wanted

    def lose_older(self, before_ms: int, most: int, reason: str, now_ms: int) -> int:
        """Give up reports that tell of a time before *before_ms*, up to *most*; how many. Not what is in flight."""
        query = (
            f"SELECT id FROM reports WHERE leased = 0 AND time_ms >= {CLOCK_SET_MS} AND time_ms < ?"
            " ORDER BY id LIMIT ?"
        )
        return self._lose_found("reports", query, (before_ms, most), reason, now_ms)

    def latest_undated(self) -> int | None:
        """The latest time, in ms, from a clock that was not set yet, if there is one; see :meth:`date`."""
        with _translated():
            (latest,) = self._db.execute(_LATEST_UNDATED).fetchone()
        return None if latest is None else int(latest)

    def date(self, shift_ms: int) -> None:
        """Add *shift_ms* to the times from a clock that was not set yet, but of no report that may have arrived."""
        with self._transaction():
            self._db.execute(f"UPDATE reports SET time_ms = time_ms + ? WHERE {_UNDATED}", (shift_ms,))
            self._db.execute(f"UPDATE dead SET died_ms = died_ms + ? WHERE {_UNDATED_DEAD}", (shift_ms,))

    def lose_oldest(self, most: int, kept: int, reason: str, now_ms: int) -> int:
        """Give up the first *most* reports, but none of the last *kept*; how many. Not what is in flight."""
        query = (
            "SELECT id FROM reports WHERE leased = 0 ORDER BY id"
            " LIMIT max(0, min(?, (SELECT count(*) FROM reports) - ?))"
        )
        return self._lose_found("reports", query, (most, kept), reason, now_ms)

    def lose_dead_older(self, before_ms: int, most: int, reason: str, now_ms: int) -> int:
        """Give up dead letters that were refused before *before_ms*, up to *most*; how many."""
        query = "SELECT id FROM dead WHERE died_ms < ? ORDER BY died_ms LIMIT ?"
        return self._lose_found("dead", query, (before_ms, most), reason, now_ms)

    def lose_dead_oldest(self, most: int, kept: int, reason: str, now_ms: int) -> int:
        """Give up the dead letters that were refused first, up to *most*, but none of the last *kept*; how many."""
        query = (
            "SELECT id FROM dead ORDER BY died_ms, id LIMIT max(0, min(?, (SELECT count(*) FROM dead) - ?))"
        )
        return self._lose_found("dead", query, (most, kept), reason, now_ms)

    def _lose_found(self, table: str, query: str, values: tuple[int, int], reason: str, now_ms: int) -> int:
        with _translated():
            found = self._db.execute(query, values).fetchall()
        if found:
            with self._transaction():
                _lose(self._db, table, [(id, reason) for (id,) in found], now_ms)
        return len(found)

    def make_due(self) -> None:
        """Whatever waits for its next try may be tried now."""
        with self._transaction():
            self._db.execute("UPDATE reports SET due_ms = 0 WHERE due_ms > 0")

    def _put_back(self, item: Again) -> None:
        self._db.execute(
            "UPDATE reports SET leased = 0, due_ms = ?, tries = ?, attempts = ?, retimed = retimed + ?,"
            " time_ms = coalesce(?, time_ms) WHERE id = ?",
            (item.due_ms, item.tries, item.attempts, item.time_ms is not None, item.time_ms, item.id),
        )

    def _bury(self, item: Dead, now_ms: int) -> None:
        self._db.execute(
            f"INSERT OR REPLACE INTO dead SELECT id, {_REPORT}, ?, ?, ? FROM reports WHERE id = ?",
            (item.code, item.answer, now_ms, item.id),
        )
        buried = self._db.execute("DELETE FROM reports WHERE id = ?", (item.id,)).rowcount
        _happened_now(self._db, now_ms, {history.DEAD: buried})

    def _keep_viewings(self, viewings: Iterable[tuple[Key, str | None]]) -> None:
        for key, state in viewings:
            if state is None:
                self._db.execute("DELETE FROM viewings WHERE (host, session_id, photo_id) = (?, ?, ?)", key)
            else:
                self._db.execute("INSERT OR REPLACE INTO viewings VALUES (?, ?, ?, ?)", (*key, state))

    def _keep_proxy_rows(self, rows: Iterable[tuple[str, str | None]]) -> None:
        for name, value in rows:
            if value is None:
                self._db.execute("DELETE FROM proxy WHERE name = ?", (name,))
            else:
                self._db.execute("INSERT OR REPLACE INTO proxy VALUES (?, ?)", (name, value))

    def _watched(self, reports: Iterable[Report]) -> None:
        self._db.executemany(
            "INSERT INTO videos VALUES (?, ?, ?, ?, ?) ON CONFLICT (hour, host, photo_id) DO UPDATE"
            " SET plays = plays + excluded.plays, bytes = bytes + excluded.bytes",
            ((hour, *each) for hour, each in history.watched(reports)),
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        if self._db.in_transaction:
            yield  # a part of what is done together
            return
        try:
            with _immediate(self._db):
                yield
        except OutboxFull:
            if not self._spares_reserve and self._make_room():
                self._fold_log()
            raise

    def _fold_log(self) -> None:
        """Now, before somebody else takes the room: a log that can't be folded into the file only grows."""
        with suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def _pragma(self, text: str) -> int:
        with _translated():
            return int(self._db.execute(f"PRAGMA {text}").fetchone()[0])


@contextmanager
def _immediate(db: sqlite3.Connection) -> Iterator[None]:
    """One transaction that writes, whole or not at all."""
    with _translated():
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise


def _lose(db: sqlite3.Connection, table: str, rows: Iterable[tuple[int, str]], now_ms: int) -> None:
    """Give up the reports of *rows* (id and reason) in *table*, and count them with their bytes."""
    day, lost = _day(now_ms), Counter[str]()
    for id, reason in rows:
        db.execute(
            f"INSERT INTO losses SELECT ?, ?, 1, sent FROM {table} WHERE id = ?"
            # With the key named: SQLite before 3.35 takes no DO UPDATE without it.
            " ON CONFLICT (day, reason) DO UPDATE SET reports = reports + 1, bytes = bytes + excluded.bytes",
            (day, reason, id),
        )
        lost[history.LOST + reason] += db.execute(f"DELETE FROM {table} WHERE id = ?", (id,)).rowcount
    _happened_now(db, now_ms, lost)


def _give_up(db: sqlite3.Connection, losses: Iterable[GivenUp], now_ms: int) -> None:
    """Count what is lost without having waited here."""
    for loss in losses:
        if loss.reports:
            db.execute(
                "INSERT INTO losses VALUES (?, ?, ?, ?) ON CONFLICT (day, reason) DO UPDATE"
                " SET reports = reports + excluded.reports, bytes = bytes + excluded.bytes",
                (_day(now_ms), *loss),
            )
            _happened_now(db, now_ms, {history.LOST + loss.reason: loss.reports})


def _count(db: sqlite3.Connection, counts: Mapping[str, int]) -> None:
    db.executemany(
        "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
        [(name, number) for name, number in counts.items() if number],
    )


def _happened_now(db: sqlite3.Connection, now_ms: int, figures: Mapping[str, int]) -> None:
    _happened(db, {(now_ms // history.MINUTE_MS, name): number for name, number in figures.items()})


def _happened(db: sqlite3.Connection, figures: Mapping[tuple[int, str], int]) -> None:
    """Add to the history, in the transaction of what it tells of."""
    totals: Counter[str] = Counter()
    for (_, name), number in figures.items():
        totals[name] += number
    db.executemany(
        "INSERT INTO minutes VALUES (?, ?, ?) ON CONFLICT (minute, name) DO UPDATE SET value = value + excluded.value",
        [(*when, number) for when, number in figures.items() if number],
    )
    db.executemany(
        "INSERT INTO totals VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
        [(name, number) for name, number in totals.items() if number],
    )


def _day(ms: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(ms / 1000))


class OutboxView:
    """The outbox as commands and pages see it: read only, while a relay works on it. Raises :class:`OutboxError`.

    A context manager. Each look is one short transaction: a long one would let the write-ahead log grow.
    """

    def __init__(self, path: Path) -> None:
        with _translated():
            self._db = _connect_beside(path, "ro")

    def __enter__(self) -> OutboxView:
        return self

    def __exit__(self, *error: object) -> None:
        self._db.close()

    def snapshot(self) -> Snapshot:
        """The figures of one moment, which add up."""
        with self._one_moment():
            oldest = self._rows(_OLDEST)
            return Snapshot(
                Stats(*self._rows(_STATS)[0]),
                [host for (host,) in self._rows(_HOSTS)],
                oldest[0][0] if oldest else None,
                dict(self._rows("SELECT name, value FROM counters")),
                [Loss(*row) for row in self._rows("SELECT * FROM losses ORDER BY day, reason")],
                dict(self._rows("SELECT name, offset FROM journals")),
                dict(self._rows("SELECT name, value FROM summary")),
            )

    def history(self, now_ms: int) -> History:
        """The last hour and the last day, and what was watched most."""
        with self._one_moment():
            videos = [Watched(*row) for row in self._rows(_VIDEOS, now_ms // history.HOUR_MS - 23)]
            return History(
                self._series(now_ms, *history.HOUR),
                self._series(now_ms, *history.DAY),
                dict(self._rows("SELECT name, value FROM totals")),
                sorted(videos, key=lambda video: video.bytes, reverse=True)[:10],
                sorted(videos, key=lambda video: video.plays, reverse=True)[:10],
                [
                    Fatality(*row)
                    for row in self._rows(
                        "SELECT died_ms, host, photo_id, code, answer FROM dead ORDER BY died_ms DESC LIMIT ?",
                        history.MOST_REFUSED,
                    )
                ],
            )

    def _series(self, now_ms: int, step: int, count: int) -> Series:
        """The last *count* steps of *step* minutes, the one under way included."""
        first = history.first_minute(now_ms, step, count)
        return history.in_steps(self._rows(_STEPS, step, first), first, step, count)

    def waiting(self, most: int) -> list[Waiting]:
        """The latest *most* of the reports that wait, the oldest of them first."""
        with self._one_moment():
            rows = self._rows(f"SELECT leased, {_REPORT} FROM reports ORDER BY id DESC LIMIT ?", most)
        return [Waiting(Report(*report), bool(leased)) for leased, *report in reversed(rows)]

    def dead(self) -> list[DeadReport]:
        """The refused reports, the oldest first."""
        with self._one_moment():
            rows = self._rows(f"SELECT id, code, answer, died_ms, {_REPORT} FROM dead ORDER BY id")
        return [DeadReport(id, Report(*report), code, answer, ms) for id, code, answer, ms, *report in rows]

    def _rows(self, query: str, *values: int) -> list[Any]:
        return self._db.execute(query, values).fetchall()

    @contextmanager
    def _one_moment(self) -> Iterator[None]:
        with _translated():
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                self._db.execute("ROLLBACK")


class DeadLetters:
    """The refused reports, to be sent again or thrown away while a relay works. Raises :class:`OutboxError`.

    A context manager. Where *ids* is ``None``, all of them are meant.
    """

    def __init__(self, path: Path) -> None:
        with _translated():
            self._db = _connect_beside(path, "rw")

    def __enter__(self) -> DeadLetters:
        return self

    def __exit__(self, *error: object) -> None:
        self._db.close()

    def retry(self, ids: Iterable[int] | None) -> list[int]:
        """Let them wait again, as if never sent; the ids that there were. Their time stays, as in every retry."""
        with _immediate(self._db):
            found = self._found(ids)
            self._db.executemany(
                f"INSERT INTO reports (id, {_REPORT}) SELECT id, {_REPORT} FROM dead WHERE id = ?", found
            )
            self._forget(found)
        return [id for (id,) in found]

    def purge(self, ids: Iterable[int] | None, now_ms: int) -> list[int]:
        """Give them up, counted as lost because ``purged``; the ids that there were."""
        with _immediate(self._db):
            found = self._found(ids)
            _lose(self._db, "dead", [(id, "purged") for (id,) in found], now_ms)
        return [id for (id,) in found]

    def _found(self, ids: Iterable[int] | None) -> list[tuple[int]]:
        there = {id for (id,) in self._db.execute("SELECT id FROM dead")}
        return [(id,) for id in sorted(there if ids is None else there.intersection(ids))]

    def _forget(self, ids: list[tuple[int]]) -> None:
        self._db.executemany("DELETE FROM dead WHERE id = ?", ids)


def _connect_beside(path: Path, mode: str) -> sqlite3.Connection:
    """The database that a relay may be working on: never made, replaced or checked in full here."""
    if not path.exists():
        raise NoOutbox(f"there is no outbox at {path} yet; a relay makes it when it starts")
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=10, isolation_level=None
    )
    try:
        version = _version(db)
        if version == 0:
            raise NoOutbox(f"the outbox {path} is only being made; try again")
        if version != SCHEMA_VERSION:
            raise OutboxError(
                f"{path} is of another version of t23_middleware (its format is {version}, not {SCHEMA_VERSION});"
                " use that version's command, or start the relay of this one first"
            )
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    except BaseException:
        db.close()
        raise
    return db


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if _means_corrupt(error):
            raise OutboxCorrupt(
                f"the outbox is corrupt ({error}); restart the relay to begin a new one"
            ) from error
        kind = OutboxFull if str(error) in _FULL else OutboxError
        raise kind(f"the outbox can't be used: {error}") from error


def _means_corrupt(error: sqlite3.Error) -> bool:
    """SQLITE_CORRUPT and SQLITE_NOTADB have no class of their own; all else that may happen has.

    A damaged header makes another format of the file, which SQLite tells as it would tell of a later version's.
    """
    return type(error) is sqlite3.DatabaseError or str(error) == "unsupported file format"


def _open_or_replace(path: Path) -> sqlite3.Connection:
    """The database at *path*; a corrupt one is set aside, for a relay that refuses to start delivers nothing."""
    try:
        return _open(path)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        # The latter comes of SQLite's words about a schema with a bit that flipped.
        if isinstance(error, sqlite3.Error) and not _means_corrupt(error):
            kind = OutboxFull if str(error) in _FULL else OutboxError
            raise kind(f"{path} can't be opened: {error}") from error
        set_aside(path, error)
        with _translated():
            return _open(path)


def set_aside(path: Path, why: Exception) -> None:
    """Put the corrupt database at *path* where it is in nobody's way, and begin a new one.

    What can be read of its reports is counted as lost there, reason ``corrupt``. It is the most that can be lost:
    what the journals still hold is taken in once more.
    """
    left = _left_in(path)
    aside = path.with_name(f"{path.name}.corrupt-{time.time_ns() // 1_000_000}")
    path.replace(aside)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    log.error(
        "the outbox was corrupt (%s); it is set aside as %s, and a new one begins; %d reports that it held count as"
        " lost%s. Look after the disk",
        why,
        aside,
        left.loss.reports,
        "" if left.all else ", and what else it held is not known",
        extra={
            "t23_event": "outbox_set_aside",
            "t23_reason": str(why),
            "t23_path": str(aside),
            "t23_count": left.loss.reports,
        },
    )
    with suppress(sqlite3.Error, OSError):  # whoever opens it next meets that too
        _begin_with(path, left)


class _Left(NamedTuple):
    """What a corrupt database held."""

    loss: GivenUp
    #: Whether that is all.
    all: bool


def _begin_with(path: Path, left: _Left) -> None:
    now_ms = time.time_ns() // 1_000_000
    with closing(_open(path)) as db, _immediate(db):
        _give_up(db, [left.loss], now_ms)
        _count(db, {"captured": left.loss.reports, CORRUPT: 1, UNCOUNTED: int(not left.all)})


def _left_in(path: Path) -> _Left:
    """What can be read of the reports in a corrupt database, those that the API refused included."""
    uri = f"{path.absolute().as_uri()}?mode=ro"
    with suppress(sqlite3.Error), closing(sqlite3.connect(uri, uri=True, timeout=0)) as db:
        found = [_left_of(db, table) for table in ("reports", "dead")]
        reports, size = (sum(numbers) for numbers in zip(*(each.loss[1:] for each in found), strict=True))
        return _Left(GivenUp("corrupt", reports, size), all(each.all for each in found))
    return _Left(GivenUp("corrupt", 0, 0), False)


def _left_of(db: sqlite3.Connection, table: str) -> _Left:
    """From the first on up to the damage, then from the last on back to it."""
    reports, size, last = _read_on(db, f"SELECT id, sent FROM {table} ORDER BY id")
    if last is None:
        return _Left(GivenUp("corrupt", reports, size), True)
    behind = _read_on(db, f"SELECT id, sent FROM {table} WHERE id > ? ORDER BY id DESC", last)
    return _Left(GivenUp("corrupt", reports + behind[0], size + behind[1]), False)


def _read_on(db: sqlite3.Connection, query: str, *values: int) -> tuple[int, int, int | None]:
    """Number and bytes of the rows that can be read, and the id of the last one; ``None`` where all can."""
    reports = size = last = 0
    try:
        for id, sent in db.execute(query, values):
            reports, last = reports + 1, id
            size += sent if type(sent) is int and 0 <= sent < MOST_BYTES else 0
    except sqlite3.Error:
        return reports, size, last
    return reports, size, None


def _open(path: Path) -> sqlite3.Connection:
    # Only one thread touches it at a time; the check would also refuse a test's own thread.
    db = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
    try:
        version = _version(db)
        if version == 0:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only a file without tables takes it
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        db.execute(f"PRAGMA journal_size_limit = {LOG_KEPT}")
        if version > SCHEMA_VERSION:
            raise OutboxError(
                f"{path} is of a newer version of t23_middleware; run that one, or move the file"
            )
        if version == 0:
            db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} {_FOR_PAGES} {_FOR_PROXY} {_SET_VERSION} COMMIT;")
        elif _lacks_tables(db):
            db.executescript(f"BEGIN IMMEDIATE; {_FOR_PAGES} {_FOR_PROXY} COMMIT;")
        db.text_factory = _text
        _check(db)
        _mend(db)
        if version != 0:
            db.executescript(f"BEGIN IMMEDIATE; {_SET_VERSION} COMMIT;")
        path.chmod(0o600)
    except BaseException:
        db.close()
        raise
    return db


def _seal(version: int) -> int:
    return zlib.crc32(b"t23_middleware outbox %d" % version) & 0x7FFFFFFF


_SEALS = {_seal(version): version for version in range(1, NEWEST_KNOWN + 1)}
_SET_VERSION = f"PRAGMA user_version = {SCHEMA_VERSION}; PRAGMA application_id = {_seal(SCHEMA_VERSION)};"


def _version(db: sqlite3.Connection) -> int:
    """The file's format, 0 where it is only being made. Raises :class:`sqlite3.DatabaseError` where that is damaged."""
    (sealed,) = db.execute("PRAGMA application_id").fetchone()
    (said,) = db.execute("PRAGMA user_version").fetchone()
    if sealed in _SEALS:
        return _SEALS[sealed]
    if said in (0, SCHEMA_VERSION):
        return int(said)
    raise sqlite3.DatabaseError("its version is damaged")


def _lacks_tables(db: sqlite3.Connection) -> bool:
    query = "SELECT count(*) FROM sqlite_master WHERE name IN (?, ?)"
    return bool(db.execute(query, _LATER).fetchone()[0] < len(_LATER))


def _check(db: sqlite3.Connection) -> None:
    """Raises :class:`sqlite3.DatabaseError` where the file is corrupt, and not only an index of it."""
    if _is_sound(db):
        return
    db.execute("REINDEX")
    if not _is_sound(db):
        raise sqlite3.DatabaseError("its integrity_check fails")


def _is_sound(db: sqlite3.Connection) -> bool:
    # Not quick_check, which leaves out what an index says of rows that are not there, and the other way round.
    return bool(db.execute("PRAGMA integrity_check(1)").fetchone()[0] == "ok")


def _text(data: bytes) -> str:
    """A text with a bit that flipped is the API's to refuse; one that can't be read would stop all others."""
    return data.decode(errors="replace")


def _mend(db: sqlite3.Connection) -> None:
    """Take out the rows that no relay can have written: flipped bits that the file's structure does not show.

    Raises :class:`sqlite3.DatabaseError` where not even the tables are ours.
    """
    try:
        db.execute("BEGIN IMMEDIATE")
        for table, strange in _what_is_strange():
            gone = db.execute(f"DELETE FROM {table} WHERE {strange}").rowcount
            db.execute(f"EXPLAIN INSERT INTO {table} DEFAULT VALUES")  # compiles its triggers
            if gone:
                _say_gone(db, table, gone)
        db.execute("COMMIT")
    except sqlite3.OperationalError as error:
        if str(error).startswith(("no such ", "error in ")):
            raise sqlite3.DatabaseError(str(error)) from error
        raise


def _say_gone(db: sqlite3.Connection, table: str, rows: int) -> None:
    log.error(
        "the outbox was damaged: %d rows of %s can't be read and are gone; look after the disk",
        rows,
        table,
        extra={"t23_event": "outbox_damaged", "t23_reason": table, "t23_count": rows},
    )
    if table in ("reports", "dead"):
        db.execute(
            "INSERT INTO losses VALUES (?, 'corrupt', ?, 0) ON CONFLICT (day, reason) DO UPDATE SET reports = reports + excluded.reports",
            (_day(time.time_ns() // 1_000_000), rows),
        )


def _what_is_strange() -> list[tuple[str, str]]:
    """Each table of ours, and what is true of a row with a value that is not of its column's type."""
    with closing(sqlite3.connect(":memory:")) as ours:
        ours.executescript(_SCHEMA + _FOR_PAGES + _FOR_PROXY)
        names = ours.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        return [(table, _strange(ours, table)) for (table,) in names if not table.startswith("sqlite_")]


def _strange(ours: sqlite3.Connection, table: str) -> str:
    columns = ours.execute(f"PRAGMA table_info({table})")
    return " OR ".join(f"typeof({name}) NOT IN ('{kind.lower()}', 'null')" for _, name, kind, *_ in columns)
