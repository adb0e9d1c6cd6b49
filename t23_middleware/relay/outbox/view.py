"""The outbox for commands and pages, while a relay may use it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import history
from ..history import History, Refusal, Series, VideoFigures
from ..report import Report
from ..viewer import Key
from .connection import immediate, open_beside, translate_errors
from .schema import HOSTS, OLDEST, REPORT_COLUMNS, STATS
from .tally import drop_reports
from .values import DeadReport, Loss, OutboxCorrupt, Snapshot, Stats, Waiting

_STEPS = f"""
SELECT minute / ?, name, CASE WHEN name IN {history.GAUGES} THEN max(value) ELSE CAST(total(value) AS INTEGER) END
FROM minutes WHERE minute >= ? GROUP BY 1, 2
"""
_VIDEOS = """
SELECT host, photo_id, sum(plays), CAST(total(bytes) AS INTEGER) FROM videos WHERE hour >= ? GROUP BY 1, 2
"""


def _checked(rows: list[Any], *kinds: type) -> list[Any]:
    """*rows*, whose first columns are checked to have these *kinds*: SQLite accepts any type in any column."""
    for row in rows:
        if not all(map(isinstance, row, kinds)):
            raise OutboxCorrupt(
                "the outbox is corrupt (it has a value of the wrong type); restart the relay to start a new one"
            )
    return rows


class OutboxView:
    """Reads the outbox while a relay may use it. A context manager. Raises :class:`OutboxError`.

    Each method uses one short transaction, since a long one would make the write-ahead log grow.
    """

    def __init__(self, path: Path) -> None:
        with translate_errors():
            self._db = open_beside(path, "ro")

    def __enter__(self) -> OutboxView:
        return self

    def __exit__(self, *error: object) -> None:
        self._db.close()

    def snapshot(self) -> Snapshot:
        """The figures of one moment, so that they add up."""
        with self._one_moment():
            oldest = _checked(self._rows(OLDEST), int)
            counters = self._rows("SELECT name, value FROM counters")
            losses = self._rows("SELECT * FROM losses ORDER BY day, reason")
            offsets = self._rows("SELECT name, offset FROM journals")
            notes = self._rows("SELECT name, value FROM summary")
            return Snapshot(
                Stats(*_checked(self._rows(STATS), int, int, int, int, int)[0]),
                [host for (host,) in _checked(self._rows(HOSTS), str)],
                oldest[0][0] if oldest else None,
                dict(_checked(counters, str, int)),
                [Loss(*row) for row in _checked(losses, str, str, int, int)],
                dict(_checked(offsets, str, int)),
                dict(_checked(notes, str, str)),
            )

    def history(self, now_ms: int) -> History:
        """The figures of the last hour and day, and the most watched videos."""
        with self._one_moment():
            videos = [VideoFigures(*row) for row in self._rows(_VIDEOS, now_ms // history.HOUR_MS - 23)]
            return History(
                self._series(now_ms, *history.HOUR),
                self._series(now_ms, *history.DAY),
                dict(self._rows("SELECT name, value FROM totals")),
                sorted(videos, key=lambda video: video.bytes, reverse=True)[:10],
                sorted(videos, key=lambda video: video.plays, reverse=True)[:10],
                [
                    Refusal(*row)
                    for row in self._rows(
                        "SELECT died_ms, host, photo_id, code, answer FROM dead ORDER BY died_ms DESC LIMIT ?",
                        history.MOST_REFUSED,
                    )
                ],
            )

    def _series(self, now_ms: int, step: int, count: int) -> Series:
        """The last *count* steps of *step* minutes, including the current one."""
        first = history.first_minute(now_ms, step, count)
        return history.in_steps(self._rows(_STEPS, step, first), first, step, count)

    def waiting(self, most: int) -> list[Waiting]:
        """The latest *most* waiting reports, the oldest of them first."""
        with self._one_moment():
            rows = self._rows(f"SELECT leased, {REPORT_COLUMNS} FROM reports ORDER BY id DESC LIMIT ?", most)
        return [Waiting(Report(*report), bool(leased)) for leased, *report in reversed(rows)]

    def viewings(self) -> list[tuple[Key, str]]:
        """The stored session states, for :meth:`~t23_middleware.relay.viewer.SessionState.load`."""
        with self._one_moment():
            rows = self._rows("SELECT host, session_id, photo_id, state FROM viewings")
        return [((host, session_id, photo_id), state) for host, session_id, photo_id, state in rows]

    def proxy_rows(self) -> dict[str, str]:
        """The relay's rows about the proxy's logs, see :mod:`~t23_middleware.relay.proxy_join`."""
        with self._one_moment():
            return dict(self._rows("SELECT name, value FROM proxy"))

    def dead(self) -> list[DeadReport]:
        """The refused reports, the oldest first."""
        with self._one_moment():
            rows = self._rows(f"SELECT id, code, answer, died_ms, {REPORT_COLUMNS} FROM dead ORDER BY id")
        _checked(rows, int, str, str, int, int, str, str, str, int, int)
        return [DeadReport(id, Report(*report), code, answer, ms) for id, code, answer, ms, *report in rows]

    def _rows(self, query: str, *values: int) -> list[Any]:
        return self._db.execute(query, values).fetchall()

    @contextmanager
    def _one_moment(self) -> Iterator[None]:
        with translate_errors():
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                self._db.execute("ROLLBACK")


class DeadLetters:
    """Retries or deletes refused reports while a relay may use the outbox. Raises :class:`OutboxError`.

    A context manager. *ids* ``None`` means all refused reports.
    """

    def __init__(self, path: Path) -> None:
        with translate_errors():
            self._db = open_beside(path, "rw")

    def __enter__(self) -> DeadLetters:
        return self

    def __exit__(self, *error: object) -> None:
        self._db.close()

    def retry(self, ids: Iterable[int] | None) -> list[int]:
        """Move them back to the waiting reports, as never tried, with their old time. Returns the ids that existed."""
        with immediate(self._db):
            found = self._found(ids)
            self._db.executemany(
                f"INSERT INTO reports (id, {REPORT_COLUMNS}) SELECT id, {REPORT_COLUMNS} FROM dead WHERE id = ?",
                found,
            )
            self._forget(found)
        return [id for (id,) in found]

    def purge(self, ids: Iterable[int] | None, now_ms: int) -> list[int]:
        """Delete them, counted as lost for the reason ``purged``. Returns the ids that existed."""
        with immediate(self._db):
            found = self._found(ids)
            drop_reports(self._db, "dead", [(id, "purged") for (id,) in found], now_ms)
        return [id for (id,) in found]

    def _found(self, ids: Iterable[int] | None) -> list[tuple[int]]:
        there = {id for (id,) in self._db.execute("SELECT id FROM dead")}
        return [(id,) for id in sorted(there if ids is None else there.intersection(ids))]

    def _forget(self, ids: list[tuple[int]]) -> None:
        self._db.executemany("DELETE FROM dead WHERE id = ?", ids)
