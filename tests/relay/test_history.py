"""The history: what is added once and never lost, what is forgotten, and what the pages make of it."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from t23_middleware.relay import history
from t23_middleware.relay.health import FAILING, PAUSED, WELL, Health
from t23_middleware.relay.history import (
    Series,
    Trouble,
    bucket,
    grown_troubles,
    in_steps,
    nothing,
    quantile,
    quantiles,
    troubles_note,
    troubles_of,
)
from t23_middleware.relay.outbox import (
    Acked,
    Dead,
    DeadLetters,
    Ingest,
    Lost,
    OutboxView,
    Retry,
    SQLiteOutbox,
)
from t23_middleware.relay.report import Report

MINUTE = history.MINUTE_MS
#: The start of a day, so that it starts a minute, a quarter and an hour.
NOW = 20_000 * 24 * history.HOUR_MS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


@pytest.fixture
def outbox(path: Path) -> Iterator[SQLiteOutbox]:
    outbox = SQLiteOutbox(path)
    yield outbox
    outbox.close()


def report(
    number: int, at_ms: int = NOW, photo: str = "7", sent: int = 100, skip: int = 0, host: str = ""
) -> Report:
    return Report(at_ms, host, f"session-{number}", photo, sent, skip)


def take(outbox: SQLiteOutbox, *reports: Report) -> list[int]:
    """Take them in and claim them; their ids."""
    outbox.ingest(Ingest(reports, [], {}, {}))
    return [entry.id for entry in outbox.claim(len(reports), NOW, {each.host for each in reports})]


def seen(path: Path, now_ms: int = NOW) -> history.History:
    with OutboxView(path) as view:
        return view.history(now_ms)


def count(path: Path, query: str) -> int:
    db = sqlite3.connect(path)
    try:
        return int(db.execute(query).fetchone()[0])
    finally:
        db.close()


# What is added.


def test_report_counted_in_its_minute(outbox: SQLiteOutbox, path: Path):
    """A report is counted as captured in the minute of its own time."""
    take(outbox, report(1), report(2, NOW - 1, skip=1), report(3, NOW - 30 * MINUTE, sent=5))
    found = seen(path)
    assert found.hour.of("captured")[-1] == 1
    assert found.hour.of("captured")[-2] == 1
    assert found.hour.of("captured")[-31] == 1
    assert (found.hour.total("captured"), found.hour.total("plays"), found.hour.total("bytes")) == (3, 2, 205)
    assert (found.totals["captured"], found.totals["plays"], found.totals["bytes"]) == (3, 2, 205)


def test_outcomes_and_answers_are_counted(outbox: SQLiteOutbox, path: Path):
    """The outcomes of reports are counted, and the API's answers with them."""
    ids = take(outbox, *(report(n) for n in range(5)))
    outbox.settle(
        [
            Acked(ids[0], 150, "accepted"),
            Acked(ids[1], 700_000_000, "accepted"),
            Dead(ids[2], "no_such_photo", "words", "refused"),
            Lost(ids[3], "ambiguous", "no_answer"),
            Retry(ids[4], NOW, 1, outcome="busy"),
        ],
        NOW,
    )
    outbox.settle([Acked(ids[0], 150)], NOW)  # it is gone: nothing is sent twice
    hour = seen(path).hour
    assert {
        name: hour.total(name) for name in ("sent", "dead", "lost:ambiguous", "took:0.2", "took:inf")
    } == {
        "sent": 2,
        "dead": 1,
        "lost:ambiguous": 1,
        "took:0.2": 2,
        "took:inf": 1,
    }
    assert [
        hour.total(f"answer:{name}") for name in ("accepted", "refused", "no_answer", "busy", "denied")
    ] == [
        2,
        1,
        1,
        1,
        0,
    ]


def test_failed_transaction_leaves_no_history(outbox: SQLiteOutbox, path: Path):
    """A report whose transaction fails is not in the history."""
    with pytest.raises(RuntimeError), outbox.atomic():
        take(outbox, report(1))
        raise RuntimeError
    assert seen(path).hour.total("captured") == 0
    assert outbox.stats() == (0, 0, 0, 0, 0)


