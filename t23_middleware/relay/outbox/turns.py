"""Whose report is next: fair queueing, so that a flood of one client holds up nobody else's reports.

The outbox does not know clients; a report names a video and a session, and whoever floods has one of them in common:
many sessions on one video, or one session on many videos. So a report's turn is behind all that wait of the same video,
and behind all that wait of the same session, but not behind those of others. A flood of ever new videos and sessions
can't be told from an audience, and waits with it in the order of arrival.
"""

from __future__ import annotations

from ..report import Report

#: Videos and sessions are counted in so many places each, whatever their number: two that share one wait for each
#: other, which is rare and only costs time.
BUCKETS = 4096


class Turns:
    """Gives out turns; those up to *reached* have been claimed."""

    def __init__(self, reached: int) -> None:
        self.reached = reached
        self._videos = [0] * BUCKETS
        self._sessions = [0] * BUCKETS

    def next(self, report: Report) -> int:
        """The turn of *report*, which comes in now."""
        # Python's hash of a text is another one in each process, so nobody can choose whom to share a place with.
        video, session = hash((report.host, report.photo_id)) % BUCKETS, hash(report.session_id) % BUCKETS
        self._videos[video] = max(self.reached, self._videos[video]) + 1
        self._sessions[session] = max(self.reached, self._sessions[session]) + 1
        return max(self._videos[video], self._sessions[session])
