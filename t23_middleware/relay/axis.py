"""The axis that times are compared on: CLOCK_MONOTONIC of one boot, in ns, which the wall clock ties to any other's."""

from __future__ import annotations

from typing import TypeAlias

from ..transfer import Acknowledged, Opening, Progress, Transfer

#: A boot, and how far its wall clock was ahead of CLOCK_MONOTONIC, in ns: where that boot's times lie on any other's.
BootClock: TypeAlias = tuple[str, int]
NO_CLOCK: BootClock = ("", 0)

#: What a response does, and that or what the kernel told of its connection.
ResponseEvent: TypeAlias = Opening | Progress | Transfer
Event: TypeAlias = ResponseEvent | Acknowledged


def time_of(what: Event) -> int:
    """When it happened, in ns on its own axis."""
    if isinstance(what, Opening):
        return what.started_ns
    return what.ended_ns if isinstance(what, Transfer) else what.at_ns


def rebased_by_wall_clock(what: Event, ahead_ns: int) -> Event:
    """*what* of another boot, on the axis of one whose wall clock is *ahead_ns* ahead."""
    if isinstance(what, Opening):
        return what._replace(started_ns=what.started_ms * 1_000_000 - ahead_ns)
    if isinstance(what, Acknowledged):
        return what._replace(at_ns=what.at_ms * 1_000_000 - ahead_ns)
    opening = what.opening._replace(started_ns=what.opening.started_ms * 1_000_000 - ahead_ns)
    if isinstance(what, Progress):
        return what._replace(opening=opening, at_ns=what.at_ms * 1_000_000 - ahead_ns)
    return what._replace(opening=opening, ended_ns=what.ended_ms * 1_000_000 - ahead_ns)


def without_connection(what: ResponseEvent) -> ResponseEvent:
    """*what* as it is where the kernel can't be asked: the server's count has to do."""
    if isinstance(what, Opening):
        return what._replace(connection=None)
    return what._replace(opening=what.opening._replace(connection=None), position=None)
