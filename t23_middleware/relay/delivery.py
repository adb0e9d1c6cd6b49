"""Delivery: claims reports from the outbox, sends them, and writes the outcome of each back to the outbox.

Only the relay's main thread uses the outbox; sender threads only wait for the API.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from ..errors import Busy, DeliveryError, NoAnswer, NotAccepted, Refused, RetryLater, Unexplained
from .answer import Accepted
from .breaker import FAILURES_TO_OPEN, PROBE_WHEN_PAUSED, Breaker
from .crash import crash_point
from .elapsed import Elapsed
from .health import FAILING, PAUSED, WELL, Health, as_notes, healths, next_health
from .history import grown_troubles, troubles_note, troubles_of
from .outbox import Acked, Dead, Entry, Lost, Outbox, OutboxError, Retry, Settlement
from .quoted import clip
from .report import REPORT_PATHS, Report

__all__ = ["FAILURES_TO_OPEN", "PROBE_WHEN_PAUSED", "Breaker", "Delivery"]

log = logging.getLogger(__name__)

#: Most sender threads, started when they are needed. With answers in 20 ms, one thread sends 50 reports/s.
MOST_SENDERS = 16
#: Reports that are claimed per sender: one in flight and one queued.
CLAIMED_PER_SENDER = 2
#: Most claimed reports, for an API that answers faster than a step writes the outcomes.
MOST_CLAIMED = 256
#: Seconds before a failed report is retried while its breaker is closed. Doubled, up to the longest, each time that
#: other reports succeeded since and it failed again.
RETRY_AFTER, LONGEST_RETRY = 1.0, 300.0
#: The longest if its answer is not understood, since each try may be recorded.
LONGEST_UNCLEAR_RETRY = 3600.0
#: Prefix of the note that an API accepted a report; the host follows.
ACCEPTED = "accepted:"
#: Seconds between two tries at the end to write outcomes that could not be written.
SETTLE_RETRY = 0.1
#: Seconds before each retry of a report that the API refuses with an undocumented code: over an hour in all.
UNEXPLAINED_DELAYS = (60.0, 300.0, 900.0, 2700.0)
#: Seconds between two log lines for reports that the same API refused with the same code.
LOG_REFUSED_EVERY = 3600.0
#: Most codes that are remembered for that; an API that returns ever new codes is logged more often.
MOST_CODES = 100
#: Longest answer that is stored with a dead letter, in characters.
LONGEST_KEPT = 500


class _Result(NamedTuple):
    entry: Entry
    outcome: Accepted | DeliveryError


class Delivery:
    """Sends the reports in the outbox to the API.

    *send* posts one report; *monotonic* is a clock in seconds, *wall_ms* one in ms since the epoch. The due times of
    retries are times of *elapsed*, which starts now by default.
    """

    def __init__(
        self,
        outbox: Outbox,
        send: Callable[[Report], Accepted],
        *,
        retry_ambiguous: bool,
        monotonic: Callable[[], float],
        wall_ms: Callable[[], int],
        notes: Mapping[str, str] = {},
        elapsed: Elapsed | None = None,
    ) -> None:
        self._outbox = outbox
        self._send = send
        self._retry_ambiguous = retry_ambiguous
        self._monotonic = monotonic
        self._wall_ms = wall_ms
        self._elapsed_ms = (elapsed or Elapsed({}, "", monotonic)).now_ms
        self._tasks: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[_Result] = queue.SimpleQueue()
        self._result_ready = threading.Event()
        self._claim_limit = MOST_SENDERS * CLAIMED_PER_SENDER
        self._senders: list[threading.Thread] = []
        self._breakers: dict[str, Breaker] = {}
        self._unsettled: list[Settlement] = []
        #: Report id -> successes of its API when it failed last, and the seconds that it waited then.
        self._retry_delays: dict[int, tuple[int, float]] = {}
        self._health = healths(notes)
        self._troubles = troubles_of(notes)
        self._answered_ms: dict[str, int] = {}
        #: Hosts that accepted a report from this state folder; before that, a refusal may mean a wrong API path.
        self._noted_accepted = {name.removeprefix(ACCEPTED) for name in notes if name.startswith(ACCEPTED)}
        self._accepted = set(self._noted_accepted)
        #: Host -> id of its last probe: the next probe is another report, so that one bad report does not block others.
        self._probed: dict[str, int] = {}
        self._logged_unclear: set[str] = set()
        self._logged_no_thread = False
        #: (Host, code) -> when a refusal was logged last, and how many were not logged since.
        self._logged_refusals: dict[tuple[str, str], tuple[float, int]] = {}
        #: Message of the latest failure.
        self.last_failure = ""
        #: Whether the latest write to the outbox failed.
        self.store_fails = False
        #: Number of reports that are queued or being sent.
        self.in_flight = 0

    def step(self) -> bool:
        """Write the new outcomes and claim reports to send. Returns whether there were any.

        Both happen in one transaction, which costs one write to the disk. While outcomes can't be written, nothing more
        is claimed, or it would be sent twice.
        """
        self._collect_results()
        try:
            with self._outbox.atomic():
                self._write_settlements()
                entries = self._claim()
                health = self._note_health()
        except OutboxError as error:
            self._log_store_fails(error)
            return self.settle()  # outcomes alone may fit on a full disk
        moved = bool(self._unsettled or entries)
        if self._unsettled:
            crash_point("after_ack")
        if entries:
            crash_point("after_claim")
        self._unsettled, self._noted_accepted = [], set(self._accepted)
        self._troubles = grown_troubles(self._troubles, self._health, health)
        self._health = health
        self.store_fails = False
        self._queue_claimed(entries)
        return moved

    def wait(self, seconds: float) -> None:
        """Wait for an outcome, up to *seconds*."""
        # Not SimpleQueue.get(timeout): if the thread is suspended until the timeout has passed, CPython continues with
        # a negative timeout, which its locks treat as infinite, and no signal ends that.
        if self._result_ready.wait(seconds):
            self._result_ready.clear()

    def settle(self) -> bool:
        """Write the new outcomes. Returns whether any were written; on a failure they are kept for the next call."""
        self._collect_results()
        if not self._unsettled:
            return False
        try:
            with self._outbox.atomic():
                self._write_settlements()
        except OutboxError as error:
            self._log_store_fails(error)
            return False
        self._unsettled, self._noted_accepted = [], set(self._accepted)
        return True

    def can_deliver(self) -> bool:
        """Whether a report is in flight or could be sent: one waits for an API that is not paused."""
        if self.in_flight or self._unsettled:
            return True
        try:
            return any(self._breaker(host).paused is None for host in self._outbox.hosts())
        except OutboxError as error:
            self._log_store_fails(error)
            return True

    def breakers(self) -> Iterable[tuple[str, Breaker]]:
        """Host and breaker of each API that was used."""
        return self._breakers.items()

    def stop(self, seconds: float, *, send_claimed: bool = False) -> None:
        """Stop claiming, and wait up to *seconds* for the reports in flight.

        With *send_claimed*, also wait for the claimed reports that no sender has begun; else they are not sent.
        """
        deadline = self._monotonic() + seconds
        if not send_claimed:
            self._requeue(lambda entry: True)
        self.settle()
        while (self.in_flight or self._unsettled) and (left := deadline - self._monotonic()) > 0:
            self.wait(min(left, SETTLE_RETRY))
            self.settle()
        self._requeue(lambda entry: True)
        self.settle()
        for _ in self._senders:
            self._tasks.put(None)
        self._senders = []

    def _write_settlements(self) -> None:
        self._outbox.settle(self._unsettled, self._wall_ms())
        if new := self._accepted - self._noted_accepted:
            self._outbox.note({ACCEPTED + host: "1" for host in new})

    def _collect_results(self) -> None:
        while not self._results.empty():
            result = self._results.get()
            self.in_flight -= 1
            self._unsettled.append(self._judge(result)._replace(outcome=_outcome_name(result.outcome)))

    def _note_health(self) -> dict[str, Health]:
        """The health of the APIs. Changes are noted in the outbox, for commands and pages."""
        health, now_ms = dict(self._health), self._wall_ms()
        for host, breaker in self._breakers.items():
            self._put_health(health, host, breaker, now_ms)
        troubles = grown_troubles(self._troubles, self._health, health)
        self._outbox.note(as_notes(health, self._health) | troubles_note(troubles, self._troubles))
        return health

    def _put_health(self, health: dict[str, Health], host: str, breaker: Breaker, now_ms: int) -> None:
        reason = breaker.paused if breaker.paused is not None else breaker.failure
        state = PAUSED if breaker.paused is not None else FAILING if breaker.is_open else WELL
        answered_ms = self._answered_ms.get(host, 0)
        if state != WELL or answered_ms:  # else nothing is known yet, except by a former relay
            health[host] = next_health(health.get(host), state, reason, answered_ms, now_ms)

    def _requeue(self, wanted: Callable[[Entry], bool]) -> None:
        """Return the *wanted* reports that no sender has begun to the outbox, without counting a try."""
        kept = []
        while not self._tasks.empty():
            try:
                entry = self._tasks.get_nowait()
            except queue.Empty:
                break  # a sender was faster
            if entry is None or not wanted(entry):
                kept.append(entry)
                continue
            self.in_flight -= 1
            self._breaker(entry.report.host).returned(entry.id)
            self._unsettled.append(
                Retry(entry.id, self._elapsed_ms(), entry.ambiguous_sends, entry.unexplained_answers)
            )
        for entry in kept:
            self._tasks.put(entry)

    def _queue_claimed(self, entries: list[Entry]) -> None:
        for entry in entries:
            self._breaker(entry.report.host).claimed(entry.id)
            self._tasks.put(entry)
        self.in_flight += len(entries)
        self._senders = [sender for sender in self._senders if sender.is_alive()]
        while len(self._senders) < min(self.in_flight, MOST_SENDERS) and self._start_sender():
            pass
        if entries and not self._senders:
            self._send_without_thread()

    def _claim(self) -> list[Entry]:
        self._set_claim_limit()
        room = self._claim_limit - self.in_flight
        return self._claim_allowed(room) if room > 0 else []

    def _set_claim_limit(self) -> None:
        """Claim up to twice the reports that were accepted during the last step, so that senders never wait for a step.

        The limit shrinks as quickly: an API that fails accepted nothing. Claimed reports may have been sent when the
        relay is killed. If such reports are then dropped, not retried, the limit stays at its minimum.
        """
        least = MOST_SENDERS * CLAIMED_PER_SENDER
        taken = sum(isinstance(item, Acked) for item in self._unsettled)
        wanted = max(2 * taken, self._claim_limit * 3 // 4, least)
        self._claim_limit = min(wanted, MOST_CLAIMED) if self._retry_ambiguous else least

    def _claim_allowed(self, room: int) -> list[Entry]:
        now = self._monotonic()
        free, probes = [], []
        for host in self._outbox.hosts():
            allowed = self._breaker(host).allows(now)
            if allowed is None:
                free.append(host)
            elif allowed:
                probes.append(host)
        entries = []
        for host in probes:  # first, since without threads only one report is sent at once
            probe = self._outbox.claim_after(self._probed.get(host, 0), host, self._elapsed_ms())
            self._probed.update((host, entry.id) for entry in probe)
            entries += probe
        return entries + (self._outbox.claim(room, self._elapsed_ms(), free) if free else [])

    def _breaker(self, host: str) -> Breaker:
        return self._breakers.setdefault(host, Breaker(host))

    def _start_sender(self) -> bool:
        """Start one more sender thread. Returns whether it started; if not, the next step tries again."""
        # A daemon, since a thread that hangs in a system call must not delay the exit.
        sender = threading.Thread(
            target=self._send_forever, daemon=True, name=f"t23-sender-{len(self._senders)}"
        )
        try:
            sender.start()
        except (RuntimeError, MemoryError) as error:
            self._log_no_thread(error)
            return False
        self._senders.append(sender)
        return True

    def _send_without_thread(self) -> None:
        """Send one report without a thread, so that the loop makes progress, and return the others to the outbox."""
        self._send_one(self._tasks.get())
        self._requeue(lambda entry: True)

    def _send_forever(self) -> None:
        while (entry := self._tasks.get()) is not None:
            self._send_one(entry)

    def _send_one(self, entry: Entry | None) -> None:
        if entry is None:
            return
        outcome: Accepted | DeliveryError = NoAnswer("an error in t23_middleware")
        try:
            outcome = self._send(entry.report)
            crash_point("after_send")
        except DeliveryError as error:
            outcome = error
        except Exception as error:
            log.exception(
                "sending a report failed because of an error in t23_middleware; it is retried",
                extra={"t23_event": "sending_failed", "t23_reason": type(error).__name__},
            )
            outcome = NoAnswer(type(error).__name__)
        finally:  # also if memory runs out while the error is logged, or the report would stay in flight for ever
            self._results.put(_Result(entry, outcome))
            self._result_ready.set()

    # The outcome of a report.

    def _judge(self, result: _Result) -> Settlement:
        entry, outcome = result
        breaker = self._breaker(entry.report.host)
        if isinstance(outcome, DeliveryError):
            self.last_failure = str(outcome)
        if isinstance(outcome, RetryLater):
            if breaker.failed(entry.id, self._monotonic(), outcome):
                text = "the API accepts no reports%s (%s); they wait in the outbox until it does"
                log.error(
                    text,
                    _for(breaker.host),
                    outcome,
                    extra=_log_fields("api_down", breaker.host, outcome),
                )
            self._requeue_if_open(breaker)
            return self._unanswered(entry, outcome, self._retry_delay(entry, breaker, outcome))
        self._retry_delays.pop(entry.id, None)
        if isinstance(outcome, NotAccepted):
            return self._denied(entry, breaker, outcome)
        if isinstance(outcome, Refused) and breaker.host not in self._accepted:
            return self._denied(entry, breaker, NotAccepted(_unproven(outcome)), soon=True)
        if breaker.worked():
            text = "reports are delivered again%s"
            log.warning(text, _for(breaker.host), extra=_log_fields("api_back", breaker.host))
        self._answered_ms[breaker.host] = self._wall_ms()
        if isinstance(outcome, Accepted):
            self._accepted.add(breaker.host)
            return self._answered(entry, outcome)
        return self._refused(entry, outcome)

    def _denied(self, entry: Entry, breaker: Breaker, why: NotAccepted, *, soon: bool = False) -> Settlement:
        if breaker.denied(entry.id, self._monotonic(), why, soon=soon):
            text = "delivery pauses%s: %s. Reports wait in the outbox; one is tried every 5 minutes%s"
            often = ", at first more often" if soon else ""
            log.error(
                text,
                _for(breaker.host),
                why,
                often,
                extra=_log_fields("api_paused", breaker.host, why),
            )
        self._requeue_if_open(breaker)
        return Retry(entry.id, self._elapsed_ms(), entry.ambiguous_sends, entry.unexplained_answers)

    def _requeue_if_open(self, breaker: Breaker) -> None:
        """While the breaker is open, return its API's queued reports to the outbox, except the probe."""
        if breaker.is_open:
            self._requeue(lambda entry: entry.report.host == breaker.host and entry.id != breaker.probe)

    def _retry_delay(self, entry: Entry, breaker: Breaker, error: RetryLater) -> float:
        """Seconds before *entry* is retried. A report that fails alone must not be retried each second for days."""
        successes, seconds = self._retry_delays.get(entry.id, (breaker.successes, RETRY_AFTER))
        unclear = isinstance(error, NoAnswer) and error.answered
        if breaker.successes > successes:
            seconds = min(seconds * 2, LONGEST_UNCLEAR_RETRY if unclear else LONGEST_RETRY)
            if unclear:
                self._log_unclear(entry.report, error)
        self._retry_delays[entry.id] = breaker.successes, seconds
        return seconds

    def _answered(self, entry: Entry, answer: Accepted) -> Settlement:
        """The outcome of an accepted report.

        ``cached`` on the first try means that the API answered from its cache and recorded nothing. On a retry it means
        that an earlier try was recorded.
        """
        if not answer.cached or entry.ambiguous_sends:
            return Acked(entry.id, max(self._wall_ms() - entry.report.time_ms, 0))
        if entry.retimed:
            return Dead(entry.id, "cached", "the API answered from its cache twice, so it recorded nothing")
        later = max(self._wall_ms(), entry.report.time_ms + 1)
        return Retry(entry.id, self._elapsed_ms(), 0, entry.unexplained_answers, later)

    def _unanswered(self, entry: Entry, error: RetryLater, seconds: float) -> Settlement:
        ambiguous = isinstance(error, NoAnswer)
        if ambiguous and not self._retry_ambiguous:
            self._retry_delays.pop(entry.id, None)
            return Lost(entry.id, "ambiguous")
        due_ms = self._elapsed_ms() + int(seconds * 1000)
        return Retry(entry.id, due_ms, entry.ambiguous_sends + ambiguous, entry.unexplained_answers)

    def _refused(self, entry: Entry, error: DeliveryError) -> Settlement:
        code = error.code if isinstance(error, Refused) else type(error).__name__
        if isinstance(error, Unexplained) and entry.unexplained_answers < len(UNEXPLAINED_DELAYS):
            due = self._elapsed_ms() + int(UNEXPLAINED_DELAYS[entry.unexplained_answers] * 1000)
            return Retry(entry.id, due, entry.ambiguous_sends, entry.unexplained_answers + 1)
        self._log_refused(entry.report, code, error)
        return Dead(entry.id, code, str(error)[:LONGEST_KEPT])

    def _log_refused(self, report: Report, code: str, error: DeliveryError) -> None:
        """Once an hour for each code: a site whose videos are all unknown would fill the log with equal lines."""
        key, now = (report.host, code), self._monotonic()
        logged_at, number = self._logged_refusals.get(key, (float("-inf"), 0))
        if now < logged_at + LOG_REFUSED_EVERY:
            self._logged_refusals[key] = logged_at, number + 1
            return
        if len(self._logged_refusals) >= MOST_CODES:
            self._logged_refusals.clear()
        self._logged_refusals[key] = now, 0
        log.warning(
            "a report of video %s was refused%s (%s); more of this kind are logged once an hour,"
            " see 't23-middleware dead list'",
            report.photo_id,
            f" for {report.host}" if report.host else "",
            error,
            extra={
                "t23_event": "report_refused",
                "t23_host": report.host,
                "t23_photo_id": report.photo_id,
                "t23_code": code,
                "t23_reason": str(error),
                "t23_count": number + 1,
            },
        )

    def _log_no_thread(self, error: Exception) -> None:
        """Once, until a thread can be started again."""
        if not self._logged_no_thread:
            self._logged_no_thread = True
            log.error(
                "only %d threads for sending can be started (%s); reports are delivered more slowly. Raise the limit on"
                " tasks or memory (RLIMIT_NPROC, TasksMax=, the pod's pids limit)",
                len(self._senders),
                error,
                extra={"t23_event": "no_thread", "t23_reason": str(error), "t23_count": len(self._senders)},
            )

    def _log_unclear(self, report: Report, error: RetryLater) -> None:
        """Once for each API. If none of its answers is understood, the breaker's line is logged instead."""
        if report.host in self._logged_unclear:
            return
        self._logged_unclear.add(report.host)
        log.warning(
            "a report of video %s gets an answer that is not understood, while others are accepted%s (%s);"
            " it is retried less and less often, in the end once an hour",
            report.photo_id,
            _for(report.host),
            error,
            extra={
                "t23_event": "answer_not_understood",
                "t23_host": report.host,
                "t23_photo_id": report.photo_id,
                "t23_reason": str(error),
            },
        )

    def _log_store_fails(self, error: OutboxError) -> None:
        if not self.store_fails:
            self.store_fails = True
            log.error(
                "%s; sending pauses until the outbox is writable again, and capturing continues. Check the disk",
                error,
                extra={"t23_event": "outbox_unwritable", "t23_reason": str(error)},
            )


def _for(host: str) -> str:
    return f" for {host}" if host else ""


def _log_fields(event: str, host: str, error: DeliveryError | None = None) -> dict[str, str]:
    """Extra fields of a log line, for formatters that write them."""
    return {"t23_event": event, "t23_host": host, "t23_reason": "" if error is None else str(error)}


def _unproven(error: DeliveryError) -> str:
    """The message for a refusal by an API that accepted no report yet, with its remedy."""
    return (
        f"{clip(str(error)).rstrip('.')}; the API accepted no report from this state folder yet, so T23_REPORT_PATH may"
        f" be wrong. 't23-middleware check --send --photo ID --session ID' tries {' and '.join(REPORT_PATHS)}"
    )


def _outcome_name(outcome: Accepted | DeliveryError) -> str:
    """The name of *outcome*, one of :data:`~t23_middleware.relay.history.ANSWERS`."""
    match outcome:
        case Accepted():
            return "accepted"
        case NotAccepted():
            return "denied"
        case Busy():
            return "busy"
        case NoAnswer():
            return "no_answer"
        case RetryLater():
            return "unreachable"
        case _:
            return "refused"
