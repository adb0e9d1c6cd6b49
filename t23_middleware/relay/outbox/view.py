"""The outbox as commands and pages see it, while a relay works on it."""

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


def _sound(rows: list[Any], *kinds: type) -> list[Any]:
    """*rows*, whose first columns are of these *kinds*: SQLite keeps anything in any column, so damage may be there."""
    for row in rows:
        if not all(map(isinstance, row, kinds)):
            raise OutboxCorrupt(
                "the outbox is corrupt (it holds a value of the wrong kind); restart the relay to begin a new one"
            )
    return rows


class OutboxView:
    """The outbox as commands and pages see it: read only, while a relay works on it. Raises :class:`OutboxError`.

    A context manager. Each look is one short transaction: a long one would let the write-ahead log grow.
    """

    def __init__(self, path: Path) -> None:
        with translate_errors():
            self._db = open_beside(path, "ro")

    def __enter__(self) -> OutboxView:
        return self

    def __exit__(self, *error: object) -> None:
        self._db.close()

    def snapshot(self) -> Snapshot:
        """The figures of one moment, which add up."""
        with self._one_moment():
            oldest = _sound(self._rows(OLDEST), int)
            counters = self._rows("SELECT name, value FROM counters")
            losses = self._rows("SELECT * FROM losses ORDER BY day, reason")
            offsets = self._rows("SELECT name, offset FROM journals")
            notes = self._rows("SELECT name, value FROM summary")
            return Snapshot(
                Stats(*_sound(self._rows(STATS), int, int, int, int, int)[0]),
                [host for (host,) in _sound(self._rows(HOSTS), str)],
                oldest[0][0] if oldest else None,
                dict(_sound(counters, str, int)),
                [Loss(*row) for row in _sound(losses, str, str, int, int)],
                dict(_sound(offsets, str, int)),
                dict(_sound(notes, str, str)),
            )

    def history(self, now_ms: int) -> History:
        """The last hour and the last day, and what was watched most."""
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
        """The last *count* steps of *step* minutes, the one under way included."""
        first = history.first_minute(now_ms, step, count)
        return history.in_steps(self._rows(_STEPS, step, first), first, step, count)

    def waiting(self, most: int) -> list[Waiting]:
        """The latest *most* of the reports that wait, the oldest of them first."""
        with self._one_moment():
            rows = self._rows(f"SELECT leased, {REPORT_COLUMNS} FROM reports ORDER BY id DESC LIMIT ?", most)
        return [Waiting(Report(*report), bool(leased)) for leased, *report in reversed(rows)]

    def viewings(self) -> list[tuple[Key, str]]:
        """The viewings that are under way, as :meth:`~t23_middleware.relay.viewer.SessionState.load` takes them."""
        with self._one_moment():
            rows = self._rows("SELECT host, session_id, photo_id, state FROM viewings")
        return [((host, session_id, photo_id), state) for host, session_id, photo_id, state in rows]

    def proxy_rows(self) -> dict[str, str]:
        """What the relay knows of the proxy's logs, see :mod:`~t23_middleware.relay.proxy_join`."""
        with self._one_moment():
            return dict(self._rows("SELECT name, value FROM proxy"))

    def dead(self) -> list[DeadReport]:
        """The refused reports, the oldest first."""
        with self._one_moment():
            rows = self._rows(f"SELECT id, code, answer, died_ms, {REPORT_COLUMNS} FROM dead ORDER BY id")
        _sound(rows, int, str, str, int, int, str, str, str, int, int)
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
    """The refused reports, to be sent again or thrown away while a relay works. Raises :class:`OutboxError`.

    A context manager. Where *ids* is ``None``, all of them are meant.
    """

    def __init__(self, path: Path) -> None:
        with translate_errors():
            self._db = open_beside(path, "rw")

    def __enter__(self) -> DeadLetters:
        return self

    def __exit__(self, *error: object) -> None:
        self._db.close()

    def retry(self, ids: Iterable[int] | None) -> list[int]:
        """Let them wait again, as if never sent; the ids that there were. Their time stays, as in every retry."""
        with immediate(self._db):
            found = self._found(ids)
            self._db.executemany(
                f"INSERT INTO reports (id, {REPORT_COLUMNS}) SELECT id, {REPORT_COLUMNS} FROM dead WHERE id = ?",
                found,
            )
            self._forget(found)
        return [id for (id,) in found]

    def purge(self, ids: Iterable[int] | None, now_ms: int) -> list[int]:
        """Give them up, counted as lost because ``purged``; the ids that there were."""
        with immediate(self._db):
            found = self._found(ids)
            drop_reports(self._db, "dead", [(id, "purged") for (id,) in found], now_ms)
        return [id for (id,) in found]

    def _found(self, ids: Iterable[int] | None) -> list[tuple[int]]:
        there = {id for (id,) in self._db.execute("SELECT id FROM dead")}
        return [(id,) for id in sorted(there if ids is None else there.intersection(ids))]

    def _forget(self, ids: list[tuple[int]]) -> None:
        self._db.executemany("DELETE FROM dead WHERE id = ?", ids)
