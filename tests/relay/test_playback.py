"""The machine that decides ``skip``, spoken to as the relay does: facts in the order of their time, reports out."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t23_middleware.relay import playback as playback_module
from t23_middleware.relay.playback import Playback
from t23_middleware.relay.report import Report
from t23_middleware.relay.viewing import BEGINNING, MOST_OPEN, MOST_SPANS, OpenResponse
from t23_middleware.transfer import Opening, Part, Play, Progress, Transfer, decode, encode

S = 1_000_000_000
#: A file of 33 MB, so that 512 KiB is what plays.
TOTAL = 33_000_000
#: Long after everything: each viewing has been dropped.
AFTER = 10**6 * S
PLAY = Play("session-1", "7190971")


def response(
    number: int,
    start: float,
    end: float,
    first: int | None,
    sent: int,
    *,
    last: int | None = TOTAL - 1,
    total: int | None = TOTAL,
    play: Play = PLAY,
    status: int = 206,
) -> Transfer:
    """A response that was open from *start* to *end*, in seconds."""
    length = None if first is None or last is None else last - first + 1
    started, ended = int(start * S), int(end * S)
    opening = Opening(number, started, started // 10**6, play, Part(first, last, total), status, length)
    return Transfer(opening, ended, ended // 10**6, sent)


class Fact(NamedTuple):
    at_ns: int
    writer: str
    event: Opening | Transfer


def facts_of(transfers: Iterable[Transfer], writers: int = 1) -> list[Fact]:
    """Both lines of each of *transfers*, dealt over so many writers, in the order of their time."""
    facts = []
    for transfer in transfers:
        writer = f"w{transfer.opening.number % writers}"
        facts.append(Fact(transfer.opening.started_ns, writer, transfer.opening))
        facts.append(Fact(transfer.ended_ns, writer, transfer))
    return sorted(facts, key=lambda fact: (fact.at_ns, isinstance(fact.event, Transfer)))


def feed(playback: Playback, facts: Iterable[Fact]) -> list[Report]:
    reports: list[Report] = []
    for fact in facts:
        if isinstance(fact.event, Opening):
            reports += playback.opened(fact.writer, fact.event)
        else:
            reports += playback.closed(fact.writer, fact.event)
    return reports


def replay(
    transfers: Iterable[Transfer], per: str = "response", min_bytes: int | None = None
) -> list[Report]:
    """What is reported of *transfers* until their viewings are dropped."""
    playback = Playback(per=per, min_bytes=min_bytes)
    reports = feed(playback, facts_of(transfers))
    return reports + playback.advance(AFTER, AFTER // 10**6)


def told(reports: Iterable[Report]) -> list[tuple[int, int]]:
    """Skip and bytes of each report."""
    return [(report.skip, report.sent) for report in reports]


#: A player that plays, seeks to 20 MB, and seeks back to 10 MB.
PLAY_AND_TWO_SCRUBS = [
    response(1, 0, 5, 0, 3_000_000),
    response(2, 5.01, 9, 20_000_000, 2_500_000),
    response(3, 9.01, 15, 10_000_000, 4_000_000),
]
#: A player that finds the index at the end of the file, then plays.
INDEX_AT_THE_END = [
    response(1, 0, 0.08, 0, 49_152),
    response(2, 0.07, 0.3, TOTAL - 102_731, 102_731),
    response(3, 0.25, 6, 32_768, 3_300_000),
]


MODES = pytest.mark.parametrize("per", ["response", "stream"])


class TestPerResponse:
    def test_first_response_is_play(self) -> None:
        """The first response of a viewing is a play. Those that follow belong to it."""
        assert told(replay(PLAY_AND_TWO_SCRUBS)) == [(0, 3_000_000), (1, 2_500_000), (1, 4_000_000)]

    def test_report_at_close(self) -> None:
        """Each report is made when its response closes and has the time of that close."""
        playback = Playback()
        for fact in facts_of(PLAY_AND_TWO_SCRUBS):
            reports = feed(playback, [fact])
            if isinstance(fact.event, Transfer):
                assert [report.time_ms for report in reports] == [fact.event.ended_ms]
            else:
                assert reports == []

    def test_report_has_player_fields(self) -> None:
        """A report contains the player fields that the request named."""
        play = Play("s", "1", "video.example.com", None, "html5", "2.1", "1920x1080")
        (report,) = replay([response(1, 0, 5, 0, 700_000, play=play)])
        assert report == Report(5000, "video.example.com", "s", "1", 700_000, 0, "html5", "2.1", "1920x1080")

    def test_range_beyond_beginning_is_skip(self) -> None:
        """A range from beyond 256 KiB without a known viewing is a skip, whatever its size."""
        assert told(replay([response(1, 0, 5, BEGINNING + 1, 9_000_000)])) == [(1, 9_000_000)]
        assert told(replay([response(1, 0, 5, BEGINNING + 1, 3)])) == [(1, 3)]

    def test_range_at_256_kib_is_play(self) -> None:
        """A range that starts at 256 KiB without a known viewing is a play."""
        assert told(replay([response(1, 0, 5, BEGINNING, 9_000_000)])) == [(0, 9_000_000)]

    def test_beginning_after_unknown_middle(self) -> None:
        """A response from the beginning is a play if only the middle of an unknown viewing came before it."""
        middle, start = response(1, 0, 5, 9_000_000, 600_000), response(2, 6, 9, 0, 700_000)
        assert told(replay([middle, start])) == [(1, 600_000), (0, 700_000)]

    def test_probes_counted_not_reported(self) -> None:
        """Empty responses and ranges of one or two bytes are counted but not reported."""
        playback = Playback()
        probes = [
            response(1, 0, 0.1, 0, 2, last=1),
            response(2, 0.2, 0.3, TOTAL - 1, 1),
            response(3, 0.4, 0.5, 0, 0),
        ]
        assert feed(playback, facts_of(probes)) == []
        assert playback.counts == Counter(ignored_probe=2, ignored_empty=1)
        assert told(feed(playback, facts_of([response(4, 1, 2, 0, 3, last=2)]))) == [(0, 3)]

    def test_probe_answered_with_more_bytes(self) -> None:
        """A probe that was answered with more bytes than its range names is reported."""
        assert told(replay([response(1, 0, 3, 0, 5_000_000, last=1)])) == [(0, 5_000_000)]

    def test_reload_asks_twice(self) -> None:
        """A reload that sends two requests is one more play."""
        reload = [
            response(1, 0, 5.6, 0, 3_300_000),
            response(2, 5.631, 5.645, 0, 8192, last=3_317_759),
            response(3, 5.642, 14, 0, 4_900_000),
        ]
        assert told(replay(reload)) == [(0, 3_300_000), (0, 8192), (1, 4_900_000)]

    def test_parallel_starts_first_is_play(self) -> None:
        """Of two responses that start together the first is the play, whichever of them ends first."""
        both = [response(1, 0, 9, 0, 5_000_000), response(2, 0.1, 2, 9_000_000, 800_000)]
        assert told(replay(both)) == [(1, 800_000), (0, 5_000_000)]

    def test_empty_start_leaves_play(self) -> None:
        """A first response that sent no bytes leaves the play to the next response."""
        tries = [response(1, 0, 0.1, 0, 0), response(2, 0.05, 4, 0, 900_000)]
        assert told(replay(tries)) == [(0, 900_000)]

    def test_empty_restart_ignored(self) -> None:
        """A restart from byte 0 that sent no bytes changes nothing: the next response goes on in the old viewing."""
        transfers = [
            response(1, 0, 5, 0, 3_000_000),
            response(2, 6, 6.1, 0, 0),
            response(3, 6.05, 9, 3_000_000, 900_000),
            response(4, 10, 12, 0, 800_000),
        ]
        assert [skip for skip, _ in told(replay(transfers))] == [0, 1, 0]

    def test_app_skip_overrides_decision(self) -> None:
        """The skip value that the app sets overrides the decision of the relay."""
        first, later = PLAY._replace(skip=1), PLAY._replace(skip=0)
        transfers = [
            response(1, 0, 5, 0, 3_000_000, play=first),
            response(2, 6, 9, 20_000_000, 900_000, play=later),
            response(3, 10, 12, 0, 800_000, play=first),
            response(4, 13, 14, 5_000_000, 800_000),
        ]
        assert [skip for skip, _ in told(replay(transfers))] == [1, 0, 1, 1]

    def test_sessions_photos_and_hosts_are_told_apart(self) -> None:
        plays = [Play("a", "1"), Play("b", "1"), Play("a", "2"), Play("a", "1", "other.example.com")]
        transfers = [response(n, n, n + 2.5, 0, 900_000, play=play) for n, play in enumerate(plays)]
        assert [skip for skip, _ in told(replay(transfers))] == [0, 0, 0, 0]

    def test_viewing_ends_after_30_minutes(self) -> None:
        """Half an hour without a request or an open response ends the viewing."""
        start = response(1, 0, 5, 0, 3_000_000)
        within, after = 5 + 1800 - 0.001, 5 + 1800
        assert told(replay([start, response(2, within, within + 3, 100_000, 700_000)]))[1] == (1, 700_000)
        assert told(replay([start, response(2, after, after + 3, 100_000, 700_000)]))[1] == (0, 700_000)

    def test_an_open_response_keeps_the_viewing(self) -> None:
        playback = Playback()
        long = response(1, 0, 7200, 0, 30_000_000)
        feed(playback, [Fact(0, "w", long.opening)])
        for minute in range(1, 120):
            assert playback.advance(minute * 60 * S, 0) == []
        assert told(feed(playback, [Fact(long.ended_ns, "w", long)])) == [(0, 30_000_000)]
        assert list(playback.open_responses()) == []

    def test_report_times_are_distinct(self) -> None:
        """Two reports of one viewing never have the same time."""
        transfers = [response(n, 0, 1, 100 * n, 1000 + n) for n in range(5)]
        times = [report.time_ms for report in replay(transfers)]
        assert times == [1000, 1001, 1002, 1003, 1004]


class TestAWriterThatDied:
    def test_open_response_not_reported(self) -> None:
        """The open response of a dead writer makes no report, and what follows it is a skip."""
        playback = Playback()
        feed(playback, [Fact(0, "dead", response(1, 0, 9, 0, 1).opening)])
        assert list(playback.open_responses()) == [("dead", 1)]
        assert playback.writer_died("dead", 1, 3 * S, 3000) == []
        assert list(playback.open_responses()) == []
        assert playback.counts["interrupted_unknown"] == 1
        assert told(feed(playback, facts_of([response(2, 4, 9, 1_000_000, 2_000_000)]))) == [(1, 2_000_000)]

    def test_play_stays_with_first_response(self) -> None:
        """The play stays with the response that started it when the writer of a later one dies."""
        playback = Playback()
        start, other = response(1, 0, 9, 0, 4_000_000), response(2, 1, 9, 0, 1)
        feed(playback, [Fact(0, "lives", start.opening), Fact(S, "dead", other.opening)])
        playback.writer_died("dead", 2, 3 * S, 3000)
        assert told(feed(playback, [Fact(start.ended_ns, "lives", start)])) == [(0, 4_000_000)]

    def test_stream_reports_known_bytes(self) -> None:
        """A stream whose first writer died is reported with the bytes that are known."""
        playback = Playback(per="stream")
        feed(playback, [Fact(0, "dead", response(1, 0, 9, 0, 1).opening)])
        playback.writer_died("dead", 1, 3 * S, 3000)
        assert feed(playback, facts_of([response(2, 4, 9, 1_000_000, 2_000_000)])) == []
        assert told(playback.advance(AFTER, 0)) == [(0, 2_000_000)]

    def test_unknown_response_lost(self) -> None:
        """A response that is not open can be lost: nothing is reported or counted."""
        playback = Playback()
        assert playback.writer_died("nobody", 1, 0, 0) == []
        assert playback.counts == Counter()


class TestPerStream:
    def test_one_report_per_scrub(self) -> None:
        """A viewing makes one report, and each scrub in it makes one more."""
        assert told(replay(PLAY_AND_TWO_SCRUBS, "stream")) == [(0, 3_000_000), (1, 2_500_000), (1, 4_000_000)]

    def test_probes_join_the_play(self) -> None:
        """The bytes of probes and of returns to an earlier offset are added to the play."""
        assert told(replay(INDEX_AT_THE_END, "stream")) == [(0, 49_152 + 102_731 + 3_300_000)]

    def test_segment_reported_at_next_open(self) -> None:
        """A segment is reported when the next one opens."""
        playback = Playback(per="stream")
        assert told(feed(playback, facts_of(PLAY_AND_TWO_SCRUBS[:2]))) == [(0, 3_000_000)]

    def test_segment_waits_for_open_responses(self) -> None:
        """A segment is reported after the last response that started in it has closed."""
        playback = Playback(per="stream")
        play, slow = response(1, 0, 5, 0, 3_000_000), response(2, 1, 12, 300_000, 100)
        facts = facts_of([play, slow, response(3, 5.01, 6.9, 20_000_000, 900_000)])
        assert feed(playback, facts[:-1]) == []
        reports = feed(playback, facts[-1:])
        assert told(reports) == [(0, 3_000_100)]
        assert reports[0].time_ms == 12_000

    def test_last_segment_reported_when_idle(self) -> None:
        """The last segment is reported, once, when it has been idle for ``idle_s``."""
        playback = Playback(per="stream", idle_s=30)
        feed(playback, facts_of(PLAY_AND_TWO_SCRUBS[:1]))
        assert playback.advance(35 * S - 1, 0) == []
        assert told(playback.advance(35 * S, 0)) == [(0, 3_000_000)]
        assert playback.advance(36 * S, 0) == []

    def test_an_open_response_is_not_idle(self) -> None:
        playback = Playback(per="stream", idle_s=30)
        feed(playback, facts_of(PLAY_AND_TWO_SCRUBS[:1]))
        feed(playback, [Fact(6 * S, "w", response(9, 6, 999, 3_000_000, 1).opening)])
        assert playback.advance(600 * S, 0) == []

    def test_shutdown_reports_once(self) -> None:
        """At shutdown every report that is complete is made, and the next relay does not repeat it."""
        playback = Playback(per="stream")
        feed(playback, facts_of(PLAY_AND_TWO_SCRUBS))
        assert told(playback.conclude(0)) == [(1, 4_000_000)]
        assert playback.conclude(0) == []
        assert restarted(playback, "stream").advance(AFTER, 0) == []

    def test_shutdown_leaves_open_responses(self) -> None:
        """A response that is open at shutdown is left to the next relay."""
        playback = Playback(per="stream")
        long = response(1, 0, 60, 0, 9_000_000)
        feed(playback, [Fact(0, "w0", long.opening)])
        assert playback.conclude(0) == []
        successor = restarted(playback, "stream")
        feed(successor, [Fact(long.ended_ns, "w0", long)])
        assert told(successor.conclude(0)) == [(0, 9_000_000)]

    @pytest.mark.parametrize("pieces", [1, 3])
    def test_whole_file_reported_at_once(self, pieces: int) -> None:
        """A file that was sent from its start to its end is reported at once, also when it came in several ranges."""
        size = TOTAL // pieces
        transfers = [
            response(n, 3 * n, 3 * n + 2, n * size, size, last=(n + 1) * size - 1) for n in range(pieces)
        ]
        assert told(feed(Playback(per="stream"), facts_of(transfers))) == [(0, TOTAL)]

    def test_capped_ranges_make_one_report(self) -> None:
        """A server that caps the size of ranges causes one report per viewing."""
        transfers = [
            response(n, n, n + 0.9, n * 200_000, 200_000, last=n * 200_000 + 199_999) for n in range(40)
        ]
        assert told(replay(transfers, "stream")) == [(0, 8_000_000)]

    def test_late_bytes_join_next_report(self) -> None:
        """Bytes for a segment that was reported already are added to the next report."""
        transfers = [
            response(1, 0, 5, 0, 3_000_000),
            response(2, 60, 65, 3_000_000, 1_000_000),
            response(3, 65.01, 70, 20_000_000, 900_000),
        ]
        assert told(replay(transfers, "stream")) == [(0, 3_000_000), (1, 1_900_000)]

    def test_late_bytes_reported_at_drop(self) -> None:
        """Without a next report, such late bytes are reported when the viewing is dropped, and counted as late."""
        playback = Playback(per="stream")
        transfers = [response(1, 0, 5, 0, 3_000_000), response(2, 60, 65, 3_000_000, 1_000_000)]
        reports = feed(playback, facts_of(transfers))
        assert told(reports) == [(0, 3_000_000)]
        assert playback.advance((65 + 1799) * S, 0) == []
        assert told(playback.advance((65 + 1800) * S, 0)) == [(1, 1_000_000)]
        assert playback.counts == Counter(late=1)

    def test_viewing_below_minimum(self) -> None:
        """A viewing below the minimum number of bytes makes no report and is counted."""
        playback = Playback(per="stream")
        feed(playback, facts_of([response(1, 0, 5, 0, 524_287)]))
        assert playback.advance(AFTER, 0) == []
        assert playback.counts["below_minimum"] == 1
        assert told(replay([response(1, 0, 5, 0, 524_288)], "stream")) == [(0, 524_288)]

    def test_minimum_of_small_file(self) -> None:
        """The minimum for a small file is an eighth of its size."""
        small = {"last": 799_999, "total": 800_000}
        assert replay([response(1, 0, 5, 0, 99_999, **small)], "stream") == []
        assert told(replay([response(1, 0, 5, 0, 100_000, **small)], "stream")) == [(0, 100_000)]

    def test_configured_minimum_per_viewing(self) -> None:
        """The minimum that the operator set is compared with the bytes of the whole viewing."""
        assert told(replay(PLAY_AND_TWO_SCRUBS, "stream", 9_500_000)) == [
            (0, 3_000_000),
            (1, 2_500_000),
            (1, 4_000_000),
        ]
        assert replay(PLAY_AND_TWO_SCRUBS, "stream", 9_500_001) == []

    def test_fast_preload_is_not_play(self) -> None:
        """A metadata preload that a fast network filled with megabytes is not a play."""
        assert replay([response(1, 0, 0.1, 0, 6_100_000)], "stream") == []
        assert told(replay([response(1, 0, 0.1, 0, 6_100_000)], "stream", 1)) == [(0, 6_100_000)]

    def test_a_quick_download_is_a_play(self) -> None:
        assert told(replay([response(1, 0, 0.1, 0, TOTAL)], "stream")) == [(0, TOTAL)]

    def test_app_skip_opens_segments(self) -> None:
        """The skip value that the app sets opens a segment, or keeps the current one open."""
        scrub, start = PLAY._replace(skip=1), PLAY._replace(skip=0)
        transfers = [
            response(1, 0, 5, 0, 3_000_000),
            response(2, 5.5, 9, 3_000_000, 900_000, play=scrub),
            response(3, 9.5, 12, 20_000_000, 800_000, play=start),
        ]
        assert sorted(told(replay(transfers, "stream"))) == [(0, 3_000_000), (1, 1_700_000)]
        assert told(replay([response(1, 0, 5, 9_000_000, 700_000, play=start)], "stream")) == [(0, 700_000)]

    def test_app_calls_start_a_skip(self) -> None:
        """A start that the app calls a skip makes one report, a skip."""
        start = response(1, 0, 5, 0, 3_000_000, play=PLAY._replace(skip=1))
        assert told(replay([start, response(2, 6, 9, 3_000_000, 900_000)], "stream")) == [(1, 3_900_000)]

    def test_unknown_middle_is_one_skip(self) -> None:
        """Responses from the middle of an unknown viewing make one report, a skip."""
        transfers = [response(1, 0, 1, 9_000_000, 1000), response(2, 2, 5, 12_000_000, 900_000)]
        assert told(replay(transfers, "stream")) == [(1, 901_000)]


class TestWhatIsAScrub:
    """``stream``: each test has a play of 5 s from byte 0 before it."""

    def scrubs_after_play(self, *transfers: Transfer, sent: int = 3_000_000) -> int:
        reports = replay([response(1, 0, 5, 0, sent), *transfers], "stream")
        assert [skip for skip, _ in told(reports)].count(0) == 1
        assert sum(report.sent for report in reports) == sent + sum(transfer.sent for transfer in transfers)
        return len(reports) - 1

    def test_near_offset_continues_playback(self) -> None:
        """A response that starts within 1/64 of the file from the end of the bytes sent so far is not a scrub."""
        near = TOTAL // 64
        assert self.scrubs_after_play(response(2, 15, 20, 3_000_000 - near, 900_000)) == 0
        assert self.scrubs_after_play(response(2, 15, 20, 3_000_000 + near, 900_000)) == 0
        assert self.scrubs_after_play(response(2, 5.01, 20, 3_000_000 + near, 900_000)) == 0
        assert self.scrubs_after_play(response(2, 5.01, 20, 3_000_001 + near, 900_000)) == 1

    def test_after_a_pause_buffers_may_lie_between(self) -> None:
        """What is counted of a cut response is off by what buffers held; a seek goes further, or comes at once."""
        held = TOTAL // 8
        for pause in (0.05, 0.8, 10):
            start = 5 + pause
            assert self.scrubs_after_play(response(2, start, start + 5, 3_000_000 + held, 900_000)) == 0
            assert self.scrubs_after_play(response(2, start, start + 5, 3_000_001 + held, 900_000)) == 1

    def test_inside_after_pause_continues(self) -> None:
        """After a pause, a response that starts inside the bytes sent so far goes on with the same segment."""
        assert self.scrubs_after_play(response(2, 15, 20, 1_500_000, 900_000)) == 0

    def test_inside_replacing_playback_is_scrub(self) -> None:
        """A response that starts inside the bytes sent so far is a scrub if it replaces the response that played."""
        assert self.scrubs_after_play(response(2, 5.03, 20, 1_500_000, 900_000)) == 1
        assert self.scrubs_after_play(response(2, 4.9, 20, 1_500_000, 900_000)) == 1

    @pytest.mark.parametrize("gap", [0.034, 0.06, 0.245, 0.8])
    def test_a_reload_goes_on_inside(self, gap: float) -> None:
        """A reload that the browser's cache answers asks for what it had not read yet: buffers held the rest."""
        again = response(2, 5 + gap, 20, 13_934_592, 5_000_000)
        assert self.scrubs_after_play(again, sent=19_922_944) == 0

    def test_back_to_a_former_seek_is_one(self) -> None:
        """A player that goes back to where it had sought once asks there again, within 0.3 s."""
        seeks = [response(2, 5.01, 9, 11_296_019, 3_145_728), response(3, 9.01, 9.2, 12_766_815, 163_840)]
        assert self.scrubs_after_play(*seeks, response(4, 9.3, 15, 11_296_019, 3_000_000)) == 2
        assert self.scrubs_after_play(*seeks, response(4, 9.31, 15, 11_296_019, 3_000_000)) == 1

    @pytest.mark.parametrize(("share", "scrubs"), [(0.66, 0), (0.78, 0), (0.79, 1)])
    def test_a_slow_start_in_the_middle(self, share: float, scrubs: int) -> None:
        """A player that starts at 60 s reads the file's header first, on a slow network for longer than 1.5 s."""
        sent = int(share * 1_000_000)
        assert self.scrubs_after_play(response(2, 5.01, 20, 13_533_184, 4_000_000), sent=sent) == scrubs

    def test_second_header_read_is_not_scrub(self) -> None:
        """A second response from the header of the file is not a scrub."""
        assert self.scrubs_after_play(response(2, 5.01, 20, 194_165, 900_000)) == 0

    def test_a_small_response_decides_nothing(self) -> None:
        assert self.scrubs_after_play(response(2, 6, 9, 20_000_000, 500_000)) == 0

    def test_aborted_response_is_not_scrub(self) -> None:
        """A response that the player aborts within 1.5 s does not count as a scrub."""
        assert self.scrubs_after_play(response(2, 6, 7.4, 20_000_000, 6_000_000)) == 0

    def test_seek_asks_twice(self) -> None:
        """A seek that sends two requests is one scrub."""
        first_try = response(2, 4.985, 5.0, 20_000_000, 8192)
        assert self.scrubs_after_play(first_try, response(3, 4.99, 12, 20_000_000, 4_000_000)) == 1

    def test_a_drag_is_one_scrub(self) -> None:
        steps = [
            response(2 + n, 5 + n * 0.2, 5.21 + n * 0.2, 8_000_000 + n * 10**6, 73_000) for n in range(8)
        ]
        assert self.scrubs_after_play(*steps, response(20, 6.6, 12, 25_000_000, 3_000_000)) == 1

    def test_a_download_over_several_connections_is_none(self) -> None:
        size = TOTAL // 4
        parts = [
            response(n, n * 0.01, 4 + n * 0.01, n * size, size, last=(n + 1) * size - 1) for n in range(4)
        ]
        late_part = response(9, 3.9, 4.5, 4 * size - 1_200_000, 1_100_000, last=4 * size - 100_001)
        reports = replay([*parts, late_part], "stream")
        assert told(reports) == [(0, 4 * size + 1_100_000)]

    def test_two_second_overlap_is_download(self) -> None:
        """Two responses that overlap for two seconds are a download, not a scrub."""
        assert self.scrubs_after_play(response(2, 2.9, 7, 20_000_000, 900_000)) == 0
        assert self.scrubs_after_play(response(2, 3.1, 7, 20_000_000, 900_000)) == 1

    def test_seek_reads_index_first(self) -> None:
        """A seek that reads the index at the end of the file first is one scrub."""
        index = response(2, 4.99, 5.005, TOTAL - 21_387, 21_387)
        assert self.scrubs_after_play(index, response(3, 5.02, 12, 20_000_000, 4_000_000)) == 1

    def test_seek_back_reads_index_first(self) -> None:
        """A seek that reads the index first is one scrub also if the bytes at its target were sent before."""
        index = response(2, 4.99, 5.005, TOTAL - 21_387, 21_387)
        assert self.scrubs_after_play(index) == 1
        assert self.scrubs_after_play(index, response(3, 5.02, 12, 3_000_000, 4_000_000)) == 1

    def test_a_seek_on_a_slow_network(self) -> None:
        """The index may take long to come: the place is asked for soon after its end."""
        index = response(2, 5.01, 9, TOTAL - 21_387, 21_387)
        assert self.scrubs_after_play(index, response(3, 9.4, 15, 20_000_000, 4_000_000)) == 1
        assert self.scrubs_after_play(index, response(3, 10.6, 15, 20_000_000, 4_000_000)) == 2

    def test_index_then_drag_is_one_scrub(self) -> None:
        """A seek that reads the index and becomes a drag is one scrub."""
        index = response(2, 4.99, 5.005, TOTAL - 21_387, 21_387)
        steps = [response(3 + n, 5.01 + n, 6.02 + n, 8_000_000 + n * 10**6, 73_000) for n in range(4)]
        assert self.scrubs_after_play(index, *steps, response(20, 9, 15, 25_000_000, 3_000_000)) == 1

    def test_index_read_while_idle(self) -> None:
        """An index that is read while nothing plays is not a scrub."""
        assert self.scrubs_after_play(response(2, 10, 10.1, TOTAL - 21_387, 21_387)) == 0

    def test_fragmented_file_is_one_play(self) -> None:
        """A fragmented file that the player reads range by range is one play."""
        hops = [
            response(2 + n, 6 + n, 6.9 + n, 3_000_000 + n * 460_000, 427_000, last=3_426_999 + n * 460_000)
            for n in range(20)
        ]
        assert self.scrubs_after_play(*hops) == 0


