"""The outbox: what it took it keeps, whole or not at all, and its figures add up."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from t23_middleware.errors import StateError
from t23_middleware.relay import outbox as outbox_module
from t23_middleware.relay.outbox import (
    LONGEST_DELAY_MS,
    SCHEMA_VERSION,
    Acked,
    Dead,
    Entry,
    Ingest,
    Lost,
    OutboxCorrupt,
    OutboxError,
    OutboxView,
    Retry,
    SQLiteOutbox,
    Stats,
    Waiting,
    schema,
    store,
)
from t23_middleware.relay.report import Report

NOW = 1_764_000_000_000
KEY = ("", "s", "1")


def report(number: int, host: str = "", sent: int = 100) -> Report:
    return Report(NOW + number, host, f"session-{number}", "7", sent, 0, "html5", None, "720p")


def batch(*reports: Report, **options: object) -> Ingest:
    return Ingest(**({"reports": reports, "viewings": [], "offsets": {}, "counts": {}} | options))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


@pytest.fixture
def outbox(path: Path) -> Iterator[SQLiteOutbox]:
    outbox = SQLiteOutbox(path)
    yield outbox
    outbox.close()


def claimed(
    outbox: SQLiteOutbox, count: int = 100, now_ms: int = NOW, hosts: tuple[str, ...] = ("",)
) -> list[Entry]:
    return outbox.claim(count, now_ms, hosts)


def adds_up(outbox: SQLiteOutbox) -> Stats:
    stats = outbox.stats()
    assert stats.captured == stats.waiting + stats.sent + stats.dead + stats.lost
    return stats


# What is taken in.


def test_batch_is_stored_whole(outbox, path):
    """A batch is stored with its offsets, viewings and counts."""
    outbox.ingest(
        batch(report(1), viewings=[(KEY, "state")], offsets={"a": 10}, counts={"late": 2, "none": 0})
    )
    outbox.ingest(
        batch(report(2), viewings=[(KEY, "state 2")], offsets={"a": 20, "b": 5}, counts={"late": 1})
    )
    outbox.close()
    again = SQLiteOutbox(path)
    assert again.offsets() == {"a": 20, "b": 5}
    assert list(again.viewings()) == [(KEY, "state 2")]
    assert again.counters() == {"late": 3, "captured": 2}
    assert [entry.report for entry in claimed(again)] == [report(1), report(2)]
    again.close()


def test_dropped_viewing_and_journal_removed(outbox):
    """A viewing that was dropped and a journal that was removed are deleted."""
    outbox.ingest(batch(viewings=[(KEY, "state")], offsets={"a": 10, "b": 20}))
    outbox.ingest(batch(viewings=[(KEY, None)]))
    outbox.forget_journals(["a", "unheard of"])
    outbox.forget_journals([])
    assert (list(outbox.viewings()), outbox.offsets()) == ([], {"b": 20})


def test_failed_batch_stores_nothing(outbox):
    """A batch that fails at its end stores nothing."""
    with pytest.raises(OverflowError):
        outbox.ingest(batch(report(1), viewings=[(KEY, "x")], offsets={"a": 1}, counts={"late": 1 << 70}))
    assert (outbox.offsets(), list(outbox.viewings()), outbox.stats()) == ({}, [], Stats(0, 0, 0, 0, 0))
    outbox.ingest(batch(report(1)))
    assert adds_up(outbox).waiting == 1


def test_atomic_stores_all_or_nothing(outbox):
    """What is done within ``atomic()`` is stored as a whole or not at all."""
    outbox.ingest(batch(report(1), report(2)))
    first, _ = claimed(outbox)
    with pytest.raises(RuntimeError), outbox.atomic():
        outbox.settle([Acked(first.id)], NOW)
        outbox.ingest(batch(report(3)))
        raise RuntimeError
    assert outbox.stats() == Stats(2, 2, 0, 0, 0)
    with outbox.atomic():
        outbox.settle([Acked(first.id)], NOW)
        outbox.ingest(batch(report(3)))
    assert adds_up(outbox) == Stats(3, 2, 1, 0, 0)


class Interrupted(sqlite3.Connection):
    """Fails where the outbox lifts the bound of its file's growth."""

    def execute(self, query: str, *values: Any) -> sqlite3.Cursor:
        if query == f"PRAGMA max_page_count = {store.MOST_PAGES}":
            raise sqlite3.OperationalError("locking protocol")
        return super().execute(query, *values)


