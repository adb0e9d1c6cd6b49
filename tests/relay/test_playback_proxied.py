"""What a proxy counts, as the playback machine sees it: openings, the app's ends, and the proxy's lines."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t23_middleware.media import MediaTypes
from t23_middleware.relay import playback as playback_module
from t23_middleware.relay.playback import Playback
from t23_middleware.relay.proxy_join import MOST_UNMATCHED, LoggedLine, ProxyJoin
from t23_middleware.relay.proxy_line import ProxyLine
from t23_middleware.relay.report import Report
from t23_middleware.relay.viewing import MOST_OPEN
from t23_middleware.transfer import (
    OFFLOADED,
    PROXY,
    Opening,
    Part,
    Play,
    Progress,
    Transfer,
    play_id,
)

from .test_proxied import says

S = 1_000_000_000
TOTAL = 33_000_000
WAIT = 100.0
WRITER = "1-a"


def machine(per: str = "response") -> Playback:
    return Playback(per=per, proxy_wait_s=WAIT, counts_type=MediaTypes(("video/*",)).counts)


def opening(
    number: int, start: float, first: int = 0, by: str = PROXY, session: str = "s", skip: int | None = None
) -> Opening:
    at = int(start * S)
    play = Play(session, "7", skip=skip)
    if by == OFFLOADED:
        return Opening(number, at, at // 10**6, play, Part(first, None, None), 206, None, by)
    return Opening(number, at, at // 10**6, play, Part(first, TOTAL - 1, TOTAL), 206, TOTAL - first, by)


def ended(opening: Opening, end: float, sent: int = 0) -> Transfer:
    return Transfer(opening, int(end * S), int(end * 1000), sent)


def line(number: int, end: float, body: int, first: int = 0, writer: str = WRITER, **more: Any) -> ProxyLine:
    fields: dict[str, Any] = {
        "play": play_id(writer, number),
        "ended_ms": int(end * 1000),
        "seconds": 1000.0,
        "status": 206,
        "body": body,
        "complete": True,
        "content_type": "video/mp4",
        "part": Part(first, TOTAL - 1, TOTAL),
        "length": TOTAL - first,
        "cache": "",
    }
    return ProxyLine(**{**fields, **more})


def logged(playback: Playback, line: ProxyLine) -> list[Report] | None:
    return playback.logged(line, line.ended_ms * 10**6)


def told(reports: list[Report] | None) -> list[tuple[int, int]]:
    assert reports is not None
    return [(report.skip, report.sent) for report in reports]


def test_play_reported_at_line_time():
    """A play is reported when its proxy line arrives, with the time of the line."""
    playback = machine()
    first = opening(1, 10)
    assert playback.opened(WRITER, first) == []
    assert playback.closed(WRITER, ended(first, 10.1, TOTAL)) == []
    assert playback.advance(50 * S, 50_000) == []
    (report,) = logged(playback, line(1, 60, 3_000_000, seconds=50.0)) or []
    assert (report.time_ms, report.sent, report.skip) == (60_000, 3_000_000, 0)
    assert list(playback.open_responses()) == []
    assert playback.awaiting_line == 0


def test_a_range_the_proxy_answered_whole():
    """The request said where the player wanted to go; the log says that all of the file went out."""
    playback = machine()
    for number, first in enumerate((0, 20_000_000, 10_000_000, 0), 1):
        asked = opening(number, 10 * number, first, OFFLOADED)
        playback.opened(WRITER, asked)
        playback.closed(WRITER, ended(asked, 10 * number))
        whole = line(number, 10 * number + 5, TOTAL, status=200, length=TOTAL)
        assert told(logged(playback, whole)) == [(0 if first == 0 else 1, TOTAL)]


def test_several_ranges_of_the_proxy():
    """Their type says nothing of the file; the app named the play, so it is one."""
    playback = machine()
    asked = opening(1, 10, by=OFFLOADED)
    playback.opened(WRITER, asked)
    playback.closed(WRITER, ended(asked, 10))
    several = line(1, 15, 5_000, content_type="multipart/byteranges; boundary=0", part=Part(None, None, None))
    assert [sent for _, sent in told(logged(playback, several))] == [5_000]


@pytest.mark.parametrize("app, proxy, bytes", [(100, 90, 90), (90, 100, 90), (5_000_000, 29_166, 29_166)])
def test_of_two_counts_the_smaller_is_told(app, proxy, bytes):
    playback = machine()
    first = opening(1, 10)
    playback.opened(WRITER, first)
    playback.closed(WRITER, ended(first, 10.1, app))
    assert told(logged(playback, line(1, 11, proxy))) == [(0, bytes)]


def test_early_line_waits_for_app_count():
    """A line that arrives before the app's response has closed waits for the app's count. The first line is used."""
    playback = machine()
    first = opening(1, 10)
    playback.opened(WRITER, first)
    assert logged(playback, line(1, 11, 100)) == []
    assert logged(playback, line(1, 11.1, 100)) == []
    assert playback.counts == {"proxy_cached": 1}
    (report,) = playback.closed(WRITER, ended(first, 14, 90))
    assert (report.sent, report.time_ms) == (90, 11_000)


def test_line_decides_after_writer_death():
    """The line gives the bytes if the writer died before it logged how many were sent."""
    playback = machine()
    first, second = opening(1, 10), opening(2, 11, session="other")
    for each in (first, second):
        playback.opened(WRITER, each)
    playback.progressed(WRITER, Progress(first, 11 * S, 11_000, 8 << 20))
    logged(playback, line(2, 11.5, 4_000))
    assert told(playback.writer_died(WRITER, 2, 12 * S, 12_000)) == [(0, 4_000)]
    assert playback.writer_died(WRITER, 1, 12 * S, 12_000) == []
    assert list(playback.open_responses()) == [], "nobody need look for its writer any more"
    assert told(logged(playback, line(1, 15, 9 << 20))) == [(0, 9 << 20)]
    assert playback.counts == {}


def test_missing_line_reports_app_count():
    """Without a line the app's count is reported after the wait, as unconfirmed."""
    playback = machine()
    first = opening(1, 10)
    playback.opened(WRITER, first)
    playback.closed(WRITER, ended(first, 11, 5_000))
    assert playback.advance(110 * S, 110_999) == []
    (report,) = playback.advance(111 * S, 111_000)
    assert (report.sent, report.time_ms) == (5_000, 11_000)
    assert playback.counts == {"unconfirmed": 1}
    assert logged(playback, line(1, 112, 100)) is None