def answered_whole(transfer: Transfer, sent: int | None = None, length: bool = True) -> Transfer:
    """The same Range of an app that answers it by 200, with the whole file from its start."""
    opening = transfer.opening
    total = opening.part.total
    assert total is not None
    opening = opening._replace(
        status=200,
        part=Part(0, total - 1, total) if length else Part(0, None, None),
        length=total if length else None,
        asked_first=opening.part.first,
    )
    return transfer._replace(opening=opening, sent=transfer.sent if sent is None else sent)


class TestARangeAnsweredWhole:
    """``Range: bytes=N-`` and status 200: N says where the player wanted to go."""

    @MODES
    @pytest.mark.parametrize("length", [True, False])
    def test_scrubs_answered_whole(self, per: str, length: bool) -> None:
        """They are told as if the app had answered the ranges, with the bytes that were sent."""
        play, *scrubs = PLAY_AND_TWO_SCRUBS
        whole = [answered_whole(scrub, length=length) for scrub in scrubs]
        assert told(replay([play, *whole], per)) == [(0, 3_000_000), (1, 2_500_000), (1, 4_000_000)]

    @MODES
    def test_all_of_the_file_each_time(self, per: str) -> None:
        """An app without ranges that sends all of the file for each of them has had one play."""
        scrubs = [answered_whole(response(n, 3 * n, 3 * n + 2, 8_000_000 * n, 1), TOTAL) for n in range(1, 4)]
        reports = replay([response(0, 0, 2, 0, TOTAL, status=200), *scrubs], per)
        assert told(reports) == [(0, TOTAL), (1, TOTAL), (1, TOTAL), (1, TOTAL)]

    @MODES
    def test_again_from_byte_0(self, per: str) -> None:
        """Who asks from byte 0 again plays again, with a Range or without one."""
        again = [
            answered_whole(response(2, 6, 12, 0, 2_000_000)),
            response(3, 13, 19, 0, 900_000, status=200),
        ]
        assert told(replay([PLAY_AND_TWO_SCRUBS[0], *again], per)) == [
            (0, 3_000_000),
            (0, 2_000_000),
            (0, 900_000),
        ]

    @MODES
    def test_the_middle_of_something_unknown(self, per: str) -> None:
        """A range from beyond the beginning starts no viewing, however it is answered."""
        assert told(replay([answered_whole(response(1, 0, 5, 9_000_000, 1), TOTAL)], per)) == [(1, TOTAL)]

    @MODES
    def test_a_pause_that_ends(self, per: str) -> None:
        """It goes on in the same viewing, and in the same report where that is one per viewing."""
        goes_on = answered_whole(response(2, 15, 25, 3_000_000, 1), 5_000_000)
        expected = [(0, 8_000_000)] if per == "stream" else [(0, 3_000_000), (1, 5_000_000)]
        assert told(replay([PLAY_AND_TWO_SCRUBS[0], goes_on], per)) == expected

    @MODES
    @pytest.mark.parametrize("first", [TOTAL, 10**15, -5])
    def test_a_place_outside_the_file(self, per: str, first: int) -> None:
        """A journal may hold any number; the bytes are told all the same."""
        odd = response(1, 0, 5, 0, 3_000_000, status=200)
        odd = odd._replace(opening=odd.opening._replace(asked_first=first))
        assert [report.sent for report in replay([odd], per)] == [3_000_000]


