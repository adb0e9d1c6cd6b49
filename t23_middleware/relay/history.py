"""The history for the operator's pages: figures per minute for two days, and plays and bytes per video and hour.

Pure. The outbox adds to the figures in the same transaction as the events, so that they agree with its counters.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .health import WELL, Health
from .report import Report

MINUTE_MS = 60_000
#: The shown periods: minutes of a step, and number of steps.
HOUR, DAY = (1, 60), (15, 96)
HOUR_MS = 60 * MINUTE_MS
#: Minutes that are kept: the shown day, and the day before for an alert rule that compares.
KEPT_MINUTES = 2 * 24 * 60
#: Videos that are kept per hour: this many with the most bytes, and this many with the most plays.
MOST_VIDEOS = 500
#: Latest refusals that are read.
MOST_REFUSED = 200
#: Changes of an API's state that are kept.
MOST_TROUBLES = 30

# Names of figures. Values of one minute are added; of the gauges the highest is kept.
CAPTURED, SENT, DEAD, BYTES, PLAYS = "captured", "sent", "dead", "bytes", "plays"
OPEN, WAITING, OLDEST = "open", "waiting", "oldest_seconds"
GAUGES = (OPEN, WAITING, OLDEST)
#: Prefixes of names that end with a reason, an answer, or a number of seconds.
LOST, ANSWER, TOOK = "lost:", "answer:", "took:"
#: Sum of the delivery times, in ms.
TOOK_MS = "took_ms"

#: Outcomes of a try: the API accepted the report, refused it, accepts none from this server, is busy; no answer came;
#: the report was not sent.
ANSWERS = ("accepted", "refused", "denied", "busy", "no_answer", "unreachable")
#: Upper bounds of the time from a report's making to its acceptance, in seconds; a last one has no bound.
BOUNDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800, 3600, 21600, 86400)
UNBOUNDED = f"{TOOK}inf"
#: Name of the note with the latest troubles.
TROUBLES = "troubles"


class VideoFigures(NamedTuple):
    """Plays and bytes of one video."""

    host: str
    photo_id: str
    plays: int
    #: Reported bytes.
    bytes: int


class Trouble(NamedTuple):
    """An API's state changed."""

    at_ms: int
    #: ``""`` if all reports go to one site.
    host: str
    #: As in :class:`~t23_middleware.relay.health.Health`.
    state: str
    reason: str


class Refusal(NamedTuple):
    """A report was refused for good; without its session."""

    at_ms: int
    host: str
    photo_id: str
    code: str
    answer: str


class Series(NamedTuple):
    """Figures over time, in steps of the same length."""

    #: Minutes since the epoch at which the first step begins.
    first: int
    #: Minutes of a step.
    step: int
    #: Name -> a value per step; for a gauge, ``None`` for a step in which no relay ran.
    values: Mapping[str, Sequence[int | None]]

    def __len__(self) -> int:
        return max(map(len, self.values.values()), default=0)

    def of(self, name: str) -> list[int | None]:
        """The values of *name*; zeros (for a gauge ``None``) if there are none."""
        found = self.values.get(name)
        return list(found) if found is not None else [None if name in GAUGES else 0] * len(self)

    def total(self, name: str) -> int:
        """Their sum."""
        return sum(value or 0 for value in self.of(name))


class History(NamedTuple):
    """What the operator's pages show besides the current figures."""

    hour: Series
    day: Series
    #: Name -> sum since the outbox was made.
    totals: Mapping[str, int]
    #: The videos of the last day with the most bytes, and with the most plays.
    by_bytes: Sequence[VideoFigures]
    by_plays: Sequence[VideoFigures]
    #: The latest refusals, the newest first.
    refused: Sequence[Refusal]


# Written by the outbox.


def of_reports(reports: Iterable[Report]) -> Counter[tuple[int, str]]:
    """(Minute, name) -> what to add for new reports, by the minute of each report's time."""
    happened: Counter[tuple[int, str]] = Counter()
    for report in reports:
        minute = report.time_ms // MINUTE_MS
        happened[minute, CAPTURED] += 1
        happened[minute, BYTES] += report.sent
        happened[minute, PLAYS] += report.skip == 0
    return happened


