"""Plays that nginx counts: journals and a log as files, the relay as a whole, and what arrives at the API."""

from __future__ import annotations

import json
import logging
import os
import random
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from t23_middleware.ops import standin
from t23_middleware.ops.standin import StandInServer
from t23_middleware.relay import process
from t23_middleware.relay.outbox import SQLiteOutbox, Stats
from t23_middleware.relay.process import Relay
from t23_middleware.state import StateFolder
from t23_middleware.transfer import (
    OFFLOADED,
    PROXY,
    JournalLine,
    Opening,
    Part,
    Play,
    Progress,
    Transfer,
    encode,
)

from ..harness import PATIENCE, until
from .readers import rows, seen, stats
from .test_process import Killed, at_point, made, relaying
from .writers import MS, alive, header

WRITER = "1-0123456789abcdef"
FILM = 10_000_000
WHOLE = Part(0, FILM - 1, FILM)


def now() -> int:
    return time.monotonic_ns()


def now_ms() -> int:
    return time.time_ns() // MS


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "t23.log"


def opening(number: int, session: str = "", ago: float = 1.0, by: str = PROXY, part: Part = WHOLE) -> Opening:
    """A response that started so many seconds *ago*."""
    at_ns, at_ms = now() - int(ago * 1e9), now_ms() - int(ago * 1000)
    status = 200 if part.first == 0 else 206
    play = Play(session or f"s{number}", "7")
    length = part.size if by == PROXY else None
    return Opening(number, at_ns, at_ms, play, part, status, length, by)


def offloaded(number: int, **more: Any) -> Opening:
    return opening(number, by=OFFLOADED, part=Part(0, None, None), **more)


def closed(opening: Opening, sent: int = FILM, after: float = 0.01) -> Transfer:
    """The app was done with it so many seconds later."""
    return Transfer(
        opening, opening.started_ns + int(after * 1e9), opening.started_ms + int(after * 1000), sent
    )


def journal(folder: StateFolder, *lines: JournalLine, name: str = WRITER) -> Path:
    path = folder.journals / f"{name}.000000.journal"
    path.write_bytes(b"".join(map(encode, (header(name), *lines))))
    return path


def says(number: int, body: int, ago: float = 0.3, writer: str = WRITER, **more: Any) -> str:
    """nginx's line of a response that ended so many seconds *ago*."""
    fields = {
        "t23": 1,
        "play": f"{writer}.{number}",
        "end": round(now_ms() - ago * 1000) / 1000,
        "seconds": 0.5,
        "status": 200,
        "body": body,
        "complete": "OK",
        "type": "video/mp4",
        "range": "",
        "length": str(FILM),
        "cache": "",
        **more,
    }
    return json.dumps(fields, separators=(",", ":")) + "\n"


def append(log: Path, *lines: str) -> None:
    with log.open("a") as file:
        file.write("".join(lines))


def told(api: StandInServer) -> dict[str, list[int]]:
    """Session -> bytes of each of its reports."""
    found: dict[str, list[int]] = {}
    for report in api.recorded():
        found.setdefault(report["session_id"], []).append(int(report["bytes_total"]))
    return found


def held(folder: StateFolder) -> list[str]:
    """The lines that the outbox keeps for a while."""
    names = [name for (name,) in rows(folder, "SELECT name FROM proxy")]
    return [name.removeprefix("line ") for name in names if name.startswith("line ")]


def losses(folder: StateFolder) -> dict[str, int]:
    return {loss.reason: loss.reports for loss in seen(folder).losses}


def relay(api: StandInServer, folder: StateFolder, log: Path, **more: str) -> Relay:
    return made(api, folder, T23_PROXY_LOG=str(log), **more)


def test_play_has_smaller_byte_count(api, folder, log):
    """A play has the bytes of the log, but not more than the app sent."""
    cut, whole, chunked = opening(1), opening(2), opening(3)
    journal(folder, *(line for each in (cut, whole, chunked) for line in (each, closed(each))))
    log.write_text(says(1, 3_000_000) + says(2, FILM) + says(3, FILM + 10_000))
    relay(api, folder, log).run()
    assert told(api) == {"s1": [3_000_000], "s2": [FILM], "s3": [FILM]}
    assert stats(folder) == Stats(3, 0, 3, 0, 0)


