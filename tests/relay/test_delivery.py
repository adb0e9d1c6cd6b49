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


def test_accepted_reports_sent_once(bench):
    """Each report that the API accepted is acknowledged and sent once."""
    bench.add(100)
    bench.turn()
    assert bench.stats() == Stats(100, 0, 100, 0, 0)
    assert set(bench.api.sessions().values()) == {1}


def test_cached_first_answer_sends_again(bench):
    """If the first send is answered from the cache, the report is sent once more with a later time."""
    bench.add()
    bench.api.says = then(CACHED, OK)
    bench.run(1)
    first, second = [report for _, report in bench.api.asked]
    assert second == first._replace(time_ms=second.time_ms)
    assert second.time_ms > first.time_ms
    assert bench.stats() == Stats(1, 0, 1, 0, 0)


def test_later_time_with_slow_clock(bench):
    """The later time is later than the report's time also if the clock is behind the report."""
    bench.add()
    bench.clock.set_ms = -3_600_000
    bench.api.says = then(CACHED, OK)
    bench.turn()
    first, second = [report for _, report in bench.api.asked]
    assert second.time_ms == first.time_ms + 1


def test_cached_retry_means_accepted(bench):
    """An answer from the cache to a retry means that the first send had arrived."""
    bench.add()
    bench.api.says = then(NoAnswer("timed out"), CACHED)
    bench.run(5)
    first, second = [report for _, report in bench.api.asked]
    assert first == second
    assert bench.stats() == Stats(1, 0, 1, 0, 0)


def test_cached_after_unreachable_is_first(bench):
    """An answer from the cache after an attempt that sent nothing is treated as one to the first send."""
    bench.add()
    bench.api.says = then(Unreachable("refused"), CACHED, OK)
    bench.run(5)
    assert len(bench.api.asked) == 3
    assert bench.stats() == Stats(1, 0, 1, 0, 0)


def test_cached_later_time_is_dead_letter(bench):
    """An answer from the cache also to the later time makes a dead letter."""
    bench.add()
    bench.api.says = then(CACHED, CACHED)
    bench.run(5)
    assert bench.stats() == Stats(1, 0, 0, 1, 0)
    ((code, answer),) = bench.rows("SELECT code, answer FROM dead")
    assert (code, "cache" in str(answer)) == ("cached", True)


def test_later_time_survives_lost_answer(bench):
    """After a lost answer the report is retried with the same later time and counts as sent."""
    bench.add()
    bench.api.says = then(CACHED, NoAnswer("timed out"), CACHED)
    bench.run(5)
    _, second, third = [report for _, report in bench.api.asked]
    assert second == third
    assert bench.stats() == Stats(1, 0, 1, 0, 0)


@pytest.mark.parametrize(
    "error", [Unreachable("refused"), NoAnswer("timed out"), busy()], ids=lambda e: type(e).__name__
)
def test_retry_after_one_second(error, bench):
    """A report that did not reach the API is retried a second later, unchanged."""
    bench.add()
    bench.api.says = then(error, OK)
    bench.run(0.9, 0.1)
    assert bench.api.times() == [0]
    bench.run(0.2, 0.1)
    assert len({report for _, report in bench.api.asked}) == 1
    assert bench.stats() == Stats(1, 0, 1, 0, 0)


def test_lost_answer_without_ambiguous_retry(make):
    """A lost answer is a lost report if nothing may be sent twice. Other errors are retried."""
    bench = make(retry_ambiguous=False)
    bench.add(3)
    bench.api.says = then(NoAnswer("timed out"), Unreachable("refused"), busy(), OK)
    bench.run(5)
    assert bench.stats() == Stats(3, 0, 2, 0, 1)
    assert bench.rows("SELECT reason, reports, bytes FROM losses") == [("ambiguous", 1, 100)]
    assert sorted(bench.api.sessions().values()) == [1, 2, 2]


def test_refused_report_is_dead_letter(bench):
    """A report that the API refuses is a dead letter with its answer, and does not open the breaker."""
    bench.add(20)
    bench.api.says = raising(Refused("no_such_photo", "x" * 1000))
    bench.turn()
    assert bench.stats() == Stats(20, 0, 0, 20, 0)
    assert set(bench.api.sessions().values()) == {1}
    assert set(bench.rows("SELECT code, answer FROM dead")) == {
        ("no_such_photo", f"no_such_photo: {'x' * 1000}"[:LONGEST_KEPT])
    }


def test_unexplained_answer_retried_five_times(bench):
    """A report with an undocumented answer is sent five times within more than an hour."""
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


def test_single_failing_report_backs_off(bench, caplog):
    """One report that always fails is retried less and less often, and does not delay the others."""
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


def test_internal_error_is_logged(bench, caplog):
    """An error in the middleware's own code while sending is logged and ends nothing."""
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


def test_breaker_opens_at_fifth_failure(bench, caplog):
    """The fifth failure in a row opens the breaker. A success in between prevents that."""
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


def test_outage_sends_two_probes_a_minute(bench, caplog):
    """An outage of four hours costs two probes a minute and no report's attempts."""
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