def test_error_after_commit_is_ignored(path, monkeypatch):
    """A batch that was committed has not failed, whatever fails afterwards."""
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Interrupted))
    with closing(SQLiteOutbox(path)) as outbox:
        with outbox.growing_by(1 << 20):
            outbox.ingest(batch(report(1)))
        assert adds_up(outbox).waiting == 1


# What is claimed.


def test_oldest_claimed_first(outbox):
    """The oldest reports are claimed first, and none is claimed twice."""
    outbox.ingest(batch(*map(report, range(5))))
    assert [entry.report for entry in claimed(outbox, 2)] == [report(0), report(1)]
    assert [entry.report for entry in claimed(outbox)] == [report(2), report(3), report(4)]
    assert claimed(outbox) == []


def test_oldest_claimed_for_given_hosts(outbox):
    """The oldest reports of all given hosts are claimed first, and none of other hosts."""
    outbox.ingest(batch(*[report(n, host) for n, host in enumerate("abcabc")]))
    assert outbox.hosts() == ["a", "b", "c"]
    assert [entry.report for entry in claimed(outbox, 3, hosts=("c", "a"))] == [
        report(0, "a"),
        report(2, "c"),
        report(3, "a"),
    ]
    assert claimed(outbox, hosts=()) == []
    assert outbox.hosts() == ["a", "b", "c"]


def of(session: str, photo: str) -> Report:
    return report(0)._replace(session_id=session, photo_id=photo)


@pytest.mark.parametrize("kind", ["sessions", "videos"])
def test_a_flood_holds_up_nobody(kind, outbox):
    """Many sessions on one video, or many videos of one session: others' reports are among the next."""
    for part in range(10):
        flood = [
            of(f"bot-{n}", "7") if kind == "sessions" else of("bot", f"7{n}")
            for n in range(part * 2000, part * 2000 + 2000)
        ]
        outbox.ingest(batch(*flood))
    outbox.settle([Acked(entry.id) for entry in claimed(outbox, 64)], NOW)
    outbox.ingest(batch(*[of(f"viewer-{n}", f"{n % 5}") for n in range(40)]))
    seen = 0
    for _ in range(3):
        entries = claimed(outbox, 64)
        seen += sum(entry.report.session_id.startswith("viewer") for entry in entries)
        outbox.settle([Acked(entry.id) for entry in entries], NOW)
        if seen == 40:
            break
    assert seen == 40


def test_continuing_flood_delays_no_other(outbox):
    """A flood that continues does not delay other reports.

    This also holds after a restart, and while more of the flood arrives than is sent.
    """
    path = Path(outbox._path)
    outbox.ingest(batch(*[of(f"bot-{n}", "7") for n in range(5000)]))
    outbox.close()
    later = SQLiteOutbox(path)
    try:
        for step in range(20):
            later.ingest(batch(*[of(f"more-{step}-{n}", "7") for n in range(300)], of(f"viewer-{step}", "8")))
            entries = claimed(later, 64)
            assert any(entry.report.session_id == f"viewer-{step}" for entry in entries), step
            later.settle([Acked(entry.id) for entry in entries], NOW)
    finally:
        later.close()


def test_each_viewing_keeps_its_order(outbox):
    """Within one session and video the reports leave as they came."""
    outbox.ingest(batch(*[of(f"s{n % 3}", f"{n % 2}")._replace(time_ms=NOW + n) for n in range(60)]))
    last: dict[tuple[str, str], int] = {}
    while entries := claimed(outbox, 7):
        for entry in entries:
            key = entry.report.session_id, entry.report.photo_id
            assert last.get(key, 0) < entry.report.time_ms
            last[key] = entry.report.time_ms
        outbox.settle([Acked(entry.id) for entry in entries], NOW)
    assert len(last) == 6


@pytest.mark.parametrize("kind", ["sessions", "videos"])
def test_bounds_give_up_the_floods_first(kind, outbox):
    """Nobody else's reports are pushed out, though they are older."""
    outbox.ingest(batch(*[of(f"viewer-{n}", f"{n % 50}") for n in range(1000)]))
    flood = [of(f"bot-{n}", "777") if kind == "sessions" else of("bot", f"7{n}") for n in range(5000)]
    outbox.ingest(batch(*flood))
    lost = sum(outbox.drop_oldest(1000, 0, "outbox_full", NOW) for _ in range(3))
    assert lost == 3000
    (viewers,) = outbox._db.execute("SELECT count(*) FROM reports WHERE session_id LIKE 'viewer%'").fetchone()
    assert viewers == 1000