def test_missing_line_after_writer_death():
    """Without a line and after its writer's death, a play is reported with the bytes that are known."""
    playback = machine()
    first, second = opening(1, 10), opening(2, 10, session="other")
    for each in (first, second):
        playback.opened(WRITER, each)
    playback.progressed(WRITER, Progress(first, 11 * S, 11_000, 8 << 20))
    for number in (1, 2):
        playback.writer_died(WRITER, number, 12 * S, 12_000)
    assert told(playback.advance(112 * S, 112_000)) == [(0, 8 << 20)]
    assert playback.counts == {"unconfirmed": 1, "interrupted": 1, "interrupted_unknown": 1}


def test_missing_line_of_offloaded_play():
    """Without its line an offloaded play is counted and not reported: its bytes are unknown. The next response is."""
    playback = machine()
    for number, start in ((1, 10), (2, 12)):
        each = opening(number, start, by=OFFLOADED)
        playback.opened(WRITER, each)
        playback.closed(WRITER, ended(each, start + 0.1))
    assert told(logged(playback, line(2, 20, 600_000))) == [(0, 600_000)]
    playback.advance(111 * S, 111_000)
    assert playback.counts == {"no_proxy_line": 1}


def test_offloaded_offset_from_log():
    """The offset of an offloaded play is taken from the log."""
    playback = machine()
    first, second = opening(1, 10, by=OFFLOADED), opening(2, 20, first=20_000_000, by=OFFLOADED)
    for each in (first, second):
        playback.opened(WRITER, each)
        playback.closed(WRITER, ended(each, each.started_ms / 1000 + 0.1))
    assert told(logged(playback, line(1, 19.99, 3_000_000))) == [(0, 3_000_000)]
    assert told(logged(playback, line(2, 30, 4_000_000, first=20_000_000))) == [(1, 4_000_000)]


