"""What happened when: figures per minute of two days, and what was video_figures per hour.

Pure. The outbox adds to the figures in the transactions that they tell of, so that they agree with its counters,
and reads them for the operator's pages.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .health import WELL, Health
from .report import Report

MINUTE_MS = 60_000
#: What is shown: minutes of a step, and how many steps.
HOUR, DAY = (1, 60), (15, 96)
HOUR_MS = 60 * MINUTE_MS
#: Minutes that are kept: a day to look at, and the one before for a rule that compares.
KEPT_MINUTES = 2 * 24 * 60
#: Videos that are kept of an hour: those with the most bytes and those with the most plays, so many of each.
MOST_VIDEOS = 500
#: Refusals that are looked at, the newest first.
MOST_REFUSED = 200
#: Changes of an API's state that are kept.
MOST_TROUBLES = 30

# Names of figures. Those of one minute add up, but for the gauges, of which the highest counts.
CAPTURED, SENT, DEAD, BYTES, PLAYS = "captured", "sent", "dead", "bytes", "plays"
OPEN, WAITING, OLDEST = "open", "waiting", "oldest_seconds"
GAUGES = (OPEN, WAITING, OLDEST)
#: Before a reason, an answer, and a number of seconds.
LOST, ANSWER, TOOK = "lost:", "answer:", "took:"
#: Sum of what delivery took, in ms.
TOOK_MS = "took_ms"

#: What became of a try: the API took the report, would not take this one, takes none from this server, said "not
#: now"; its answer did not come; the report was not sent.
ANSWERS = ("accepted", "refused", "denied", "busy", "no_answer", "unreachable")
#: Upper bounds of the time from a report's making to its acceptance, in seconds; a last one has no bound.
BOUNDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800, 3600, 21600, 86400)
UNBOUNDED = f"{TOOK}inf"
#: Name of the note that holds the latest troubles.
TROUBLES = "troubles"


class VideoFigures(NamedTuple):
    """What was video_figures of a video."""

    host: str
    photo_id: str
    plays: int
    #: Bytes that were handed over.
    bytes: int


class Trouble(NamedTuple):
    """An API's state changed."""

    at_ms: int
    #: ``""`` where there is one site.
    host: str
    #: As in :class:`~t23_middleware.relay.health.Health`.
    state: str
    reason: str


class Refusal(NamedTuple):
    """A report was refused for good; nothing of its viewer."""

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
    #: Name -> a value per step; of a gauge, ``None`` where no relay ran.
    values: Mapping[str, Sequence[int | None]]

    def __len__(self) -> int:
        return max(map(len, self.values.values()), default=0)

    def of(self, name: str) -> list[int | None]:
        """The values of *name*, whether it happened or not."""
        found = self.values.get(name)
        return list(found) if found is not None else [None if name in GAUGES else 0] * len(self)

    def total(self, name: str) -> int:
        """Their sum."""
        return sum(value or 0 for value in self.of(name))


class History(NamedTuple):
    """What the operator's pages tell beside the figures of now."""

    hour: Series
    day: Series
    #: Name -> sum since the outbox was made.
    totals: Mapping[str, int]
    #: The videos of the last day with the most bytes, and with the most plays.
    by_bytes: Sequence[VideoFigures]
    by_plays: Sequence[VideoFigures]
    #: The latest refusals, the newest first.
    refused: Sequence[Refusal]


# What is added.


def of_reports(reports: Iterable[Report]) -> Counter[tuple[int, str]]:
    """(Minute, name) -> what to add for new reports; they count in the minute that they tell of."""
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
    """Name -> what to add for tries: what was answered, and the ms that an accepted report took."""
    happened: Counter[str] = Counter()
    for answer, took_ms in tries:
        if answer:
            happened[ANSWER + answer] += 1
        if took_ms is not None:
            happened[bucket(took_ms)] += 1
            happened[TOOK_MS] += max(took_ms, 0)
    return happened


def bucket(took_ms: int) -> str:
    """Name of the figure that counts reports that took so long."""
    bound = next((bound for bound in BOUNDS if took_ms <= bound * 1000), None)
    return UNBOUNDED if bound is None else f"{TOOK}{bound:g}"


# What is told.


def first_minute(now_ms: int, step: int, count: int) -> int:
    """The minute at which *count* steps begin that end with the one under way."""
    return (now_ms // MINUTE_MS // step - count + 1) * step


def nothing(now_ms: int) -> History:
    """The history where none was kept yet."""
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
    """Seconds within which *share* of the reports were delivered, by straight lines between the bounds."""
    in_buckets = [counts.get(f"{TOOK}{bound:g}", 0) for bound in BOUNDS]
    wanted = share * (sum(in_buckets) + counts.get(UNBOUNDED, 0))
    if not wanted:
        return None
    below, lower = 0, 0.0
    for bound, number in zip(BOUNDS, in_buckets, strict=True):
        if number and below + number >= wanted:
            return lower + (bound - lower) * (wanted - below) / number
        below, lower = below + number, float(bound)
    return lower  # longer than that is all that is known


def quantiles(series: Series, share: float) -> list[float | None]:
    """:func:`quantile` for each step."""
    took = {name: series.of(name) for name in series.values if name.startswith(TOOK)}
    steps = ({name: values[at] or 0 for name, values in took.items()} for at in range(len(series)))
    return [quantile(counts, share) for counts in steps]


def grown_troubles(
    former: Sequence[Trouble], before: Mapping[str, Health], now: Mapping[str, Health]
) -> list[Trouble]:
    """*former* and the changes from *before* to *now*; that a new API is well is none."""
    changes = [
        Trouble(health.since_ms, host, health.state, health.reason)
        for host, health in now.items()
        if health.state != (before[host].state if host in before else WELL)
    ]
    return [*former, *changes][-MOST_TROUBLES:]


def troubles_note(troubles: Sequence[Trouble], former: Sequence[Trouble]) -> dict[str, str]:
    """The note that tells *troubles*; nothing where they are still the *former* ones."""
    return {} if list(troubles) == list(former) else {TROUBLES: json.dumps(troubles)}


def troubles_of(notes: Mapping[str, str]) -> list[Trouble]:
    """The troubles that were noted, the oldest first; what can't be read is left out."""
    try:
        rows = json.loads(notes.get(TROUBLES, "[]"))
        found = [Trouble(*row) for row in rows]
    except (ValueError, TypeError):
        return []
    return [each for each in found if [type(value) for value in each] == [int, str, str, str]]