def test_sizes_match_tables(outbox: SQLiteOutbox, path: Path):
    """The stored sizes match the tables after everything that happens to reports."""
    ids = take(outbox, *(report(n) for n in range(20)))
    outbox.settle([Acked(id) for id in ids[:5]] + [Lost(id, "ambiguous") for id in ids[5:7]], NOW)
    outbox.settle([Dead(id, "code", "words") for id in ids[7:12]], NOW)
    with pytest.raises(RuntimeError), outbox.atomic():
        outbox.settle([Acked(ids[12])], NOW)
        raise RuntimeError
    with DeadLetters(path) as letters:
        assert letters.retry(ids[7:9]) == ids[7:9]
        assert letters.purge([ids[9]], NOW) == [ids[9]]
    stats = outbox.stats()
    assert stats == (20, 10, 5, 2, 3)
    assert stats.waiting == count(path, "SELECT count(*) FROM reports")
    assert stats.dead == count(path, "SELECT count(*) FROM dead")
    assert seen(path).hour.total("lost:purged") == 1


def test_outbox_without_history_tables(outbox: SQLiteOutbox, path: Path):
    """An outbox from before the history continues and gets its tables."""
    ids = take(outbox, *(report(n) for n in range(4)))
    outbox.settle([Dead(ids[0], "code", "words"), Acked(ids[1])], NOW)
    outbox.close()
    db = sqlite3.connect(path)
    for table in ("minutes", "totals", "videos", "sizes"):
        db.execute(f"DROP TABLE {table}")
    for trigger in ("report_in", "report_out", "dead_in", "dead_out"):
        db.execute(f"DROP TRIGGER {trigger}")
    db.execute("DROP INDEX dead_by_time")
    db.commit()
    db.close()
    again = SQLiteOutbox(path)
    assert again.stats() == (4, 2, 1, 1, 0)
    take(again, report(5))
    assert again.stats() == (5, 3, 1, 1, 0)
    assert seen(path).hour.total("captured") == 1
    again.close()


# What is watched most.


def test_videos_ranked_by_bytes_and_plays(outbox: SQLiteOutbox, path: Path):
    """Videos are ranked by bytes and by plays of a day."""
    take(
        outbox,
        report(1, photo="1", sent=1000),
        report(2, NOW - 20 * history.HOUR_MS, "1", 500, skip=1),
        report(3, photo="2", sent=10),
        report(4, photo="2", sent=10),
        report(5, NOW - 30 * history.HOUR_MS, "3", 10**9),
    )
    found = seen(path)
    assert [video[1:] for video in found.by_bytes] == [("1", 1, 1500), ("2", 2, 20)]
    assert [video.photo_id for video in found.by_plays] == ["2", "1"]


def test_most_relevant_videos_are_kept(outbox: SQLiteOutbox, path: Path):
    """Of a very large number of videos, the ones with the most bytes and plays are kept."""
    most = history.MOST_VIDEOS
    take(outbox, *(report(n, photo=str(n), sent=n, skip=1) for n in range(3 * most)))
    take(outbox, *(report(n, photo=str(n), sent=0) for n in range(10)))
    outbox.begin_minute(NOW, 0)
    assert count(path, "SELECT count(*) FROM videos") <= 2 * most
    found = seen(path)
    assert found.by_bytes[0].photo_id == str(3 * most - 1)
    assert found.by_plays[0].plays == 1


# What is forgotten.


def test_two_days_are_kept(outbox: SQLiteOutbox, path: Path):
    """Two days are kept. Minutes that a wrong clock wrote, older or in the future, are not."""
    kept = history.KEPT_MINUTES
    ages = (0, kept, kept + 1, 10 * kept, -30, -100, -(10**7))
    take(outbox, *(report(n, NOW - age * MINUTE) for n, age in enumerate(ages)))
    outbox.begin_minute(NOW, 0)
    minutes = "SELECT count(DISTINCT minute) FROM minutes WHERE name = 'captured'"
    assert count(path, minutes) == 3
    assert count(path, "SELECT count(*) FROM videos WHERE hour NOT BETWEEN 479900 AND 480002") == 0
    assert seen(path).totals["captured"] == len(ages)


def test_each_minute_tells_how_full_it_is(outbox: SQLiteOutbox, path: Path):
    outbox.begin_minute(NOW - MINUTE, 3)
    take(outbox, report(1, NOW - 90_000), report(2))
    outbox.begin_minute(NOW, 5)
    hour = seen(path).hour
    assert hour.of("open")[-3:] == [None, 3, 5]
    assert hour.of("waiting")[-3:] == [None, 0, 2]
    assert hour.of("oldest_seconds")[-2:] == [0, 90]


