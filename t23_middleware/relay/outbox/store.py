"""The outbox for the relay, which reads and writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .. import history
from ..report import CLOCK_SET_MS, Report
from .connection import SQLITE_ERRORS, immediate, translate_errors
from .readers import log_size
from .salvage import open_or_replace
from .schema import HOSTS, OLDEST, REPORT_COLUMNS, REPORT_MARKS, STATS
from .tally import add_counts, add_history, add_history_now, add_losses, drop_reports
from .turns import Turns
from .values import (
    Acked,
    Dead,
    EarlyLoss,
    Entry,
    Ingest,
    Key,
    Lost,
    OutboxError,
    OutboxFull,
    Retry,
    Settlement,
    Stats,
)

_UNDATED = f"time_ms < {CLOCK_SET_MS} AND tries = 0 AND leased = 0"
_UNDATED_DEAD = f"died_ms < {CLOCK_SET_MS}"
_LATEST_UNDATED = f"""
SELECT max(at) FROM (
    SELECT max(time_ms) AS at FROM reports WHERE {_UNDATED}
    UNION ALL SELECT max(died_ms) FROM dead WHERE {_UNDATED_DEAD}
)
"""
#: Deletes an hour's videos that are neither among those with the most bytes nor among those with the most plays.
_FORGET_VIDEOS = """
DELETE FROM videos WHERE hour = :hour
AND (host, photo_id) NOT IN (SELECT host, photo_id FROM videos WHERE hour = :hour ORDER BY bytes DESC LIMIT :most)
AND (host, photo_id) NOT IN (SELECT host, photo_id FROM videos WHERE hour = :hour ORDER BY plays DESC LIMIT :most)
"""
#: Longest delay of a retry, in ms; a later due time comes from a clock that was reset.
LONGEST_DELAY_MS = 2 * 3600 * 1000
#: Whether a dead letter belongs to the video that has more than half of them.
_MOST_REFUSED = """
((host, photo_id) IN (SELECT host, photo_id FROM dead GROUP BY 1, 2 HAVING count(*) * 2 > (SELECT count(*) FROM dead)))
"""
_LAST_TURN = "SELECT max(turn) FROM reports WHERE host = ? AND leased = 0"
#: This many waiting reports of one video or session are not a flood, however few others wait.
LEAST_FLOOD = 1000
#: SQLite's own limit of a file's pages.
MOST_PAGES = (1 << 30) - 1


class SQLiteOutbox:
    """An :class:`Outbox` in one SQLite file, written with ``synchronous=FULL``, since no request waits for it.

    *make_room* is called when the disk is full; it returns whether there is more room now.
    """

    def __init__(self, path: Path, make_room: Callable[[], bool] = lambda: False) -> None:
        self._path = path
        self._make_room = make_room
        self._keeps_reserve = False
        try:
            self._db = open_or_replace(path)
        except OutboxFull:
            if not make_room():
                raise
            self._db = open_or_replace(path)
        with translate_errors():
            (first,) = self._db.execute("SELECT coalesce(min(turn), 1) FROM reports").fetchone()
        self._turns = Turns(first - 1)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def offsets(self) -> dict[str, int]:
        with translate_errors():
            return dict(self._db.execute("SELECT name, offset FROM journals"))

    @contextmanager
    def atomic(self) -> Iterator[None]:
        with self._transaction():
            yield

    def viewings(self) -> Iterator[tuple[Key, str]]:
        with translate_errors():
            for host, session_id, photo_id, state in self._db.execute("SELECT * FROM viewings"):
                yield (host, session_id, photo_id), state

    def proxy_rows(self) -> dict[str, str]:
        with translate_errors():
            return dict(self._db.execute("SELECT name, value FROM proxy"))

    def ingest(self, batch: Ingest) -> None:
        with self._transaction():
            losses = list(batch.losses)
            if batch.lost_as:
                sent = sum(report.sent for report in batch.reports)
                losses.append(EarlyLoss(batch.lost_as, len(batch.reports), sent))
            else:
                self._db.executemany(
                    f"INSERT INTO reports ({REPORT_COLUMNS}, since_ms, turn) VALUES ({REPORT_MARKS}, ?, ?)",
                    ((*report, batch.since_ms, self._turns.next(report)) for report in batch.reports),
                )
            add_losses(self._db, losses, batch.at_ms)
            self._keep_viewings(batch.viewings)
            self._keep_proxy_rows(batch.proxy)
            self._db.executemany("INSERT OR REPLACE INTO journals VALUES (?, ?)", batch.offsets.items())
            captured = len(batch.reports) + sum(loss.reports for loss in batch.losses)
            add_counts(self._db, {**batch.counts, "captured": captured})
            add_history(self._db, history.of_reports(batch.reports))
            add_history_now(self._db, batch.at_ms, {history.CAPTURED: captured - len(batch.reports)})
            self._add_video_figures(batch.reports)
            self.note(batch.notes)

    def forget_journals(self, names: Sequence[str]) -> None:
        if not names:
            return
        with self._transaction():
            self._db.executemany("DELETE FROM journals WHERE name = ?", ((name,) for name in names))

    def recover_leases(self, retry: bool, now_ms: int) -> int:
        """Release a dead relay's leases. Its reports may have arrived: retry them or, if *retry* is false, drop them.

        Returns their number.
        """
        with self._transaction():
            rows = self._db.execute("SELECT id FROM reports WHERE leased != 0").fetchall()
            if not retry:
                drop_reports(self._db, "reports", [(id, "ambiguous") for (id,) in rows], now_ms)
            self._db.execute("UPDATE reports SET leased = 0, tries = tries + 1 WHERE leased != 0")
        return len(rows)

    def claim(self, count: int, now_ms: int, hosts: Iterable[str]) -> list[Entry]:
        with self._transaction():
            rows = [row for host in hosts for row in self._due(host, now_ms, count)]
            rows = sorted(rows)[:count]
            if rows:
                self._turns.reached = max(self._turns.reached, rows[-1][0])
            return self._leased(rows)

    def claim_after(self, id: int, host: str, now_ms: int) -> list[Entry]:
        with self._transaction():
            (turn,) = self._db.execute("SELECT max(turn) FROM reports WHERE id = ?", (id,)).fetchone()
            after = self._due(host, now_ms, 1, (turn, id)) if turn is not None else []
            return self._leased(after or self._due(host, now_ms, 1))

    def _leased(self, rows: list[Any]) -> list[Entry]:
        self._db.executemany("UPDATE reports SET leased = 1 WHERE id = ?", ((row[1],) for row in rows))
        return [Entry(row[1], Report(*row[5:]), row[2], row[3], bool(row[4])) for row in rows]

    def _due(self, host: str, now_ms: int, count: int, after: tuple[int, int] = (-1, 0)) -> list[Any]:
        """Due reports of one host: the index has them in order, while reports of several hosts would need a sort."""
        return self._db.execute(
            f"SELECT turn, id, tries, attempts, retimed, {REPORT_COLUMNS} FROM reports WHERE host = ? AND leased = 0"
            " AND (turn, id) > (?, ?) AND (due_ms <= ? OR due_ms > ?) ORDER BY turn, id LIMIT ?",
            (host, *after, now_ms, now_ms + LONGEST_DELAY_MS, count),
        ).fetchall()

    def settle(self, settlements: Sequence[Settlement], now_ms: int) -> None:
        with self._transaction():
            acked = [(item.id,) for item in settlements if isinstance(item, Acked)]
            sent = self._db.executemany("DELETE FROM reports WHERE id = ?", acked).rowcount if acked else 0
            for item in settlements:
                if isinstance(item, Retry):
                    self._retry_later(item)
                elif isinstance(item, Dead):
                    self._move_to_dead(item, now_ms)
            drop_reports(
                self._db,
                "reports",
                [(item.id, item.reason) for item in settlements if isinstance(item, Lost)],
                now_ms,
            )
            add_counts(self._db, {"sent": sent})
            tries = [
                (item.outcome, item.took_ms if isinstance(item, Acked) else None) for item in settlements
            ]
            add_history_now(self._db, now_ms, {**history.of_tries(tries), history.SENT: sent})

    def hosts(self) -> list[str]:
        with translate_errors():
            return [host for (host,) in self._db.execute(HOSTS)]

    def stats(self) -> Stats:
        with translate_errors():
            return Stats(*self._db.execute(STATS).fetchone())

    def counters(self) -> dict[str, int]:
        """Every named counter."""
        with translate_errors():
            return dict(self._db.execute("SELECT name, value FROM counters"))

    def note(self, notes: Mapping[str, str]) -> None:
        if not notes:
            return
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO summary VALUES (?, ?)", notes.items())

    def notes(self) -> dict[str, str]:
        """The notes that :meth:`note` stored."""
        with translate_errors():
            return dict(self._db.execute("SELECT name, value FROM summary"))

    def begin_minute(self, now_ms: int, open_responses: int) -> None:
        minute, hour = now_ms // history.MINUTE_MS, now_ms // history.HOUR_MS
        with self._transaction():
            oldest = self._db.execute(OLDEST).fetchone()
            gauges = {
                history.OPEN: open_responses,
                history.WAITING: self.stats().waiting,
                history.OLDEST: max(now_ms - oldest[0], 0) // 1000 if oldest else 0,
            }
            self._db.executemany(
                "INSERT OR REPLACE INTO minutes VALUES (?, ?, ?)",
                [(minute, name, value) for name, value in gauges.items()],
            )
            # A minute in the future comes from a clock that was set back.
            kept = minute - history.KEPT_MINUTES, minute + 60
            self._db.execute("DELETE FROM minutes WHERE minute < ? OR minute > ?", kept)
            self._db.execute("DELETE FROM videos WHERE hour < ? OR hour > ?", (kept[0] // 60, kept[1] // 60))
            for each in (hour - 1, hour):
                self._db.execute(_FORGET_VIDEOS, {"hour": each, "most": history.MOST_VIDEOS})

    # Limits.

    def size(self) -> int:
        """Used bytes of the file."""
        return (self._pragma("page_count") - self._pragma("freelist_count")) * self._pragma("page_size")

    def log_size(self) -> int:
        """Bytes of the write-ahead log."""
        return log_size(self._path)

    def free(self) -> int:
        """Free bytes of the file."""
        return self._pragma("freelist_count") * self._pragma("page_size")

    @contextmanager
    def growing_by(self, size: int, *, may_make_room: bool = False) -> Iterator[None]:
        """Within this context the file grows by at most *size* bytes; *may_make_room* allows it to use the reserve."""
        most = self._pragma("page_count") + size // self._pragma("page_size")
        self._pragma(f"max_page_count = {min(most, MOST_PAGES)}")
        self._keeps_reserve = not may_make_room
        try:
            yield
        finally:
            self._keeps_reserve = False
            # An error here must not look like a failed commit: the batch would be stored twice.
            with suppress(OutboxError):
                self._pragma(f"max_page_count = {MOST_PAGES}")

    def shrink(self, kept: int, most: int) -> bool:
        """Return up to *most* pages to the disk if more than *kept*, and more than half, are free. Returns whether."""
        free = self._pragma("freelist_count")
        wanted = free > max(kept, self._pragma("page_count") // 2)
        if wanted:
            with translate_errors():
                # Not execute(), which frees only one page: it stops at the statement's first row, which has no columns.
                self._db.executescript(f"PRAGMA incremental_vacuum({min(free - kept, most)});")
            self._checkpoint()  # only this makes the file shorter
        return wanted

    def start_ages(self, elapsed_ms: int) -> None:
        """Set the start of the age to *elapsed_ms* for reports without one: refused ones, and retried dead letters."""
        for table in ("reports", "dead"):
            query = f"SELECT 1 FROM {table} WHERE since_ms IS NULL LIMIT 1"
            with translate_errors():
                found = self._db.execute(query).fetchone()
            if found:
                with self._transaction():
                    self._db.execute(f"UPDATE {table} SET since_ms = ? WHERE since_ms IS NULL", (elapsed_ms,))

    def drop_older(self, before_ms: int, most: int, reason: str, now_ms: int) -> int:
        """Drop up to *most* reports that wait since before *before_ms* (elapsed), but none in flight. Returns the number."""
        query = "SELECT id FROM reports WHERE leased = 0 AND since_ms < ? ORDER BY id LIMIT ?"
        return self._drop_found("reports", query, (before_ms, most), reason, now_ms)

    def latest_undated(self) -> int | None:
        """The latest time, in ms, that comes from a clock that was not set yet, or ``None``; see :meth:`date`."""
        with translate_errors():
            (latest,) = self._db.execute(_LATEST_UNDATED).fetchone()
        return None if latest is None else int(latest)

    def date(self, shift_ms: int) -> None:
        """Add *shift_ms* to the times from a clock that was not set yet, except of reports that may have arrived."""
        with self._transaction():
            self._db.execute(f"UPDATE reports SET time_ms = time_ms + ? WHERE {_UNDATED}", (shift_ms,))
            self._db.execute(f"UPDATE dead SET died_ms = died_ms + ? WHERE {_UNDATED_DEAD}", (shift_ms,))

    def drop_oldest(self, most: int, kept: int, reason: str, now_ms: int) -> int:
        """Drop the first *most* reports that are not in flight, but none of the last *kept*. Returns the number.

        If one video or session has more than half of the waiting reports, its latest reports are dropped instead.
        """
        if flood := self._flood(min(most, max(self.stats().waiting - kept, 0))):
            with self._transaction():
                drop_reports(self._db, "reports", [(id, reason) for id in flood], now_ms)
            return len(flood)
        query = (
            "SELECT id FROM reports WHERE leased = 0 ORDER BY id"
            " LIMIT max(0, min(?, (SELECT count(*) FROM reports) - ?))"
        )
        return self._drop_found("reports", query, (most, kept), reason, now_ms)

    def _flood(self, most: int) -> list[int]:
        """Ids of reports whose turn comes after half of the waiting reports, the last turn first."""
        waiting = self.stats().waiting
        behind = self._turns.reached + max(waiting // 2, LEAST_FLOOD)
        with translate_errors():
            last = [self._db.execute(_LAST_TURN, (host,)).fetchone()[0] or 0 for host in self.hosts()]
        if max(last, default=0) - self._turns.reached >= waiting:
            return []  # all waiting reports belong to it
        found: list[int] = []
        for host in self.hosts():
            with translate_errors():
                rows = self._db.execute(
                    "SELECT id FROM reports WHERE host = ? AND leased = 0 AND turn > ? ORDER BY turn DESC LIMIT ?",
                    (host, behind, most - len(found)),
                ).fetchall()
            found += [id for (id,) in rows]
        return found

    def drop_dead_older(self, before_ms: int, most: int, reason: str, now_ms: int) -> int:
        """Drop up to *most* dead letters that were refused before *before_ms* (elapsed). Returns the number."""
        query = "SELECT id FROM dead WHERE since_ms < ? ORDER BY since_ms LIMIT ?"
        return self._drop_found("dead", query, (before_ms, most), reason, now_ms)

    def drop_oldest_dead(self, most: int, kept: int, reason: str, now_ms: int) -> int:
        """Drop up to *most* of the oldest dead letters, but none of the last *kept*. Returns the number.

        If one video has more than half of them, its dead letters are dropped first.
        """
        query = f"SELECT id FROM dead ORDER BY {_MOST_REFUSED} DESC, died_ms, id LIMIT max(0, min(?, (SELECT count(*) FROM dead) - ?))"
        return self._drop_found("dead", query, (most, kept), reason, now_ms)

    def _drop_found(self, table: str, query: str, values: tuple[int, int], reason: str, now_ms: int) -> int:
        with translate_errors():
            found = self._db.execute(query, values).fetchall()
        if found:
            with self._transaction():
                drop_reports(self._db, table, [(id, reason) for (id,) in found], now_ms)
        return len(found)

    def make_due(self) -> None:
        """Make all reports that wait for a retry due now."""
        with self._transaction():
            self._db.execute("UPDATE reports SET due_ms = 0 WHERE due_ms > 0")

    def _retry_later(self, item: Retry) -> None:
        self._db.execute(
            "UPDATE reports SET leased = 0, due_ms = ?, tries = ?, attempts = ?, retimed = retimed + ?,"
            " time_ms = coalesce(?, time_ms) WHERE id = ?",
            (
                item.due_ms,
                item.ambiguous_sends,
                item.unexplained_answers,
                item.time_ms is not None,
                item.time_ms,
                item.id,
            ),
        )

    def _move_to_dead(self, item: Dead, now_ms: int) -> None:
        self._db.execute(
            f"INSERT OR REPLACE INTO dead SELECT id, {REPORT_COLUMNS}, ?, ?, ?, NULL FROM reports WHERE id = ?",
            (item.code, item.answer, now_ms, item.id),
        )
        buried = self._db.execute("DELETE FROM reports WHERE id = ?", (item.id,)).rowcount
        add_history_now(self._db, now_ms, {history.DEAD: buried})

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

    def _add_video_figures(self, reports: Iterable[Report]) -> None:
        self._db.executemany(
            "INSERT INTO videos VALUES (?, ?, ?, ?, ?) ON CONFLICT (hour, host, photo_id) DO UPDATE"
            " SET plays = plays + excluded.plays, bytes = bytes + excluded.bytes",
            ((hour, *each) for hour, each in history.video_figures(reports)),
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        if self._db.in_transaction:
            yield  # part of an outer transaction
            return
        try:
            with immediate(self._db):
                yield
        except OutboxFull:
            if not self._keeps_reserve and self._make_room():
                self._checkpoint()
            raise

    def _checkpoint(self) -> None:
        """Checkpoint now, before another process uses the room: a log that can't be checkpointed only grows."""
        with suppress(*SQLITE_ERRORS):
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def _pragma(self, text: str) -> int:
        with translate_errors():
            return int(self._db.execute(f"PRAGMA {text}").fetchone()[0])
