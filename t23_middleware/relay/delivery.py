"""Claim, send, acknowledge: what becomes of each report, and when the API is left in peace.

The outbox is touched by the relay's one thread; sender threads do nothing but wait for the API.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ..errors import DeliveryError, NoAnswer, NotAccepted, Refused, RetryLater, Unexplained
from .answer import Answer
from .outbox import Acked, Again, Dead, Entry, Lost, Outbox, OutboxError, Settlement
from .report import Report

log = logging.getLogger(__name__)

#: Threads that wait for the API. An answer in 20 ms makes 50 reports/s of one thread; started as they are needed.
MOST_SENDERS = 16
#: Reports that are claimed per sender: one under way and one at hand.
CLAIMED_PER_SENDER = 2
#: Failures in a row after which an API is left alone but for a probe.
FAILURES_TO_OPEN = 5
#: Seconds to the first probe; each one that fails doubles it, up to the longest.
FIRST_PROBE, LONGEST_PROBE = 1.0, 60.0
#: Seconds between two probes while the API takes nothing from this server; somebody has to mend that by hand.
PROBE_WHEN_PAUSED = 300.0
#: Longest that ``Retry-After`` is obeyed, in seconds.
LONGEST_RETRY_AFTER = 3600.0
#: Seconds before a report is tried again that failed while its API is not left alone.
RETRY_AFTER = 1.0
#: Seconds before each further try of a report that the API refuses with a code nobody documents: over an hour in all.
UNEXPLAINED_DELAYS = (60.0, 300.0, 900.0, 2700.0)
#: Longest answer that is kept with a dead letter, in characters.
LONGEST_KEPT = 500


class Breaker:
    """Whether an API may be asked now: all reports, one probe, or none."""

    def __init__(self, host: str, jitter: Callable[[float, float], float] = random.uniform) -> None:
        self._host = host
        self._jitter = jitter
        self._failures = 0
        self._probes = 0
        self._closed_until = 0.0
        self._probing = False
        #: Why the API takes nothing from this server, where that is so.
        self.paused: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether the API is left alone but for probes."""
        return self.paused is not None or self._failures >= FAILURES_TO_OPEN

    def allows(self, now: float) -> int | None:
        """How many reports may go now: ``None`` for any number."""
        if now < self._closed_until:
            return 0
        if self.is_open:
            return 0 if self._probing else 1
        return None

    def claimed(self) -> None:
        """A report is on its way."""
        self._probing = self.is_open

    def worked(self) -> None:
        """The API answered as it should."""
        if self.is_open:
            log.warning("reports are delivered again%s", self._where())
        self._failures, self._probes, self._closed_until, self._probing, self.paused = 0, 0, 0.0, False, None

    def failed(self, now: float, error: RetryLater) -> None:
        """The API did not answer, or said "not now"."""
        was_open, probed, self._probing = self.is_open, self._probing, False
        self._failures += 1
        wait = min(error.retry_after or 0.0, LONGEST_RETRY_AFTER)
        if self.is_open and not was_open:
            log.error("the API takes no reports%s (%s); they wait here until it does", self._where(), error)
        if self.is_open and (probed or not was_open):
            # Only a probe lengthens the wait: what was under way when the API failed tells nothing new.
            longest = min(FIRST_PROBE * 2**self._probes, LONGEST_PROBE)
            self._probes = min(self._probes + 1, 10)
            wait = max(wait, self._jitter(longest / 2, longest))
        self._closed_until = max(self._closed_until, now + wait)

    def denied(self, now: float, error: NotAccepted) -> None:
        """The API takes nothing from this server."""
        self._probing = False
        self._closed_until = now + PROBE_WHEN_PAUSED
        if self.paused is None:
            log.error(
                "delivery pauses%s: %s. Reports wait here, and one is tried each 5 minutes",
                self._where(),
                error,
            )
        self.paused = str(error)

    def ask_now(self) -> None:
        """Let a probe go at once."""
        self._closed_until, self._probing = 0.0, False

    def _where(self) -> str:
        return f" for {self._host}" if self._host else ""


class _Result(NamedTuple):
    entry: Entry
    outcome: Answer | DeliveryError


