"""What becomes of a report, by what the API answers; with a send and a clock of the test's own."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from t23_middleware.errors import Busy, NoAnswer, NotAccepted, Refused, Unexplained, Unreachable
from t23_middleware.relay import delivery as delivery_module
from t23_middleware.relay.breaker import LONGEST_UNCLEAR_PROBE
from t23_middleware.relay.client import Accepted
from t23_middleware.relay.delivery import (
    ACCEPTED,
    CLAIMED_PER_SENDER,
    FAILURES_TO_OPEN,
    LONGEST_KEPT,
    LONGEST_RETRY,
    MOST_CLAIMED,
    MOST_SENDERS,
    PROBE_WHEN_PAUSED,
    Breaker,
    Delivery,
)
from t23_middleware.relay.elapsed import Elapsed
from t23_middleware.relay.outbox import Entry, Ingest, OutboxError, Settlement, SQLiteOutbox, Stats
from t23_middleware.relay.report import Report

from ..harness import ROOT

NOW = 1_764_000_000_000
OK, CACHED = Accepted(False, "ok", 0.0), Accepted(True, "ok", 0.0)
PATIENCE = 30.0


class Clock:
    """Both clocks; they move when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        #: What somebody added to the wall clock, in ms.
        self.set_ms = 0

    def monotonic(self) -> float:
        return self.now

    def wall_ms(self) -> int:
        return NOW + self.set_ms + int(self.now * 1000)