def test_offloaded_play_uses_log(api, folder, log):
    """For a play that the app offloads, everything is taken from the log."""
    plays = [offloaded(number, ago=3 - number / 10) for number in range(1, 6)]
    journal(folder, *(line for each in plays for line in (each, closed(each, 0))))
    log.write_text(
        says(1, 3_000_000)
        + says(2, 5_000_000, status=206, range=f"bytes 5000000-9999999/{FILM}", length="5000000")
        + says(3, 3_000_000, type="image/jpeg")
        + says(4, 153, status=404, type="text/html")
        + says(5, 2, status=206, range=f"bytes 0-1/{FILM}", length="2")
    )
    relay(api, folder, log).run()
    assert told(api) == {"s1": [3_000_000], "s2": [5_000_000]}
    assert {report["session_id"]: report["skip"] for report in api.recorded()} == {"s1": "0", "s2": "1"}
    assert seen(folder).counters["proxy_not_played"] == 2
    assert stats(folder) == Stats(2, 0, 2, 0, 0)


def test_play_waits_for_its_line(api, folder, log):
    """A play stays open until its line arrives."""
    log.touch()
    play = opening(1, ago=0.2)
    journal(folder, play, closed(play))
    with alive(folder, WRITER), relaying(api, folder, T23_PROXY_LOG=str(log)):
        assert until(lambda: seen(folder).notes.get("awaited") == "1")
        assert told(api) == {}
        append(log, says(1, 4_000_000, ago=0))
        api.wait_for(1, PATIENCE)
        assert until(lambda: seen(folder).notes["awaited"] == "0")
    assert told(api) == {"s1": [4_000_000]}
    assert int(seen(folder).notes["proxy_line_ms"]) > now_ms() - 60_000


def test_early_line_waits_for_journal(api, folder, log):
    """A line that arrives before its journal is joined with it later."""
    append(log, says(1, 5_000_000, ago=0))
    with alive(folder, WRITER), relaying(api, folder, T23_PROXY_LOG=str(log)):
        assert until(lambda: held(folder) == [f"{WRITER}.1"])
        play = opening(1, ago=1)
        journal(folder, play, closed(play))
        api.wait_for(1, PATIENCE)
        assert until(lambda: held(folder) == [])
    assert told(api) == {"s1": [5_000_000]}


def test_bad_lines_counted_and_skipped(api, folder, log):
    """Lines that are foreign, broken or repeated are counted, and the next line is read."""
    plays = [opening(number, ago=20) for number in (1, 2)]
    journal(folder, *(line for each in plays for line in (each, closed(each))))
    log.write_text(
        "192.0.2.1 - - [24/Nov/2026] GET\n"
        + says(1, 600_000, ago=15)[:80]
        + "\n\x00\xff\n"
        + says(9, 600_000, ago=15, writer="2-other")
        + says(1, 700_000, ago=14)
        + says(1, 800_000, ago=13)
        + '{"t23":1,"play":"'
        + "x" * 1_000_000
        + '"}\n'
        + says(2, 900_000, ago=12)
    )
    relay(api, folder, log).run()
    assert told(api) == {"s1": [700_000], "s2": [900_000]}
    found = seen(folder).counters
    assert found["proxy_foreign"] == 3
    assert found["proxy_bad"] == 2
    assert found["proxy_cached"] == 1


@pytest.mark.parametrize(
    ("cache", "by"),
    [("HIT", PROXY), ("STALE", OFFLOADED), ("UPDATING", PROXY), ("REVALIDATED", OFFLOADED)],
)
def test_cached_line_decides_nothing(api, folder, log, cache, by):
    """It comes before the play's own: that one is still under way, while others are answered with what it brought."""
    play = opening(1, ago=20) if by == PROXY else offloaded(1, ago=20)
    journal(folder, play, closed(play, FILM if by == PROXY else 0))
    log.write_text(says(1, 5000, ago=19, cache=cache) + says(1, 2, ago=18, cache=cache))
    with alive(folder, WRITER), relaying(api, folder, T23_PROXY_LOG=str(log)):
        assert until(lambda: seen(folder).counters.get("proxy_cached") == 1), "a probe is no play"
        assert told(api) == {}
        append(log, says(1, 5000, ago=1, cache=cache), says(1, 700_000, ago=0.5, cache="MISS"))
        api.wait_for(1, PATIENCE)
    assert told(api) == {"s1": [700_000]}
    assert seen(folder).counters["proxy_cached"] == 2


def test_cached_line_before_its_journal_decides_nothing(api, folder, log):
    append(log, says(1, 9000, ago=2, cache="HIT"))
    with alive(folder, WRITER), relaying(api, folder, T23_PROXY_LOG=str(log)):
        assert until(lambda: seen(folder).counters.get("proxy_cached") == 1)
        play = opening(1, ago=1)
        journal(folder, play, closed(play))
        append(log, says(1, 5_000_000, ago=0, cache="EXPIRED"))
        api.wait_for(1, PATIENCE)
    assert told(api) == {"s1": [5_000_000]}


