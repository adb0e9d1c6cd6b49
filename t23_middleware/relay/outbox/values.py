"""What goes into the outbox and what comes out of it, and the interface: no SQL here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from ...errors import StateError
from ..report import Report

#: A viewing's key: host, session and photo.
Key = tuple[str, str, str]
#: Counters: how often the outbox was set aside because it was corrupt, and how often what it held could not be
#: counted in full.
CORRUPT, UNCOUNTED = "outbox_corrupt", "outbox_uncounted"


class Entry(NamedTuple):
    """A report in the outbox."""

    id: int
    report: Report
    #: How often it was sent so that it may have arrived.
    ambiguous_sends: int
    #: How often the API answered it with something that nobody documents.
    unexplained_answers: int
    #: Whether it got a later time because the API had answered from its cache.
    retimed: bool


class EarlyLoss(NamedTuple):
    """Plays that are lost without ever waiting; they count as captured and lost."""

    reason: str
    reports: int
    bytes: int


class Ingest(NamedTuple):
    """What one look at the journals brought; kept whole or not at all."""

    reports: Sequence[Report]
    #: Changed viewings, ``None`` for one that is dropped.
    viewings: Sequence[tuple[Key, str | None]]
    #: Journal -> offset in bytes up to which it is taken in.
    offsets: Mapping[str, int]
    counts: Mapping[str, int]
    #: What the relay tells of itself with it, see :meth:`Outbox.note`.
    notes: Mapping[str, str] = {}
    #: What was lost before it could become a report.
    losses: Sequence[EarlyLoss] = ()
    #: Changed rows of what is known of the proxy's logs, ``None`` for one that is dropped.
    proxy: Sequence[tuple[str, str | None]] = ()
    #: Reason for which its reports are lost at once instead of kept; ``""`` for none.
    lost_as: str = ""
    #: Time of the look, in ms since the epoch; only losses need it.
    at_ms: int = 0
    #: The same as :class:`~t23_middleware.relay.elapsed.Elapsed` has it, from which reports age; ``None`` for later.
    since_ms: int | None = None


class Acked(NamedTuple):
    """The report was recorded."""

    id: int
    #: Time from the report's making to this answer, in ms.
    took_ms: int | None = None
    #: One of :data:`~t23_middleware.relay.history.ANSWERS`, here and below; ``""`` for none.
    outcome: str = ""


class Retry(NamedTuple):
    """The report is tried again at *due_ms* (elapsed)."""

    id: int
    due_ms: int
    ambiguous_sends: int
    unexplained_answers: int = 0
    #: Its new time, where it needs one.
    time_ms: int | None = None
    outcome: str = ""


class Dead(NamedTuple):
    """The report was refused for good."""

    id: int
    code: str
    answer: str
    outcome: str = ""


class Lost(NamedTuple):
    """The report is given up, and counted under *reason*."""

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
    """A report that was not taken yet."""

    report: Report
    #: Whether it is on its way now.
    in_flight: bool


class Loss(NamedTuple):
    """What was given up on one day for one reason."""

    day: str
    reason: str
    reports: int
    bytes: int


class DeadReport(NamedTuple):
    """A report that the API refused for good."""

    id: int
    report: Report
    code: str
    #: The API's words, without the session.
    answer: str
    died_ms: int


class Snapshot(NamedTuple):
    """All that a look at the outbox tells, of one moment."""

    stats: Stats
    #: Those that reports wait for.
    hosts: Sequence[str]
    #: Time of the oldest report that waits, in ms since the epoch.
    oldest_ms: int | None
    counters: Mapping[str, int]
    losses: Sequence[Loss]
    #: Journal -> offset in bytes up to which it is taken in.
    offsets: Mapping[str, int]
    #: What the relay told of itself.
    notes: Mapping[str, str]


class Outbox(Protocol):
    """What the relay needs of a store; every method raises :class:`OutboxError` where the store fails."""

    def atomic(self) -> AbstractContextManager[None]:
        """What is done within happens whole or not at all, at the price of one write to the disk."""

    def offsets(self) -> dict[str, int]:
        """Journal -> offset up to which it was taken in."""

    def viewings(self) -> Iterator[tuple[Key, str]]:
        """The playback state that was kept."""

    def proxy_rows(self) -> dict[str, str]:
        """What was kept of the proxy's logs."""

    def ingest(self, batch: Ingest) -> None:
        """Keep *batch*, whole or not at all."""

    def forget_journals(self, names: Sequence[str]) -> None:
        """Journals that no longer exist."""

    def claim(self, count: int, now_ms: int, hosts: Iterable[str]) -> list[Entry]:
        """Lease up to *count* reports of *hosts* that are due at *now_ms* (elapsed), the oldest first."""

    def claim_after(self, id: int, host: str, now_ms: int) -> list[Entry]:
        """Lease the report of *host* that is due and comes after *id*, else the first one that is due; one or none."""

    def settle(self, settlements: Sequence[Settlement], now_ms: int) -> None:
        """Write down what became of claimed reports."""

    def hosts(self) -> list[str]:
        """Hosts that have reports waiting."""

    def stats(self) -> Stats:
        """The figures."""

    def note(self, notes: Mapping[str, str]) -> None:
        """Keep what the relay tells of itself, by name; commands and pages read it."""

    def begin_minute(self, now_ms: int, open_responses: int) -> None:
        """Write down how full it is and how many responses are open, and forget the history that is too old."""


class OutboxError(StateError):
    """The store failed; what was asked of it did not happen."""


class OutboxFull(OutboxError):
    """The disk, or the file's bound, takes no more; or the disk has a fault, which a quota looks like."""


class NoOutbox(OutboxError):
    """No relay has made one yet."""


class OutboxCorrupt(StateError):
    """The file is no longer a database; the next :class:`SQLiteOutbox` on it begins a new one."""
