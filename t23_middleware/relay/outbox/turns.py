"""Fair queueing: decides which report is next, so that a flood of one client does not delay other reports.

The outbox does not know clients, but a flood shares a video (many sessions on one video) or a session (one session on
many videos). So a report's turn comes after all waiting reports of the same video and of the same session, but not
after those of others. A flood of ever new videos and sessions looks like an audience: it waits in order of arrival.
"""

from __future__ import annotations

from ..report import Report

#: Number of hash buckets for videos, and for sessions. Two in the same bucket wait for each other, which is rare and
#: only costs time.
BUCKETS = 4096


class Turns:
    """Assigns turns; the turns up to *reached* have been claimed."""

    def __init__(self, reached: int) -> None:
        self.reached = reached
        self._videos = [0] * BUCKETS
        self._sessions = [0] * BUCKETS

    def next(self, report: Report) -> int:
        """The turn of *report*, which is stored now."""
        # Python's hash of a text differs between processes, so a client can't choose its bucket.
        video, session = hash((report.host, report.photo_id)) % BUCKETS, hash(report.session_id) % BUCKETS
        self._videos[video] = max(self.reached, self._videos[video]) + 1
        self._sessions[session] = max(self.reached, self._sessions[session]) + 1
        return max(self._videos[video], self._sessions[session])
