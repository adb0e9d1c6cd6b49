"""Times of events. Times are ns of CLOCK_MONOTONIC, which starts again at each boot.

Times of different boots are compared by the wall clock.
"""

from __future__ import annotations

from typing import TypeAlias

from ..transfer import Acknowledged, Opening, Progress, Transfer

#: A boot, and how far its wall clock was ahead of CLOCK_MONOTONIC, in ns.
BootClock: TypeAlias = tuple[str, int]
NO_CLOCK: BootClock = ("", 0)

#: An event of a response; and one of a response or of its connection in the kernel.
ResponseEvent: TypeAlias = Opening | Progress | Transfer
Event: TypeAlias = ResponseEvent | Acknowledged


def time_of(event: Event) -> int:
    """Its time, in ns of CLOCK_MONOTONIC of its own boot."""
    if isinstance(event, Opening):
        return event.started_ns
    return event.ended_ns if isinstance(event, Transfer) else event.at_ns


def rebased_by_wall_clock(event: Event, ahead_ns: int) -> Event:
    """*event* of another boot, with the times of a boot whose wall clock is *ahead_ns* ahead of CLOCK_MONOTONIC."""
    if isinstance(event, Opening):
        return event._replace(started_ns=event.started_ms * 1_000_000 - ahead_ns)
    if isinstance(event, Acknowledged):
        return event._replace(at_ns=event.at_ms * 1_000_000 - ahead_ns)
    opening = event.opening._replace(started_ns=event.opening.started_ms * 1_000_000 - ahead_ns)
    if isinstance(event, Progress):
        return event._replace(opening=opening, at_ns=event.at_ms * 1_000_000 - ahead_ns)
    return event._replace(opening=opening, ended_ns=event.ended_ms * 1_000_000 - ahead_ns)


def without_connection(event: ResponseEvent) -> ResponseEvent:
    """*event* without its connection, so that the server's count is used: the kernel can't be asked about it."""
    if isinstance(event, Opening):
        return event._replace(connection=None)
    return event._replace(opening=event.opening._replace(connection=None), position=None)
