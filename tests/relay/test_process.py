"""The relay as a whole: real files, a stand-in for the API, real processes and real kills."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count as numbers
from pathlib import Path
from typing import Any

import pytest

from t23_middleware.ops import standin
from t23_middleware.ops.standin import StandInServer
from t23_middleware.relay import intake
from t23_middleware.relay import process as module
from t23_middleware.relay.bounds import SMALL_PIECE, Limits
from t23_middleware.relay.delivery import CLAIMED_PER_SENDER, MOST_CLAIMED, MOST_SENDERS, Delivery
from t23_middleware.relay.intake import FOREIGN_SINCE
from t23_middleware.relay.journals import PIECE, Journals
from t23_middleware.relay.outbox import OutboxCorrupt, OutboxError, OutboxFull, SQLiteOutbox, Stats
from t23_middleware.relay.process import Relay
from t23_middleware.settings import Settings
from t23_middleware.state import StateFolder, lock_is_held
from t23_middleware.transfer import FORMAT, Opening, Part, Play, Transfer, encode

from ..harness import MEDIA, PATIENCE, ROOT, running, until
from ..ports import free_port
from .readers import rows, seen, stats
from .writers import MS, alive, end, journal, living, opening, start, transfer


def now() -> int:
    return time.monotonic_ns()


def environ(api: StandInServer, folder: StateFolder, **more: str) -> dict[str, str]:
    return {"T23_API_URL": api.url, "T23_STATE_DIR": str(folder.path), **more}


def digest(api: StandInServer, folder: StateFolder, **more: str) -> str:
    """What a writer wants whose app has the same settings as the relay."""
    return Settings(environ=environ(api, folder, **more)).relay_digest()


def sessions(api: StandInServer) -> Counter[str]:
    return Counter(report["session_id"] for report in api.recorded())


# In this process.


def made(api: StandInServer, folder: StateFolder, automatic: bool = True, **more: str) -> Relay:
    return Relay(Settings(environ=environ(api, folder, **more)), folder, automatic=automatic)


@contextmanager
def relaying(api: StandInServer, folder: StateFolder, **more: str) -> Iterator[Relay]:
    """A relay in a thread; nothing else in this process may look at its lock meanwhile."""
    relay = made(api, folder, automatic=False, **more)
    thread = threading.Thread(target=relay.run)
    thread.start()
    try:
        yield relay
    finally:
        relay.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_live_and_dead_writers_arrive_once(api, folder):
    """The plays of live and of dead writers arrive once."""
    journal(folder, "1-dead", *[transfer(n, now() - 10**9 + n, f"dead{n}") for n in range(50)])
    with living(folder) as writer, relaying(api, folder):
        for number in range(50):
            writer.write(opening(number, now(), f"live{number}"))
            writer.write(transfer(number, now(), f"live{number}"))
        api.wait_for(100, PATIENCE)
        writer.kill()
        assert until(lambda: list(folder.journals.iterdir()) == [])
    assert set(sessions(api).values()) == {1}
    assert stats(folder) == Stats(100, 0, 100, 0, 0)
    assert not folder.unfinished.exists()


def test_automatic_relay_without_work_exits(api, folder):
    """An automatic relay that has nothing to do exits."""
    made(api, folder).run()
    assert not folder.has_work()


def foreign_journal(folder: StateFolder, name: str = "9-later") -> Path:
    """One of a later version, which says more in its first line than this one knows."""
    path = journal(folder, name, b"what that version writes\n")
    fields = json.dumps(["writer", name, FORMAT + 1, "9.0", "boot", 1, "digest", {"more": True}]).encode()
    path.write_bytes(b"%08x %b\nwhat that version writes\n" % (zlib.crc32(fields), fields))
    return path


def test_foreign_journal_starts_no_relay(api, folder, caplog):
    """A journal of another version is left for that version's relay and starts no relay."""
    theirs = foreign_journal(folder)
    written = theirs.read_bytes()
    assert folder.has_work(), "nobody has looked at it yet"
    made(api, folder).run()
    assert not folder.has_work()
    made(api, folder).run()
    assert theirs.read_bytes() == written
    assert [record.getMessage() for record in caplog.records] == [
        f"{theirs.name} was written by another version (format {FORMAT + 1}) and is left for that version's relay"
    ]
    foreign_journal(folder, "9-more")
    assert folder.has_work()
    made(api, folder).run()
    assert not folder.has_work()
    assert seen(folder).counters == {}