def test_outage_end_found_with_one_report(bench):
    """The end of an outage is noticed as early with one waiting report as with many."""
    bench.add()
    bench.api.says = raising(busy())
    bench.run(4 * 3600, 5)
    bench.api.says = lambda report: OK
    bench.run(70, 1)
    assert bench.stats().waiting == 0


def test_probe_delays_double_to_60_seconds():
    """Probes come after 1, 2, 4 seconds and so on up to 60, each after half to all of that time."""
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


def test_probe_delay_reset_by_success():
    """After a success the delay of the probes starts at a second again."""
    breaker = Breaker("", lambda low, high: high)
    for _ in range(2):
        for id in range(FAILURES_TO_OPEN):
            breaker.failed(id, 0.0, busy())
        breaker.claimed(77)
        breaker.failed(77, 1.0, busy())
        assert (breaker.allows(2.9), breaker.allows(3.0)) == (0, 1)
        breaker.worked()


def test_late_failures_ignored_by_breaker():
    """Reports that were being sent when the breaker opened neither delay its probe nor count as the probe."""
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
def test_retry_after_obeyed_to_an_hour(asked, obeyed):
    """Retry-After is obeyed from the first failure on, up to an hour."""
    breaker = Breaker("")
    breaker.failed(1, 0.0, busy(asked))
    assert (breaker.allows(obeyed - 0.1), breaker.allows(obeyed)) == (0, None)


def test_retry_after_pauses_all_reports(bench):
    """Retry-After of a busy API pauses all of its reports."""
    bench.add()
    bench.api.says = then(busy(30.0), OK)
    bench.turn()
    bench.add(50)
    bench.run(29)
    assert bench.api.times() == [0]
    bench.run(2)
    assert bench.stats() == Stats(51, 0, 51, 0, 0)


def test_hanging_api_gets_limited_reports(bench):
    """A hanging API gets no more reports than there are senders. The other claimed reports are returned."""
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


def test_not_accepted_pauses_delivery(bench, caplog):
    """If the API does not accept this server, sending pauses: one probe every 5 minutes and one ERROR."""
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


def test_one_error_per_change(bench, caplog):
    """One ERROR is logged per change of state, however often the API's answer changes."""
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


def test_failing_api_delays_no_other(bench, caplog):
    """An API that is down or refuses this server does not delay the reports to another one."""
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
def test_failed_settle_stops_claims(kinds, bench, caplog):
    """While results can't be stored nothing more is claimed. They are stored later, and nothing is sent twice."""
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


def test_failed_claim_keeps_acknowledgements(bench, caplog):
    """If only claims fail for lack of space, acknowledgements are still stored."""
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


def test_full_disk_loses_nothing(bench):
    """A full disk neither loses a report nor sends one twice."""
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


def test_unreadable_outbox_keeps_relay_running(bench, monkeypatch):
    """An outbox that can't be read does not end the relay."""

    def unreadable() -> list[str]:
        raise OutboxError("the outbox can't be used: disk I/O error")

    monkeypatch.setattr(bench.outbox, "hosts", unreadable)
    assert bench.delivery.can_deliver()
    assert bench.delivery.step() is False


def test_claim_limit_grows_with_api(bench):
    """The faster the API, the more reports are claimed at a time, up to a limit.

    Otherwise the senders would have nothing to do while their results are stored.
    """
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


def test_claim_limit_fixed_without_retry(tmp_path):
    """If a report with a lost answer is not retried, the number of claimed reports does not grow."""
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


def test_wait_ends_while_thread_sleeps():
    """``wait()`` ends although a thread sleeps until the time is over."""
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout == "came back\n", done.stderr


# The end.


def test_stop_waits_for_open_sends(bench):
    """``stop()`` waits for the sends that have begun and claims nothing more."""
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


@pytest.mark.parametrize("send_claimed", [False, True])
def test_stop_ends_while_api_hangs(send_claimed, bench):
    """``stop()`` takes no longer than its limit while the API hangs."""
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
    bench.delivery.stop(0.2, send_claimed=send_claimed)
    assert time.monotonic() - began < PATIENCE / 2
    # What was begun may arrive, so its lease tells the next relay; what was not begun is as it was.
    assert bench.rows("SELECT leased, count(*) FROM reports GROUP BY leased") == [
        (0, 100 - MOST_SENDERS),
        (1, MOST_SENDERS),
    ]
    gate.set()


def test_stop_sends_what_was_claimed(bench):
    """With *send_claimed* it sends all that it claimed, more than it has senders; what is left over stays as it was."""
    bench.delivery._monotonic = time.monotonic
    bench.add(300)
    bench.delivery.step()
    claimed = bench.delivery.in_flight
    bench.delivery.stop(PATIENCE, send_claimed=True)
    assert MOST_SENDERS < claimed < 300
    assert bench.stats() == Stats(300, 300 - claimed, claimed, 0, 0)
    assert bench.rows("SELECT DISTINCT leased, tries FROM reports") == [(0, 0)]


def test_stop_retries_failed_settle(bench):
    """``stop()`` tries again to store the results that the outbox refused."""
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


def test_senders_start_and_end(bench):
    """Sender threads are started when they are needed and end with the delivery."""

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
