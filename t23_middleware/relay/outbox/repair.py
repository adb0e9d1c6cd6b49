"""Checks an opened file, and removes damaged rows."""

from __future__ import annotations

import logging
import sqlite3
import time
from contextlib import closing

from .schema import FOR_PAGES, FOR_PROXY, TABLES
from .tally import day_of

log = logging.getLogger(__name__)


def check_integrity(db: sqlite3.Connection) -> None:
    """Rebuild a damaged index. Raises :class:`sqlite3.DatabaseError` if more than an index is corrupt."""
    if _is_sound(db):
        return
    db.execute("REINDEX")
    if not _is_sound(db):
        raise sqlite3.DatabaseError("its integrity_check fails")


def _is_sound(db: sqlite3.Connection) -> bool:
    # Not quick_check, which does not compare indexes with their tables.
    return bool(db.execute("PRAGMA integrity_check(1)").fetchone()[0] == "ok")


def remove_damaged_rows(db: sqlite3.Connection) -> None:
    """Delete rows that no relay can have written: flipped bits that the integrity check does not find.

    Raises :class:`sqlite3.DatabaseError` if the tables are not ours.
    """
    try:
        db.execute("BEGIN IMMEDIATE")
        for table, damaged in _damage_conditions():
            removed = db.execute(f"DELETE FROM {table} WHERE {damaged}").rowcount
            db.execute(f"EXPLAIN INSERT INTO {table} DEFAULT VALUES")  # compiles its triggers
            if removed:
                _log_removed(db, table, removed)
        db.execute("COMMIT")
    except sqlite3.OperationalError as error:
        if str(error).startswith(("no such ", "error in ")):
            raise sqlite3.DatabaseError(str(error)) from error
        raise


def _log_removed(db: sqlite3.Connection, table: str, rows: int) -> None:
    log.error(
        "the outbox was damaged: %d unreadable rows were removed from %s. Check the disk",
        rows,
        table,
        extra={"t23_event": "outbox_damaged", "t23_reason": table, "t23_count": rows},
    )
    if table in ("reports", "dead"):
        db.execute(
            "INSERT INTO losses VALUES (?, 'corrupt', ?, 0) ON CONFLICT (day, reason) DO UPDATE SET reports = reports + excluded.reports",
            (day_of(time.time_ns() // 1_000_000), rows),
        )


def _damage_conditions() -> list[tuple[str, str]]:
    """Each table, and an SQL condition that is true for a row with a value of a wrong type."""
    with closing(sqlite3.connect(":memory:")) as ours:
        ours.executescript(TABLES + FOR_PAGES + FOR_PROXY)
        names = ours.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        return [
            (table, _damage_condition(ours, table)) for (table,) in names if not table.startswith("sqlite_")
        ]


def _damage_condition(ours: sqlite3.Connection, table: str) -> str:
    columns = ours.execute(f"PRAGMA table_info({table})")
    return " OR ".join(f"typeof({name}) NOT IN ('{kind.lower()}', 'null')" for _, name, kind, *_ in columns)