def test_foreign_journal_dropped_and_counted(api, folder, caplog):
    """A journal of another version whose relay never came is dropped after ``T23_MAX_AGE`` and counted."""
    theirs, recent = foreign_journal(folder), foreign_journal(folder, "9-recent")
    made(api, folder, T23_MAX_AGE="3600").run()
    for since_ms, wall_s in ((0, 0), (-3_600_001, time.time() + 40 * 86_400)):
        # The clock that says how old the file is decides nothing; the time that has passed does.
        os.utime(theirs, (wall_s, wall_s))
        assert theirs.exists()
        outbox = SQLiteOutbox(folder.outbox)
        outbox.note({FOREIGN_SINCE: json.dumps({theirs.name: since_ms, recent.name: 0})})
        outbox.close()
        made(api, folder, T23_MAX_AGE="3600").run()
    assert (theirs.exists(), recent.exists()) == (False, True)
    assert seen(folder).counters == {"journals_given_up": 1}
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1
    assert not folder.has_work()


@pytest.mark.parametrize(
    "note", ['{"9-later', "[]", "null", '{"9-later.000000.journal": [1]}', '{"a": 1e999}']
)
def test_damaged_times_start_again(api, folder, note):
    """A damaged note on journals of another version stops no relay, and gives up no journal."""
    theirs = foreign_journal(folder)
    journal(folder, "1-dead", transfer(1, now() - 10**9, "s"))
    folder.create()
    outbox = SQLiteOutbox(folder.outbox)
    outbox.note({FOREIGN_SINCE: note})
    outbox.close()
    made(api, folder).run()
    assert sessions(api) == {"s": 1}
    assert theirs.exists()
    assert list(json.loads(seen(folder).notes[FOREIGN_SINCE])) == [theirs.name]


def test_foreign_journal_of_live_writer_kept(api, folder):
    """The journal of another version is not dropped while a writer of that version lives."""
    theirs = foreign_journal(folder)
    folder.create()
    outbox = SQLiteOutbox(folder.outbox)
    outbox.note({FOREIGN_SINCE: json.dumps({theirs.name: -3_600_001})})
    outbox.close()
    with alive(folder, "9-later"), relaying(api, folder, T23_MAX_AGE="3600"):
        assert until(folder.foreign_journals)
    assert theirs.exists()


def test_open_responses_ended_before_exit(api, folder):
    """Responses that a dead writer left open are ended before the relay exits."""
    journal(folder, "1-dead", opening(1, now() - 10**9, "open"), transfer(2, now() - 10**8, "closed"))
    made(api, folder).run()
    assert sessions(api) == {"closed": 1}
    assert seen(folder).counters["interrupted_unknown"] == 1
    assert seen(folder).offsets == {}


