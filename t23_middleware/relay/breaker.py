"""A circuit breaker for one API: it stops sending after failures, and allows one probe from time to time."""

from __future__ import annotations

import random
from collections.abc import Callable

from ..errors import NoAnswer, NotAccepted, RetryLater

#: Consecutive failures after which only probes are sent.
FAILURES_TO_OPEN = 5
#: Seconds to the first probe; each failed probe doubles the time, up to the longest.
FIRST_PROBE, LONGEST_PROBE = 1.0, 60.0
#: The longest while the answers are not understood: each probe may be recorded, and such a fault rarely ends by itself.
LONGEST_UNCLEAR_PROBE = 3600.0
#: Seconds between two probes while the API accepts nothing from this server, which needs a person to fix it.
PROBE_WHEN_PAUSED = 300.0
#: Longest ``Retry-After`` that is respected, in seconds.
LONGEST_RETRY_AFTER = 3600.0


class Breaker:
    """Decides how many reports may be sent to an API now: all, one probe, or none."""

    def __init__(self, host: str, jitter: Callable[[float, float], float] = random.uniform) -> None:
        self.host = host
        self._jitter = jitter
        self._failures = 0
        self._probes = 0
        self._closed_until = 0.0
        #: Id of the report that is in flight as a probe.
        self.probe: int | None = None
        #: Number of valid answers of the API.
        self.successes = 0
        #: Why the API accepts nothing from this server; ``None`` if it does.
        self.paused: str | None = None
        #: Message of the latest failure without an answer about the report.
        self.failure = ""

    @property
    def is_open(self) -> bool:
        """Whether only probes are sent."""
        return self.paused is not None or self._failures >= FAILURES_TO_OPEN

    def allows(self, now: float) -> int | None:
        """How many reports may be sent now: 0, 1, or ``None`` for any number. *now* is in monotonic seconds."""
        if now < self._closed_until:
            return 0
        if self.is_open:
            return 1 if self.probe is None else 0
        return None

    def claimed(self, id: int) -> None:
        """The report *id* is about to be sent."""
        if self.is_open:
            self.probe = id

    def worked(self) -> bool:
        """The API gave a valid answer. Returns whether the breaker was open before."""
        was_open = self.is_open
        self._failures, self._probes, self._closed_until, self.probe, self.paused = 0, 0, 0.0, None, None
        self.successes += 1
        return was_open

    def failed(self, id: int, now: float, error: RetryLater) -> bool:
        """The API did not answer *id*, or is busy. Returns whether the breaker opens because of that."""
        was_open, probed = self.is_open, self.returned(id)
        self._failures += 1
        self.failure = str(error)
        wait = min(error.retry_after or 0.0, LONGEST_RETRY_AFTER)
        if self.is_open and (probed or not was_open):
            # Only a probe makes the wait longer: reports that were in flight when the API failed add no information.
            unclear = isinstance(error, NoAnswer) and error.answered
            longest = self._next_wait(LONGEST_UNCLEAR_PROBE if unclear else LONGEST_PROBE)
            wait = max(wait, self._jitter(longest / 2, longest))
        self._closed_until = max(self._closed_until, now + wait)
        return self.is_open and not was_open

    def denied(self, id: int, now: float, error: NotAccepted, *, soon: bool = False) -> bool:
        """The API accepts nothing from this server, by its answer to *id*. Returns whether that is new.

        *soon*: another report may be accepted, so the first probes come as soon as after a failure.
        """
        probed, was_paused = self.returned(id), self.paused is not None
        if not soon:
            self._closed_until = now + PROBE_WHEN_PAUSED
        elif probed or not was_paused:
            self._closed_until = now + self._next_wait(PROBE_WHEN_PAUSED)
        self.paused = str(error)
        return not was_paused

    def _next_wait(self, longest: float) -> float:
        """Seconds to the next probe; doubled each time, up to *longest*."""
        wait: float = FIRST_PROBE * 2**self._probes
        if wait < longest:
            self._probes += 1
        return min(wait, longest)

    def returned(self, id: int) -> bool:
        """The report *id* is no longer in flight. Returns whether it was the probe."""
        probed = self.probe == id
        if probed:
            self.probe = None
        return probed
