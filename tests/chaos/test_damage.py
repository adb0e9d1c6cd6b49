"""Every file of the state folder damaged between two runs: the relay starts, counts, and goes on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from t23_middleware.errors import StateError
from t23_middleware.ops.standin import StandInServer
from t23_middleware.relay.outbox import OutboxView
from t23_middleware.state import StateFolder
from t23_middleware.transfer import ForeignLine, TornLine, Transfer, decode

from ..harness import PATIENCE, Server, until
from ..relay.writers import MS, journal, transfer
from .api import plain_api, relay
from .load import play

pytestmark = pytest.mark.chaos

GUNICORN = "gunicorn -w 2 -k gthread --threads 4 -b 127.0.0.1:PORT tests.chaos.app:app"
#: Plays that are in the outbox, and plays that are only in the journals yet.
TAKEN_IN, WRITTEN = 30, 20
SIDE_BY_SIDE = 4


def flipped(data: bytes, chosen: random.Random) -> bytes:
    """One bit, where there is something."""
    damaged = bytearray(data or b"\0")
    places = [place for place, byte in enumerate(damaged) if byte] or [0]
    damaged[chosen.choice(places)] ^= 1 << chosen.randrange(8)
    return bytes(damaged)


def riddled(data: bytes, chosen: random.Random) -> bytes:
    for _ in range(40):
        data = flipped(data, chosen)
    return data


def truncated(data: bytes, chosen: random.Random) -> bytes:
    return data[: chosen.randrange(len(data))] if data else data


def emptied(data: bytes, chosen: random.Random) -> bytes:
    return b""


def rubbish(data: bytes, chosen: random.Random) -> bytes:
    return chosen.randbytes(max(len(data), 100))


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flipped": flipped,
    "flipped elsewhere": flipped,
    "riddled": riddled,
    "truncated": truncated,
    "emptied": emptied,
    "rubbish": rubbish,
}
#: What the first run leaves, and what is done to it; a name that differs each time is a pattern here.
CASES = [
    *((name, damage) for name in ("*.journal", "outbox.db", "outbox.db-wal") for damage in DAMAGE),
    *((name, "rubbish") for name in ("outbox.db-shm", "*.lock", "relay.lock", "unfinished")),
    *((name, "emptied") for name in ("outbox.db-shm", "relay.lock")),
]


class SecondRun(NamedTuple):
    """What came of a damaged folder."""

    returncode: int
    said: str
    intact: set[str]
    arrived: list[str]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What killed workers and a killed relay leave: reports in the outbox, and lines that it does not know yet."""
    state = tmp_path_factory.mktemp("damage") / "state"
    with plain_api() as api:
        api.fault("status", status=503)
        server = Server(GUNICORN, state, api.url, T23_RELAY="external").wait_until_ready()
        try:
            play_all(server, range(TAKEN_IN))
            with relay(state, api.url) as process:
                assert until(lambda: captured(state) == TAKEN_IN)
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
            play_all(server, range(TAKEN_IN, TAKEN_IN + WRITTEN))
        finally:
            server.signal_group(signal.SIGKILL)
            server.process.wait()
    return state


def play_all(server: Server, numbers: range) -> None:
    for number in numbers:
        assert play(server.port, f"p{number}") is not None, server.log()


def captured(state: Path) -> int:
    try:
        with OutboxView(StateFolder(state).outbox) as view:
            return view.snapshot().stats.captured
    except StateError:
        return 0


@pytest.fixture(scope="module")
def second_runs(
    left: Path, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Future[SecondRun]]]:
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        yield {
            case: pool.submit(run_again, left, *case, seed, tmp_path_factory.mktemp("second"))
            for case in CASES
        }


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_damaged_file_costs_its_content(
    name: str, damage: str, seed: int, second_runs: dict[tuple[str, str], Future[SecondRun]]
) -> None:
    """A damaged file costs no more reports than were in it."""
    print(f"--seed {seed}")
    run = second_runs[name, damage].result()
    print(run.said)
    assert "Traceback" not in run.said
    # SQLite reads a write-ahead log up to its first damaged frame: the transactions behind it never were.
    assert ({"new"} if name == "outbox.db-wal" else run.intact) <= set(run.arrived)
    if not may_mislead(name, damage):
        assert run.returncode == 0, "something is left"
        assert len(run.arrived) == len(set(run.arrived))


def may_mislead(name: str, damage: str) -> bool:
    """Whether the damage may make a true-looking lie: SQLite has checksums in its log but not in its file."""
    if name == "outbox.db-wal":
        return True
    return name == "outbox.db" and damage in ("flipped", "flipped elsewhere", "riddled")


