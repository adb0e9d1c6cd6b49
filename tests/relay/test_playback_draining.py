"""Final counts, and the playback machine that waits for them: facts in the order of their time, reports out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t23_middleware.relay import playback as playback_module
from t23_middleware.relay.drains import final_count, interrupted_count
from t23_middleware.relay.playback import Playback
from t23_middleware.relay.report import Report
from t23_middleware.relay.viewing import MOST_OPEN
from t23_middleware.transfer import Acknowledged, Connection, Opening, Play, Progress, Transfer

from .test_playback import AFTER, MODES, TOTAL, S, _transfers, facts_of, replay, response, told

#: Bytes of earlier answers and a head.
BASE = 1000


def on_connection(transfer: Transfer, cookie: int, written: int | None = None) -> Transfer:
    """*transfer* on a connection of its own, not acknowledged as it closes; *written* bytes carry its body."""
    opening = transfer.opening._replace(connection=Connection(cookie, 80, 2, BASE))
    position = BASE + (transfer.sent if written is None else written)
    return transfer._replace(opening=opening, position=position)


def acked(cookie: int, at: float, bytes: int | None, gone: int = 1) -> Acknowledged:
    """Of the body so many *bytes*."""
    return Acknowledged(cookie, int(at * S), int(at * 1000), None if bytes is None else BASE + bytes, gone)


def begun(playback: Playback, *transfers: Transfer) -> None:
    """Feeds both lines of each; nothing is told yet."""
    for fact in facts_of(transfers):
        if isinstance(fact.event, Opening):
            assert playback.opened(fact.writer, fact.event) == []
        else:
            assert playback.closed(fact.writer, fact.event) == []


# The count.


@pytest.mark.parametrize(
    ("sent", "written", "taken", "count"),
    [
        (3_000_000, 3_000_000, 3_000_000, 3_000_000),
        (3_000_000, 3_000_000, 3_000_001, 3_000_000),  # the FIN
        (3_000_000, 3_000_000, 680_000, 680_000),
        (3_000_000, 3_000_000, 0, 0),
        (3_000_000, 3_000_000, -900, 0),  # not even the head
        (3_000_000, 3_004_128, 3_004_128, 3_000_000),  # TLS
        (3_000_000, 3_030_000, 1_515_000, 1_500_000),  # chunks of 777 bytes
        (3_000_000, 2_999_900, 2_999_000, 2_999_100),  # the head was taken for longer than it is
        (3_000_000, 0, 0, 3_000_000),
        (3_000_000, -50, -50, 3_000_000),
        (0, 0, 5, 0),
    ],
)
def test_final_count_of_a_response(sent, written, taken, count):
    assert final_count(sent, BASE, BASE + written, BASE + taken) == count


@given(st.integers(0, 10**12), *[st.integers(-(10**13), 10**13)] * 3)
def test_final_count_stays_in_bounds(sent, base, position, acked):
    assert 0 <= final_count(sent, base, position, acked) <= sent
    assert final_count(sent, base, position, position) == sent


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.integers(0, 10**9), st.integers(0, 10**9))
def test_more_acknowledged_counts_no_less(sent, written, one, other):
    fewer, more = sorted((one, other))
    assert final_count(sent, 0, written, fewer) <= final_count(sent, 0, written, more)


@pytest.mark.parametrize(
    ("progress", "taken", "count"),
    [
        (None, 500_000, 500_000),
        (None, -20, 0),
        (None, TOTAL + 1, TOTAL),
        ((8_000_000, 8_000_000), 9_000_000, 9_000_000),
        ((8_000_000, 8_000_000), 5_000_000, 5_000_000),
        ((8_000_000, 8_080_000), 10_100_000, 10_000_000),  # chunks of 777 bytes
        ((8_000_000, 8_080_000), 0, 0),
        ((8_000_000, None), 8_500_000, 8_500_000),
    ],
)
def test_count_of_an_interrupted_response(progress, taken, count):
    known: Opening | Progress = on_connection(response(1, 0, 9, 0, 0), 5).opening
    if progress is not None:
        sent, written = progress
        known = Progress(known, 0, 0, sent, None if written is None else BASE + written)
    assert interrupted_count(known, BASE + taken) == count


# What waits.


def test_report_waits_for_final_count():
    playback = Playback()
    begun(playback, on_connection(response(1, 0, 5, 0, 3_000_000), 7))
    assert playback.advance(6 * S, 6000) == []
    assert playback.acknowledged(acked(7, 7, 1_000_000, gone=0)) == []
    assert playback.acknowledged(acked(8, 7, 3_000_000)) == [], "another connection's"
    (report,) = playback.acknowledged(acked(7, 8, 1_200_000))
    assert (report.sent, report.skip, report.time_ms) == (1_200_000, 0, 5000)
    assert playback.acknowledged(acked(7, 9, 3_000_000)) == [], "it is told once"
    assert len(playback.drains) == 0
    assert playback.counts == {}


def test_all_acknowledged_on_living_connection():
    playback = Playback()
    begun(playback, on_connection(response(1, 0, 5, 0, 3_000_000), 7))
    assert told(playback.acknowledged(acked(7, 8, 3_000_000, gone=0))) == [(0, 3_000_000)]


def test_nothing_arrived_makes_no_report():
    playback = Playback()
    begun(playback, on_connection(response(1, 0, 5, 0, 3_000_000), 7))
    assert playback.acknowledged(acked(7, 8, -500)) == []
    assert playback.counts == {"ignored_empty": 1}


def test_unknown_end_counts_handed_over():
    playback = Playback()
    begun(playback, on_connection(response(1, 0, 5, 0, 3_000_000), 7))
    assert told(playback.acknowledged(acked(7, 8, None))) == [(0, 3_000_000)]
    assert playback.counts == {"unknown_end": 1}


def test_connection_gone_before_its_close_line():
    playback = Playback()
    transfer = on_connection(response(1, 0, 5, 0, 3_000_000), 7)
    playback.opened("w", transfer.opening)
    assert playback.acknowledged(acked(7, 4, 900_000)) == []
    assert told(playback.closed("w", transfer)) == [(0, 900_000)]


def test_wait_ends_with_last_known_count():
    playback = Playback(drain_wait_s=100)
    begun(playback, on_connection(response(1, 0, 5, 0, 3_000_000), 7))
    begun(playback, on_connection(response(2, 6, 8, 0, 2_000_000, play=Play("other", "1")), 8))
    playback.drains.last_acked[7] = BASE + 400_000
    assert playback.advance(104 * S, 104_999) == []
    assert told(playback.advance(105 * S, 105_000)) == [(0, 400_000)]
    assert told(playback.advance(109 * S, 109_000)) == [(0, 2_000_000)], "never asked"
    assert playback.counts == {"drain_wait_over": 2, "unknown_end": 1}


def test_wait_after_the_clock_was_set_back():
    playback = Playback(drain_wait_s=100)
    begun(playback, on_connection(response(1, 0, 5000, 0, 3_000_000), 7))
    assert playback.advance(5001 * S, 1000_000) == []
    assert playback.advance(5101 * S, 1099_999) == []
    assert len(playback.advance(5102 * S, 1100_000)) == 1


def test_more_drains_than_a_player_has():
    playback = Playback()
    for number in range(MOST_OPEN + 5):
        transfer = on_connection(response(number, number, number + 0.5, 0, 600_000, last=599_999), 7 + number)
        playback.opened("w", transfer.opening)
        reports = playback.closed("w", transfer)
        assert len(reports) == (number >= MOST_OPEN)
    assert len(playback.drains) == MOST_OPEN
    assert len(playback.conclude(0)) == MOST_OPEN


def test_sessions_dropped_with_their_drains(monkeypatch):
    monkeypatch.setattr(playback_module, "MOST_SESSIONS", 10)
    playback, reports = Playback(), []
    for number in range(30):
        play = Play(f"s{number}", "1")
        transfer = on_connection(response(number, number, number + 0.5, 0, 600_000, play=play), 7 + number)
        reports += playback.opened("w", transfer.opening) + playback.closed("w", transfer)
    assert len(reports) == 20
    assert len(playback.drains) == 10
    assert len(reports + playback.conclude(0)) == 30


def test_orphans_make_room_for_others(monkeypatch):
    """Of dead writers: the oldest viewer goes, and the oldest of too many in one viewing, with what is known."""
    monkeypatch.setattr(playback_module, "MOST_SESSIONS", 10)
    playback, reports = Playback(), []
    for number in range(30):
        play = Play(f"s{number}", "1")
        opening = on_connection(response(number, number, 99, 0, 0, play=play), 7 + number).opening
        reports += playback.opened("w", opening)
        reports += playback.writer_died("w", number, (number + 1) * S, 0)
        playback.drains.last_acked[7 + number] = BASE + 600_000
    assert told(reports) == [(0, 600_000)] * 20
    for number in range(100, 100 + MOST_OPEN + 5):
        opening = on_connection(response(number, number, 999, 9_000_000, 0), 7 + number).opening
        reports += playback.opened("w", opening)
        reports += playback.writer_died("w", number, number * S + 1, 0)
        playback.drains.last_acked[7 + number] = BASE + 700_000
    assert len([report for report in reports if report.sent == 700_000]) == 5
    assert len(playback.drains) == 9 + MOST_OPEN
    assert len(playback.conclude(0)) == 9 + MOST_OPEN
    assert not playback.drains.cookies


@pytest.mark.parametrize("lived", [True, False], ids=["heard later", "heard before"])
def test_dead_writer_leaves_a_connection(lived):
    playback = Playback()
    opening = on_connection(response(1, 0, 5, 0, 0), 7).opening
    playback.opened("w", opening)
    playback.progressed("w", Progress(opening, 2 * S, 2000, 8_000_000, BASE + 8_000_000))
    if not lived:
        assert playback.acknowledged(acked(7, 3, 8_500_000)) == []
    reports = playback.writer_died("w", 1, 4 * S, 4000)
    assert list(playback.open_responses()) == []
    if lived:
        assert reports == []
        assert len(playback.drains) == 1
        reports = playback.acknowledged(acked(7, 6, 8_500_000))
    assert told(reports) == [(0, 8_500_000)]
    assert playback.counts == {"interrupted": 1}
    assert len(playback.drains) == 0


@pytest.mark.parametrize("progress", [True, False])
def test_dead_writer_and_unknown_end(progress):
    playback = Playback()
    opening = on_connection(response(1, 0, 5, 0, 0), 7).opening
    playback.opened("w", opening)
    if progress:
        playback.progressed("w", Progress(opening, 2 * S, 2000, 8_000_000, BASE + 8_000_000))
    playback.writer_died("w", 1, 4 * S, 4000)
    assert told(playback.acknowledged(acked(7, 6, None))) == ([(0, 8_000_000)] if progress else [])
    assert playback.counts == {"interrupted" if progress else "interrupted_unknown": 1}


def test_stream_waits_for_all_its_bytes():
    playback = Playback(per="stream", idle_s=30)
    first = on_connection(response(1, 0, 5, 0, 3_000_000), 7)
    scrub = response(2, 5.01, 9, 20_000_000, 2_500_000)
    assert playback.opened("w", first.opening) + playback.closed("w", first) == []
    assert playback.opened("w", scrub.opening) + playback.closed("w", scrub) == []
    assert playback.advance(500 * S, 500_000) == [], "open to the idle time"
    assert told(playback.acknowledged(acked(7, 510, 1_000_000))) == [(0, 1_000_000)]
    assert playback.advance(539 * S, 539_000) == []
    assert told(playback.advance(540 * S, 540_000)) == [(1, 2_500_000)]


def test_stream_of_which_nothing_arrived():
    playback = Playback(per="stream", min_bytes=1)
    begun(playback, on_connection(response(1, 0, 5, 0, 3_000_000), 7))
    assert playback.acknowledged(acked(7, 8, 0)) == []
    assert playback.advance(AFTER, 0) == []
    assert playback.counts == {"ignored_empty": 1}


# A relay that is killed, or another boot.


def restarted(playback: Playback, boot: str = "", **options: float) -> Playback:
    rows = [(key, text) for key, text in playback.changed(("", 0)) if text is not None]
    successor = Playback(**options)
    successor.restore(rows, (boot, 0), now_ns=50 * S)
    return successor


def test_restarted_relay_waits_on():
    playback = Playback()
    drains = on_connection(response(1, 0, 5, 0, 3_000_000), 7)
    open_now, orphan = (
        on_connection(response(n, 6, 9, 0, 600_000, play=Play(f"s{n}", "1")), 6 + n) for n in (2, 3)
    )
    begun(playback, drains)
    playback.opened("w", open_now.opening)
    playback.acknowledged(acked(8, 7, 500_000))
    playback.opened("dead", orphan.opening)
    playback.writer_died("dead", 3, 8 * S, 8000)
    successor = restarted(playback, drain_wait_s=1000)
    assert len(successor.drains) == 2
    assert set(successor.drains.cookies) == {7, 8, 9}
    assert list(successor.open_responses()) == [("w", 2)]
    assert told(successor.closed("w", open_now)) == [(0, 500_000)]
    assert told(successor.acknowledged(acked(7, 60, 800_000))) == [(0, 800_000)]
    assert told(successor.advance(1009 * S, 1_009_000)) == [], "nothing is known of it"
    assert +successor.counts == {"drain_wait_over": 1, "interrupted_unknown": 1}


def test_another_boot_has_no_connections():
    playback = Playback()
    begun(playback, on_connection(response(1, 0, 5, 0, 3_000_000), 7))
    orphan = on_connection(response(2, 6, 9, 0, 600_000, play=Play("orphan", "1")), 8)
    playback.opened("w", orphan.opening)
    playback.writer_died("w", 2, 8 * S, 8000)
    successor = restarted(playback, boot="another")
    assert successor.acknowledged(acked(7, 55, 1)) == [], "another connection of that number"
    assert list(successor.open_responses()) == [("w", 2)], "its writer is dead, and that is found again"
    assert successor.writer_died("w", 2, 60 * S, 60_000) == []
    assert told(successor.advance(60 * S, 60_000)) == [(0, 3_000_000)]
    assert +successor.counts == {"unknown_end": 1, "interrupted_unknown": 1}


# What holds for whatever players and networks do.


class _Draining(NamedTuple):
    """A response, and what arrived of it so many seconds after it closed."""

    transfer: Transfer
    after: float
    arrived: int


@st.composite
def _draining(draw: st.DrawFn) -> list[_Draining]:
    found = []
    for each in draw(_transfers()):
        if each.sent > 2 and draw(st.booleans()):
            arrived = draw(st.integers(1, each.sent))
            after = draw(st.sampled_from([0.001, 0.4, 3, 35, 500]))
            found.append(_Draining(on_connection(each, 100 + each.opening.number), after, arrived))
        else:
            found.append(_Draining(each, 0, each.sent))
    return found


def _played(
    responses: Sequence[_Draining], per: str, kills: set[int] = frozenset(), min_bytes: int | None = None
) -> list[Report]:
    """What is reported, by a relay that is killed before so many facts."""
    facts = [(fact.at_ns, fact) for fact in facts_of(each.transfer for each in responses)]
    for each in responses:
        connection = each.transfer.opening.connection
        if connection is not None:
            at_ns = each.transfer.ended_ns + int(each.after * S)
            end = Acknowledged(connection.cookie, at_ns, at_ns // 10**6, BASE + each.arrived, 1)
            facts.append((at_ns, end))
    playback, rows, reports = Playback(per=per, min_bytes=min_bytes, drain_wait_s=10**6), {}, []
    for at, (at_ns, fact) in enumerate(sorted(facts, key=lambda fact: fact[0])):
        if at in kills:
            playback = Playback(per=per, min_bytes=min_bytes, drain_wait_s=10**6)
            playback.restore(rows.items())
        reports += playback.advance(at_ns, at_ns // 10**6)
        if isinstance(fact, Acknowledged):
            reports += playback.acknowledged(fact)
        elif isinstance(fact.event, Opening):
            reports += playback.opened(fact.writer, fact.event)
        else:
            reports += playback.closed(fact.writer, fact.event)
        for key, text in playback.changed():
            rows.pop(key, None)
            rows |= {} if text is None else {key: text}
    assert len(playback.drains) == 0
    assert not playback.drains.cookies
    return reports + playback.advance(AFTER, AFTER // 10**6)


@given(_draining(), st.data())
def test_drains_never_change_skip(responses: list[_Draining], data: st.DataObject) -> None:
    """Per response: the same reports at the same times, whatever drains when; only the bytes are those that arrived."""
    kills = data.draw(st.sets(st.integers(0, 3 * len(responses))))
    expected = {
        (each.session_id, each.time_ms): each
        for each in replay([each.transfer._replace(position=None) for each in responses])
    }
    found = {(each.session_id, each.time_ms): each for each in _played(responses, "response", kills)}
    assert {time: each.skip for time, each in found.items()} == {
        time: each.skip for time, each in expected.items()
    }
    arrived = Counter((each.transfer.opening.play.session_id, each.arrived) for each in responses)
    assert Counter((each.session_id, each.sent) for each in found.values()) <= arrived


@given(_draining(), st.data())
def test_stream_bytes_are_what_arrived(responses: list[_Draining], data: st.DataObject) -> None:
    """Per stream: as many plays as without draining, and each byte that arrived is told once."""
    kills = data.draw(st.sets(st.integers(0, 3 * len(responses))))
    found = _played(responses, "stream", kills, min_bytes=1)
    expected = replay([each.transfer._replace(position=None) for each in responses], "stream", 1)
    plays = [Counter(each.session_id for each in reports if each.skip == 0) for reports in (found, expected)]
    assert plays[0] == plays[1]
    counted: Counter[str] = Counter()
    for each in responses:
        if each.transfer.sent > 0 and (each.transfer.opening.part.size or 3) > 2:
            counted[each.transfer.opening.play.session_id] += each.arrived
    total: Counter[str] = Counter()
    for report in found:
        total[report.session_id] += report.sent
    assert total == counted


STEPS = ["open", "close", "progress", "lost", "acked", "advance", "conclude", "restart"]
_number = st.integers(-5, 2**62)


@MODES
@given(steps=st.lists(st.sampled_from(STEPS), max_size=30), data=st.data())
def test_senseless_positions_stop_nothing(per: str, steps: list[str], data: st.DataObject) -> None:
    playback = Playback(per=per, min_bytes=1, drain_wait_s=5)
    for step in steps:
        number, time = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 4000 * S))
        connection = Connection(data.draw(st.integers(0, 2)), data.draw(_number), 2, data.draw(_number))
        opening = response(number, 0, 9, 0, 0).opening._replace(connection=connection, started_ns=time)
        sent, position = data.draw(st.integers(-5, 2**40)), data.draw(st.one_of(st.none(), _number))
        reports: list[Report] = []
        if step == "open":
            reports = playback.opened("w", opening)
        elif step == "close":
            reports = playback.closed("w", Transfer(opening, time, time // 10**6, sent, position=position))
        elif step == "progress":
            playback.progressed("w", Progress(opening, time, time // 10**6, sent, position))
        elif step == "lost":
            reports = playback.writer_died("w", number, time, time // 10**6)
        elif step == "acked":
            reports = playback.acknowledged(Acknowledged(connection.cookie, time, 0, position, number % 2))
        elif step == "conclude":
            reports = playback.conclude(0)
        elif step == "restart":
            playback = restarted(playback, drain_wait_s=5)
        else:
            reports = playback.advance(time, time // 10**6)
        assert all(report.sent > 0 for report in reports)
    playback.conclude(0)
    playback.advance(AFTER, AFTER // 10**6)
    assert len(playback.drains) == 0