def video_figures(reports: Iterable[Report]) -> list[tuple[int, VideoFigures]]:
    """(Hour, what to add to the video's figures) for new reports."""
    plays: Counter[tuple[int, str, str]] = Counter()
    sent: Counter[tuple[int, str, str]] = Counter()
    for report in reports:
        key = report.time_ms // HOUR_MS, report.host, report.photo_id
        plays[key] += report.skip == 0
        sent[key] += report.sent
    return [(key[0], VideoFigures(*key[1:], plays[key], sent[key])) for key in sent]


def of_tries(tries: Iterable[tuple[str, int | None]]) -> Counter[str]:
    """Name -> what to add for *tries*: pairs of an outcome and the ms that an accepted report took."""
    happened: Counter[str] = Counter()
    for answer, took_ms in tries:
        if answer:
            happened[ANSWER + answer] += 1
        if took_ms is not None:
            happened[bucket(took_ms)] += 1
            happened[TOOK_MS] += max(took_ms, 0)
    return happened


def bucket(took_ms: int) -> str:
    """Name of the figure for reports that took *took_ms*."""
    bound = next((bound for bound in BOUNDS if took_ms <= bound * 1000), None)
    return UNBOUNDED if bound is None else f"{TOOK}{bound:g}"


# Read for the pages.


def first_minute(now_ms: int, step: int, count: int) -> int:
    """First minute of *count* steps, the last of which is the current one."""
    return (now_ms // MINUTE_MS // step - count + 1) * step


def nothing(now_ms: int) -> History:
    """An empty history."""
    hour, day = (in_steps([], first_minute(now_ms, *span), *span) for span in (HOUR, DAY))
    return History(hour, day, {}, [], [], [])


def in_steps(rows: Iterable[tuple[int, str, int]], first: int, step: int, count: int) -> Series:
    """The series of *count* steps from minute *first*, of (number of step since the epoch, name, value)."""
    values: dict[str, list[int | None]] = {name: [None] * count for name in GAUGES}
    for number, name, value in rows:
        at = number - first // step
        if 0 <= at < count:
            values.setdefault(name, [0] * count)[at] = value
    return Series(first, step, values)


def quantile(counts: Mapping[str, int], share: float) -> float | None:
    """Seconds within which *share* of the reports were delivered, interpolated linearly between the bounds."""
    in_buckets = [counts.get(f"{TOOK}{bound:g}", 0) for bound in BOUNDS]
    wanted = share * (sum(in_buckets) + counts.get(UNBOUNDED, 0))
    if not wanted:
        return None
    below, lower = 0, 0.0
    for bound, number in zip(BOUNDS, in_buckets, strict=True):
        if number and below + number >= wanted:
            return lower + (bound - lower) * (wanted - below) / number
        below, lower = below + number, float(bound)
    return lower  # the last bucket has no upper bound


def quantiles(series: Series, share: float) -> list[float | None]:
    """:func:`quantile` for each step."""
    took = {name: series.of(name) for name in series.values if name.startswith(TOOK)}
    steps = ({name: values[at] or 0 for name, values in took.items()} for at in range(len(series)))
    return [quantile(counts, share) for counts in steps]


def grown_troubles(
    former: Sequence[Trouble], before: Mapping[str, Health], now: Mapping[str, Health]
) -> list[Trouble]:
    """*former* and the changes from *before* to *now*; a new API that is well is not a change."""
    changes = [
        Trouble(health.since_ms, host, health.state, health.reason)
        for host, health in now.items()
        if health.state != (before[host].state if host in before else WELL)
    ]
    return [*former, *changes][-MOST_TROUBLES:]


def troubles_note(troubles: Sequence[Trouble], former: Sequence[Trouble]) -> dict[str, str]:
    """The note with *troubles*; empty if they equal the *former* ones."""
    return {} if list(troubles) == list(former) else {TROUBLES: json.dumps(troubles)}


def troubles_of(notes: Mapping[str, str]) -> list[Trouble]:
    """The noted troubles, the oldest first; entries that can't be read are skipped."""
    try:
        rows = json.loads(notes.get(TROUBLES, "[]"))
        found = [Trouble(*row) for row in rows]
    except (ValueError, TypeError):
        return []
    return [each for each in found if [type(value) for value in each] == [int, str, str, str]]
