"""The tables of the outbox's file, its version, and the queries that both readers and writer use."""

from __future__ import annotations

import zlib

from ..report import Report

#: Version of the file's format. The file has it twice, as ``user_version`` and as a seal in ``application_id``, so that
#: one flipped bit does not look like another version.
SCHEMA_VERSION = 2
#: Latest version whose seal is known: a file of a later version is then not mistaken for a damaged one.
NEWEST_KNOWN = 255
#: ``due_ms`` and ``since_ms`` are times of :mod:`~t23_middleware.relay.elapsed`, all others of the wall clock.
#: ``since_ms`` is NULL until the ages are checked. ``tries`` and ``attempts`` are :attr:`.Entry.ambiguous_sends` and
#: :attr:`.Entry.unexplained_answers`.
TABLES = """
CREATE TABLE IF NOT EXISTS reports (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    time_ms INTEGER NOT NULL, host TEXT NOT NULL, session_id TEXT NOT NULL, photo_id TEXT NOT NULL,
    sent INTEGER NOT NULL, skip INTEGER NOT NULL,
    player_type TEXT, player_version TEXT, player_resolution TEXT,
    tries INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    retimed INTEGER NOT NULL DEFAULT 0,
    due_ms INTEGER NOT NULL DEFAULT 0,
    leased INTEGER NOT NULL DEFAULT 0,
    since_ms INTEGER,
    turn INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS reports_by_host ON reports (host, leased, turn, id);
CREATE TABLE IF NOT EXISTS dead (
    id INTEGER PRIMARY KEY,
    time_ms INTEGER NOT NULL, host TEXT NOT NULL, session_id TEXT NOT NULL, photo_id TEXT NOT NULL,
    sent INTEGER NOT NULL, skip INTEGER NOT NULL,
    player_type TEXT, player_version TEXT, player_resolution TEXT,
    code TEXT NOT NULL, answer TEXT NOT NULL, died_ms INTEGER NOT NULL,
    since_ms INTEGER
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
#: Tables for the pages, so that a page counts nothing while a visitor waits. Created if they are missing, so that an
#: outbox of an earlier version stays usable.
FOR_PAGES = """
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
#: The relay's state of the proxy's logs, see :mod:`~t23_middleware.relay.proxy_join`. Also created if missing.
FOR_PROXY = "CREATE TABLE IF NOT EXISTS proxy (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;"
#: Later tables, which an outbox may lack.
LATER = ("sizes", "proxy")
#: Each host that has reports. It jumps through the index; DISTINCT would read all of it.
HOSTS = """
WITH RECURSIVE found (host) AS (
    SELECT min(host) FROM reports
    UNION ALL
    SELECT (SELECT min(host) FROM reports WHERE host > found.host) FROM found WHERE host IS NOT NULL
)
SELECT host FROM found WHERE host IS NOT NULL
"""
OLDEST = "SELECT time_ms FROM reports ORDER BY id LIMIT 1"
STATS = """
SELECT
    coalesce((SELECT value FROM counters WHERE name = 'captured'), 0),
    (SELECT value FROM sizes WHERE name = 'waiting'),
    coalesce((SELECT value FROM counters WHERE name = 'sent'), 0),
    (SELECT value FROM sizes WHERE name = 'dead'),
    (SELECT coalesce(sum(reports), 0) FROM losses)
"""
REPORT_COLUMNS = ", ".join(Report._fields)
REPORT_MARKS = ", ".join("?" * len(Report._fields))


def _seal(version: int) -> int:
    return zlib.crc32(b"t23_middleware outbox %d" % version) & 0x7FFFFFFF


SEALS = {_seal(version): version for version in range(1, NEWEST_KNOWN + 1)}
SET_VERSION = f"PRAGMA user_version = {SCHEMA_VERSION}; PRAGMA application_id = {_seal(SCHEMA_VERSION)};"
