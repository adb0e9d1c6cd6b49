"""The outbox: reports that wait, in a file that survives; the only place that speaks SQL.

One relay at a time writes it, which the relay's lock guarantees; pages and commands only read.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..errors import StateError
from .report import Report

log = logging.getLogger(__name__)

#: A viewing's key: host, session and photo.
Key = tuple[str, str, str]

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE reports (
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
CREATE INDEX reports_by_host ON reports (host, leased, id);
CREATE TABLE dead (
    id INTEGER PRIMARY KEY,
    time_ms INTEGER NOT NULL, host TEXT NOT NULL, session_id TEXT NOT NULL, photo_id TEXT NOT NULL,
    sent INTEGER NOT NULL, skip INTEGER NOT NULL,
    player_type TEXT, player_version TEXT, player_resolution TEXT,
    code TEXT NOT NULL, answer TEXT NOT NULL, died_ms INTEGER NOT NULL
);
CREATE TABLE viewings (
    host TEXT, session_id TEXT, photo_id TEXT, state TEXT NOT NULL,
    PRIMARY KEY (host, session_id, photo_id)
) WITHOUT ROWID;
CREATE TABLE journals (name TEXT PRIMARY KEY, offset INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE losses (
    day TEXT, reason TEXT, reports INTEGER NOT NULL, bytes INTEGER NOT NULL,
    PRIMARY KEY (day, reason)
) WITHOUT ROWID;
"""
#: Each host that has reports, by a jump through the index: DISTINCT would read all of it.
_HOSTS = """
WITH RECURSIVE found (host) AS (
    SELECT min(host) FROM reports
    UNION ALL
    SELECT (SELECT min(host) FROM reports WHERE host > found.host) FROM found WHERE host IS NOT NULL
)
SELECT host FROM found WHERE host IS NOT NULL
"""
_STATS = """
SELECT
    coalesce((SELECT value FROM counters WHERE name = 'captured'), 0),
    (SELECT count(*) FROM reports),
    coalesce((SELECT value FROM counters WHERE name = 'sent'), 0),
    (SELECT count(*) FROM dead),
    (SELECT coalesce(sum(reports), 0) FROM losses)
"""
_REPORT = ", ".join(Report._fields)
_MARKS = ", ".join("?" * len(Report._fields))

#: Longest that a retry is ever put off, in ms; a due time beyond it comes from a clock that was set back.
LONGEST_DELAY_MS = 2 * 3600 * 1000
#: Pages of the write-ahead log before it is folded into the file. Small, so that a full disk still takes
#: acknowledgements: 2,000 of 2,000 with 16 pages, 54 with SQLite's default of 1,000.
CHECKPOINT_PAGES = 16


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


class Ingest(NamedTuple):
    """What one look at the journals brought; kept whole or not at all."""

    reports: Sequence[Report]
    #: Changed viewings, ``None`` for one that is dropped.
    viewings: Sequence[tuple[Key, str | None]]
    #: Journal -> offset in bytes up to which it is taken in.
    places: Mapping[str, int]
    counts: Mapping[str, int]


class Acked(NamedTuple):
    """The report was recorded."""

    id: int


class Again(NamedTuple):
    """The report is tried again at *due_ms*."""

    id: int
    due_ms: int
    tries: int
    attempts: int = 0
    #: Its new time, where it needs one.
    time_ms: int | None = None


class Dead(NamedTuple):
    """The report was refused for good."""

    id: int
    code: str
    answer: str


class Lost(NamedTuple):
    """The report is given up, and counted under *reason*."""

    id: int
    reason: str


Settlement = Acked | Again | Dead | Lost


class Stats(NamedTuple):
    """Figures that add up: captured = waiting + sent + dead + lost."""

    captured: int
    waiting: int
    sent: int
    dead: int
    lost: int


class Outbox(Protocol):
    """What the relay needs of a store; every method raises :class:`OutboxError` where the store fails."""

    def together(self) -> AbstractContextManager[None]:
        """What is done within happens whole or not at all, at the price of one write to the disk."""

    def places(self) -> dict[str, int]:
        """Journal -> offset up to which it was taken in."""

    def viewings(self) -> Iterator[tuple[Key, str]]:
        """The playback state that was kept."""

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


class OutboxError(StateError):
    """The store failed; what was asked of it did not happen."""