def test_dead_letters_of_a_flood_go_first(outbox):
    """A flood of one wrong video leaves the letters of others, though they are older."""
    outbox.ingest(
        batch(*[of(f"viewer-{n}", f"{n}") for n in range(20)], *[of(f"bot-{n}", "777") for n in range(80)])
    )
    for viewers in (True, False):
        entries = list(claimed(outbox, 100))
        mine = [entry for entry in entries if entry.report.session_id.startswith("viewer") is viewers]
        outbox.settle([Dead(entry.id, "no_such_photo", "") for entry in mine], NOW + (not viewers))
        outbox.settle([Retry(entry.id, 0, 0) for entry in entries if entry not in mine], NOW)
    assert outbox.drop_oldest_dead(100, 40, "dead_full", NOW) == 60
    (viewers,) = outbox._db.execute("SELECT count(*) FROM dead WHERE session_id LIKE 'viewer%'").fetchone()
    assert viewers == 20


def test_retried_report_claimed_when_due(outbox):
    """A report that was returned for a retry is claimed when it is due, in its old position."""
    outbox.ingest(batch(*map(report, range(3))))
    first = claimed(outbox, 1)[0]
    outbox.settle([Retry(first.id, NOW + 1000, 1, 2)], NOW)
    assert [entry.report for entry in claimed(outbox, 1, NOW + 999)] == [report(1)]
    back, after = claimed(outbox, 2, NOW + 1000)
    assert back == Entry(first.id, report(0), 1, 2, False)
    assert after.report == report(2)


def test_new_time_is_stored(outbox):
    """A new time is stored with the report."""
    outbox.ingest(batch(report(1)))
    first = claimed(outbox)[0]
    outbox.settle([Retry(first.id, NOW, 0, 0, NOW + 77)], NOW)
    assert claimed(outbox) == [Entry(first.id, report(1)._replace(time_ms=NOW + 77), 0, 0, True)]


def test_clock_set_back_delays_nothing(outbox):
    """A clock that was set back does not delay a retry until a time that was in the future."""
    outbox.ingest(batch(report(1)))
    outbox.settle([Retry(claimed(outbox)[0].id, NOW + 60_000, 0)], NOW)
    a_year_before = NOW - 365 * 86_400_000
    assert len(claimed(outbox, now_ms=a_year_before)) == 1
    outbox.recover_leases(True, NOW)
    assert claimed(outbox, now_ms=NOW + 60_000 - LONGEST_DELAY_MS) == []


# What becomes of it.


def test_figures_add_up(outbox):
    """The figures add up for every outcome of the reports."""
    outbox.ingest(batch(*[report(n, sent=10**n) for n in range(6)]))
    ids = [entry.id for entry in claimed(outbox)]
    outbox.settle(
        [
            Acked(ids[0]),
            Dead(ids[1], "no_such_photo", "answer"),
            Lost(ids[2], "ambiguous"),
            Retry(ids[3], NOW, 1),
        ],
        NOW,
    )
    assert adds_up(outbox) == Stats(6, 3, 1, 1, 1)
    outbox.settle([Lost(ids[4], "ambiguous"), Lost(ids[5], "age")], NOW)
    assert adds_up(outbox) == Stats(6, 1, 1, 1, 3)
    rows = outbox._db.execute("SELECT * FROM losses ORDER BY reason").fetchall()
    assert rows == [("2025-11-24", "age", 1, 10**5), ("2025-11-24", "ambiguous", 2, 10**2 + 10**4)]


def test_dead_letter_has_report_and_answer(outbox):
    """A dead letter contains the report and the answer."""
    outbox.ingest(batch(report(1)))
    (entry,) = claimed(outbox)
    outbox.settle([Dead(entry.id, "no_such_photo", "There is no such photo")], NOW + 5)
    row = outbox._db.execute("SELECT * FROM dead").fetchone()
    assert row == (entry.id, *report(1), "no_such_photo", "There is no such photo", NOW + 5, None)


def test_what_is_settled_twice_counts_once(outbox):
    """A commit whose failure was told too late: it is tried again."""
    outbox.ingest(batch(*map(report, range(4))))
    ids = [entry.id for entry in claimed(outbox, 3)]
    said = [Acked(ids[0]), Dead(ids[1], "code", ""), Lost(ids[2], "ambiguous")]
    outbox.settle(said, NOW)
    outbox.settle(said, NOW)
    assert adds_up(outbox) == Stats(4, 1, 1, 1, 1)


