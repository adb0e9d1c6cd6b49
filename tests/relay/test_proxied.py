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


def test_a_play_has_the_bytes_of_the_log_and_not_more_than_the_app_sent(api, folder, log):
    cut, whole, chunked = opening(1), opening(2), opening(3)
    journal(folder, *(line for each in (cut, whole, chunked) for line in (each, closed(each))))
    log.write_text(says(1, 3_000_000) + says(2, FILM) + says(3, FILM + 10_000))
    relay(api, folder, log).run()
    assert told(api) == {"s1": [3_000_000], "s2": [FILM], "s3": [FILM]}
    assert stats(folder) == Stats(3, 0, 3, 0, 0)


def test_of_a_play_that_the_app_offloads_the_log_knows_all(api, folder, log):
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


def test_a_play_stays_open_until_its_line_comes(api, folder, log):
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


def test_a_line_that_comes_before_its_journal_is_joined(api, folder, log):
    append(log, says(1, 5_000_000, ago=0))
    with alive(folder, WRITER), relaying(api, folder, T23_PROXY_LOG=str(log)):
        assert until(lambda: held(folder) == [f"{WRITER}.1"])
        play = opening(1, ago=1)
        journal(folder, play, closed(play))
        api.wait_for(1, PATIENCE)
        assert until(lambda: held(folder) == [])
    assert told(api) == {"s1": [5_000_000]}


def test_lines_that_are_foreign_broken_or_repeated_are_counted_and_the_next_is_read(api, folder, log):
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


def test_a_second_line_is_known_as_such_after_a_restart_and_long_after_the_play(api, folder, log):
    play = opening(1, ago=20)
    journal(folder, play, closed(play))
    log.write_text(says(1, 700_000, ago=19))
    relay(api, folder, log).run()
    append(log, says(1, 700_000, ago=10), says(1, 700_000, ago=9))
    relay(api, folder, log).run()
    assert told(api) == {"s1": [700_000]}
    assert seen(folder).counters["proxy_cached"] == 2


def test_without_a_line_the_apps_count_is_reported_and_an_offloaded_play_is_lost(api, folder, log):
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


def test_the_line_of_a_play_whose_worker_died_decides(api, folder, log):
    mine, other = opening(1, ago=5), offloaded(2, ago=5)
    journal(folder, mine, Progress(mine, now() - 4 * 10**9, now_ms() - 4000, 8 << 20), other)
    log.write_text(says(1, 9_000_000) + says(2, 3_000_000))
    relay(api, folder, log).run()
    assert told(api) == {"s1": [9_000_000], "s2": [3_000_000]}
    assert "interrupted" not in seen(folder).counters


# Relays that come and go.


def test_an_automatic_relay_does_not_stay_for_what_the_proxy_may_send_for_hours(
    api, folder, log, monkeypatch
):
    """Its successor, which the app's next request starts, reads on in the log as it was renamed meanwhile."""
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


def test_a_relay_that_was_away_for_longer_than_the_wait_reads_the_log_first(api, folder, log):
    mine, other = opening(1, ago=20_000), offloaded(2, ago=20_000)
    journal(folder, mine, closed(mine, 600_000), other, closed(other, 0))
    filler = "".join(says(number, 600_000, ago=19_990, writer="2-other") for number in range(20_000))
    log.write_text(filler + says(1, 500_000, ago=10_000) + says(2, 400_000, ago=9_000))
    relay(api, folder, log, T23_PROXY_WAIT="1000000").run()
    assert told(api) == {"s1": [500_000], "s2": [400_000]}
    assert seen(folder).counters["proxy_foreign"] == 20_000


def test_a_relay_that_was_killed_with_its_first_lines_is_followed_by_one_that_reads_all_since(
    api, folder, log, monkeypatch
):
    """Of a reading that was judged in part only it is not known yet how far it is taken; that it began, is."""
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
def test_a_kill_at_any_point_loses_no_line_and_takes_none_twice(api, folder, log, monkeypatch, point, after):
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


def test_rotations_under_load_and_relays_that_are_killed_at_random_lose_none_and_double_none(
    api, folder, log, monkeypatch
):
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


def test_an_outbox_of_a_version_before_gets_its_table(api, folder, log):
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


def test_a_log_that_is_missing_and_comes_back_is_told_once_each(api, folder, log, caplog, monkeypatch):
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


def test_a_log_in_another_format_is_told_once_however_it_grows(api, folder, log, caplog):
    with alive(folder, WRITER), relaying(api, folder, T23_PROXY_LOG=str(log)):
        for _ in range(5):
            append(log, "192.0.2.1 - - [24/Nov/2026] GET\n" * 10)
            time.sleep(0.3)
        assert until(lambda: seen(folder).counters.get("proxy_foreign") == 50)
    assert len([each for each in caplog.records if "in the format t23" in each.message]) == 1


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "FIFO"])
def test_a_folder_or_a_fifo_in_its_place_stops_nothing(api, folder, log, make):
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
