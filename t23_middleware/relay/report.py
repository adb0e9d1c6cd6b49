"""A report: what is sent to the API about one transfer, and its form fields."""

from __future__ import annotations

from typing import NamedTuple

#: The beginning of 2024, in ms since the epoch. A time before it comes from a clock that was not set yet.
CLOCK_SET_MS = 1_704_067_200_000

#: TwentyThree's documentation has the first as the heading of the method's page, and the second in its example.
REPORT_PATHS = ("/api/analytics/report/play", "/api/analytics/report/download")


class Report(NamedTuple):
    """One report, ready to be sent."""

    #: Time in ms since the epoch; unique per session and photo, the same in every retry.
    time_ms: int
    #: Host that the report goes to; ``""`` where all reports go to one site.
    host: str
    session_id: str
    photo_id: str
    #: Body bytes that the next hop's kernel accepted.
    sent: int
    #: 0 for the report that starts a viewing, 1 for later ones of the same viewing.
    skip: int
    player_type: str | None = None
    player_version: str | None = None
    player_resolution: str | None = None


def form(report: Report) -> dict[str, str]:
    """The parameters of ``report/play``, as its documentation spells them. Only this function has their names.

    The documentation has ``session_id`` in its text and ``seesion_id`` in its table, so both are sent. ``time`` makes
    each request unique, so that the API answers from its cache only if it received the same report before.
    """
    player = {
        "user_player_type": report.player_type,
        "user_player_version": report.player_version,
        "user_player_resolution": report.player_resolution,
    }
    return {
        "photo_id": report.photo_id,
        "session_id": report.session_id,
        "seesion_id": report.session_id,
        "bytes_total": str(report.sent),
        "skip": str(report.skip),
        **{name: value for name, value in player.items() if value},
        "format": "json",
        "raw": "1",
        "time": str(report.time_ms),
    }