def test_leases_of_dead_relay_sent_again(outbox, path):
    """Reports that a dead relay leased are sent again and marked as possibly sent before."""
    outbox.ingest(batch(*map(report, range(3))))
    claimed(outbox, 2)
    outbox.close()
    after = SQLiteOutbox(path)
    assert [entry.report for entry in claimed(after)] == [report(2)]
    after.close()
    last = SQLiteOutbox(path)
    assert last.recover_leases(True, NOW) == 3
    assert [(entry.report, entry.ambiguous_sends) for entry in claimed(last)] == [
        (report(n), 1) for n in range(3)
    ]
    assert adds_up(last).waiting == 3
    last.close()


def test_leases_of_dead_relay_lost(outbox):
    """Reports that a dead relay leased are lost if nothing may be sent twice."""
    outbox.ingest(batch(*map(report, range(3))))
    claimed(outbox, 2)
    assert outbox.recover_leases(False, NOW) == 2
    assert adds_up(outbox) == Stats(3, 1, 0, 0, 2)
    assert [(entry.report, entry.ambiguous_sends) for entry in claimed(outbox)] == [(report(2), 0)]


# The file.


def test_only_its_owner_may_read_it(outbox, path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("damage", ["rubbish", "header", "pages"])
def test_corrupt_file_is_replaced(damage, outbox, path, caplog):
    """A corrupt file is renamed, one ERROR is logged, and a new outbox is created."""
    outbox.ingest(batch(*map(report, range(2000))))
    outbox.close()
    content = bytearray(path.read_bytes())
    if damage == "rubbish":
        content[:] = b"no database" * 1000
    elif damage == "header":
        content[:16] = b"\0" * 16
    else:
        content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)
    new = SQLiteOutbox(path)
    assert new.stats() == Stats(0, 0, 0, 0, 0)
    new.ingest(batch(report(1)))
    new.close()
    (aside,) = path.parent.glob("outbox.db.corrupt-*")
    assert aside.read_bytes()[100:] == content[100:]  # behind SQLite's header, in which it counts changes
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    again = SQLiteOutbox(path)
    assert again.stats().waiting == 1
    again.close()


def test_an_empty_file_is_a_new_outbox(path):
    path.touch()
    outbox = SQLiteOutbox(path)
    assert outbox.stats() == Stats(0, 0, 0, 0, 0)
    outbox.close()


def test_two_processes_create_outbox(path):
    """Two processes that create the outbox at the same moment both get it.

    The other is a command, which comes between this one's search for tables and its creation of them.
    """
    script = "import sys; from pathlib import Path; from tests.relay.test_outbox import *; SQLiteOutbox(Path(sys.argv[1])).close()"
    root = Path(__file__).parent.parent.parent
    makers = [subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=root) for _ in range(4)]
    assert [maker.wait(60) for maker in makers] == [0] * 4
    outbox = SQLiteOutbox(path)
    outbox._db.execute("PRAGMA user_version = 0")
    again = SQLiteOutbox(path)
    again.ingest(batch(report(1)))
    assert adds_up(outbox).waiting == 1
    again.close()
    outbox.close()


def test_file_corrupted_while_open(outbox, path):
    """A file that becomes corrupt while it is open raises ``OutboxCorrupt``."""
    outbox.ingest(batch(*map(report, range(2000))))
    outbox._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    outbox._db.execute("PRAGMA cache_size = 0")
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))
    with pytest.raises(OutboxCorrupt):
        for _ in range(10):
            outbox.claim(2000, NOW, [""])
            outbox.recover_leases(True, NOW)