@pytest.mark.parametrize(
    "more", [{"status": 404}, {"status": 416}, {"content_type": "image/jpeg"}, {"content_type": ""}]
)
def test_offloaded_answer_without_media(more):
    """An offloaded answer that is not media is ignored: the next response is the play."""
    playback = machine()
    for number in (1, 2):
        each = opening(number, 10 + number, by=OFFLOADED)
        playback.opened(WRITER, each)
        playback.closed(WRITER, ended(each, 10.1 + number))
    assert logged(playback, line(1, 13, 600_000, **more)) == []
    assert told(logged(playback, line(2, 14, 600_000))) == [(0, 600_000)]
    assert playback.counts == {"proxy_not_played": 1}


def test_empty_response_awaits_no_line():
    """A response of which the app sent nothing waits for no line."""
    playback = machine()
    first = opening(1, 10)
    playback.opened(WRITER, first)
    assert playback.closed(WRITER, ended(first, 10.1, 0)) == []
    assert (playback.awaiting_line, playback.counts) == (0, {"ignored_empty": 1})


@pytest.mark.parametrize("off", [-3600.0, 3600.0])
def test_proxy_clock_differs(off):
    """If the proxy's clock differs, the end of a play is computed from its duration."""
    playback = machine()
    first = opening(1, 10_000)
    playback.opened(WRITER, first)
    playback.closed(WRITER, ended(first, 10_000.1, TOTAL))
    (report,) = playback.logged(line(1, 10_020 + off, 700_000, seconds=20.0), 10_020 * S) or []
    assert report.time_ms == 10_020_000
    assert playback.counts == {"proxy_clock_differs": 1}


def test_missing_line_delays_stream_report():
    """In a stream a missing line delays the report that it belongs to, for at most the wait."""
    playback = machine("stream")
    first, second = opening(1, 10), opening(2, 11, first=1_000_000)
    for each, sent in ((first, 1_000_000), (second, 2_000_000)):
        playback.opened(WRITER, each)
        playback.closed(WRITER, ended(each, 12, sent))
    logged(playback, line(2, 20, 2_000_000, first=1_000_000))
    assert playback.advance(90 * S, 90_000) == []
    assert playback.conclude(90_000) == [], "the next relay may have the line"
    assert told(logged(playback, line(1, 95, 900_000))) == []
    assert told(playback.advance(130 * S, 130_000)) == [(0, 2_900_000)]


def test_waiting_plays_survive_restart():
    """Plays that wait for a line survive a restart of the relay, with all that is known of them."""
    playback = machine()
    first, second, third = (
        opening(1, 10),
        opening(2, 10, by=OFFLOADED, session="b"),
        opening(3, 10, session="c"),
    )
    for each in (first, second, third):
        playback.opened(WRITER, each)
    playback.closed(WRITER, ended(first, 11, 5_000))
    playback.closed(WRITER, ended(second, 11))
    logged(playback, line(3, 11, 4_000))
    successor = machine()
    successor.restore([(key, state) for key, state in playback.changed() if state is not None])
    assert (successor.awaiting_line, successor.awaiting_line_since_ms) == (2, 11_000)
    assert list(successor.open_responses()) == [(WRITER, 3)]
    assert told(successor.closed(WRITER, ended(third, 12, 4_000))) == [(0, 4_000)]
    assert told(logged(successor, line(2, 20, 600_000))) == [(0, 600_000)]
    assert told(successor.advance(111 * S, 111_000)) == [(0, 5_000)]


def test_clock_set_back_ends_wait():
    """A clock that was set back does not extend the wait for a line without end."""
    playback = machine()
    first = opening(1, 10)
    playback.opened(WRITER, first)
    playback.closed(WRITER, ended(first, 10**6, 5_000))
    assert playback.advance(20 * S, 20_000) == []
    assert told(playback.advance(120 * S, 120_000)) == [(0, 5_000)]


def test_open_limit_reports_unconfirmed():
    """Plays above the limit of open responses are reported as unconfirmed and not dropped."""
    playback = machine()
    reports = []
    for number in range(1, MOST_OPEN + 11):
        each = opening(number, 10 + number / 100)
        reports += playback.opened(WRITER, each)
        reports += playback.closed(WRITER, ended(each, 11 + number / 100, 5_000))
    assert len(reports) == 10
    assert playback.counts["unconfirmed"] == 10


