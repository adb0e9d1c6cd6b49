"""The outbox's interface, and the values that go in and out. No SQL here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from ...errors import StateError
from ..report import Report

#: Key of a session's state: host, session and photo.
Key = tuple[str, str, str]
#: Counters: how often a corrupt outbox was set aside, and how often its reports could not be counted in full.
CORRUPT, UNCOUNTED = "outbox_corrupt", "outbox_uncounted"


class Entry(NamedTuple):
    """A report in the outbox."""

    id: int
    report: Report
    #: How often it was sent and may have arrived.
    ambiguous_sends: int
    #: How often the API gave it an undocumented answer.
    unexplained_answers: int
    #: Whether it got a later time, because the API answered from its cache.
    retimed: bool


class EarlyLoss(NamedTuple):
    """Plays that were lost before they became reports; they count as captured and lost."""

    reason: str
    reports: int
    bytes: int


class Ingest(NamedTuple):
    """A batch: all results of one poll of the journals. All of it is stored, or nothing."""

    reports: Sequence[Report]
    #: Changed session states, ``None`` for one that was dropped.
    viewings: Sequence[tuple[Key, str | None]]
    #: Journal -> offset in bytes up to which it is stored.
    offsets: Mapping[str, int]
    counts: Mapping[str, int]
    #: Notes of the relay, see :meth:`Outbox.note`.
    notes: Mapping[str, str] = {}
    #: Plays that were lost before they became reports.
    losses: Sequence[EarlyLoss] = ()
    #: Changed rows about the proxy's logs, ``None`` for one that was dropped.
    proxy: Sequence[tuple[str, str | None]] = ()
    #: If not ``""``, its reports are not stored but counted as lost for this reason.
    lost_as: str = ""
    #: Time of the poll, in ms since the epoch; only losses need it.
    at_ms: int = 0
    #: The same as a time of :class:`~t23_middleware.relay.elapsed.Elapsed`, for the reports' ages; ``None``: set later.
    since_ms: int | None = None


class Acked(NamedTuple):
    """The API recorded the report."""

    id: int
    #: Time from the report's creation to this answer, in ms.
    took_ms: int | None = None
    #: One of :data:`~t23_middleware.relay.history.ANSWERS`, here and below, or ``""``.
    outcome: str = ""


class Retry(NamedTuple):
    """The report is retried at *due_ms* (elapsed)."""

    id: int
    due_ms: int
    ambiguous_sends: int
    unexplained_answers: int = 0
    #: Its new time in ms since the epoch, if it needs one.
    time_ms: int | None = None
    outcome: str = ""


class Dead(NamedTuple):
    """The API refused the report for good."""

    id: int
    code: str
    answer: str
    outcome: str = ""


class Lost(NamedTuple):
    """The report is dropped, and counted as lost for *reason*."""

    id: int
    reason: str
    outcome: str = ""


Settlement = Acked | Retry | Dead | Lost


class Stats(NamedTuple):
    """Figures that add up: captured = waiting + sent + dead + lost."""

    captured: int
    waiting: int
    sent: int
    dead: int
    lost: int


class Waiting(NamedTuple):
    """A report that waits for delivery."""

    report: Report
    #: Whether it is being sent now.
    in_flight: bool


class Loss(NamedTuple):
    """The reports that were lost on one day for one reason."""

    day: str
    reason: str
    reports: int
    bytes: int


class DeadReport(NamedTuple):
    """A report that the API refused for good."""

    id: int
    report: Report
    code: str
    #: The API's answer, without the session.
    answer: str
    died_ms: int


class Snapshot(NamedTuple):
    """All figures of the outbox at one moment."""

    stats: Stats
    #: Hosts that have waiting reports.
    hosts: Sequence[str]
    #: Time of the oldest waiting report, in ms since the epoch.
    oldest_ms: int | None
    counters: Mapping[str, int]
    losses: Sequence[Loss]
    #: Journal -> offset in bytes up to which it is stored.
    offsets: Mapping[str, int]
    #: The relay's notes.
    notes: Mapping[str, str]


class Outbox(Protocol):
    """The interface that the relay needs; every method raises :class:`OutboxError` if the store fails."""

    def atomic(self) -> AbstractContextManager[None]:
        """A context in which all changes happen together or not at all, with one write to the disk."""

    def offsets(self) -> dict[str, int]:
        """Journal -> offset in bytes up to which it is stored."""

    def viewings(self) -> Iterator[tuple[Key, str]]:
        """The stored session states of playback, by key."""

    def proxy_rows(self) -> dict[str, str]:
        """The stored rows about the proxy's logs."""

    def ingest(self, batch: Ingest) -> None:
        """Store all of *batch*, or nothing."""

    def forget_journals(self, names: Sequence[str]) -> None:
        """Remove the offsets of journals that no longer exist."""

    def claim(self, count: int, now_ms: int, hosts: Iterable[str]) -> list[Entry]:
        """Lease up to *count* reports of *hosts* that are due at *now_ms* (elapsed), in the order of their turns."""

    def claim_after(self, id: int, host: str, now_ms: int) -> list[Entry]:
        """Lease the next due report of *host* after *id*, else the first due one. Returns at most one."""

    def settle(self, settlements: Sequence[Settlement], now_ms: int) -> None:
        """Write the outcomes of claimed reports."""

    def hosts(self) -> list[str]:
        """Hosts that have waiting reports."""

    def stats(self) -> Stats:
        """The figures."""

    def note(self, notes: Mapping[str, str]) -> None:
        """Store notes of the relay by name, for commands and pages."""

    def begin_minute(self, now_ms: int, open_responses: int) -> None:
        """Write the history's gauges of this minute, and delete history that is too old."""


class OutboxError(StateError):
    """The store failed; the requested change did not happen."""


class OutboxFull(OutboxError):
    """The disk or the file's size limit is full; or the disk has a fault, which looks the same as a quota."""


class NoOutbox(OutboxError):
    """No relay has created the outbox yet."""


class OutboxCorrupt(StateError):
    """The file is not a valid database; the next :class:`SQLiteOutbox` sets it aside and creates a new one."""