def as_if_of_version(version: int, path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {version}")
        db.execute(f"PRAGMA application_id = {schema._seal(version)}")


def test_older_version_is_refused(outbox, path):
    """A file of an older version is refused.

    Its tables are different; it is neither damaged nor renamed.
    """
    outbox.close()
    as_if_of_version(SCHEMA_VERSION - 1, path)
    with pytest.raises(OutboxError, match="older version"):
        SQLiteOutbox(path)
    assert list(path.parent.glob("*corrupt*")) == []


def test_newer_version_is_refused(outbox, path):
    """A file of a newer version is refused and stays as it is."""
    outbox.ingest(batch(report(1)))
    outbox.close()
    as_if_of_version(SCHEMA_VERSION + 1, path)
    with pytest.raises(StateError, match="newer version"):
        SQLiteOutbox(path)
    assert list(path.parent.glob("*.corrupt*")) == []


#: Where SQLite's header has the two numbers, four bytes each (sqlite.org/fileformat2.html).
@pytest.mark.parametrize("place", [60, 68], ids=["user_version", "application_id"])
def test_version_bit_flip_is_repaired(place, outbox, path, caplog):
    """Any flipped bit in the version is repaired without a loss and without a log line."""
    outbox.ingest(batch(report(1)))
    outbox.close()
    whole = path.read_bytes()
    for bit in range(32):
        damaged = bytearray(whole)
        damaged[place + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with OutboxView(path) as view:
            assert view.snapshot().stats.waiting == 1
        mended = SQLiteOutbox(path)
        assert adds_up(mended) == Stats(1, 1, 0, 0, 0)
        mended.close()
        assert path.read_bytes()[60:72] == whole[60:72]
    assert caplog.records == []


def test_unreadable_schema_is_corrupt(outbox, path, caplog):
    """A file whose schema is not valid text any more is corrupt."""
    outbox.ingest(batch(*map(report, range(3))))
    outbox.close()
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE reports (", b"CREATE TABL\xc1 reports ("))
    with pytest.raises(OutboxCorrupt), OutboxView(path) as view:
        view.snapshot()
    new = SQLiteOutbox(path)
    assert adds_up(new) == Stats(0, 0, 0, 0, 0)
    assert new.counters() == {"outbox_corrupt": 1, "outbox_uncounted": 1}
    new.close()
    assert "more that can't be counted" in caplog.text


def test_damaged_version_fields_are_corrupt(outbox, path):
    """A file whose version is damaged in both places is corrupt."""
    outbox.ingest(batch(report(1)))
    outbox.close()
    path.write_bytes(path.read_bytes()[:60] + b"\x7f" * 12 + path.read_bytes()[72:])
    new = SQLiteOutbox(path)
    assert adds_up(new) == Stats(1, 0, 0, 0, 1)
    new.close()


def test_corrupt_readable_reports_are_lost(outbox, path, caplog):
    """The reports that can be read in a corrupt file count as lost."""
    outbox.ingest(batch(*map(report, range(20_000))))
    outbox.settle([Acked(1)], NOW)
    outbox.settle([Dead(id, "no_such_photo", "no") for id in (2, 3)], NOW)
    outbox.close()
    content = bytearray(path.read_bytes())
    at = (
        content.index(b"session-100007dhtml5") // 4096 * 4096
    )  # a page in the middle of the table; "d" is 100 bytes
    content[at : at + 4096] = os.urandom(4096)
    path.write_bytes(content)
    new = SQLiteOutbox(path)
    found = adds_up(new)
    assert 19_000 < found.lost < 19_999
    assert found == Stats(found.lost, 0, 0, 0, found.lost)
    assert new.counters() == {"captured": found.lost, "outbox_corrupt": 1, "outbox_uncounted": 1}
    with OutboxView(path) as view:
        ((_, reason, reports, size),) = view.snapshot().losses
    assert (reason, reports, size) == ("corrupt", found.lost, 100 * found.lost)
    new.close()
    (record,) = caplog.records
    assert f"{found.lost} reports in it count as lost" in record.message
    assert "more that can't be counted" in record.message


def test_corrupt_file_with_all_reports(outbox, path, caplog):
    """A corrupt file in which all reports can be read leaves no unknown number of reports."""
    outbox.ingest(batch(*map(report, range(50))))
    outbox.settle([Dead(1, "no_such_photo", "no")], NOW)
    outbox.close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("DROP TABLE viewings")
    new = SQLiteOutbox(path)
    assert adds_up(new) == Stats(50, 0, 0, 0, 50)
    assert new.counters() == {"captured": 50, "outbox_corrupt": 1}
    new.close()
    assert "more that can't be counted" not in caplog.text


def test_unusable_path_is_named(path):
    """A path that can't be a file raises an error with its name."""
    path.mkdir()
    with pytest.raises(OutboxError, match="outbox.db"):
        SQLiteOutbox(path)


def test_full_disk_refuses_whole_batches(outbox):
    """A full disk refuses whole batches and still stores acknowledgements."""
    outbox.ingest(batch(*map(report, range(300))))
    (pages,) = outbox._db.execute("PRAGMA page_count").fetchone()
    outbox._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(OutboxError, match="full"):
        outbox.ingest(batch(*map(report, range(300, 5000)), offsets={"a": 1}))
    assert (outbox.stats(), outbox.offsets()) == (Stats(300, 300, 0, 0, 0), {})
    outbox.settle([Acked(entry.id) for entry in claimed(outbox, 200)], NOW)
    assert adds_up(outbox) == Stats(300, 100, 200, 0, 0)
    outbox._db.execute("PRAGMA max_page_count = 1000000")
    outbox.ingest(batch(*map(report, range(300, 5000)), offsets={"a": 1}))
    assert adds_up(outbox) == Stats(5000, 4800, 200, 0, 0)


def test_failed_claim_changes_nothing(outbox, path):
    """A claim that can't be written did not happen.

    Another connection holds the lock for longer than SQLite waits.
    """
    outbox.ingest(batch(report(1)))
    other = SQLiteOutbox(path)
    outbox._db.execute("PRAGMA busy_timeout = 1")
    with other.atomic(), pytest.raises(OutboxError, match="locked"):
        claimed(outbox)
    assert len(claimed(outbox)) == 1
    other.close()


def test_commits_survive_kill(path):
    """What the outbox has committed survives a kill.

    The process kills itself right after each kind of write, with nothing closed.
    """
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tests.relay.test_outbox import *\n"
        "outbox = SQLiteOutbox(Path(sys.argv[1]))\n"
        "outbox.ingest(batch(*map(report, range(10)), offsets={'a': 5}))\n"
        "outbox.settle([Acked(entry.id) for entry in outbox.claim(4, NOW, [''])], NOW)\n"
        "outbox.claim(3, NOW, [''])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], cwd=root, capture_output=True, timeout=60
    )
    assert done.returncode == -9, done.stderr
    outbox = SQLiteOutbox(path)
    assert (adds_up(outbox), outbox.offsets()) == (Stats(10, 6, 4, 0, 0), {"a": 5})
    assert [entry.report for entry in claimed(outbox)] == [report(n) for n in range(7, 10)]
    assert outbox.recover_leases(True, NOW) == 6
    outbox.close()


def test_failing_disk_is_outbox_error(outbox, monkeypatch):
    """A failing disk raises ``OutboxError``, whichever error sqlite3 raises."""

    class Failing:
        in_transaction = False

        def execute(self, *arguments: object) -> None:
            raise sqlite3.OperationalError(os.strerror(errno.EIO))

    healthy = outbox._db
    outbox._db = Failing()
    for attempt in (
        outbox.offsets,
        outbox.hosts,
        outbox.stats,
        outbox.counters,
        lambda: list(outbox.viewings()),
    ):
        with pytest.raises(OutboxError, match="Input/output"):
            attempt()
    outbox._db = healthy


# Against a model.


class Model(RuleBasedStateMachine):
    """A dict that does what the outbox says it does; both are asked the same."""

    folder: Path

    @initialize()
    def begin(self) -> None:
        self.path = Path(self.folder) / f"{os.urandom(8).hex()}.db"
        self.outbox = SQLiteOutbox(self.path)
        self.now = NOW
        self.number = 0
        #: Id -> report, tries, attempts, retimed, due.
        self.waiting: dict[int, list] = {}
        self.leased: set[int] = set()
        self.sent = self.dead = 0
        self.losses: dict[str, int] = {}
        self.offsets: dict[str, int] = {}

    @rule(
        hosts=st.lists(st.sampled_from("ab"), max_size=5),
        offsets=st.dictionaries(st.sampled_from("xyz"), st.integers(0, 99), max_size=2),
    )
    def ingest(self, hosts: list[str], offsets: dict[str, int]) -> None:
        reports = []
        for host in hosts:
            self.number += 1
            reports.append(report(self.number, host))
            self.waiting[self.number] = [reports[-1], 0, 0, False, 0]
        self.outbox.ingest(batch(*reports, offsets=offsets))
        self.offsets |= offsets

    @rule()
    def ingest_that_fails(self) -> None:
        with pytest.raises(OverflowError):
            self.outbox.ingest(batch(report(0), offsets={"x": 1 << 70}))

    @rule(names=st.sets(st.sampled_from("xyz")))
    def forget(self, names: set[str]) -> None:
        self.outbox.forget_journals(sorted(names))
        for name in names:
            self.offsets.pop(name, None)

    @rule(count=st.integers(1, 4), hosts=st.sets(st.sampled_from("abc")))
    def claim(self, count: int, hosts: set[str]) -> None:
        turns = dict(self.outbox._db.execute("SELECT id, turn FROM reports"))
        due = [
            id for id, (each, *_, due) in sorted(self.waiting.items(), key=lambda item: (turns[item[0]], item[0]))
            if id not in self.leased and each.host in hosts and not self.now < due <= self.now + LONGEST_DELAY_MS
        ][:count]  # fmt: skip
        entries = self.outbox.claim(count, self.now, sorted(hosts))
        assert entries == [Entry(id, *self.waiting[id][:4]) for id in due]
        self.leased |= set(due)

    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        settlements = []
        for id in sorted(self.leased):
            match data.draw(st.sampled_from(["acked", "again", "retimed", "dead", "lost", "open"])):
                case "acked":
                    settlements.append(Acked(id))
                    self.sent += 1
                case "again":
                    due, tries, attempts = (
                        self.now + data.draw(st.integers(0, 5000)),
                        data.draw(st.integers(0, 3)),
                        1,
                    )
                    settlements.append(Retry(id, due, tries, attempts))
                    self.waiting[id][1:] = [tries, attempts, self.waiting[id][3], due]
                case "retimed":
                    settlements.append(Retry(id, self.now, 0, 0, self.now))
                    self.waiting[id] = [self.waiting[id][0]._replace(time_ms=self.now), 0, 0, True, self.now]
                case "dead":
                    settlements.append(Dead(id, "code", "answer"))
                    self.dead += 1
                case "lost":
                    settlements.append(Lost(id, "ambiguous"))
                    self.losses["ambiguous"] = self.losses.get("ambiguous", 0) + 1
                case _:
                    continue
            self.leased.discard(id)
            if not isinstance(settlements[-1], Retry):
                del self.waiting[id]
        self.outbox.settle(settlements, self.now)

    @rule(retry=st.booleans())
    def reopen(self, retry: bool) -> None:
        self.outbox.close()
        self.outbox = SQLiteOutbox(self.path)
        assert self.outbox.recover_leases(retry, self.now) == len(self.leased)
        for id in self.leased:
            if retry:
                self.waiting[id][1] += 1
            else:
                del self.waiting[id]
                self.losses["ambiguous"] = self.losses.get("ambiguous", 0) + 1
        self.leased = set()

    @rule(step=st.sampled_from([1, 1000, 60_000, -3600_000, -LONGEST_DELAY_MS * 2]))
    def let_time_pass(self, step: int) -> None:
        self.now += step

    @invariant()
    def says_the_same(self) -> None:
        if not hasattr(self, "outbox"):
            return
        lost = sum(self.losses.values())
        assert self.outbox.stats() == Stats(self.number, len(self.waiting), self.sent, self.dead, lost)
        assert self.number == len(self.waiting) + self.sent + self.dead + lost
        assert self.outbox.offsets() == self.offsets
        assert self.outbox.hosts() == sorted({each[0].host for each in self.waiting.values()})

    def teardown(self) -> None:
        if hasattr(self, "outbox"):
            self.outbox.close()


def test_the_outbox_does_what_its_model_does(tmp_path):
    machine = type("Machine", (Model,), {"folder": tmp_path})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_statements_run_on_promised_sqlite():
    """No statement needs a newer SQLite than the documented one.

    Of what the outbox might use: DO UPDATE without its key and RETURNING came with SQLite 3.35.
    """
    source = "".join(path.read_text() for path in Path(outbox_module.__file__).parent.glob("*.py")).upper()
    assert "ON CONFLICT DO UPDATE" not in source
    assert " RETURNING " not in source


def test_view_shows_latest_waiting(outbox: SQLiteOutbox, path: Path):
    """A view shows the latest waiting reports and which of them are being sent."""
    outbox.ingest(batch(*(report(number) for number in range(5))))
    claimed = outbox.claim(4, NOW + 10, [""])
    outbox.settle([Acked(claimed[0].id)], NOW + 10)
    with OutboxView(path) as view:
        assert view.waiting(3) == [
            Waiting(report(2), True),
            Waiting(report(3), True),
            Waiting(report(4), False),
        ]
        assert len(view.waiting(100)) == 4