def test_dropped_session_reported_unconfirmed(monkeypatch):
    """A session that is dropped to make space for another is reported as unconfirmed."""
    monkeypatch.setattr(playback_module, "MOST_SESSIONS", 2)
    playback = machine()
    reports = []
    for number, by in ((1, PROXY), (2, OFFLOADED), (3, PROXY), (4, PROXY)):
        each = opening(number, 10 + number, by=by, session=f"s{number}")
        reports += playback.opened(WRITER, each)
        reports += playback.closed(WRITER, ended(each, 10.1 + number, 5_000 if by == PROXY else 0))
    assert told(reports) == [(0, 5_000)]
    assert (playback.counts["unconfirmed"], playback.counts["no_proxy_line"]) == (1, 1)


def test_invalid_stored_line_is_counted():
    """A stored state with an invalid line is skipped and counted."""
    playback = machine()
    playback.opened(WRITER, opening(1, 10))
    ((key, state),) = playback.changed()
    assert state is not None
    successor = machine()
    successor.restore([(key, state.replace("open", "oben"))])
    assert successor.counts == {"state_unreadable": 1}


# The join: what is held, and what is known of ids for good.


def join(playback: Playback, rows: dict[str, str] | None = None, now: float = 0) -> ProxyJoin:
    return ProxyJoin([], playback, rows or {}, int(now * S), int(now * 1000))


def say(joined: ProxyJoin, *lines: ProxyLine, at: float | None = None) -> list[Report]:
    """The lines come, and their time passes."""
    reports: list[Report] = []
    for each in lines:
        at_ns = each.ended_ms * 10**6 if at is None else int(at * S)
        reports += joined.judge(LoggedLine(at_ns, each, at_ns))
    return reports


def keep(rows: dict[str, str], joined: ProxyJoin) -> None:
    """As the outbox does."""
    for name, value in joined.changed():
        if value is None:
            rows.pop(name, None)
        else:
            rows[name] = value
    joined.committed()


def test_early_line_joined_with_journal():
    """A line that arrives before its journal is kept and joined later."""
    playback = machine()
    joined = join(playback)
    assert say(joined, line(1, 10, 600_000)) == []
    assert joined.retry_unmatched(11 * S) == []
    first = opening(1, 9.9, by=OFFLOADED)
    playback.opened(WRITER, first)
    playback.closed(WRITER, ended(first, 9.95))
    assert told(joined.retry_unmatched(12 * S)) == [(0, 600_000)]
    assert joined.retry_unmatched(30 * S) == []
    assert joined.counts == {}


def test_unknown_writer_line_is_foreign():
    """A line of an unknown writer counts as foreign after its wait."""
    joined = join(machine())
    say(joined, line(1, 10, 600_000, writer="other"))
    joined.retry_unmatched(14 * S)
    assert joined.counts == {}
    joined.retry_unmatched(15 * S)
    assert joined.counts == {"proxy_foreign": 1}


def test_second_line_is_proxy_cached():
    """A second line for a play comes from the proxy's cache, however late it is, and after a restart too."""
    playback, rows = machine(), dict[str, str]()
    joined = join(playback)
    first = opening(1, 10, by=OFFLOADED)
    playback.opened(WRITER, first)
    playback.closed(WRITER, ended(first, 10.1))
    assert len(say(joined, line(1, 11, 600_000))) == 1
    keep(rows, joined)
    playback.advance(10**5 * S, 10**8)  # the viewing is long gone
    joined = join(machine(), rows)
    say(joined, line(1, 10**5, 600_000), line(1, 10**5, 600_000), line(2, 10**5, 600_000))
    joined.retry_unmatched((10**5 + 6) * S)
    assert joined.counts == {"proxy_cached": 2, "proxy_foreign": 1}


