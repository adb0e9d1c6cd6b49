"""Whether an API may be asked now: when it is left alone, and when one report is tried."""

from __future__ import annotations

import random
from collections.abc import Callable

from ..errors import NoAnswer, NotAccepted, RetryLater

#: Failures in a row after which an API is left alone but for a probe.
FAILURES_TO_OPEN = 5
#: Seconds to the first probe; each one that fails doubles it, up to the longest.
FIRST_PROBE, LONGEST_PROBE = 1.0, 60.0
#: The same while something answers that is not understood: it may record each report, and seldom passes by itself.
LONGEST_UNCLEAR_PROBE = 3600.0
#: Seconds between two probes while the API takes nothing from this server; somebody has to mend that by hand.
PROBE_WHEN_PAUSED = 300.0
#: Longest that ``Retry-After`` is obeyed, in seconds.
LONGEST_RETRY_AFTER = 3600.0


class Breaker:
    """Whether an API may be asked now: all reports, one probe, or none."""

    def __init__(self, host: str, jitter: Callable[[float, float], float] = random.uniform) -> None:
        self.host = host
        self._jitter = jitter
        self._failures = 0
        self._probes = 0
        self._closed_until = 0.0
        #: Id of the report that is under way as a probe.
        self.probe: int | None = None
        #: How often the API answered as it should.
        self.successes = 0
        #: Why the API takes nothing from this server, where that is so.
        self.paused: str | None = None
        #: How the last report failed that the API did not judge.
        self.failure = ""

    @property
    def is_open(self) -> bool:
        """Whether the API is left alone but for probes."""
        return self.paused is not None or self._failures >= FAILURES_TO_OPEN

    def allows(self, now: float) -> int | None:
        """How many reports may go now: ``None`` for any number."""
        if now < self._closed_until:
            return 0
        if self.is_open:
            return 1 if self.probe is None else 0
        return None

    def claimed(self, id: int) -> None:
        """The report *id* is on its way."""
        if self.is_open:
            self.probe = id

    def worked(self) -> bool:
        """The API answered as it should; whether that is new."""
        was_open = self.is_open
        self._failures, self._probes, self._closed_until, self.probe, self.paused = 0, 0, 0.0, None, None
        self.successes += 1
        return was_open

    def failed(self, id: int, now: float, error: RetryLater) -> bool:
        """The API did not answer *id*, or said "not now"; whether it is left alone from now on."""
        was_open, probed = self.is_open, self._returned(id)
        self._failures += 1
        self.failure = str(error)
        wait = min(error.retry_after or 0.0, LONGEST_RETRY_AFTER)
        if self.is_open and (probed or not was_open):
            # Only a probe lengthens the wait: what was under way when the API failed tells nothing new.
            strange = isinstance(error, NoAnswer) and error.answered
            longest = self._next_wait(LONGEST_UNCLEAR_PROBE if strange else LONGEST_PROBE)
            wait = max(wait, self._jitter(longest / 2, longest))
        self._closed_until = max(self._closed_until, now + wait)
        return self.is_open and not was_open

    def denied(self, id: int, now: float, error: NotAccepted, *, soon: bool = False) -> bool:
        """The API takes nothing from this server, as it told *id*; whether that is new.

        *soon*: another report may be taken, so the first probes come as after a failure.
        """
        probed, was_paused = self._returned(id), self.paused is not None
        if not soon:
            self._closed_until = now + PROBE_WHEN_PAUSED
        elif probed or not was_paused:
            self._closed_until = now + self._next_wait(PROBE_WHEN_PAUSED)
        self.paused = str(error)
        return not was_paused

    def _next_wait(self, longest: float) -> float:
        """Seconds to the next probe, twice as many each time."""
        wait: float = FIRST_PROBE * 2**self._probes
        if wait < longest:
            self._probes += 1
        return min(wait, longest)

    def _returned(self, id: int) -> bool:
        """Whether *id* was the probe, which is back then."""
        probed = self.probe == id
        if probed:
            self.probe = None
        return probed