def test_backlog_viewings_kept_until_read(api, folder):
    """No viewing is dropped before all of a backlog was read.

    Time passes as in the journals, not as it is now: the second half of the viewing is in a later piece.
    """
    then, hour = now() - 5 * 3600 * 10**9, 3600 * 10**9
    then_ms = time.time_ns() // MS - 5 * 3600 * 1000
    play = Play("viewer", "7")

    def part(number: int, at_ns: int, first: int) -> Transfer:
        opened = Opening(number, at_ns, then_ms, play, Part(first, first + 99_999, 10**7), 206, 100_000)
        return Transfer(opened, at_ns + MS, then_ms + 1, 100_000)

    filler = [transfer(n, then + 10**9 + n * MS, f"filler{n}") for n in range(10, 2500)]
    lines = [part(1, then, 0), *filler, part(2, then + hour // 6, 100_000)]
    assert sum(len(encode(line)) for line in lines) > PIECE
    journal(folder, "1-dead", *lines)
    made(api, folder).run()
    told = [
        (report["bytes_total"], report["skip"])
        for report in api.recorded()
        if report["session_id"] == "viewer"
    ]
    assert told == [("100000", "0"), ("100000", "1")]


def test_line_written_during_lock_release(api, folder, monkeypatch):
    """A line that is written while the relay releases its lock is delivered by that relay.

    A worker that saw the lock taken a moment before relies on that; no more senders are started for it.
    """
    journal(folder, "1-first", transfer(1, now() - 10**9, "first"))
    has_news = Journals.has_news
    late = iter(["second", "third"])

    def write_and_look(self: Journals, **options: bool) -> bool:
        name = next(late, None)
        if name is not None:
            journal(folder, f"2-{name}", transfer(1, now() - 10**9, name))
        return has_news(self, **options)

    monkeypatch.setattr(Journals, "has_news", write_and_look)
    relay = made(api, folder)
    thread = threading.Thread(target=relay.run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert sessions(api) == {"first": 1, "second": 1, "third": 1}
    assert not folder.unfinished.exists()


def test_refused_batch_stays_in_journals(api, folder, monkeypatch, caplog):
    """Lines that the outbox refuses stay in the journals until it accepts them, and one ERROR is logged."""
    journal(folder, "1-dead", *[transfer(n, now() - 10**9 + n, f"s{n}") for n in range(20)])
    ingest, refused = SQLiteOutbox.ingest, []

    def failing(self: SQLiteOutbox, batch: Any) -> None:
        if len(refused) < 3:
            refused.append(batch)
            raise OutboxError("the outbox can't be used: database or disk is full")
        ingest(self, batch)

    monkeypatch.setattr(SQLiteOutbox, "ingest", failing)
    monkeypatch.setattr(module, "STORE_RETRY", 0.05)
    made(api, folder).run()
    assert set(sessions(api).values()) == {1}
    assert stats(folder) == Stats(20, 0, 20, 0, 0)
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1


def test_refused_batch_is_not_recomputed(api, folder, monkeypatch):
    """While the outbox refuses a batch, nothing is loaded or decided again.

    A hundred thousand viewings would cost a second at each retry.
    """
    opened = [opening(n, now() - 2 * 10**9 + n, f"s{n}") for n in range(20)]
    closed = [transfer(n, now() - 10**9 + n, f"s{n}") for n in range(20)]
    ingest, viewings, refused, loaded = SQLiteOutbox.ingest, SQLiteOutbox.viewings, [], []

    def failing(self: SQLiteOutbox, batch: Any) -> None:
        if len(refused) < 5 and batch.offsets:
            refused.append(batch)
            raise OutboxError("the outbox can't be used: database is locked")
        ingest(self, batch)

    def load(self: SQLiteOutbox) -> Any:
        loaded.append(True)
        return viewings(self)

    monkeypatch.setattr(SQLiteOutbox, "ingest", failing)
    monkeypatch.setattr(SQLiteOutbox, "viewings", load)
    monkeypatch.setattr(module, "STORE_RETRY", 0.02)
    with living(folder) as writer, relaying(api, folder):
        writer.write(*opened)
        assert until(lambda: len(refused) >= 2)
        writer.write(*closed)
        api.wait_for(20, PATIENCE)
    assert len({id(batch) for batch in refused}) == 1
    assert len(loaded) == 1
    assert set(sessions(api).values()) == {1}
    assert stats(folder) == Stats(20, 0, 20, 0, 0)


def test_full_outbox_gets_smaller_pieces(api, folder, monkeypatch):
    """A batch that does not fit in the outbox is read again in smaller pieces."""
    journal(folder, "1-dead", *[transfer(n, now() - 10**9 + n, f"s{n}") for n in range(300)])
    ingest, refused = SQLiteOutbox.ingest, []

    def small_only(self: SQLiteOutbox, batch: Any) -> None:
        if len(batch.reports) > 150:
            refused.append(batch)
            raise OutboxFull("the outbox can't be used: database or disk is full")
        ingest(self, batch)

    monkeypatch.setattr(SQLiteOutbox, "ingest", small_only)
    monkeypatch.setattr(Limits, "piece_bytes", property(lambda self: SMALL_PIECE if refused else PIECE))
    monkeypatch.setattr(module, "STORE_RETRY", 0.02)
    made(api, folder).run()
    assert len(refused) == 1
    assert set(sessions(api).values()) == {1}
    assert stats(folder) == Stats(300, 0, 300, 0, 0)


def test_exit_while_outbox_refuses(api, folder, monkeypatch):
    """A relay that exits while the outbox refuses its batch leaves everything to the next relay."""
    play = transfer(1, now() - 10**9, "viewer", sent=100_000)
    journal(folder, "1-dead", play.opening, play)
    with monkeypatch.context() as patch:
        refused = []

        def failing(self: SQLiteOutbox, batch: Any) -> None:
            refused.append(batch)
            raise OutboxError("the outbox can't be used: database is locked")

        patch.setattr(SQLiteOutbox, "ingest", failing)
        with relaying(api, folder, T23_REPORT_PER="stream"):
            assert until(lambda: refused)
    made(api, folder, T23_REPORT_PER="stream").run()
    assert sessions(api) == {"viewer": 1}
    assert stats(folder) == Stats(1, 0, 1, 0, 0)


def test_corrupt_outbox_is_replaced(api, folder, monkeypatch, caplog):
    """An outbox that becomes corrupt is renamed, and the relay goes on with a new one."""
    claim, broken = SQLiteOutbox.claim, []

    def corrupting(self: SQLiteOutbox, *arguments: Any) -> Any:
        entries = claim(self, *arguments)
        if entries and not broken:
            broken.append(True)
            folder.outbox.write_bytes(b"no database" * 1000)
            raise OutboxCorrupt("the outbox is corrupt")
        return entries

    monkeypatch.setattr(SQLiteOutbox, "claim", corrupting)
    with living(folder) as writer, relaying(api, folder):
        writer.write(transfer(1, now(), "before"))
        api.wait_for(1, PATIENCE)
        writer.write(transfer(2, now(), "after"))
        assert until(lambda: set(sessions(api)) == {"before", "after"})
    assert len(list(folder.path.glob("outbox.db.corrupt-*"))) == 1
    assert set(sessions(api).values()) == {1}


class Killed(BaseException):
    """The process ends here, as far as the relay can tell."""


def at_point(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, *, after: bool) -> None:
    """The next call of this method kills; with *after*, once it is done."""
    method: Callable[..., Any] = getattr(owner, name)

    def kill(self: Any, *arguments: Any, **options: Any) -> Any:
        works = not arguments or bool(arguments[0])
        answer = method(self, *arguments, **options) if after or not works else None
        if works:
            raise Killed
        return answer

    monkeypatch.setattr(owner, name, kill)


#: Where the relay is killed, and whether before or after what it did there.
CRASH_POINTS = {
    "before_ingest_commit": (SQLiteOutbox, "ingest", False),
    "after_ingest_commit": (SQLiteOutbox, "ingest", True),
    "after_ingest_before_unlink": (Journals, "remove_finished", False),
    "after_unlink": (Journals, "remove_finished", True),
    "after_forgetting_places": (SQLiteOutbox, "forget_journals", True),
    "after_claim": (Delivery, "_queue_claimed", False),
    "after_send": (SQLiteOutbox, "settle", False),
    "after_ack": (SQLiteOutbox, "settle", True),
}


@pytest.mark.parametrize("point", CRASH_POINTS.values(), ids=CRASH_POINTS)
def test_kill_at_any_point(point, api, folder, monkeypatch):
    """A kill at any point loses nothing, and sends twice no more than was in flight."""
    owner, name, after = point
    monkeypatch.setattr(standin, "CACHE_SECONDS", 0)  # else the API's cache hides what is sent twice
    count = 40
    journal(folder, "1-dead", *[transfer(n, now() - 10**9 + n, f"s{n}") for n in range(count)])
    with monkeypatch.context() as patch:
        at_point(patch, owner, name, after=after)
        relay = made(api, folder)
        with pytest.raises(Killed):
            relay.run()
        time.sleep(0.2)  # what a sender had begun
        os.close(relay._lock)
    made(api, folder).run()
    told = sessions(api)
    assert set(told) == {f"s{n}" for n in range(count)}
    doubled = sum(times - 1 for times in told.values())
    assert doubled <= (MOST_SENDERS * CLAIMED_PER_SENDER if name in ("settle", "_queue_claimed") else 0)
    assert stats(folder) == Stats(count, 0, count, 0, 0)
    assert seen(folder).offsets == {}
    assert list(folder.journals.iterdir()) == []


@pytest.mark.parametrize("error", [Killed(), RuntimeError("a fault")])
def test_tries_of_a_killed_relay(
    api: StandInServer, folder: StateFolder, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """A relay that is killed once it works was not started in vain; one that fails of itself was."""
    folder.create()
    folder.relay_start.write_bytes(b"5 1 wanted")
    journal(folder, "1-dead", transfer(1, now() - 10**9, "s"))

    def fail(self: SQLiteOutbox, *arguments: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(SQLiteOutbox, "ingest", fail)
        relay = made(api, folder)
        with pytest.raises(type(error)):
            relay.run()
        os.close(relay._lock)
    assert folder.relay_start.exists() == isinstance(error, RuntimeError)
    if folder.relay_start.exists():
        assert folder.relay_start.read_bytes() == b"5 1 wanted"
    made(api, folder).run()
    assert not folder.relay_start.exists()
    assert list(sessions(api)) == ["s"]


def test_other_boot_viewing_uses_wall_clock(api, folder, monkeypatch):
    """The times of a viewing from another boot are converted by the wall clock.

    It was an hour ago, so it is over; by the old boot's own clock it would seem to be now.
    """
    hour = 3600 * 10**9
    with monkeypatch.context() as patch:
        patch.setattr(intake, "boot_id", lambda: "the boot before")
        patch.setattr(
            intake.Intake, "_clock", lambda self: (self._boot, time.time_ns() - time.monotonic_ns() - hour)
        )
        journal(folder, "1-dead", transfer(1, now() - 10**9, "viewer"))
        made(api, folder).run()
    journal(folder, "2-dead", transfer(1, now() - 10**9, "viewer"))
    made(api, folder).run()
    assert [report["skip"] for report in api.recorded()] == ["0", "0"]


# As a process of its own.


class RelayProcess:
    """``python -m t23_middleware relay``, as a service or as a worker starts it."""

    def __init__(
        self, environ: dict[str, str], log: Path, *, automatic: bool = False, before: Sequence[str] = ()
    ) -> None:
        self._log = log
        own = {name: text for name, text in os.environ.items() if not name.startswith("T23_")}
        if automatic:
            environ = {**environ, "_T23_STARTED_BY_WORKER": "1"}
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*before, sys.executable, "-m", "t23_middleware", "relay"],
                env={**own, **environ},
                cwd=ROOT,
                stdout=output,
                stderr=output,
            )

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self) -> int:
        """Its exit code, once it has ended by itself."""
        return self.process.wait(PATIENCE)

    def end(self, number: int = signal.SIGKILL) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(PATIENCE)


@pytest.fixture
def run(api: StandInServer, folder: StateFolder, tmp_path: Path) -> Iterator[Callable[..., RelayProcess]]:
    """Starts relays; all are ended with the test."""
    started: list[RelayProcess] = []

    def begin(of: StandInServer = api, automatic: bool = False, **more: str) -> RelayProcess:
        relay = RelayProcess(environ(of, folder, **more), tmp_path / "relay.log", automatic=automatic)
        started.append(relay)
        return relay

    yield begin
    for relay in started:
        relay.end()


def test_sigterm_lets_finish_what_is_in_flight(api, folder, run):
    journal(folder, "1-dead", *[transfer(n, now() - 10**9 + n, f"s{n}") for n in range(8)])
    api.fault("latency", seconds=1.0)
    relay = run(T23_EXIT_SECONDS="20")
    api.wait_for(8, PATIENCE)
    assert relay.end(signal.SIGTERM) == 0, relay.log()
    assert stats(folder) == Stats(8, 0, 8, 0, 0)
    assert not folder.unfinished.exists()
    assert "Traceback" not in relay.log()


def test_sigterm_while_api_hangs(api, folder, run):
    """SIGTERM ends the relay in time while the API hangs, and the next relay delivers."""
    journal(folder, "1-dead", *[transfer(n, now() - 10**9 + n, f"s{n}") for n in range(50)])
    api.fault("hang")
    relay = run(T23_EXIT_SECONDS="0.5", T23_TIMEOUT="60")
    assert until(lambda: leased(folder))
    began = time.monotonic()
    assert relay.end(signal.SIGTERM) == 0, relay.log()
    assert time.monotonic() - began < PATIENCE / 2
    assert folder.unfinished.exists()
    assert stats(folder).waiting == 50
    api.heal()
    run()
    api.wait_for(50, PATIENCE)
    assert until(lambda: stats(folder) == Stats(50, 0, 50, 0, 0))
    assert set(sessions(api).values()) == {1}


def leased(folder: StateFolder) -> int:
    return len(rows(folder, "SELECT 1 FROM reports WHERE leased = 1"))


_PACED_WRITER = """
import sys, time
from pathlib import Path
from t23_middleware.journal import JournalWriter
from t23_middleware.state import StateFolder
from tests.relay.writers import encode, opening, transfer
writer = JournalWriter(StateFolder(Path(sys.argv[1])), "0.1.0", "digest")
number, name = 0, sys.argv[2]
while number < int(sys.argv[3]):
    for number in range(number + 1, number + 6):
        session = f"{name}-{number}"
        assert writer.write(encode(opening(number, time.monotonic_ns(), session)))
        assert writer.write(encode(transfer(number, time.monotonic_ns(), session)))
    time.sleep(0.02)
print(number, flush=True)
sys.stdin.read()
"""


def test_kill_relay_while_workers_write(api, folder, run, monkeypatch):
    """Ten kills of the relay while two workers write lose nothing."""
    monkeypatch.setattr(standin, "CACHE_SECONDS", 0)  # else the API's cache hides what is sent twice
    chance, kills, each = random.Random(7), 10, 1500
    writers = [start(_PACED_WRITER, str(folder.path), name, str(each)) for name in "ab"]
    try:
        for _ in range(kills):
            before = len(api.recorded())
            relay = run()
            # Killed before it began, or at once, or in the middle of its work: as chance has it.
            until(lambda: len(api.recorded()) > before, chance.choice([0.3, 2.0, 4.0]))  # noqa: B023
            time.sleep(chance.random() * 0.2)
            relay.end(signal.SIGKILL)
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline().strip() == str(each)
    finally:
        for writer in writers:
            end(writer)
    run()
    assert until(lambda: list(folder.journals.glob("*.journal")) == [], 60)
    assert until(lambda: stats(folder) == Stats(2 * each, 0, 2 * each, 0, 0), 60)
    told = sessions(api)
    assert set(told) == {f"{name}-{number}" for name in "ab" for number in range(1, each + 1)}
    assert sum(times - 1 for times in told.values()) <= kills * MOST_CLAIMED


def test_an_outage_across_a_kill_loses_nothing(api, folder, run):
    journal(folder, "1-dead", *[transfer(n, now() - 10**9 + n, f"s{n}") for n in range(100)])
    api.stop()
    first = run()
    assert until(lambda: stats(folder).captured == 100)
    first.end(signal.SIGKILL)
    api.start()
    run()
    api.wait_for(100, PATIENCE)
    assert until(lambda: stats(folder) == Stats(100, 0, 100, 0, 0))
    assert set(sessions(api).values()) == {1}


# One at a time.


@pytest.mark.parametrize(("automatic", "code"), [(False, 2), (True, 0)], ids=["operator's", "worker's"])
def test_a_second_relay_is_refused(automatic, code, api, folder, run):
    first = run()
    assert until(lambda: lock_is_held(folder.relay_lock)), first.log()
    second = run(automatic=automatic)
    assert second.wait() == code
    assert ("another relay works on" in second.log()) == (not automatic)
    assert "Traceback" not in second.log()
    assert first.process.poll() is None
    journal(folder, "1-dead", transfer(1, now() - 10**9, "still"))
    assert [report["session_id"] for report in api.wait_for(1, PATIENCE)] == ["still"]


def test_parallel_starts_run_one_relay(api, folder, run):
    """Of several relays that start at once, one works and the others exit."""
    journal(folder, "1-dead", *[transfer(n, now() - 10**9 + n, f"s{n}") for n in range(100)])
    relays = [run(automatic=True) for _ in range(4)]
    assert [relay.wait() for relay in relays] == [0] * 4
    assert sum(sessions(api).values()) == len(sessions(api)) == 100
    assert "Traceback" not in relays[0].log()


def test_removed_lock_ends_relay(api, folder, run):
    """A relay whose lock file was removed exits and leaves the work to its successor."""
    first = run()
    assert until(lambda: lock_is_held(folder.relay_lock)), first.log()
    folder.relay_lock.unlink()
    assert first.wait() == 0
    assert "relay.lock" in first.log()
    run()
    journal(folder, "1-dead", transfer(1, now() - 10**9, "after"))
    api.wait_for(1, PATIENCE)
    assert sessions(api) == {"after": 1}


# Leaving.


def test_automatic_relay_follows_writers(api, folder, run):
    """An automatic relay runs as long as a writer lives, and exits when none does."""
    with living(folder, digest=digest(api, folder)) as writer:
        writer.write(transfer(1, now(), "one"))
        relay = run(automatic=True)
        api.wait_for(1, PATIENCE)
        with pytest.raises(subprocess.TimeoutExpired):
            relay.process.wait(module.LEAVE_AFTER + 1.5)
        writer.write(transfer(2, now(), "two"))
        api.wait_for(2, PATIENCE)
        writer.kill()
        assert relay.wait() == 0, relay.log()
    assert list(folder.journals.iterdir()) == []
    assert not folder.has_work()


def test_a_service_stays(api, folder, run):
    relay = run()
    assert until(lambda: lock_is_held(folder.relay_lock)), relay.log()
    with pytest.raises(subprocess.TimeoutExpired):
        relay.process.wait(module.LEAVE_AFTER + 1.5)
    assert relay.end(signal.SIGTERM) == 0


def test_automatic_relay_waits_for_api(api, folder, run):
    """An automatic relay waits for an API that is down."""
    journal(folder, "1-dead", transfer(1, now() - 10**9, "late"))
    api.stop()
    relay = run(automatic=True)
    with pytest.raises(subprocess.TimeoutExpired):
        relay.process.wait(module.LEAVE_AFTER + 3)
    api.start()
    api.wait_for(1, PATIENCE)
    assert relay.wait() == 0


def test_automatic_relay_exits_when_refused(folder, run):
    """An automatic relay does not wait for an API that accepts nothing from this server."""
    with StandInServer(whitelisted=False) as denying:
        journal(folder, "1-dead", transfer(1, now() - 10**9, "denied"))
        relay = run(of=denying, automatic=True)
        assert relay.wait() == 0, relay.log()
    assert stats(folder) == Stats(1, 1, 0, 0, 0)
    assert folder.has_work()


@pytest.mark.parametrize(
    "other", [{"digest": "other settings"}, {"version": "999.0"}], ids=["settings", "version"]
)
def test_unwanted_relay_exits(other, api, folder, run):
    """A relay that the newest writer does not want (other settings or version) exits, and delivers nothing for it."""
    wanted = digest(api, folder)
    with living(folder, digest=wanted) as old:
        old.write(transfer(1, now(), "old"))
        relay = run(automatic=True)
        api.wait_for(1, PATIENCE)
        with living(folder, **{"digest": wanted, **other}) as new:
            new.write(transfer(1, now(), "new"))
            assert relay.wait() == 0, relay.log()
            assert run(automatic=True).wait() == 0
            assert sessions(api) == {"old": 1}
            with StandInServer() as second:
                run(of=second)  # a service does as it is told
                assert [report["session_id"] for report in second.wait_for(1, PATIENCE)] == ["new"]


@pytest.mark.parametrize("other", [{"digest": "other settings"}, {"version": "99.0"}])
def test_unwanted_relay_counts_as_failed(api, folder, run, other):
    """A relay that the newest writer does not want stores nothing, so its workers try less and less often."""
    folder.create()
    wanted = {"digest": digest(api, folder)} | other
    with living(folder, **wanted) as new:
        new.write(transfer(1, now(), "new"))
        folder.relay_start.write_bytes(b"5 1 wanted")
        assert run(automatic=True).wait() == 0
        assert folder.relay_start.read_bytes() == b"5 1 wanted"


def test_two_apps_share_a_folder(api, tmp_path):
    """Two apps with other settings, asked in turn: one relay stays and delivers the plays of both."""
    state, site = tmp_path / "state", "gunicorn -w 1 -b 127.0.0.1:PORT examples.flask_app:app"
    with running(site, state, api.url) as one, running(site, state, api.url, T23_TIMEOUT="7") as other:
        number = numbers()

        def all_arrived() -> bool:
            play = next(number)
            for name, server in (("one", one), ("other", other)):
                server.get(f"{MEDIA}?session_id={name}{play}", Range="bytes=0-999")
            return {"one5", "other5"} <= sessions(api).keys()

        assert until(all_arrived), one.log() + other.log()


def test_older_writer_settings_ignored(api, folder, run):
    """An older writer with other settings changes nothing for the relay of the newer one."""
    with living(folder, digest="other settings", version="0.0.1") as older:
        older.write(transfer(1, now(), "older"))
        with living(folder, digest=digest(api, folder)) as newer:
            newer.write(transfer(1, now(), "newer"))
            relay = run(automatic=True)
            api.wait_for(2, PATIENCE)
            assert relay.process.poll() is None


# What can go wrong at the start.


def test_unusable_state_folder_is_reported(api, folder, run):
    """A state folder that can't be used is reported in one sentence, without a traceback."""
    folder.outbox.mkdir()
    relay = run()
    assert relay.wait() == 1
    assert "outbox.db" in relay.log()
    assert "Traceback" not in relay.log()


def test_missing_api_allows_start_and_exit(folder, run):
    """With an API that does not exist a relay still starts, stores reports and exits."""
    nowhere = StandInServer(port=free_port())
    relay = run(of=nowhere)
    journal(folder, "1-dead", transfer(1, now() - 10**9, "nowhere"))
    assert until(lambda: stats(folder).waiting == 1)
    assert relay.end(signal.SIGINT) == 0, relay.log()
    assert "Traceback" not in relay.log()