def test_probe_line_is_no_second_line():
    """The line of a probe or of an empty response is not counted as a second line."""
    playback = machine()
    joined = join(playback)
    probe = opening(1, 10)._replace(part=Part(0, 1, TOTAL), length=2)
    empty = opening(2, 10)
    for each, sent in ((probe, 2), (empty, 0)):
        playback.opened(WRITER, each)
        playback.closed(WRITER, ended(each, 10.1, sent))
    say(joined, line(1, 10.2, 2, part=Part(0, 1, TOTAL), length=2), line(2, 10.2, 0))
    joined.retry_unmatched(20 * S)
    assert joined.counts == {}


def test_a_held_line_outlives_the_relay():
    rows: dict[str, str] = {}
    joined = join(machine())
    say(joined, line(1, 10, 600_000))
    keep(rows, joined)
    playback = machine()
    joined = join(playback, rows, now=11)
    first = opening(1, 9.9, by=OFFLOADED)
    playback.opened(WRITER, first)
    playback.closed(WRITER, ended(first, 9.95))
    assert told(joined.retry_unmatched(11 * S)) == [(0, 600_000)]
    keep(rows, joined)
    assert [name for name in rows if name.startswith("line")] == []


def test_slow_proxy_clock_finds_journal():
    """A line finds its journal also if the proxy's clock is behind."""
    playback = machine()
    joined = join(playback)
    playback.opened(WRITER, opening(1, 9_000))
    early = LoggedLine(5_000 * S, line(2, 5_000, 600_000), 10_000 * S)
    joined.judge(early)
    joined.retry_unmatched(10_001 * S)
    second = opening(2, 10_000, by=OFFLOADED, session="b")
    playback.opened(WRITER, second)
    playback.closed(WRITER, ended(second, 10_000.1))
    assert told(joined.retry_unmatched(10_002 * S)) == [(0, 600_000)]


def test_what_is_held_is_bounded():
    joined = join(machine())
    say(joined, *(line(number, 10, 600_000) for number in range(MOST_UNMATCHED + 5)))
    joined.retry_unmatched(11 * S)
    assert joined.counts == {"proxy_foreign": 5}


def test_old_backlog_moves_no_viewing_back(tmp_path):
    """A backlog of yesterday moves no viewing back in time.

    The viewings with an open response would otherwise look idle as soon as it is read.
    """
    log = tmp_path / "t23.log"
    log.write_text("".join(says(number, 600_000, ago=86_400) for number in range(10_000)))
    playback = machine()
    now_ns, now_ms = 10**5 * S, time.time_ns() // 10**6
    playback.opened(WRITER, opening(1, 10**5 - 50))
    joined = ProxyJoin([str(log)], playback, {}, now_ns, now_ms)
    joined.read(now_ns, now_ms)
    assert not joined.all_read
    assert joined.until(now_ns) == (10**5 - 50) * S
    assert len(joined.due(joined.until(now_ns))) > 1000


def test_time_waits_for_slowest_log(tmp_path):
    """Time passes no further than in the log that is furthest behind.

    Otherwise a play with its line in the rest of one log would be dropped because another log is up to date.
    """
    behind, fresh = tmp_path / "behind.log", tmp_path / "fresh.log"
    behind.write_text("".join(says(number, 600_000, ago=86_400 - number) for number in range(10_000)))
    fresh.write_text(says(20_000, 600_000, ago=1))
    now_ns, now_ms, playback = 10**6 * S, time.time_ns() // 10**6, machine()
    joined = ProxyJoin([str(behind), str(fresh)], playback, {}, now_ns, now_ms)
    untils, numbers = list[int](), list[int]()
    while not untils or not joined.all_read:
        joined.read(now_ns, now_ms)
        untils.append(joined.until(now_ns))
        numbers += [each.line.writer_and_number[1] for each in joined.due(untils[-1])]
        joined.changed()
        joined.committed()
    assert len(untils) > 1
    assert all(until < now_ns - 70_000 * S for until in untils[:-1])
    assert numbers == [*range(10_000), 20_000]


@pytest.mark.parametrize("rows", [{"line a": "[]"}, {"line a": "no"}, {"writer a": "x"}, {"places /x": "{}"}])
def test_unreadable_rows_are_skipped(rows):
    """Stored rows that can't be read are skipped."""
    joined = ProxyJoin(["/x"], machine(), rows, 0, 0)
    assert joined.retry_unmatched(100 * S) == []
    assert joined.counts == {}


# Whatever comes when.

