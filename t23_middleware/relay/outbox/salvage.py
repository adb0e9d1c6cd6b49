"""Sets a corrupt outbox aside and starts a new one, since a relay that refuses to start delivers nothing."""

from __future__ import annotations

import logging
import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from .connection import FULL, SQLITE_ERRORS, immediate, means_corrupt, open_file, translate_errors
from .tally import add_counts, add_losses
from .values import CORRUPT, UNCOUNTED, EarlyLoss, OutboxError, OutboxFull

log = logging.getLogger(__name__)

#: No report has as many bytes; a larger number is damage.
MOST_BYTES = 1 << 50


def open_or_replace(path: Path) -> sqlite3.Connection:
    """Open the database at *path*; a corrupt one is set aside first."""
    try:
        return open_file(path)
    except SQLITE_ERRORS as error:
        if not means_corrupt(error):
            kind = OutboxFull if str(error) in FULL else OutboxError
            raise kind(f"{path} can't be opened: {error}") from error
        set_aside(path, error)
        with translate_errors():
            return open_file(path)


def set_aside(path: Path, why: Exception) -> None:
    """Rename the corrupt database at *path*, and create a new one.

    The new one counts the reports that can be read in the old one as lost, reason ``corrupt``. That is an upper limit:
    lines that are still in the journals are read again.
    """
    left = _salvage(path)
    aside = path.with_name(f"{path.name}.corrupt-{time.time_ns() // 1_000_000}")
    path.replace(aside)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    log.error(
        "the outbox was corrupt (%s). It was renamed to %s and a new one was created; %d reports in it count as lost%s."
        " Check the disk",
        why,
        aside,
        left.loss.reports,
        "" if left.all else ", and more that can't be counted",
        extra={
            "t23_event": "outbox_set_aside",
            "t23_reason": str(why),
            "t23_path": str(aside),
            "t23_count": left.loss.reports,
        },
    )
    with suppress(*SQLITE_ERRORS, OSError):  # the next open meets the same error
        _record_in_new(path, left)


class _Salvaged(NamedTuple):
    """The reports that can be read in a corrupt database."""

    loss: EarlyLoss
    #: Whether those are all.
    all: bool


def _record_in_new(path: Path, left: _Salvaged) -> None:
    now_ms = time.time_ns() // 1_000_000
    with closing(open_file(path)) as db, immediate(db):
        add_losses(db, [left.loss], now_ms)
        add_counts(db, {"captured": left.loss.reports, CORRUPT: 1, UNCOUNTED: int(not left.all)})


def _salvage(path: Path) -> _Salvaged:
    """Count the readable reports in a corrupt database, including the refused ones."""
    uri = f"{path.absolute().as_uri()}?mode=ro"
    with suppress(*SQLITE_ERRORS), closing(sqlite3.connect(uri, uri=True, timeout=0)) as db:
        found = [_salvage_table(db, table) for table in ("reports", "dead")]
        reports, size = (sum(numbers) for numbers in zip(*(each.loss[1:] for each in found), strict=True))
        return _Salvaged(EarlyLoss("corrupt", reports, size), all(each.all for each in found))
    return _Salvaged(EarlyLoss("corrupt", 0, 0), False)


def _salvage_table(db: sqlite3.Connection, table: str) -> _Salvaged:
    """Count rows from the first to the damage, then from the last back to it."""
    reports, size, last = _read_on(db, f"SELECT id, sent FROM {table} ORDER BY id")
    if last is None:
        return _Salvaged(EarlyLoss("corrupt", reports, size), True)
    behind = _read_on(db, f"SELECT id, sent FROM {table} WHERE id > ? ORDER BY id DESC", last)
    return _Salvaged(EarlyLoss("corrupt", reports + behind[0], size + behind[1]), False)


def _read_on(db: sqlite3.Connection, query: str, *values: int) -> tuple[int, int, int | None]:
    """Number and bytes of the readable rows, and the id of the last one; ``None`` if all are readable."""
    reports = size = last = 0
    try:
        for id, sent in db.execute(query, values):
            reports, last = reports + 1, id
            size += sent if type(sent) is int and 0 <= sent < MOST_BYTES else 0
    except SQLITE_ERRORS:
        return reports, size, last
    return reports, size, None