class Delivery:
    """Moves reports from the outbox to the API.

    *send* posts one report; *monotonic* is a clock in seconds, *wall_ms* one in ms since the epoch.
    """

    def __init__(
        self,
        outbox: Outbox,
        send: Callable[[Report], Answer],
        *,
        retry_ambiguous: bool,
        monotonic: Callable[[], float],
        wall_ms: Callable[[], int],
    ) -> None:
        self._outbox = outbox
        self._send = send
        self._retry_ambiguous = retry_ambiguous
        self._monotonic = monotonic
        self._wall_ms = wall_ms
        self._tasks: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[_Result] = queue.SimpleQueue()
        self._senders: list[threading.Thread] = []
        self._breakers: dict[str, Breaker] = {}
        self._unsettled: list[Settlement] = []
        self._store_fails = False
        #: Reports that are with the senders.
        self.in_flight = 0

    def step(self) -> bool:
        """Settle what came back and send what may go; whether anything moved."""
        settled = self.settle()
        return self._claim() > 0 or settled

    def wait(self, seconds: float) -> None:
        """Wait until a report comes back, or *seconds*."""
        try:
            self._results.put(self._results.get(timeout=seconds))
        except queue.Empty:
            pass

    def settle(self) -> bool:
        """Write down what came back; whether there was anything.

        What can't be written is kept and tried again; until then nothing more is claimed, or it would be sent twice.
        """
        while not self._results.empty():
            result = self._results.get()
            self.in_flight -= 1
            self._unsettled.append(self._judge(result))
        if not self._unsettled:
            return False
        try:
            self._outbox.settle(self._unsettled, self._wall_ms())
        except OutboxError as error:
            self._say_store_fails(error)
            return False
        self._unsettled = []
        self._store_fails = False
        return True

    def can_deliver(self) -> bool:
        """Whether anything is under way or could be: something waits for an API that is not paused."""
        if self.in_flight or self._unsettled:
            return True
        return any(self._breaker(host).paused is None for host in self._outbox.hosts())

    def breakers(self) -> Iterable[tuple[str, Breaker]]:
        """Host and state of each API that was asked."""
        return self._breakers.items()

    def stop(self, seconds: float) -> None:
        """Claim nothing more, and give what is under way *seconds* to come back."""
        deadline = self._monotonic() + seconds
        while self.in_flight and (left := deadline - self._monotonic()) > 0:
            self.wait(left)
            self.settle()
        for _ in self._senders:
            self._tasks.put(None)

    def _claim(self) -> int:
        room = MOST_SENDERS * CLAIMED_PER_SENDER - self.in_flight
        if room <= 0 or self._unsettled:
            return 0
        try:
            entries = self._claim_allowed(room)
        except OutboxError as error:
            self._say_store_fails(error)
            return 0
        for entry in entries:
            self._breaker(entry.report.host).claimed()
            self._tasks.put(entry)
        self.in_flight += len(entries)
        while len(self._senders) < min(self.in_flight, MOST_SENDERS):
            self._start_sender()
        return len(entries)

    def _claim_allowed(self, room: int) -> list[Entry]:
        now = self._monotonic()
        free, probes = [], []
        for host in self._outbox.hosts():
            allowed = self._breaker(host).allows(now)
            if allowed is None:
                free.append(host)
            elif allowed:
                probes.append(host)
        entries = self._outbox.claim(room, self._wall_ms(), free) if free else []
        for host in probes:
            entries += self._outbox.claim(1, self._wall_ms(), [host])
        return entries

    def _breaker(self, host: str) -> Breaker:
        return self._breakers.setdefault(host, Breaker(host))

    def _start_sender(self) -> None:
        # A daemon: one that hangs in a system call must not hold up the exit.
        sender = threading.Thread(
            target=self._send_forever, daemon=True, name=f"t23-sender-{len(self._senders)}"
        )
        self._senders.append(sender)
        sender.start()

    def _send_forever(self) -> None:
        while (entry := self._tasks.get()) is not None:
            try:
                outcome: Answer | DeliveryError = self._send(entry.report)
            except DeliveryError as error:
                outcome = error
            except Exception as error:
                log.exception("sending a report failed in a way that is our own fault")
                outcome = NoAnswer(type(error).__name__)
            self._results.put(_Result(entry, outcome))

    # What becomes of a report.

    def _judge(self, result: _Result) -> Settlement:
        entry, outcome = result
        breaker = self._breaker(entry.report.host)
        now = self._monotonic()
        if isinstance(outcome, Answer):
            breaker.worked()
            return self._answered(entry, outcome)
        if isinstance(outcome, RetryLater):
            breaker.failed(now, outcome)
            return self._unanswered(entry, outcome)
        if isinstance(outcome, NotAccepted):
            breaker.denied(now, outcome)
            return Again(entry.id, self._wall_ms(), entry.tries, entry.attempts)
        breaker.worked()
        return self._refused(entry, outcome)

    def _answered(self, entry: Entry, answer: Answer) -> Settlement:
        """``cached`` on a first try: the API answered from its cache and recorded nothing; on a later one, the first did."""
        if not answer.cached or entry.tries:
            return Acked(entry.id)
        if entry.retimed:
            return Dead(entry.id, "cached", "the API answered from its cache twice, and so recorded nothing")
        later = max(self._wall_ms(), entry.report.time_ms + 1)
        return Again(entry.id, self._wall_ms(), 0, entry.attempts, later)

    def _unanswered(self, entry: Entry, error: RetryLater) -> Settlement:
        ambiguous = isinstance(error, NoAnswer)
        if ambiguous and not self._retry_ambiguous:
            return Lost(entry.id, "ambiguous")
        return Again(
            entry.id, self._wall_ms() + int(RETRY_AFTER * 1000), entry.tries + ambiguous, entry.attempts
        )

    def _refused(self, entry: Entry, error: DeliveryError) -> Settlement:
        code = error.code if isinstance(error, Refused) else type(error).__name__
        if isinstance(error, Unexplained) and entry.attempts < len(UNEXPLAINED_DELAYS):
            due = self._wall_ms() + int(UNEXPLAINED_DELAYS[entry.attempts] * 1000)
            return Again(entry.id, due, entry.tries, entry.attempts + 1)
        log.warning("a report was refused (%s); see 't23-middleware dead list'", error)
        return Dead(entry.id, code, str(error)[:LONGEST_KEPT])

    def _say_store_fails(self, error: OutboxError) -> None:
        if not self._store_fails:
            self._store_fails = True
            log.error(
                "the outbox can't be written (%s); nothing is sent until it can, and captures go on", error
            )
