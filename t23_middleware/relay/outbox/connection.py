"""Opens the outbox's file, and translates SQLite's errors into ours."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ... import owned
from .repair import check_integrity, remove_damaged_rows
from .schema import FOR_PAGES, FOR_PROXY, LATER, SCHEMA_VERSION, SEALS, SET_VERSION, TABLES
from .values import NoOutbox, OutboxCorrupt, OutboxError, OutboxFull

#: Pages of the write-ahead log before a checkpoint. Few, so that acknowledgements still fit on a full disk: 2,000 of
#: 2,000 did with 16 pages, 54 with SQLite's default of 1,000.
CHECKPOINT_PAGES = 16
#: Size to which the write-ahead log is cut after a large transaction, in bytes: room for acknowledgements.
LOG_KEPT = 1 << 20
#: SQLite's messages for SQLITE_FULL and SQLITE_IOERR; Python has the codes only since 3.11.
FULL = ("database or disk is full", "disk I/O error")
#: Errors that :mod:`sqlite3` raises; the second if SQLite's message quotes a damaged schema that is not UTF-8.
SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)


@contextmanager
def immediate(db: sqlite3.Connection) -> Iterator[None]:
    """One write transaction; all of it happens, or nothing."""
    with translate_errors():
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise


def open_beside(path: Path, mode: str) -> sqlite3.Connection:
    """Open the database while a relay may use it: it is never created, replaced or fully checked here."""
    if not _is_there(path):
        raise NoOutbox(f"there is no outbox at {path} yet; a relay creates it when it starts")
    _refuse_irregular_file(path)
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=10, isolation_level=None
    )
    try:
        version = _version(db)
        if version == 0:
            raise NoOutbox(f"the outbox {path} is being created; try again")
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


def _refuse_irregular_file(path: Path) -> None:
    """Check the file first: SQLite would wait for a FIFO's writer for ever, and gives no reason if it can't open it."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise NoOutbox(f"there is no outbox at {path} yet; a relay creates it when it starts") from None
    except OSError as error:
        raise OutboxError(
            f"the outbox {path} can't be read by user {os.geteuid()} ({error.strerror}); run this as the workers' user"
        ) from error
    if not stat.S_ISREG(mode):
        raise OutboxError(
            f"the outbox {path} is no regular file; move it away, and a relay creates a new one"
        )


@contextmanager
def translate_errors() -> Iterator[None]:
    """Within this context, SQLite's errors become :class:`OutboxError`, its subclasses, or :class:`OutboxCorrupt`."""
    try:
        yield
    except SQLITE_ERRORS as error:
        if means_corrupt(error):
            raise OutboxCorrupt(
                f"the outbox is corrupt ({error}); restart the relay to start a new one"
            ) from error
        kind = OutboxFull if str(error) in FULL else OutboxError
        raise kind(f"the outbox can't be used: {error}") from error


def means_corrupt(error: Exception) -> bool:
    """Whether *error* means a corrupt file: SQLITE_CORRUPT and SQLITE_NOTADB have no class of their own, others have.

    For a damaged header, SQLite may report an unsupported file format, as for a later version.
    """
    return (
        type(error) in (sqlite3.DatabaseError, UnicodeDecodeError) or str(error) == "unsupported file format"
    )


#: ioctls and the flag of a file that is written in place (linux/fs.h).
_GET_FLAGS, _SET_FLAGS, _IN_PLACE = 0x80086601, 0x40086602, 0x00800000


def _write_in_place(folder: Path) -> None:
    """Make a copy-on-write file system (btrfs) write new files in *folder* in place.

    Otherwise each acknowledgement needs new room, which a full disk or quota does not have.
    """
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            flags = int.from_bytes(fcntl.ioctl(descriptor, _GET_FLAGS, bytes(8)), sys.byteorder)
            fcntl.ioctl(descriptor, _SET_FLAGS, (flags | _IN_PLACE).to_bytes(8, sys.byteorder))
        finally:
            os.close(descriptor)


def _is_there(path: Path) -> bool:
    """Whether the database exists. It and the files beside it are checked first, since SQLite opens them by path."""
    try:
        for end in ("-wal", "-shm", "-journal"):
            owned.check_file(path.with_name(path.name + end))
        return owned.check_file(path)
    except OSError as error:
        raise OutboxError(f"{error.filename or path} can't be opened: {error.strerror}") from error


def open_file(path: Path) -> sqlite3.Connection:
    """Open the database as the relay, create it if necessary, check it, and remove damaged rows."""
    if not _is_there(path):
        _write_in_place(path.parent)
    # Only one thread uses it at a time; SQLite's own check would also refuse a test's thread.
    db = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
    try:
        version = _version(db)
        if version == 0:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only possible without tables
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        db.execute(f"PRAGMA journal_size_limit = {LOG_KEPT}")
        if version not in (0, SCHEMA_VERSION):
            kind = "a newer" if version > SCHEMA_VERSION else "an older"
            raise OutboxError(
                f"{path} is of {kind} version of t23_middleware; run that one, or move the file"
            )
        if version == 0:
            db.executescript(f"BEGIN IMMEDIATE; {TABLES} {FOR_PAGES} {FOR_PROXY} {SET_VERSION} COMMIT;")
        elif _lacks_tables(db):
            db.executescript(f"BEGIN IMMEDIATE; {FOR_PAGES} {FOR_PROXY} COMMIT;")
        db.text_factory = _text
        check_integrity(db)
        remove_damaged_rows(db)
        if version != 0:
            db.executescript(f"BEGIN IMMEDIATE; {SET_VERSION} COMMIT;")
        path.chmod(0o600)
    except BaseException:
        db.close()
        raise
    return db


def _version(db: sqlite3.Connection) -> int:
    """The file's format; 0 while it is being created. Raises :class:`sqlite3.DatabaseError` if that is damaged."""
    (sealed,) = db.execute("PRAGMA application_id").fetchone()
    (user_version,) = db.execute("PRAGMA user_version").fetchone()
    if sealed in SEALS:
        return SEALS[sealed]
    if user_version in (0, SCHEMA_VERSION):
        return int(user_version)
    raise sqlite3.DatabaseError("its version is damaged")


def _lacks_tables(db: sqlite3.Connection) -> bool:
    query = "SELECT count(*) FROM sqlite_master WHERE name IN (?, ?)"
    return bool(db.execute(query, LATER).fetchone()[0] < len(LATER))


def _text(data: bytes) -> str:
    """A text with a flipped bit stays readable, so that only the API refuses it and other reports are not blocked."""
    return data.decode(errors="replace")