class TestADownloadInPieces:
    """One response per piece, in any order and some at a time: one play."""

    @staticmethod
    def pieces(order: Sequence[int], at_once: int, lasts: float, total: int, begin: float) -> list[Transfer]:
        free = [begin + 0.003 * n for n in range(at_once)]
        size, transfers = total // len(order), []
        for number, piece in enumerate(order, 10):
            lane = free.index(min(free))
            first, end = piece * size, total if piece == len(order) - 1 else (piece + 1) * size
            starts = free[lane] + 0.001
            free[lane] = starts + lasts * (1 + 0.03 * (number % 5))
            part = {"last": end - 1, "total": total}
            transfers.append(response(number, starts, free[lane], first, end - first, **part))
        return transfers

    @MODES
    @pytest.mark.parametrize("lasts", [0.004, 0.3, 8.0])
    @pytest.mark.parametrize("count", [4, 8, 16, 32])
    @pytest.mark.parametrize("order", ["forward", "backward", "shuffled", "first last"])
    @pytest.mark.parametrize("got", [None, 70_000, 4_000_000])
    def test_one_play_no_scrub(self, per: str, lasts: float, count: int, order: str, got: int | None) -> None:
        """Whether a GET was left before, however fast the network, whichever piece comes first."""
        numbers = list(range(count))
        if order == "backward":
            numbers.reverse()
        elif order == "shuffled":
            random.Random(count).shuffle(numbers)
        elif order == "first last":
            numbers = [*numbers[1:], 0]
        transfers = self.pieces(numbers, min(count, 8), lasts, TOTAL, 0.1)
        if got is not None:
            transfers.insert(0, response(1, 0, 0.01, 0, got, status=200))
        skips = Counter(report.skip for report in replay(transfers, per))
        assert skips == Counter({0: 1} if per == "stream" else {0: 1, 1: len(transfers) - 1})

    @MODES
    def test_the_first_piece_comes_much_later(self, per: str) -> None:
        """As long as nothing of it was told, the download is one play with all its bytes."""
        rest = self.pieces(range(5), 5, 2.0, TOTAL, 0)[1:]
        late = response(90, 20, 22, 0, TOTAL // 5, last=TOTAL // 5 - 1)
        skips = Counter(report.skip for report in replay([*rest, late], per))
        assert skips[0] == 1 and (per == "response" or skips[1] == 0)

    def test_a_download_that_comes_again(self) -> None:
        """The piece at byte 0 comes once in a download: the second one is another play."""
        once = self.pieces(range(8), 4, 1.0, TOTAL, 0)
        again = [
            each._replace(opening=each.opening._replace(number=each.opening.number + 50))
            for each in self.pieces(range(8), 4, 1.0, TOTAL, 60)
        ]
        assert Counter(report.skip for report in replay([*once, *again]))[0] == 2

    def test_a_player_that_asks_in_pieces(self) -> None:
        """It plays one piece after the other; when it begins again, that is another play."""
        size = 1_000_000
        played = [response(n, n, n + 0.9, n * size, size, last=(n + 1) * size - 1) for n in range(6)]
        again = [
            response(10 + n, 10 + n, 10.9 + n, n * size, size, last=(n + 1) * size - 1) for n in range(3)
        ]
        assert told(replay([*played, *again], "stream")) == [(0, 6 * size), (0, 3 * size)]

    @MODES
    def test_a_relay_that_is_killed_in_between(self, per: str) -> None:
        """What is known of the pieces is kept with the viewing."""
        facts = facts_of(self.pieces([5, 3, 7, 1, 6, 2, 4, 0], 2, 1.0, TOTAL, 0))
        expected = replay(self.pieces([5, 3, 7, 1, 6, 2, 4, 0], 2, 1.0, TOTAL, 0), per)
        playback, reports = Playback(per=per), []
        for fact in facts:
            reports += feed(playback, [fact])
            playback = restarted(playback, per)
        assert reports + playback.advance(AFTER, AFTER // 10**6) == expected


def restarted(playback: Playback, per: str, min_bytes: int | None = None) -> Playback:
    """A relay that was killed and began anew with what the first one had stored."""
    successor = Playback(per=per, min_bytes=min_bytes)
    successor.restore([(key, text) for key, text in playback.changed() if text is not None])
    return successor


class TestAfterARestartOfTheHost:
    """CLOCK_MONOTONIC begins anew: what the outbox kept is placed by the wall clock, *pause* seconds back."""

    BEFORE, UPTIME = ("boot a", 10**9 * S), 40 * 86_400

    def rebooted(self, playback: Playback, pause: float, uptime: float = 60.0) -> Playback:
        """One in a boot that is *uptime* old, *pause* after second 0 of the old one's day 40."""
        axis = "boot b", self.BEFORE[1] + int((self.UPTIME + pause - uptime) * S)
        successor = Playback(per="stream", idle_s=1000)
        kept = [(key, text) for key, text in playback.changed(self.BEFORE) if text is not None]
        successor.restore(kept, axis, int(uptime * S))
        return successor

    def played(self) -> Playback:
        playback = Playback(per="stream", idle_s=1000)
        feed(playback, facts_of([response(1, self.UPTIME - 9, self.UPTIME, 0, 3_000_000)]))
        return playback

    def test_viewing_continues_after_reboot(self) -> None:
        """A viewing that goes on after a restart of the host is the same viewing."""
        playback = self.rebooted(self.played(), pause=100)
        feed(playback, facts_of([response(2, 61, 70, 3_000_000, 4_000_000)]))
        assert told(playback.advance(AFTER, 0)) == [(0, 7_000_000)]

    def test_ended_viewing_reported_after_reboot(self) -> None:
        """A viewing that ended while the host was down is reported at once. The next response begins another one."""
        playback = self.rebooted(self.played(), pause=3600)
        reports = playback.advance(60 * S, 0)
        assert told(reports) == [(0, 3_000_000)]
        feed(playback, facts_of([response(2, 61, 70, 0, 5_000_000)]))
        assert told(playback.advance(AFTER, 0)) == [(0, 5_000_000)]

    def test_open_response_lost_in_reboot(self) -> None:
        """A response that was open at the restart is ended, and its viewing is dropped after 30 minutes."""
        playback = Playback(per="stream", idle_s=1000)
        playback.opened("w", response(1, self.UPTIME, self.UPTIME + 1, 0, 1).opening)
        playback = self.rebooted(playback, pause=100)
        assert list(playback.open_responses()) == [("w", 1)]
        assert playback.writer_died("w", 1, 60 * S, 0) == []
        playback.advance(60 * S + 30 * 60 * S, 0)
        assert dict(playback.changed()) == {("", *PLAY[:2]): None}

    def test_ended_before_recent_boot(self) -> None:
        """A viewing that ended before a boot some seconds ago is reported and dropped at once."""
        playback = Playback(per="stream", idle_s=1000)
        feed(playback, facts_of([response(1, -3609, -3600, 0, 3_000_000)]))
        assert told(playback.advance(5 * S, 0)) == [(0, 3_000_000)]
        assert dict(playback.changed()) == {("", *PLAY[:2]): None}

    def test_open_response_times_rebased(self) -> None:
        """The times in the last line of an open response are also converted by the wall clock."""
        opening = response(1, self.UPTIME, self.UPTIME + 1, 0, 1).opening._replace(started_ms=2_000)
        open_response = OpenResponse.of("w", opening)
        open_response.last_line = encode(Progress(opening, self.UPTIME * S, 3_000, 5)).decode().rstrip()
        open_response.rebase(("boot b", S // 2))
        moved = Progress(opening._replace(started_ns=3 * S // 2), 5 * S // 2, 3_000, 5)
        assert decode(open_response.last_line.encode()) == moved

    def test_damaged_open_response_line(self) -> None:
        """A damaged last line of an open response is counted, and the response is dropped."""
        playback = Playback()
        opening = response(1, 0, 1, 0, 1).opening
        playback.opened("w", opening)
        playback.progressed("w", Progress(opening, S, 1_000, 5))
        ((key, text),) = playback.changed()
        assert text is not None
        successor = Playback()
        successor.restore([(key, text.replace("progress", "progrezz"))])
        assert successor.counts == Counter(state_unreadable=1)
        assert not list(successor.open_responses())

    def test_wall_clock_set_back_at_reboot(self) -> None:
        """If the wall clock was set back at a reboot, no stored time lies in the future."""
        playback = self.rebooted(self.played(), pause=-(10**6))
        feed(playback, facts_of([response(2, 61, 70, 3_000_000, 4_000_000)]))
        assert told(playback.advance(1070 * S, 0)) == [(0, 7_000_000)]

    def test_same_boot_times_unchanged(self) -> None:
        """Times that are stored and restored within one boot stay as they are, even if the wall clock is set."""
        playback = self.rebooted(self.played(), pause=100)
        feed(playback, facts_of([response(2, 61, 70, 3_000_000, 4_000_000)]))
        later = "boot b", 5 * S  # somebody set the wall clock; the boot's own clock went on
        successor = Playback(per="stream", idle_s=1000)
        kept = [(key, text) for key, text in playback.changed(later) if text is not None]
        successor.restore(kept, ("boot b", 10**6 * S), 80 * S)
        feed(successor, facts_of([response(3, 71, 80, 7_000_000, 1_000_000)]))
        assert told(successor.advance(AFTER, 0)) == [(0, 8_000_000)]

    def test_times_before_this_boot_are_not_late(self) -> None:
        playback = Playback()
        feed(playback, facts_of([response(1, -100, -90, 0, 3_000_000)]))
        assert playback.counts["late"] == 0


class TestBadInput:
    def test_repeated_line_reported_once(self) -> None:
        """A line that is read twice is reported once and counted as repeated."""
        playback = Playback()
        facts = facts_of(PLAY_AND_TWO_SCRUBS)
        assert len(feed(playback, [fact for fact in facts for _ in range(2)])) == 3
        assert len(feed(playback, facts)) == 0
        assert playback.counts["repeated"] > 0

    def test_close_without_open_line(self) -> None:
        """A close line whose open line was not seen is decided when it arrives."""
        playback = Playback()
        start, scrub, _ = PLAY_AND_TWO_SCRUBS
        assert told(playback.closed("w", start)) == [(0, 3_000_000)]
        assert told(playback.closed("w", scrub)) == [(1, 2_500_000)]
        assert playback.counts == Counter()

    def test_late_line_is_counted(self) -> None:
        """A line that arrives after the relay's hold-back time is reported and counted as late."""
        playback = Playback()
        playback.advance(10 * S, 10_000)
        assert told(feed(playback, facts_of([response(1, 9, 11, 0, 700_000)]))) == [(0, 700_000)]
        assert playback.counts == Counter(late=1)

    def test_clock_set_back(self) -> None:
        """A clock that was set back neither keeps a viewing longer than its idle time nor loses its bytes."""
        playback = Playback(per="stream")
        future = 10**6
        feed(playback, facts_of([response(1, future, future + 5, 0, 3_000_000)]))
        playback.advance(100 * S, 0)
        assert told(playback.advance(131 * S, 0)) == [(0, 3_000_000)]
        playback.advance((132 + 1800) * S, 0)
        assert dict(playback.changed()) == {("", "session-1", "7190971"): None}
        feed(playback, [Fact(2000 * S, "w", response(2, 2000, 2010, 0, 1).opening)])
        assert playback.counts["late"] == 0

    @pytest.mark.parametrize(
        "part",
        [
            Part(None, None, None),
            Part(-5, 10, 100),
            Part(500, 100, TOTAL),
            Part(500, 1000, 600),
            Part(10**15, 10**15 + 5, TOTAL),
            Part(0, None, None),
            Part(0, 99, 0),
            Part(None, 99, 100),
        ],
    )
    @pytest.mark.parametrize("per", ["response", "stream"])
    def test_contradictory_part_reports_bytes(self, part: Part, per: str) -> None:
        """A part that contradicts itself or the number of bytes is reported by the bytes sent."""
        opening = Opening(1, 0, 0, PLAY, part, 206, -7)
        playback = Playback(per=per, min_bytes=1)
        reports = feed(playback, facts_of([Transfer(opening, 5 * S, 5000, 3_000_000)]))
        reports += playback.advance(AFTER, 0)
        assert [report.sent for report in reports] == [3_000_000]
        assert reports[0].skip == (0 if part.first in (0, 500) else 1)

    def test_end_before_start_is_reported(self) -> None:
        """A response that ended before it started is reported."""
        assert told(replay([response(1, 5, 4, 0, 700_000)])) == [(0, 700_000)]

    def test_responses_that_never_end_are_given_up(self) -> None:
        playback = Playback()
        feed(playback, [Fact(n, "w", response(n, n / S, 1, n, 1).opening) for n in range(1000)])
        assert len(list(playback.open_responses())) == MOST_OPEN
        assert playback.counts["responses_given_up"] == 1000 - MOST_OPEN
        day = 25 * 3600 * S
        playback.advance(day, 0)
        playback.advance(day + 1801 * S, 0)
        assert list(playback.open_responses()) == []

    def test_viewing_state_is_bounded(self) -> None:
        """The stored state of a viewing does not grow with the number of its responses."""
        playback = Playback(per="stream")
        start = [Fact(0, "w", response(0, 0, 1, 0, 1, total=10**12).opening)]
        feed(playback, start)
        for n in range(1, 2000):
            at = 3 * n
            feed(playback, facts_of([response(n, at, at + 2, n * 10**7, 700_000, last=None, total=10**12)]))
        ((_, text),) = playback.changed()
        assert text is not None and len(text) < 200 * MOST_SPANS

    def test_oldest_session_dropped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """If there are more sessions than the limit, the oldest are dropped, and their bytes are reported."""
        monkeypatch.setattr(playback_module, "MOST_SESSIONS", 100)
        playback = Playback(per="stream")
        transfers = [response(n, n, n + 2, 0, 700_000, play=Play(f"s{n}", "1")) for n in range(1000)]
        reports = feed(playback, facts_of(transfers)) + playback.conclude(0)
        assert Counter(report.session_id for report in reports) == Counter(f"s{n}" for n in range(1000))
        assert playback.counts["viewings_dropped"] == 900
        assert len([text for _, text in playback.changed() if text is not None]) == 100

    def test_unreadable_row_is_skipped(self) -> None:
        """A stored row that can't be read is skipped and counted."""
        playback = Playback()
        feed(playback, facts_of(PLAY_AND_TWO_SCRUBS)[:3])
        ((key, text),) = playback.changed()
        assert text is not None
        broken = ["", "{}", "null", "[]", text[:-2], text.replace("session-1", "session-2"), "[" * 100_000]
        values = json.loads(text)
        for place in range(len(values)):
            broken.append(json.dumps([*values[:place], {"not": "this"}, *values[place + 1 :]]))
        successor = Playback()
        successor.restore([(key, row) for row in broken])
        assert successor.counts == Counter(state_unreadable=len(broken))
        assert list(successor.open_responses()) == []


# What holds for whatever players do.

_places = st.one_of(
    st.just(0), st.integers(0, 2 * BEGINNING), st.integers(0, TOTAL - 1), st.just(TOTAL - 20_000)
)


@st.composite
def _transfers(draw: st.DrawFn) -> list[Transfer]:
    """Responses of two sessions, at times that are all different, as times in ns are."""
    transfers = []
    now = 1000
    for number in range(draw(st.integers(1, 12))):
        now += draw(st.sampled_from([1, 20, 250, 900, 2500, 31_000, 1_900_000]))
        lasts = draw(st.sampled_from([1, 15, 200, 1600, 2500, 9000, 40_000]))
        first = draw(_places)
        last = draw(st.sampled_from([TOTAL - 1, min(first + 1, TOTAL - 1), min(first + 10**6, TOTAL - 1)]))
        sent = draw(st.sampled_from([0, 1, 8192, 300_000, 600_000, 4_000_000, TOTAL]))
        play = draw(st.sampled_from([PLAY, PLAY, Play("session-2", "1")]))
        each = response(number, now / 1000, 0, first, min(sent, last - first + 1), last=last, play=play)
        started, ended = now * 10**6 + 2 * number, (now + lasts) * 10**6 + 2 * number + 1
        opening = each.opening._replace(started_ns=started, started_ms=now)
        transfers.append(each._replace(opening=opening, ended_ns=ended, ended_ms=now + lasts))
    return transfers


def _counted(transfers: Iterable[Transfer]) -> list[Transfer]:
    return [each for each in transfers if each.sent > 0 and (each.opening.part.size or 3) > 2]


def _by_session(reports: Iterable[Report]) -> dict[str, list[Report]]:
    sessions: dict[str, list[Report]] = {}
    for report in reports:
        sessions.setdefault(report.session_id, []).append(report)
    return sessions


@given(_transfers())
def test_each_response_reported_once(transfers: list[Transfer]) -> None:
    """Per response, each counted response is reported exactly once."""
    reports = replay(transfers)
    told_of = Counter((report.session_id, report.sent) for report in reports)
    assert told_of == Counter((each.opening.play.session_id, each.sent) for each in _counted(transfers))


@given(_transfers())
def test_stream_bytes_reported_once(
    transfers: list[Transfer],
) -> None:
    """Per stream, no byte is reported twice, and none is lost except those below the minimum."""
    counted: Counter[str] = Counter()
    for each in _counted(transfers):
        counted[each.opening.play.session_id] += each.sent
    told_all, told_enough = Counter[str](), Counter[str]()
    for report in replay(transfers, "stream", 1):
        told_all[report.session_id] += report.sent
    for report in replay(transfers, "stream"):
        told_enough[report.session_id] += report.sent
    assert told_all == counted
    assert told_enough <= counted


@MODES
@given(transfers=_transfers())
def test_plays_are_no_more_than_starts(per: str, transfers: list[Transfer]) -> None:
    reports = _by_session(replay(transfers, per, 1))
    for session, of_session in reports.items():
        mine = [each for each in _counted(transfers) if each.opening.play.session_id == session]
        starts = [each for each in mine if (each.opening.part.first or 0) <= BEGINNING]
        assert sum(report.skip == 0 for report in of_session) <= len(starts)


@MODES
@given(transfers=_transfers())
def test_times_are_unique_and_grow(per: str, transfers: list[Transfer]) -> None:
    for of_session in _by_session(replay(transfers, per, 1)).values():
        times = [report.time_ms for report in of_session]
        assert times == sorted(set(times))


@MODES
@given(transfers=_transfers(), data=st.data())
def test_relay_killed_at_any_point(per: str, transfers: list[Transfer], data: st.DataObject) -> None:
    """A relay that is killed at any point makes the same reports after its restart."""
    facts = facts_of(transfers)
    kills = data.draw(st.sets(st.integers(0, len(facts))))
    playback = Playback(per=per)
    rows: dict[tuple[str, str, str], str] = {}
    reports: list[Report] = []
    for at, fact in enumerate(facts):
        if at in kills:
            playback = Playback(per=per)
            playback.restore(rows.items())
        reports += feed(playback, [fact])
        for key, text in playback.changed():
            rows.pop(key, None)
            if text is not None:
                rows[key] = text
    assert reports + playback.advance(AFTER, 0) == replay(transfers, per)


def _through_relay(
    transfers: Sequence[Transfer], per: str, writers: int, delays: Sequence[int], polls: Sequence[int]
) -> list[Report]:
    """The reports of a relay that looks at *polls* and holds back for 0.25 s, as lines come up to that late."""
    hold_back = S // 4
    waiting = [
        (fact.at_ns + delay, fact) for fact, delay in zip(facts_of(transfers, writers), delays, strict=True)
    ]
    playback = Playback(per=per)
    reports: list[Report] = []
    for now in polls:
        arrived = [fact for arrival, fact in waiting if arrival <= now and fact.at_ns <= now - hold_back]
        waiting = [(arrival, fact) for arrival, fact in waiting if fact not in arrived]
        reports += feed(playback, sorted(arrived, key=lambda fact: fact.at_ns))
        reports += playback.advance(now - hold_back, 0)
    assert waiting == []
    assert (
        per == "stream" or playback.counts["late"] == 0
    )  # per stream it also counts bytes that ride on nothing
    return reports


@MODES
@given(transfers=_transfers(), data=st.data())
@settings(max_examples=200)
def test_line_order_does_not_matter(per: str, transfers: list[Transfer], data: st.DataObject) -> None:
    """The same lines give the same reports in any order that the hold-back time allows."""
    expected = replay(transfers, per)
    count = 2 * len(transfers)
    delays = data.draw(st.lists(st.integers(0, S // 4), min_size=count, max_size=count))
    end = max(each.ended_ns for each in transfers) + 4 * 3600 * S
    polls = [*sorted(data.draw(st.lists(st.integers(0, end), max_size=30))), end, AFTER + S // 4]
    reports = _through_relay(transfers, per, data.draw(st.sampled_from([1, 4])), delays, polls)
    assert _by_session(reports) == _by_session(expected)


_wild_ints = st.one_of(st.none(), st.integers(-5, 5), st.integers(-(2**63), 2**63))


@st.composite
def _wild_transfers(draw: st.DrawFn) -> Transfer:
    """A line that is whole and makes no sense."""
    time = st.integers(-10 * S, 4000 * S)
    play = Play(draw(st.sampled_from("ab")), "1", "", draw(st.sampled_from([None, 0, 1, 7])))
    part = Part(draw(_wild_ints), draw(_wild_ints), draw(_wild_ints))
    number, status = draw(st.integers(0, 5)), draw(st.sampled_from([200, 206]))
    opening = Opening(number, draw(time), draw(st.integers(0, 10**13)), play, part, status, draw(_wild_ints))
    return Transfer(opening, draw(time), draw(st.integers(0, 10**13)), draw(st.integers(-5, 2**40)))


@MODES
@given(
    transfers=st.lists(_wild_transfers(), max_size=20),
    steps=st.lists(st.sampled_from(["open", "close", "lost", "advance", "restart", "conclude"]), max_size=40),
)
def test_strange_lines_never_stop_relay(per: str, transfers: list[Transfer], steps: list[str]) -> None:
    """No line that a journal may contain stops the relay."""
    playback = Playback(per=per, min_bytes=1)
    reports: list[Report] = []
    for step, transfer in zip(steps, transfers, strict=False):
        opening = transfer.opening
        if step == "open":
            reports += playback.opened("w", opening)
        elif step == "close":
            reports += playback.closed("w", transfer)
        elif step == "lost":
            reports += playback.writer_died("w", opening.number, transfer.ended_ns, transfer.ended_ms)
        elif step == "advance":
            reports += playback.advance(transfer.ended_ns, transfer.ended_ms)
        elif step == "conclude":
            reports += playback.conclude(transfer.ended_ms)
        else:
            playback = _with_counts(restarted(playback, per, 1))
    reports += playback.advance(AFTER, 0) + playback.advance(2 * AFTER, 0) + playback.advance(3 * AFTER, 0)
    assert sum(report.sent for report in reports) <= sum(max(each.sent, 0) for each in transfers)
    assert all(report.sent > 0 and report.skip in (0, 1) for report in reports)
    assert list(playback.open_responses()) == []


def _with_counts(playback: Playback) -> Playback:
    assert playback.counts["state_unreadable"] == 0
    return playback