def test_day_sums_counts_keeps_highest_gauge(outbox: SQLiteOutbox, path: Path):
    """Over a day counts are added up, and of a gauge the highest value is used."""
    for ago, number in ((3, 9), (2, 4), (1, 6)):
        take(outbox, report(ago, NOW - ago * MINUTE))
        outbox.begin_minute(NOW - ago * MINUTE, number)
    day = seen(path).day
    assert (day.step, len(day)) == (15, 96)
    assert day.of("captured")[-2:] == [3, 0]
    assert day.of("open")[-3:] == [None, 9, None]


# What is made of it, pure.


def test_steps_outside_range_left_out():
    """Steps outside the range are left out, and a name that never occurred has only zeros."""
    series = in_steps([(9, "sent", 1), (10, "sent", 2), (12, "open", 3), (13, "sent", 4)], 10, 1, 3)
    assert series.of("sent") == [2, 0, 0]
    assert series.of("open") == [None, None, 3]
    assert series.of("unheard of") == [0, 0, 0]


def test_empty_history_has_full_length():
    """An empty history has as many steps as any other."""
    empty = nothing(NOW)
    assert (len(empty.hour), len(empty.day)) == (60, 96)
    assert empty.hour.of("open") == [None] * 60


@pytest.mark.parametrize(
    ("took_ms", "name"),
    [
        (0, "took:0.1"),
        (100, "took:0.1"),
        (101, "took:0.2"),
        (1000, "took:1"),
        (86_400_001, "took:inf"),
        (-5, "took:0.1"),
    ],
)
def test_time_falls_into_first_bucket(took_ms: int, name: str):
    """A time is counted in the first step that contains it."""
    assert bucket(took_ms) == name


def test_quantiles_lie_within_steps():
    """Quantiles lie between the limits of their steps."""
    assert quantile({}, 0.5) is None
    assert quantile({"took:1": 10}, 0.5) == pytest.approx(0.75)
    assert quantile({"took:0.1": 90, "took:10": 10}, 0.5) == pytest.approx(0.1 * 50 / 90)
    assert quantile({"took:0.1": 90, "took:10": 10}, 0.95) == pytest.approx(7.5)
    assert quantile({"took:inf": 1}, 0.5) == 86400
    series = Series(0, 1, {"took:1": [2, 0], "open": [1, 1]})
    assert quantiles(series, 0.5) == [pytest.approx(0.75), None]


def test_the_times_of_tries_add_up():
    tries = [("accepted", 100), ("accepted", -3), ("busy", None), ("", None)]
    assert history.of_tries(tries) == Counter(
        {"answer:accepted": 2, "answer:busy": 1, "took:0.1": 2, "took_ms": 100}
    )


# Troubles.


def test_state_change_is_a_trouble():
    """A change of state is a trouble, and the same state with another reason is not."""
    well, down = Health(WELL, "", 1, 1), Health(FAILING, "HTTP 503", 2, 1)
    assert grown_troubles([], {}, {"": well}) == []
    troubles = grown_troubles([], {"": well}, {"": down})
    assert troubles == [Trouble(2, "", FAILING, "HTTP 503")]
    assert grown_troubles(troubles, {"": down}, {"": down._replace(reason="timed out")}) == troubles
    assert grown_troubles(troubles, {"": down}, {"": Health(WELL, "", 9, 9)})[-1] == Trouble(9, "", WELL, "")
    assert grown_troubles([], {}, {"a.example": Health(PAUSED, "why", 3, 0)}) == [
        Trouble(3, "a.example", PAUSED, "why")
    ]


def test_only_so_many_troubles_are_kept():
    former = [Trouble(n, "", FAILING, "") for n in range(history.MOST_TROUBLES)]
    grown = grown_troubles(former, {}, {"": Health(PAUSED, "", 99, 0)})
    assert len(grown) == history.MOST_TROUBLES
    assert grown[-1].at_ms == 99


def test_new_troubles_stored_and_read_back():
    """Troubles are stored only if there are new ones, and are read back."""
    troubles = [Trouble(1, "", FAILING, "why")]
    assert troubles_note(troubles, troubles) == {}
    assert troubles_of(troubles_note(troubles, [])) == troubles


@pytest.mark.parametrize("text", ["", "7", "{}", "[7]", '[["x"]]', '[[1, "", "", 7]]', "null"])
def test_unreadable_troubles_are_skipped(text: str):
    """Stored troubles that can't be read are skipped."""
    assert troubles_of({"troubles": text}) == []