class Api:
    """Answers as *says* says, and notes when it was asked for what."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.says: Callable[[Report], Accepted] = lambda report: OK
        self.asked: list[tuple[float, Report]] = []

    def send(self, report: Report) -> Accepted:
        self.asked.append((self._clock.now, report))
        return self.says(report)

    def times(self) -> list[float]:
        return [at for at, _ in self.asked]

    def sessions(self) -> Counter[str]:
        return Counter(report.session_id for _, report in self.asked)


class FailingOutbox(SQLiteOutbox):
    """One whose disk takes nothing of the kinds that the test names."""

    fails: Sequence[str] = ()

    def settle(self, settlements: Sequence[Settlement], now_ms: int) -> None:
        with self.atomic():
            super().settle(settlements, now_ms)
            self._fail("settle", settlements)

    def claim(self, count: int, now_ms: int, hosts: Sequence[str]) -> list[Entry]:  # type: ignore[override]
        entries = super().claim(count, now_ms, hosts)
        self._fail("claim", entries)
        return entries

    def _fail(self, kind: str, work: Sequence[object]) -> None:
        if work and kind in self.fails:
            raise OutboxError("the outbox can't be used: database or disk is full")


class Bench:
    """A delivery with its outbox, its API and its clock."""

    def __init__(self, path: Path, retry_ambiguous: bool = True, accepted: bool = True) -> None:
        self.clock = Clock()
        self.api = Api(self.clock)
        self.outbox = FailingOutbox(path)
        self.delivery = Delivery(
            self.outbox,
            self.api.send,
            retry_ambiguous=retry_ambiguous,
            monotonic=self.clock.monotonic,
            wall_ms=self.clock.wall_ms,
            notes={ACCEPTED: "1"} if accepted else self.outbox.notes(),
        )
        self.number = 0

    def add(self, count: int = 1, host: str = "", session: str | None = None) -> None:
        reports = []
        for _ in range(count):
            self.number += 1
            name = session or f"s{self.number}"
            reports.append(Report(NOW + self.number, host, name, "7", 100, 0))
        self.outbox.ingest(Ingest(reports, [], {}, {}))

    def turn(self) -> None:
        """Send and settle all that may go now."""
        deadline = time.monotonic() + PATIENCE
        while self.delivery.step() or self.delivery.in_flight:
            assert time.monotonic() < deadline
            if self.delivery.in_flight:
                self.delivery.wait(1)

    def step_until(self, true: Callable[[], bool]) -> None:
        """Turns in which not all that was sent comes back."""

        def stepped() -> bool:
            self.delivery.step()
            return true()

        wait_for(stepped)

    def run(self, seconds: float, step: float = 1.0) -> None:
        """Let time pass, with a turn at each *step*."""
        end = self.clock.now + seconds
        self.turn()
        while self.clock.now < end:
            self.clock.now = min(self.clock.now + step, end)
            self.turn()

    def stats(self) -> Stats:
        stats = self.outbox.stats()
        assert stats.captured == stats.waiting + stats.sent + stats.dead + stats.lost
        return stats

    def rows(self, what: str) -> list[tuple[object, ...]]:
        return self.outbox._db.execute(what).fetchall()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def made(**options: bool) -> Bench:
        benches.append(Bench(tmp_path / f"{len(benches)}.db", **options))
        return benches[-1]

    yield made
    for bench in benches:
        bench.delivery.stop(0)
        bench.outbox.close()


@pytest.fixture
def bench(make: Callable[..., Bench]) -> Bench:
    return make()


def raising(error: Exception) -> Callable[[Report], Accepted]:
    def says(report: Report) -> Accepted:
        raise error

    return says


def then(*answers: Accepted | Exception) -> Callable[[Report], Accepted]:
    """One answer after the other, the last one from then on."""
    left = list(answers)

    def says(report: Report) -> Accepted:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return says


def busy(retry_after: float | None = None) -> Busy:
    return Busy("HTTP 503", retry_after)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


# One report.


def test_what_the_api_took_is_acknowledged_and_sent_once(bench):
    bench.add(100)
    bench.turn()
    assert bench.stats() == Stats(100, 0, 100, 0, 0)
    assert set(bench.api.sessions().values()) == {1}


def test_an_answer_from_the_cache_on_the_first_try_sends_the_report_once_more_with_a_later_time(bench):
    bench.add()
    bench.api.says = then(CACHED, OK)
    bench.run(1)
    first, second = [report for _, report in bench.api.asked]
    assert second == first._replace(time_ms=second.time_ms)
    assert second.time_ms > first.time_ms
    assert bench.stats() == Stats(1, 0, 1, 0, 0)


def test_the_later_time_is_later_even_where_the_clock_is_behind_the_report(bench):
    bench.add()
    bench.clock.set_ms = -3_600_000
    bench.api.says = then(CACHED, OK)
    bench.turn()
    first, second = [report for _, report in bench.api.asked]
    assert second.time_ms == first.time_ms + 1


def test_an_answer_from_the_cache_on_a_retry_means_that_the_first_try_had_arrived(bench):
    bench.add()
    bench.api.says = then(NoAnswer("timed out"), CACHED)
    bench.run(5)
    first, second = [report for _, report in bench.api.asked]
    assert first == second
    assert bench.stats() == Stats(1, 0, 1, 0, 0)


def test_an_answer_from_the_cache_after_a_try_that_was_never_sent_is_one_on_the_first(bench):
    bench.add()
    bench.api.says = then(Unreachable("refused"), CACHED, OK)
    bench.run(5)
    assert len(bench.api.asked) == 3
    assert bench.stats() == Stats(1, 0, 1, 0, 0)


def test_an_answer_from_the_cache_to_the_later_time_too_is_a_dead_letter(bench):
    bench.add()
    bench.api.says = then(CACHED, CACHED)
    bench.run(5)
    assert bench.stats() == Stats(1, 0, 0, 1, 0)
    ((code, answer),) = bench.rows("SELECT code, answer FROM dead")
    assert (code, "cache" in str(answer)) == ("cached", True)


def test_the_later_time_keeps_its_report_alive_through_a_lost_answer(bench):
    bench.add()
    bench.api.says = then(CACHED, NoAnswer("timed out"), CACHED)
    bench.run(5)
    _, second, third = [report for _, report in bench.api.asked]
    assert second == third
    assert bench.stats() == Stats(1, 0, 1, 0, 0)


@pytest.mark.parametrize(
    "error", [Unreachable("refused"), NoAnswer("timed out"), busy()], ids=lambda e: type(e).__name__
)
def test_what_found_no_api_is_sent_again_a_second_later_and_the_same(error, bench):
    bench.add()
    bench.api.says = then(error, OK)
    bench.run(0.9, 0.1)
    assert bench.api.times() == [0]
    bench.run(0.2, 0.1)
    assert len({report for _, report in bench.api.asked}) == 1
    assert bench.stats() == Stats(1, 0, 1, 0, 0)


def test_a_lost_answer_is_a_lost_report_where_nothing_may_be_sent_twice(make):
    bench = make(retry_ambiguous=False)
    bench.add(3)
    bench.api.says = then(NoAnswer("timed out"), Unreachable("refused"), busy(), OK)
    bench.run(5)
    assert bench.stats() == Stats(3, 0, 2, 0, 1)
    assert bench.rows("SELECT reason, reports, bytes FROM losses") == [("ambiguous", 1, 100)]
    assert sorted(bench.api.sessions().values()) == [1, 2, 2]


def test_what_the_api_refuses_is_a_dead_letter_with_its_answer_and_closes_nothing(bench):
    bench.add(20)
    bench.api.says = raising(Refused("no_such_photo", "x" * 1000))
    bench.turn()
    assert bench.stats() == Stats(20, 0, 0, 20, 0)
    assert set(bench.api.sessions().values()) == {1}
    assert set(bench.rows("SELECT code, answer FROM dead")) == {
        ("no_such_photo", f"no_such_photo: {'x' * 1000}"[:LONGEST_KEPT])
    }


def test_what_nobody_documents_is_tried_five_times_within_more_than_an_hour(bench):
    bench.add()
    bench.api.says = raising(Unexplained("odd", "what?"))
    bench.run(2 * 3600, 5)
    times = bench.api.times()
    assert len(times) == 5
    assert times[-1] - times[0] >= 3600
    assert bench.rows("SELECT code FROM dead") == [("odd",)]
    assert bench.stats() == Stats(1, 0, 0, 1, 0)


def test_what_nobody_documents_can_still_arrive(bench):
    bench.add()
    odd = Unexplained("odd", "")
    bench.api.says = then(odd, busy(), odd, OK)
    bench.run(2 * 3600, 5)
    assert bench.stats() == Stats(1, 0, 1, 0, 0)


def test_a_report_that_fails_alone_is_tried_less_and_less_and_holds_up_no_other(bench, caplog):
    bench.add(session="poison")

    def says(report: Report) -> Accepted:
        if report.session_id == "poison":
            raise busy()
        return OK

    bench.api.says = says
    for _ in range(720):
        bench.add(1)
        bench.run(5, 5)
    tries = [at for at, report in bench.api.asked if report.session_id == "poison"]
    assert bench.stats() == Stats(721, 1, 720, 0, 0)
    assert 10 <= len(tries) <= 25
    assert tries[-1] - tries[-2] == pytest.approx(LONGEST_RETRY, abs=10)
    assert errors(caplog) == []
    bench.api.says = lambda report: OK
    bench.run(LONGEST_RETRY, 5)
    assert bench.stats().waiting == 0


def test_an_error_of_our_own_while_sending_is_told_and_ends_nothing(bench, caplog):
    bench.add(50)
    bench.api.says = then(ZeroDivisionError("our fault"), OK)
    bench.run(5)
    assert bench.stats() == Stats(50, 0, 50, 0, 0)
    assert any("an error in t23_middleware" in text for text in errors(caplog))


def test_senders_that_died_are_replaced(bench, monkeypatch):
    """Memory that runs out while an error is logged ends a sender, but loses no report and stops no delivery."""

    def no_memory(*args: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(threading, "excepthook", lambda hook: None)
    monkeypatch.setattr(delivery_module.log, "exception", no_memory)
    bench.api.says = raising(MemoryError())
    bench.add(100)
    bench.run(30)
    assert bench.delivery.in_flight == 0
    bench.api.says = lambda report: OK
    bench.run(120)
    assert bench.stats() == Stats(100, 0, 100, 0, 0)


# An API that is down.


def test_the_fifth_failure_in_a_row_opens_the_breaker_and_a_success_between_does_not(bench, caplog):
    bench.api.says = then(*[busy()] * 4, OK, *[busy()] * 4, OK)
    bench.add()
    bench.run(60)
    bench.add()
    bench.run(60)
    assert bench.stats().sent == 2
    assert errors(caplog) == []
    bench.api.says = raising(busy())
    bench.add()
    bench.run(60)
    assert len(errors(caplog)) == 1


def test_an_outage_of_four_hours_costs_two_probes_a_minute_and_nobodys_attempts(bench, caplog):
    bench.add(200)
    bench.api.says = raising(Unreachable("refused"))
    bench.run(4 * 3600, 1)
    times = bench.api.times()
    minutes = Counter(int(at // 60) for at in times)
    assert max(count for minute, count in minutes.items() if minute >= 2) <= 2
    assert len(minutes) > 200
    assert bench.rows("SELECT DISTINCT tries, attempts, leased FROM reports") == [(0, 0, 0)]
    assert len(errors(caplog)) == 1
    bench.api.says = lambda report: OK
    healed = bench.clock.now
    bench.run(70, 1)
    assert bench.stats() == Stats(200, 0, 200, 0, 0)
    assert min(at for at in bench.api.times() if at > healed) - healed <= 61
    assert "delivered again" in caplog.text


def test_an_outage_with_one_report_waiting_is_found_over_as_early_as_with_many(bench):
    bench.add()
    bench.api.says = raising(busy())
    bench.run(4 * 3600, 5)
    bench.api.says = lambda report: OK
    bench.run(70, 1)
    assert bench.stats().waiting == 0


def test_probes_come_after_1_2_4_seconds_and_so_on_to_60_each_half_to_full():
    asked: list[tuple[float, float]] = []

    def jitter(low: float, high: float) -> float:
        asked.append((low, high))
        return high

    breaker = Breaker("", jitter)
    for id in range(FAILURES_TO_OPEN):
        assert breaker.allows(0.0) is None
        breaker.failed(id, 0.0, busy())
    now, waits = 0.0, []
    for id in range(100, 109):
        begun = now
        while not breaker.allows(now):
            now += 0.125
        waits.append(now - begun)
        breaker.claimed(id)
        assert breaker.allows(now + 1000) == 0
        breaker.failed(id, now, busy())
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert asked == [(each / 2, each) for each in (1, 2, 4, 8, 16, 32, 60, 60, 60, 60)]
    breaker.worked()
    assert breaker.allows(now) is None


def test_after_a_success_the_probes_begin_at_a_second_again():
    breaker = Breaker("", lambda low, high: high)
    for _ in range(2):
        for id in range(FAILURES_TO_OPEN):
            breaker.failed(id, 0.0, busy())
        breaker.claimed(77)
        breaker.failed(77, 1.0, busy())
        assert (breaker.allows(2.9), breaker.allows(3.0)) == (0, 1)
        breaker.worked()


def test_what_was_under_way_when_the_api_failed_neither_lengthens_the_wait_nor_takes_the_probes_place():
    breaker = Breaker("", lambda low, high: high)
    for id in range(FAILURES_TO_OPEN):
        breaker.failed(id, 0.0, busy())
    for id in range(10, 40):
        breaker.failed(id, 0.5, busy())
    assert (breaker.allows(0.9), breaker.allows(1.0)) == (0, 1)
    breaker.claimed(50)
    for id in range(40, 50):
        breaker.failed(id, 1.5, busy())
        assert breaker.allows(100.0) == 0
    breaker.failed(50, 2.0, busy())
    assert (breaker.allows(3.9), breaker.allows(4.0)) == (0, 1)


@pytest.mark.parametrize(("asked", "obeyed"), [(120.0, 120.0), (100_000.0, 3600.0)])
def test_retry_after_is_obeyed_up_to_an_hour_from_the_first_failure_on(asked, obeyed):
    breaker = Breaker("")
    breaker.failed(1, 0.0, busy(asked))
    assert (breaker.allows(obeyed - 0.1), breaker.allows(obeyed)) == (0, None)


def test_retry_after_of_a_busy_api_stops_all_its_reports(bench):
    bench.add()
    bench.api.says = then(busy(30.0), OK)
    bench.turn()
    bench.add(50)
    bench.run(29)
    assert bench.api.times() == [0]
    bench.run(2)
    assert bench.stats() == Stats(51, 0, 51, 0, 0)


def test_an_api_that_hangs_is_asked_for_no_more_than_its_senders_hold_and_the_rest_goes_back(bench):
    bench.add(100)
    gates: dict[str, threading.Event] = defaultdict(threading.Event)

    def hang(report: Report) -> Accepted:
        assert gates[report.session_id].wait(PATIENCE)
        raise NoAnswer("timed out")

    bench.api.says = hang
    bench.delivery.step()
    wait_for(lambda: len(bench.api.asked) == MOST_SENDERS)
    assert bench.delivery.in_flight == MOST_SENDERS * CLAIMED_PER_SENDER
    for _, report in bench.api.asked[:FAILURES_TO_OPEN]:
        gates[report.session_id].set()
    bench.step_until(lambda: bench.delivery.in_flight <= MOST_SENDERS)
    wait_for(lambda: bench.delivery.in_flight == len(bench.api.asked) - FAILURES_TO_OPEN)
    assert len(bench.api.asked) <= MOST_SENDERS + FAILURES_TO_OPEN
    assert bench.rows("SELECT count(*) FROM reports WHERE leased = 0") == [(100 - bench.delivery.in_flight,)]
    assert bench.rows("SELECT count(*) FROM reports WHERE tries > 0") == [(FAILURES_TO_OPEN,)]
    for gate in [gates[f"s{number}"] for number in range(1, 101)]:
        gate.set()
    bench.turn()


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# An API that takes nothing from this server.


def test_a_server_that_is_not_accepted_pauses_with_a_probe_each_5_minutes_and_one_error(bench, caplog):
    bench.add(200)
    bench.api.says = raising(NotAccepted("not whitelisted"))
    bench.turn()
    at_once = len(bench.api.asked)
    assert at_once <= MOST_SENDERS * CLAIMED_PER_SENDER
    bench.run(3600, 1)
    probes = bench.api.times()[at_once:]
    assert probes == [PROBE_WHEN_PAUSED * turn for turn in range(1, 13)]
    assert len(errors(caplog)) == 1
    assert bench.rows("SELECT DISTINCT tries, attempts, leased FROM reports") == [(0, 0, 0)]
    assert not bench.delivery.can_deliver()
    bench.api.says = lambda report: OK
    bench.run(PROBE_WHEN_PAUSED, 1)
    assert bench.stats() == Stats(200, 0, 200, 0, 0)
    bench.api.says = raising(NotAccepted("not whitelisted"))
    bench.add()
    bench.run(1)
    assert len(errors(caplog)) == 2


def test_one_error_is_told_per_change_however_the_api_changes(bench, caplog):
    bench.add(50)
    for answer in (busy(), NotAccepted("no"), busy(), NotAccepted("no")):
        bench.api.says = raising(answer)
        bench.run(900, 5)
    assert [("no reports" in text, "pauses" in text) for text in errors(caplog)] == [
        (True, False),
        (False, True),
    ]
    bench.api.says = lambda report: OK
    bench.run(400, 5)
    assert bench.stats().sent == 50


# A clock that somebody sets.


@pytest.mark.parametrize("off_ms", [31 * 86_400_000, 3_600_000, -3_600_000, -400 * 86_400_000])
def test_retries_keep_their_distance(off_ms, bench):
    """Whatever the wall clock does meanwhile: a report whose tries are counted does not use them up at once."""
    bench.add()
    bench.api.says = raising(Unexplained("odd", "what?"))
    bench.run(30, 5)
    for _ in range(8):
        bench.clock.set_ms = off_ms - bench.clock.set_ms
        bench.run(900, 5)
    times = bench.api.times()
    assert [round(later - one) for one, later in pairwise(times)] == [60, 300, 900, 2700]
    assert bench.stats() == Stats(1, 0, 0, 1, 0)


def test_retries_keep_their_distance_over_relays(bench, tmp_path):
    """The next relay goes on with the same clock, whatever the wall clock says by then."""
    bench.add()
    bench.api.says = raising(Unexplained("odd", "what?"))
    bench.turn()
    bench.outbox.note(Elapsed({}, "boot", bench.clock.monotonic).note())
    bench.clock.set_ms = 31 * 86_400_000
    bench.clock.now += 50
    elapsed = Elapsed(bench.outbox.notes(), "boot", bench.clock.monotonic)
    bench.delivery = Delivery(
        bench.outbox,
        bench.api.send,
        retry_ambiguous=True,
        monotonic=bench.clock.monotonic,
        wall_ms=bench.clock.wall_ms,
        notes={ACCEPTED: "1"},
        elapsed=elapsed,
    )
    bench.run(100, 1)
    assert bench.api.times() == [0, pytest.approx(60, abs=2)]


# What runs out.


@pytest.mark.parametrize("retry", [True, False])
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_few_threads_send_all_once(threads, retry, tmp_path, monkeypatch, caplog):
    """With as many as there are, or none; nothing counts as sent or lost that was not sent."""
    bench = Bench(tmp_path / "few.db", retry)
    start, started = threading.Thread.start, []

    def limited(thread: threading.Thread) -> None:
        if len(started) >= threads:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    bench.add(50)
    for _ in range(60):
        bench.turn()
    assert bench.stats() == Stats(50, 0, 50, 0, 0)
    assert set(bench.api.sessions().values()) == {1}
    assert [record.t23_event for record in caplog.records] == ["no_thread"]
    monkeypatch.setattr(threading.Thread, "start", start)
    bench.delivery.stop(PATIENCE)
    bench.outbox.close()


@pytest.mark.parametrize("retry", [True, False])
def test_without_threads_an_api_that_is_down(retry, tmp_path, monkeypatch):
    """What could not be sent waits, also where nothing may be sent twice."""
    bench = Bench(tmp_path / "few.db", retry)

    def none(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    bench.add(20)
    bench.api.says = raising(Unreachable("no descriptors left"))
    bench.run(60)
    assert bench.stats() == Stats(20, 20, 0, 0, 0)
    assert bench.rows("SELECT DISTINCT tries, leased FROM reports") == [(0, 0)]
    bench.api.says = lambda report: OK
    bench.run(120)
    assert bench.stats() == Stats(20, 0, 20, 0, 0)
    bench.outbox.close()


def test_probe_without_threads_continues(tmp_path, monkeypatch):
    """Without threads, a site that was down is probed on while another site always has reports."""
    bench = Bench(tmp_path / "few.db")

    def none(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    down = True

    def says(report: Report) -> Accepted:
        if down and report.host == "down.example.com":
            raise Unreachable("refused")
        return OK

    bench.api.says = says
    bench.add(10, host="down.example.com")
    bench.run(60)
    down = False
    for _ in range(100):
        bench.add(5, host="up.example.com")
        bench.clock.now += 1
        bench.delivery.step()
    assert ("down.example.com",) not in bench.rows("SELECT DISTINCT host FROM reports")
    bench.outbox.close()


def test_returned_probe_is_no_probe(bench):
    """A probe that is put back before a sender began it does not stop the probes: a relay that stops and goes on."""
    bench.add(10)
    bench.api.says = raising(Unreachable("refused"))
    bench.run(30)
    (breaker,) = [each for _, each in bench.delivery.breakers()]
    (probe,) = bench.outbox.claim(1, 1 << 60, [""])
    breaker.claimed(probe.id)
    bench.delivery._tasks.put(probe)
    bench.delivery.in_flight += 1
    bench.delivery._requeue(lambda entry: True)
    bench.delivery.settle()
    bench.api.says = lambda report: OK
    bench.run(120)
    assert bench.stats().sent == 10


# An answer that nobody understands.


def not_understood() -> NoAnswer:
    return NoAnswer("answered HTTP 200, but not in the API's format", answered=True)


def test_strange_answers_are_asked_seldom(bench, caplog):
    """A week of them costs some hundred requests and one line of the log; then all leaves."""
    bench.add(3)
    bench.api.says = raising(not_understood())
    bench.run(7 * 86_400, 60)
    assert 100 < len(bench.api.asked) < 400
    assert len(errors(caplog)) == 1
    bench.api.says = lambda report: OK
    bench.run(LONGEST_UNCLEAR_PROBE, 60)
    assert bench.stats() == Stats(3, 0, 3, 0, 0)


def test_one_strange_answer_among_good_ones(bench, caplog):
    """A report whose answer alone is not understood is tried less and less, and said once."""
    bench.add(session="poison")

    def says(report: Report) -> Accepted:
        if report.session_id == "poison":
            raise not_understood()
        return OK

    bench.api.says = says
    for _ in range(2 * 1440):
        bench.add()
        bench.run(60, 60)
    assert 10 < bench.api.sessions()["poison"] < 70
    assert bench.stats() == Stats(2881, 1, 2880, 0, 0)
    assert [record.t23_event for record in caplog.records] == ["answer_not_understood"]


def test_a_probe_that_fails_forever_blocks_nobody(bench):
    """Once the API is back, the probes get to a report that it takes, whatever is wrong with the first."""
    bench.add(session="poison")
    bench.add(5)
    bench.api.says = raising(busy())
    bench.run(600, 5)

    def says(report: Report) -> Accepted:
        if report.session_id == "poison":
            raise busy()
        return OK

    bench.api.says = says
    bench.run(180, 5)
    assert bench.stats().sent == 5


# An API that never took a report.


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "fresh.db", accepted=False)
    yield bench
    bench.delivery.stop(1)
    bench.outbox.close()


@pytest.mark.parametrize(
    "refusal",
    [Refused("no_such_photo", ""), Refused("http_400", ""), Unexplained("odd", "what?"), NotAccepted("no")],
)
def test_first_refusals_pause_instead_of_burying(refusal, fresh, caplog):
    """As long as an API took nothing, any refusal may mean that it is asked at the wrong place."""
    fresh.add(40)
    fresh.api.says = raising(refusal)
    fresh.run(6 * 3600, 5)
    assert fresh.stats() == Stats(40, 40, 0, 0, 0)
    assert fresh.rows("SELECT DISTINCT tries, attempts, leased FROM reports") == [(0, 0, 0)]
    (text,) = errors(caplog)
    assert "delivery pauses" in text
    if isinstance(refusal, Refused):
        assert refusal.code in text
        assert "check --send" in text
        assert "/api/analytics/report/download" in text
    assert not fresh.delivery.can_deliver()
    fresh.api.says = lambda report: OK
    fresh.run(PROBE_WHEN_PAUSED, 5)
    assert fresh.stats() == Stats(40, 0, 40, 0, 0)


def test_wrong_videos_block_no_right_one(fresh):
    """The probes go through what waits in turn: wrong ones are refused for good after the first right one."""
    fresh.add(10, session="wrong")
    fresh.api.says = raising(Refused("no_such_photo", ""))
    fresh.run(5)
    fresh.add(session="right")

    def says(report: Report) -> Accepted:
        if report.session_id == "wrong":
            raise Refused("no_such_photo", "")
        return OK

    fresh.api.says = says
    fresh.run(2 * 3600, 5)
    assert fresh.stats() == Stats(11, 0, 1, 10, 0)
    assert fresh.api.sessions()["right"] == 1


def test_the_next_relay_knows_what_was_accepted(fresh, tmp_path):
    """One accepted report is enough for ever, also where it was written down at the end."""
    fresh.add()
    fresh.delivery.step()
    fresh.delivery.stop(PATIENCE)
    later = Bench(tmp_path / "fresh.db", accepted=False)
    try:
        later.add()
        later.api.says = raising(Refused("no_such_photo", ""))
        later.turn()
        assert later.stats() == Stats(2, 0, 1, 1, 0)
    finally:
        later.delivery.stop(1)
        later.outbox.close()


def test_each_site_proves_itself(bench):
    """A site that took reports says nothing of another one."""
    bench.add(1, host="new.example.com")
    bench.add(1)
    bench.api.says = raising(Refused("no_such_photo", ""))
    bench.run(60)
    assert bench.stats() == Stats(2, 1, 0, 1, 0)


# Several APIs.


def test_an_api_that_is_down_holds_up_no_other(bench, caplog):
    bench.add(60, host="a.example.com")
    bench.add(60, host="b.example.com")
    bench.add(60, host="c.example.com")

    def says(report: Report) -> Accepted:
        if report.host == "a.example.com":
            raise Unreachable("refused")
        if report.host == "b.example.com":
            raise NotAccepted("not whitelisted")
        return OK

    bench.api.says = says
    bench.run(60)
    assert bench.stats() == Stats(180, 120, 60, 0, 0)
    assert sorted(text.split()[0] for text in errors(caplog)) == ["delivery", "the"]
    assert any("a.example.com" in text for text in errors(caplog))
    assert bench.delivery.can_deliver()
    assert {host: breaker.is_open for host, breaker in bench.delivery.breakers()} == {
        "a.example.com": True,
        "b.example.com": True,
        "c.example.com": False,
    }
    bench.api.says = lambda report: OK
    bench.run(400)
    assert bench.stats().sent == 180


# A store that fails.


@pytest.mark.parametrize("kinds", [("settle",), ("settle", "claim")], ids=" and ".join)
def test_what_cannot_be_acknowledged_stops_all_claims_and_is_acknowledged_later(kinds, bench, caplog):
    bench.add(100)
    bench.delivery.step()
    bench.outbox.fails = kinds
    limit = MOST_SENDERS * CLAIMED_PER_SENDER
    wait_for(lambda: len(bench.api.asked) == limit)
    for _ in range(50):
        bench.delivery.step()
        bench.delivery.wait(0.001)
    assert len(bench.api.asked) == limit
    assert bench.stats() == Stats(100, 100, 0, 0, 0)
    assert len(errors(caplog)) == 1
    assert bench.delivery.can_deliver()
    bench.outbox.fails = ()
    bench.turn()
    assert bench.stats() == Stats(100, 0, 100, 0, 0)
    assert set(bench.api.sessions().values()) == {1}


def test_acknowledgements_go_through_where_only_claims_find_no_room(bench, caplog):
    bench.add(100)
    bench.delivery.step()
    bench.outbox.fails = ("claim",)
    limit = MOST_SENDERS * CLAIMED_PER_SENDER
    bench.step_until(lambda: bench.outbox.stats().sent == limit)
    for _ in range(20):
        bench.delivery.step()
    assert bench.stats() == Stats(100, 100 - limit, limit, 0, 0)
    assert len(errors(caplog)) == 1
    bench.outbox.fails = ()
    bench.turn()
    assert bench.stats() == Stats(100, 0, 100, 0, 0)
    assert set(bench.api.sessions().values()) == {1}


def test_a_disk_full_of_pages_loses_and_doubles_nothing(bench):
    bench.add(300)
    bench.api.says = then(*[Refused("invalid_input", "x" * 400)] * 200, OK)
    (pages,) = bench.rows("PRAGMA page_count")[0]
    bench.outbox._db.execute(f"PRAGMA max_page_count = {pages}")
    for _ in range(100):
        bench.delivery.step()
        bench.delivery.wait(0.005)
    assert bench.stats().waiting > 0
    bench.outbox._db.execute("PRAGMA max_page_count = 1000000")
    bench.turn()
    assert bench.stats() == Stats(300, 0, 100, 200, 0)
    assert set(bench.api.sessions().values()) == {1}


def test_a_store_that_cannot_be_read_keeps_the_relay_here(bench, monkeypatch):
    def unreadable() -> list[str]:
        raise OutboxError("the outbox can't be used: disk I/O error")

    monkeypatch.setattr(bench.outbox, "hosts", unreadable)
    assert bench.delivery.can_deliver()
    assert bench.delivery.step() is False


def test_the_faster_the_api_the_more_is_at_hand_up_to_a_bound(bench):
    """Or its senders would have nothing to do whenever what they brought is written down."""
    bench.add(2000)
    least, held = MOST_SENDERS * CLAIMED_PER_SENDER, []
    for _ in range(5):
        bench.delivery.step()
        held.append(bench.delivery.in_flight)
        wait_for(lambda: bench.delivery._results.qsize() == bench.delivery.in_flight)
    assert held == [least, 2 * least, 4 * least, MOST_CLAIMED, MOST_CLAIMED]
    bench.api.says = then(*[Unreachable("down")] * 2000)
    for _ in range(20):
        bench.delivery.step()
        wait_for(lambda: bench.delivery._results.qsize() == bench.delivery.in_flight)
    assert bench.delivery._claim_limit == least


def test_no_more_is_at_hand_than_must_be_where_what_may_have_arrived_is_given_up(tmp_path):
    bench = Bench(tmp_path / "outbox.db", retry_ambiguous=False)
    bench.add(500)
    for _ in range(4):
        bench.delivery.step()
        assert bench.delivery.in_flight == MOST_SENDERS * CLAIMED_PER_SENDER
        wait_for(lambda: bench.delivery._results.qsize() == bench.delivery.in_flight)
    bench.delivery.stop(0)
    bench.outbox.close()


#: A wait that is interrupted, by a handler that takes longer than the wait: what a busy machine makes of any wait.
_INTERRUPTED = """
import signal, sys, time
from t23_middleware.relay.delivery import Delivery
delivery = Delivery(None, None, retry_ambiguous=True, monotonic=time.monotonic, wall_ms=lambda: 0)
signal.signal(signal.SIGALRM, lambda number, frame: time.sleep(0.3))
signal.setitimer(signal.ITIMER_REAL, 0.05)
delivery.wait(0.1)
print("came back")
"""


def test_a_wait_ends_though_its_thread_sleeps_until_the_time_is_up():
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout == "came back\n", done.stderr


# The end.


def test_stopping_waits_for_what_is_under_way_and_claims_nothing_more(bench):
    bench.delivery._monotonic = time.monotonic
    bench.add(100)
    gate = threading.Event()

    def slow(report: Report) -> Accepted:
        assert gate.wait(PATIENCE)
        return OK

    bench.api.says = slow
    bench.delivery.step()
    wait_for(lambda: len(bench.api.asked) == MOST_SENDERS)
    threading.Timer(0.2, gate.set).start()
    bench.delivery.stop(PATIENCE)
    assert bench.stats() == Stats(100, 100 - MOST_SENDERS, MOST_SENDERS, 0, 0)
    assert bench.rows("SELECT DISTINCT leased, tries FROM reports") == [(0, 0)]


def test_stopping_takes_no_longer_than_it_may_while_the_api_hangs(bench):
    bench.delivery._monotonic = time.monotonic
    bench.add(100)
    gate = threading.Event()

    def hang(report: Report) -> Accepted:
        gate.wait(PATIENCE)
        return OK

    bench.api.says = hang
    bench.delivery.step()
    wait_for(lambda: len(bench.api.asked) == MOST_SENDERS)
    began = time.monotonic()
    bench.delivery.stop(0.2)
    assert time.monotonic() - began < PATIENCE / 2
    # What was begun may arrive, so its lease tells the next relay; what was not begun is as it was.
    assert bench.rows("SELECT leased, count(*) FROM reports GROUP BY leased") == [
        (0, 100 - MOST_SENDERS),
        (1, MOST_SENDERS),
    ]
    gate.set()


def test_stopping_tries_again_to_write_down_what_the_store_refused(bench):
    bench.delivery._monotonic = time.monotonic
    bench.add(3)
    bench.delivery.step()
    bench.outbox.fails = ("settle",)
    bench.step_until(lambda: bench.delivery.in_flight == 0)

    def heal() -> None:
        bench.outbox.fails = ()

    threading.Timer(0.3, heal).start()
    bench.delivery.stop(PATIENCE)
    assert bench.stats() == Stats(3, 0, 3, 0, 0)


def test_after_a_stop_it_can_go_on(bench):
    """As when a relay that was about to leave sees news."""
    for turn in range(3):
        bench.add(5)
        bench.turn()
        bench.delivery.stop(0)
        assert bench.stats().sent == 5 * (turn + 1)


def test_senders_are_started_as_they_are_needed_and_end_with_the_delivery(bench):
    def senders() -> int:
        return sum(thread.name.startswith("t23-sender") for thread in threading.enumerate())

    before = senders()
    bench.turn()
    assert senders() == before
    bench.add(2)
    bench.turn()
    assert senders() - before <= 2
    bench.add(1000)
    bench.turn()
    assert senders() - before <= MOST_SENDERS
    bench.delivery.stop(0)
    wait_for(lambda: senders() <= before)
