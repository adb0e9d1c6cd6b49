"""Counters, losses and history. Callers update them in the same transaction as the change that they count."""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Mapping

from .. import history
from .values import EarlyLoss


def drop_reports(db: sqlite3.Connection, table: str, rows: Iterable[tuple[int, str]], now_ms: int) -> None:
    """Delete the reports of *rows* (id and reason) in *table*, and count them as lost, with their bytes."""
    day, lost = day_of(now_ms), Counter[str]()
    for id, reason in rows:
        db.execute(
            f"INSERT INTO losses SELECT ?, ?, 1, sent FROM {table} WHERE id = ?"
            # With the key named: SQLite before 3.35 takes no DO UPDATE without it.
            " ON CONFLICT (day, reason) DO UPDATE SET reports = reports + 1, bytes = bytes + excluded.bytes",
            (day, reason, id),
        )
        lost[history.LOST + reason] += db.execute(f"DELETE FROM {table} WHERE id = ?", (id,)).rowcount
    add_history_now(db, now_ms, lost)


def add_losses(db: sqlite3.Connection, losses: Iterable[EarlyLoss], now_ms: int) -> None:
    """Count plays that were lost before they became reports."""
    for loss in losses:
        if loss.reports:
            db.execute(
                "INSERT INTO losses VALUES (?, ?, ?, ?) ON CONFLICT (day, reason) DO UPDATE"
                " SET reports = reports + excluded.reports, bytes = bytes + excluded.bytes",
                (day_of(now_ms), *loss),
            )
            add_history_now(db, now_ms, {history.LOST + loss.reason: loss.reports})


def add_counts(db: sqlite3.Connection, counts: Mapping[str, int]) -> None:
    db.executemany(
        "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
        [(name, number) for name, number in counts.items() if number],
    )


def add_history_now(db: sqlite3.Connection, now_ms: int, figures: Mapping[str, int]) -> None:
    add_history(db, {(now_ms // history.MINUTE_MS, name): number for name, number in figures.items()})


def add_history(db: sqlite3.Connection, figures: Mapping[tuple[int, str], int]) -> None:
    """Add *figures*, (minute, name) -> number, to the history."""
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


def day_of(ms: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(ms / 1000))