Event = tuple[str, int]


@st.composite
def histories(draw: Any) -> tuple[list[tuple[str, bool, int]], list[Event]]:
    """Plays (by whom, whether the app ends it, bytes), and an order of their events, with restarts between."""
    plays = draw(
        st.lists(
            st.tuples(st.sampled_from([PROXY, OFFLOADED]), st.booleans(), st.integers(0, 10**6)),
            min_size=1,
            max_size=6,
        )
    )
    events: list[Event] = []
    for number, (_, ends, _) in enumerate(plays):
        events += [("open", number)] + [("close" if ends else "die", number)]
        events += [("line", number)] * draw(st.integers(0, 3))
    order = draw(st.permutations(events))
    for number in range(len(plays)):  # a journal's lines are in order
        places = sorted(
            order.index(each) for each in order if each[1] == number and each[0] in ("open", "close", "die")
        )
        words = ["open", "close" if plays[number][1] else "die"]
        for place, word in zip(sorted(set(places)), words, strict=True):
            order[place] = (word, number)
    mixed: list[Event] = []
    for event in order:
        mixed += [event, *[("restart", 0)] * draw(st.integers(0, 1)), ("wait", draw(st.integers(0, 8)))]
    return plays, mixed


class World:
    """A relay that is killed and begun anew, with what its outbox has."""

    def __init__(self, plays: list[tuple[str, bool, int]], per: str) -> None:
        self.plays, self.per, self.now = plays, per, 10.0
        self.rows: dict[str, str] = {}
        self.viewings: dict[Any, str] = {}
        self.counts: Counter[str] = Counter()
        self.reports: list[Report] = []
        self.opened: dict[int, Opening] = {}
        self.restart(0)

    def restart(self, number: int) -> None:
        self.playback = machine(self.per)
        self.playback.restore(self.viewings.items())
        self.joined = join(self.playback, self.rows, self.now)

    def open(self, number: int) -> None:
        self.opened[number] = opening(number + 1, self.now, by=self.plays[number][0], session=f"s{number}")
        self.reports += self.playback.opened(WRITER, self.opened[number])

    def close(self, number: int) -> None:
        by, _, sent = self.plays[number]
        transfer = ended(self.opened[number], self.now, sent if by == PROXY else 0)
        self.reports += self.playback.closed(WRITER, transfer)

    def die(self, number: int) -> None:
        self.reports += self.playback.writer_died(WRITER, number + 1, int(self.now * S), int(self.now * 1000))

    def line(self, number: int) -> None:
        self.reports += say(self.joined, line(number + 1, self.now, self.plays[number][2] // 2))

    def wait(self, seconds: int) -> None:
        self.now += seconds
        self.reports += self.joined.retry_unmatched(int(self.now * S))
        self.reports += self.playback.advance(int(self.now * S), int(self.now * 1000))

    def commit(self) -> None:
        for key, state in self.playback.changed():
            self.viewings.pop(key, None)
            if state is not None:
                self.viewings[key] = state
        keep(self.rows, self.joined)
        self.counts.update(self.playback.counts + self.joined.take_counts())
        self.playback.counts.clear()


@settings(max_examples=300, deadline=None)
@given(histories(), st.sampled_from(["response", "stream"]))
def test_one_report_per_play_id(history, per):
    """Each play id makes one report at most, and the sums agree."""
    plays, events = history
    world = World(plays, per)
    for word, number in [*events, *[("wait", 10**4)] * 3]:
        getattr(world, word)(number)
        world.commit()
    assert (world.playback.awaiting_line, list(world.playback.open_responses()), world.viewings) == (
        0,
        [],
        {},
    )
    assert [name for name in world.rows if name.startswith("line")] == []
    told_of = Counter(report.session_id for report in world.reports)
    assert all(times == 1 for times in told_of.values())
    for report in world.reports:
        by, _, sent = plays[int(report.session_id[1:])]
        assert report.sent in ((sent // 2, sent) if by == PROXY else (sent // 2,))
    if per == "response":
        counts = world.counts
        nothing = ("no_proxy_line", "interrupted_unknown", "ignored_empty", "ignored_probe")
        assert len(world.reports) + sum(counts[name] for name in nothing) == len(plays)
