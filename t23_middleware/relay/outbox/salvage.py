"""A corrupt file is set aside, for a relay that refuses to start delivers nothing."""

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

#: More bytes than a report has.
MOST_BYTES = 1 << 50


def open_or_replace(path: Path) -> sqlite3.Connection:
    """The database at *path*; a corrupt one is set aside, for a relay that refuses to start delivers nothing."""
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
    """Put the corrupt database at *path* where it is in nobody's way, and begin a new one.

    What can be read of its reports is counted as lost there, reason ``corrupt``. It is the most that can be lost:
    what the journals still hold is taken in once more.
    """
    left = _salvage(path)
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
    with suppress(*SQLITE_ERRORS, OSError):  # whoever opens it next meets that too
        _record_in_new(path, left)


class _Salvaged(NamedTuple):
    """What a corrupt database held."""

    loss: EarlyLoss
    #: Whether that is all.
    all: bool


def _record_in_new(path: Path, left: _Salvaged) -> None:
    now_ms = time.time_ns() // 1_000_000
    with closing(open_file(path)) as db, immediate(db):
        add_losses(db, [left.loss], now_ms)
        add_counts(db, {"captured": left.loss.reports, CORRUPT: 1, UNCOUNTED: int(not left.all)})


def _salvage(path: Path) -> _Salvaged:
    """What can be read of the reports in a corrupt database, those that the API refused included."""
    uri = f"{path.absolute().as_uri()}?mode=ro"
    with suppress(*SQLITE_ERRORS), closing(sqlite3.connect(uri, uri=True, timeout=0)) as db:
        found = [_salvage_table(db, table) for table in ("reports", "dead")]
        reports, size = (sum(numbers) for numbers in zip(*(each.loss[1:] for each in found), strict=True))
        return _Salvaged(EarlyLoss("corrupt", reports, size), all(each.all for each in found))
    return _Salvaged(EarlyLoss("corrupt", 0, 0), False)


def _salvage_table(db: sqlite3.Connection, table: str) -> _Salvaged:
    """From the first on up to the damage, then from the last on back to it."""
    reports, size, last = _read_on(db, f"SELECT id, sent FROM {table} ORDER BY id")
    if last is None:
        return _Salvaged(EarlyLoss("corrupt", reports, size), True)
    behind = _read_on(db, f"SELECT id, sent FROM {table} WHERE id > ? ORDER BY id DESC", last)
    return _Salvaged(EarlyLoss("corrupt", reports + behind[0], size + behind[1]), False)


def _read_on(db: sqlite3.Connection, query: str, *values: int) -> tuple[int, int, int | None]:
    """Number and bytes of the rows that can be read, and the id of the last one; ``None`` where all can."""
    reports = size = last = 0
    try:
        for id, sent in db.execute(query, values):
            reports, last = reports + 1, id
            size += sent if type(sent) is int and 0 <= sent < MOST_BYTES else 0
    except SQLITE_ERRORS:
        return reports, size, last
    return reports, size, None