def test_second_line_after_restart(api, folder, log):
    """A second line is recognised as such after a restart and long after the play."""
    play = opening(1, ago=20)
    journal(folder, play, closed(play))
    log.write_text(says(1, 700_000, ago=19))
    relay(api, folder, log).run()
    append(log, says(1, 700_000, ago=10), says(1, 700_000, ago=9))
    relay(api, folder, log).run()
    assert told(api) == {"s1": [700_000]}
    assert seen(folder).counters["proxy_cached"] == 2


def test_missing_line_after_wait(api, folder, log):
    """Without a line the app's count is reported after the wait, and an offloaded play is lost."""
    log.touch()
    mine, other = opening(1, ago=5), offloaded(2, ago=5)
    journal(folder, mine, closed(mine, 600_000), other, closed(other, 0))
    relay(api, folder, log, T23_PROXY_WAIT="2").run()
    assert told(api) == {"s1": [600_000]}
    assert seen(folder).counters["unconfirmed"] == 1
    assert stats(folder) == Stats(2, 0, 1, 0, 1)
    assert losses(folder) == {"no_proxy_line": 1}
    append(log, says(1, 500_000), says(2, 500_000))
    relay(api, folder, log, T23_PROXY_WAIT="2").run()
    assert told(api) == {"s1": [600_000]}, "one report per id, however late its line"


def test_line_of_dead_worker_decides(api, folder, log):
    """The line of a play whose worker died gives its bytes."""
    mine, other = opening(1, ago=5), offloaded(2, ago=5)
    journal(folder, mine, Progress(mine, now() - 4 * 10**9, now_ms() - 4000, 8 << 20), other)
    log.write_text(says(1, 9_000_000) + says(2, 3_000_000))
    relay(api, folder, log).run()
    assert told(api) == {"s1": [9_000_000], "s2": [3_000_000]}
    assert "interrupted" not in seen(folder).counters


# Relays that come and go.


def test_relay_exits_during_long_transfer(api, folder, log, monkeypatch):
    """An automatic relay does not keep running for a play that the proxy may send for hours.

    Its successor, which the app's next request starts, reads on in the log, which was renamed in the meantime.
    """
    monkeypatch.setattr(process, "LEAVE_AWAITING_AFTER", 1.0)
    log.write_text(says(7, 600_000, writer="2-other"))
    mine, other = opening(1), offloaded(2)
    journal(folder, mine, closed(mine), other, closed(other, 0))
    relay(api, folder, log).run()
    assert told(api) == {}
    assert folder.has_work(), "so that the app's next request starts a relay"
    append(log, says(1, 3_000_000, ago=0))
    log.rename(log.with_name("t23.log.1"))
    append(log, says(2, 4_000_000, ago=0))
    relay(api, folder, log).run()
    assert told(api) == {"s1": [3_000_000], "s2": [4_000_000]}
    assert not folder.has_work()
    assert stats(folder) == Stats(2, 0, 2, 0, 0)


def test_log_read_before_wait_ends(api, folder, log):
    """A relay that was down for longer than the wait reads the log first, before it reports without a line."""
    mine, other = opening(1, ago=20_000), offloaded(2, ago=20_000)
    journal(folder, mine, closed(mine, 600_000), other, closed(other, 0))
    filler = "".join(says(number, 600_000, ago=19_990, writer="2-other") for number in range(20_000))
    log.write_text(filler + says(1, 500_000, ago=10_000) + says(2, 400_000, ago=9_000))
    relay(api, folder, log, T23_PROXY_WAIT="1000000").run()
    assert told(api) == {"s1": [500_000], "s2": [400_000]}
    assert seen(folder).counters["proxy_foreign"] == 20_000


def test_rotation_after_kill_at_first_lines(api, folder, log, monkeypatch):
    """A relay that was killed with its first lines is followed by one that reads all lines since then.

    If only a part of a reading was decided, its end offset is not stored yet; its start is.
    """
    plays = [opening(number, ago=2) for number in range(1, 7)]
    journal(folder, *(line for each in plays for line in (each, closed(each))))
    log.write_text(says(1, 100_001, ago=1) + says(2, 100_002, ago=0))
    with monkeypatch.context() as patch:
        at_point(patch, SQLiteOutbox, "ingest", after=True)
        killed = relay(api, folder, log)
        with pytest.raises(Killed):
            killed.run()
        os.close(killed._lock)
    append(log, says(3, 100_003, ago=0))
    for number in range(3, 0, -1):
        for old in range(2, 0, -1):
            if (older := log.with_name(f"t23.log.{old}")).exists():
                older.rename(log.with_name(f"t23.log.{old + 1}"))
        log.rename(log.with_name("t23.log.1"))
        append(log, says(7 - number, 100_007 - number, ago=0))
    relay(api, folder, log).run()
    assert told(api) == {f"s{number}": [100_000 + number] for number in range(1, 7)}


