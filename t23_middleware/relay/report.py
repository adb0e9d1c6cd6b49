"""A report: what the API is told about one transfer, and the form in which the wire carries it."""

from __future__ import annotations

from typing import NamedTuple

#: The beginning of 2024, in ms: a clock that says less was not set yet when it was asked.
CLOCK_SET_MS = 1_704_067_200_000

#: The documentation heads the method's page with the first and names the second in its example.
REPORT_PATHS = ("/api/analytics/report/play", "/api/analytics/report/download")


class Report(NamedTuple):
    """What is told about one transfer, ready to be sent."""

    #: Wall clock in ms since the epoch; unique per session and photo, the same in every retry.
    time_ms: int
    #: Host that the report goes to; ``""`` where all reports go to one site.
    host: str
    session_id: str
    photo_id: str
    #: Body bytes that the next hop's kernel accepted.
    sent: int
    #: 0 for the transfer that starts a viewing, 1 for what belongs to one that has started.
    skip: int
    player_type: str | None = None
    player_version: str | None = None
    player_resolution: str | None = None


def form(report: Report) -> dict[str, str]:
    """The parameters of ``report/play``, as its documentation spells them; their names stand here alone.

    The page writes ``session_id`` in its prose and ``seesion_id`` in its table: both are sent. ``time`` keeps
    an answer from coming out of the API's cache, unless the report is one that the API has had before.
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
