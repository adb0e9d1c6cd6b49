"""The health of each API, which the relay writes to the outbox for commands and pages: one note per host.

Pure. A note is written when the state, its reason or (once a second) the time of the last answer changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

#: The API answers; it does not answer or is busy; it accepts nothing from this server.
WELL, FAILING, PAUSED = "well", "failing", "paused"
#: Name of the note with the number of open counted responses.
OPEN_RESPONSES = "open_responses"
#: Names of the notes on plays that wait for their line in the proxy's log: their number, since when the oldest waits,
#: and the time of the latest line; times are ms since the epoch.
AWAITED, AWAITED_SINCE, LAST_LINE = "awaited", "awaited_since_ms", "proxy_line_ms"
#: Names of the notes on acknowledged bytes: number of draining responses, why the kernel can't be asked (empty if it
#: can), and number of live writers in another network namespace.
DRAINING, ACKED, ELSEWHERE = "draining", "kernel_problem", "writers_elsewhere"
#: Settings that are the reason: the server's count is used, or the proxy's log.
OFF, BY_PROXY = "T23_ACKED=0", "T23_PROXY_LOG"

_PREFIX = "api:"
#: A later answer is noted at most once in this many milliseconds.
_SOON_MS = 1000


class Health(NamedTuple):
    """The health of one API."""

    #: :data:`WELL`, :data:`FAILING` or :data:`PAUSED`.
    state: str
    #: Why it is not well, with a remedy if there is one.
    reason: str
    #: Since when, in ms since the epoch.
    since_ms: int
    #: When it last answered about a report, in ms since the epoch; 0 for never.
    answered_ms: int


def next_health(before: Health | None, state: str, reason: str, answered_ms: int, now_ms: int) -> Health:
    """The health after *before*; *before* itself if no relevant change happened."""
    if before is None or before.state != state:
        former_ms = before.answered_ms if before else 0
        return Health(state, "" if state == WELL else reason, now_ms, max(answered_ms, former_ms))
    if state == WELL:
        return (
            before
            if answered_ms - before.answered_ms < _SOON_MS
            else before._replace(answered_ms=answered_ms)
        )
    return before._replace(reason=reason)


def as_notes(health: Mapping[str, Health], before: Mapping[str, Health]) -> dict[str, str]:
    """The notes that change from *before* to *health*."""
    changed = {host: each for host, each in health.items() if each != before.get(host)}
    return {_PREFIX + host: json.dumps(each) for host, each in changed.items()}


def healths(notes: Mapping[str, str]) -> dict[str, Health]:
    """Host -> health of its API; notes that can't be read are skipped."""
    found = {}
    for name, text in notes.items():
        if name.startswith(_PREFIX) and (health := _read(text)):
            found[name.removeprefix(_PREFIX)] = health
    return found


def _read(text: str) -> Health | None:
    try:
        health = Health(*json.loads(text))
    except (ValueError, TypeError):
        return None
    kinds_fit = [type(value) for value in health] == [str, str, int, int]
    return health if kinds_fit and health.state in (WELL, FAILING, PAUSED) else None