POINTS = ["ingest", "forget_journals"]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("point", POINTS)
def test_kill_at_any_point(api, folder, log, monkeypatch, point, after):
    """A kill at any point loses no line and counts none twice."""
    monkeypatch.setattr(standin, "CACHE_SECONDS", 0)
    plays = [opening(number, ago=3) if number % 2 else offloaded(number, ago=3) for number in range(1, 41)]
    journal(
        folder, *(line for each in plays for line in (each, closed(each, FILM if each.number % 2 else 0)))
    )
    log.write_text("".join(says(number, 100_000 + number, ago=2) for number in range(1, 41)))
    with monkeypatch.context() as patch:
        at_point(patch, SQLiteOutbox, point, after=after)
        killed = relay(api, folder, log)
        with pytest.raises(Killed):
            killed.run()
        time.sleep(0.2)
        os.close(killed._lock)
    relay(api, folder, log).run()
    assert told(api) == {f"s{number}": [100_000 + number] for number in range(1, 41)}
    assert stats(folder) == Stats(40, 0, 40, 0, 0)


def test_rotation_with_random_kills(api, folder, log, monkeypatch):
    """Rotations under load and relays that are killed at random lose no line and count none twice."""
    monkeypatch.setattr(standin, "CACHE_SECONDS", 0)
    monkeypatch.setattr(process, "LEAVE_AWAITING_AFTER", 0.5)
    dice, count = random.Random(8), 0
    for step in range(8):
        plays = [offloaded(count + n, ago=2, session=f"p{count + n}") for n in range(1, 26)]
        journal(folder, *(line for each in plays for line in (each, closed(each, 0))), name=f"{step}-w")
        append(log, *(says(each.number, 100_000, ago=1, writer=f"{step}-w") for each in plays))
        count += len(plays)
        if step % 2:
            log.rename(log.with_name("t23.log.1"))
        with monkeypatch.context() as patch:
            at_point(patch, SQLiteOutbox, "ingest", after=dice.random() < 0.5)
            killed = relay(api, folder, log)
            with pytest.raises(Killed):
                killed.run()
            time.sleep(0.1)
            os.close(killed._lock)
    relay(api, folder, log).run()
    assert told(api) == {f"p{number}": [100_000] for number in range(1, count + 1)}


def test_older_outbox_gets_table(api, folder, log):
    """The outbox of an earlier version gets the table for the proxy."""
    SQLiteOutbox(folder.outbox).close()
    db = sqlite3.connect(folder.outbox)
    db.execute("DROP TABLE proxy")
    db.commit()
    db.close()
    play = opening(1)
    journal(folder, play, closed(play))
    log.write_text(says(1, 500_000))
    relay(api, folder, log).run()
    assert told(api) == {"s1": [500_000]}


# What is wrong with the log.


def test_missing_log_logged_once(api, folder, log, caplog, monkeypatch):
    """A missing log is logged once, and so is its return."""
    with caplog.at_level(logging.WARNING), alive(folder, WRITER):
        play = opening(1, ago=0.2)
        journal(folder, play, closed(play))
        with relaying(api, folder, T23_PROXY_LOG=str(log)):
            assert until(lambda: any("does not exist" in each.message for each in caplog.records))
            time.sleep(0.5)
            append(log, says(1, 500_000, ago=0))
            api.wait_for(1, PATIENCE)
    told_of = [each.message for each in caplog.records if str(log) in each.message]
    assert len(told_of) == 2, told_of
    assert "can be read again" in told_of[1]


def test_foreign_log_logged_once(api, folder, log, caplog):
    """A log in another format is logged once, however it grows."""
    with alive(folder, WRITER), relaying(api, folder, T23_PROXY_LOG=str(log)):
        for _ in range(5):
            append(log, "192.0.2.1 - - [24/Nov/2026] GET\n" * 10)
            time.sleep(0.3)
        assert until(lambda: seen(folder).counters.get("proxy_foreign") == 50)
    assert len([each for each in caplog.records if "in the format t23" in each.message]) == 1


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "FIFO"])
def test_folder_or_fifo_as_log(api, folder, log, make):
    """A folder or a FIFO in place of the log stops nothing."""
    make(log)
    play = opening(1, ago=5)
    journal(folder, play, closed(play, 600_000))
    relay(api, folder, log, T23_PROXY_WAIT="2").run()
    assert told(api) == {"s1": [600_000]}


def test_two_logs_are_followed_as_one(api, folder, log):
    other = log.with_name("other.log")
    plays = [opening(number) for number in (1, 2)]
    journal(folder, *(line for each in plays for line in (each, closed(each))))
    log.write_text(says(1, 500_000))
    other.write_text(says(2, 600_000))
    made(api, folder, T23_PROXY_LOG=f"{log},{other}").run()
    assert told(api) == {"s1": [500_000], "s2": [600_000]}