#: What flipped bits make of rows and tables without the file's structure showing it; reports that it may cost.
LIES = {
    "a session that is no text any more": (
        "UPDATE reports SET session_id = CAST(x'70b2' AS TEXT) WHERE id = 5",
        1,
    ),
    "a host that is no text any more": ("UPDATE reports SET host = CAST(x'70b2' AS TEXT) WHERE id = 5", 1),
    "a session that is no text at all": ("UPDATE reports SET session_id = x'00ff' WHERE id = 5", 1),
    "a time that is no number": ("UPDATE reports SET time_ms = 'noon' WHERE id = 5", 1),
    "a lease that nobody gives": ("UPDATE reports SET leased = 3 WHERE id = 5", 0),
    "a journal whose name is no text": ("INSERT INTO journals VALUES (CAST(x'70b2' AS TEXT), 5)", 0),
    "a place before the beginning": ("INSERT INTO journals VALUES ('new.000000.journal', -7)", 0),
    "a place that is no number": ("INSERT INTO journals VALUES ('new.000000.journal', 'here')", 0),
    "a viewing of no text": ("INSERT INTO viewings VALUES ('', CAST(x'70b2' AS TEXT), '7', '{}')", 0),
    "a counter that is no number": ("UPDATE counters SET value = x'00' WHERE name = 'captured'", 0),
    "a column of another name": ("UPDATE sqlite_master SET sql = replace(sql, 'due_ms', 'due_mt')", 0),
    "a column of no name": (
        "UPDATE sqlite_master SET sql = CAST(replace(CAST(sql AS BLOB), 'due_ms', x'b2') AS TEXT)"
        " WHERE sql LIKE '%due_ms%'",
        0,
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_false_outbox_costs_one_row(lie: str, left: Path, tmp_path: Path) -> None:
    """An outbox with a false value or a false schema costs no more than the row in question."""
    statement, cost = LIES[lie]
    state = copy_of(left, tmp_path)
    with opened(state) as db:
        db.execute(statement)
    assert_all_but(cost, state)


def test_false_index_costs_one_row(left: Path, tmp_path: Path) -> None:
    """An index that does not match its table costs no more than the row in question."""
    state = copy_of(left, tmp_path)
    with opened(state) as db:
        index = db.execute("SELECT * FROM sqlite_master WHERE name = 'reports_by_host'").fetchone()
        db.execute("DELETE FROM sqlite_master WHERE name = 'reports_by_host'")
    with opened(state) as db:
        db.execute("DELETE FROM reports WHERE id = 5")  # of which the index knows nothing now
    with opened(state) as db:
        db.execute("INSERT INTO sqlite_master VALUES (?, ?, ?, ?, ?)", index)
    assert_all_but(1, state)


@contextmanager
def opened(state: Path) -> Iterator[sqlite3.Connection]:
    """The outbox, with its schema to write in; what is done takes effect for those who open it next."""
    with closing(sqlite3.connect(StateFolder(state).outbox)) as db:
        db.execute("PRAGMA writable_schema = 1")
        yield db
        db.commit()


def assert_all_but(cost: int, state: Path) -> None:
    write_new(state)
    with plain_api() as api:
        finish(state, api)
        arrived = [report["session_id"] for report in api.recorded()]
    expected = {"new", *(f"p{number}" for number in range(TAKEN_IN + WRITTEN))}
    assert len(expected - set(arrived)) <= cost, said(state)
    assert len(arrived) == len(set(arrived))
    assert "Traceback" not in said(state)


def run_again(left: Path, name: str, damage: str, seed: int, folder: Path) -> SecondRun:
    chosen = random.Random(f"{seed} {name} {damage}")
    state = copy_of(left, folder)
    for file in sorted((*state.glob(name), *state.glob(f"journals/{name}"))):
        file.write_bytes(DAMAGE[damage](file.read_bytes(), chosen))
    write_new(state)
    unharmed = {"new", *intact(state, name, damage)}
    with plain_api() as api:
        returncode = finish(state, api)
        arrived = [report["session_id"] for report in api.recorded()]
    return SecondRun(returncode, said(state), unharmed, arrived)


def copy_of(left: Path, folder: Path) -> Path:
    return Path(shutil.copytree(left, folder / "state"))


def write_new(state: Path) -> None:
    """A journal that the outbox knows nothing of, since its places of the others may be what is damaged."""
    journal(StateFolder(state), "new", transfer(1, time.monotonic_ns() - 2000 * MS, "new"))


def intact(state: Path, name: str, damage: str) -> set[str]:
    """The sessions that nothing happened to. A lost outbox costs none of these: the journals still have them."""
    if may_mislead(name, damage):
        return set()
    kept = range(TAKEN_IN) if name == "*.journal" else range(TAKEN_IN + WRITTEN)
    return {f"p{number}" for number in kept} | set(closed(state))


def closed(state: Path) -> Iterator[str]:
    """Sessions of the close lines that can still be read."""
    for file in StateFolder(state).journals.glob("*.journal"):
        for line in file.read_bytes().split(b"\n"):
            try:
                what = decode(line)
            except (TornLine, ForeignLine):
                continue
            if isinstance(what, Transfer):
                yield what.opening.play.session_id


def finish(state: Path, api: StandInServer) -> int:
    with relay(state, api.url, "--once") as process:
        return process.wait(2 * PATIENCE)


def said(state: Path) -> str:
    return state.with_suffix(".relay.log").read_text(errors="replace")