class OutboxCorrupt(StateError):
    """The file is no longer a database; the next :class:`SQLiteOutbox` on it begins a new one."""


class SQLiteOutbox:
    """An :class:`Outbox` in one SQLite file, written with ``synchronous=FULL``: off the request path, so it may."""

    def __init__(self, path: Path) -> None:
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

    def ingest(self, batch: Ingest) -> None:
        with self._transaction():
            self._db.executemany(f"INSERT INTO reports ({_REPORT}) VALUES ({_MARKS})", batch.reports)
            for key, state in batch.viewings:
                if state is None:
                    self._db.execute(
                        "DELETE FROM viewings WHERE (host, session_id, photo_id) = (?, ?, ?)", key
                    )
                else:
                    self._db.execute("INSERT OR REPLACE INTO viewings VALUES (?, ?, ?, ?)", (*key, state))
            self._db.executemany("INSERT OR REPLACE INTO journals VALUES (?, ?)", batch.places.items())
            self._count({**batch.counts, "captured": len(batch.reports)})

    def forget_journals(self, names: Sequence[str]) -> None:
        if not names:
            return
        with self._transaction():
            self._db.executemany("DELETE FROM journals WHERE name = ?", ((name,) for name in names))

    def recover_leases(self, retry: bool, now_ms: int) -> int:
        """Reports that a dead relay had in hand may have arrived: send them again, or lose them if *retry* is false."""
        with self._transaction():
            rows = self._db.execute("SELECT id FROM reports WHERE leased = 1").fetchall()
            if not retry:
                self._lose([(id, "ambiguous") for (id,) in rows], now_ms)
            self._db.execute("UPDATE reports SET leased = 0, tries = tries + 1 WHERE leased = 1")
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
            self._lose([(item.id, item.reason) for item in settlements if isinstance(item, Lost)], now_ms)
            self._count({"sent": sent})

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
        self._db.execute("DELETE FROM reports WHERE id = ?", (item.id,))

    def _lose(self, rows: Iterable[tuple[int, str]], now_ms: int) -> None:
        day = time.strftime("%Y-%m-%d", time.gmtime(now_ms / 1000))
        for id, reason in rows:
            self._db.execute(
                "INSERT INTO losses SELECT ?, ?, 1, sent FROM reports WHERE id = ?"
                " ON CONFLICT DO UPDATE SET reports = reports + 1, bytes = bytes + excluded.bytes",
                (day, reason, id),
            )
            self._db.execute("DELETE FROM reports WHERE id = ?", (id,))

    def _count(self, counts: Mapping[str, int]) -> None:
        self._db.executemany(
            "INSERT INTO counters VALUES (?, ?) ON CONFLICT DO UPDATE SET value = value + excluded.value",
            [(name, number) for name, number in counts.items() if number],
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        if self._db.in_transaction:
            yield  # a part of what is done together
            return
        with _translated():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if _means_corrupt(error):
            raise OutboxCorrupt(
                f"the outbox is corrupt ({error}); restart the relay to begin a new one"
            ) from error
        raise OutboxError(f"the outbox can't be used: {error}") from error


def _means_corrupt(error: sqlite3.Error) -> bool:
    """SQLITE_CORRUPT and SQLITE_NOTADB have no class of their own; all else that may happen has."""
    return type(error) is sqlite3.DatabaseError


def _open_or_replace(path: Path) -> sqlite3.Connection:
    """The database at *path*; a corrupt one is set aside, for a relay that refuses to start delivers nothing."""
    try:
        return _open(path)
    except sqlite3.Error as error:
        if not _means_corrupt(error):
            raise OutboxError(f"{path} can't be opened: {error}") from error
        aside = path.with_name(f"{path.name}.corrupt-{time.time_ns() // 1_000_000}")
        path.replace(aside)
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        log.error("the outbox was corrupt (%s); it is set aside as %s, and a new one begins", error, aside)
        with _translated():
            return _open(path)


def _open(path: Path) -> sqlite3.Connection:
    # Only one thread touches it at a time; the check would also refuse a test's own thread.
    db = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
    try:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only a file without tables takes it
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        if version > SCHEMA_VERSION:
            raise OutboxError(
                f"{path} is of a newer version of t23_middleware; run that one, or move the file"
            )
        if version == 0:
            db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("quick_check failed")
        path.chmod(0o600)
    except BaseException:
        db.close()
        raise
    return db
