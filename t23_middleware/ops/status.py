"""``t23-middleware status``: how many reports were captured, wait, were sent, are dead or lost, and the API's state.

:func:`read_status` reads the figures (SQL in one transaction; of journals only the size), :func:`screen` and
:func:`as_json` format them. Nothing is written, and no journal or writer's lock is opened.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .. import owned
from ..errors import UsageError
from ..relay.health import (
    AWAITED,
    AWAITED_SINCE,
    DRAINING,
    FAILING,
    LAST_LINE,
    OPEN_RESPONSES,
    PAUSED,
    Health,
    healths,
)
from ..relay.outbox import LONG_LOG, UNCOUNTED, NoOutbox, OutboxView, Snapshot, Stats, log_size, readers
from ..settings import Settings
from ..state import LockHolder, StateFolder, lock_is_held
from . import text
from .counted import counting_description

#: Seconds between two refreshes of ``--watch``.
REFRESH = 2.0
#: Counters that are shown separately.
_FIGURES = ("captured", "sent")
#: The figures if no relay ever ran.
EMPTY_SNAPSHOT = Snapshot(Stats(0, 0, 0, 0, 0), [], None, {}, [], {}, {})


class WaitingForProxy(NamedTuple):
    """Plays that wait for their line in the proxy's log, as the relay last noted."""

    number: int
    #: When the oldest began to wait, and the time of the latest line; ms since the epoch, 0 for never.
    since_ms: int
    last_line_ms: int


def waiting_for_proxy(outbox: Snapshot) -> WaitingForProxy:
    """What the relay noted about the proxy."""
    return WaitingForProxy(*(_number_in_notes(outbox, name) for name in (AWAITED, AWAITED_SINCE, LAST_LINE)))


def _number_in_notes(outbox: Snapshot, name: str) -> int:
    noted = outbox.notes.get(name, "")
    return int(noted) if noted.isascii() and noted.isdigit() else 0


@dataclass(frozen=True)
class Status:
    """The state of one folder at one time. Counts are reports, times are ms since the epoch."""

    site: str
    folder: Path
    #: Whether the folder exists.
    exists: bool
    now_ms: int
    outbox: Snapshot
    #: Bytes in journals that no relay has read yet.
    journal_bytes: int
    #: Journals that only another version's relay can read.
    foreign_journals: int
    #: The running relay, if any.
    relay: LockHolder | None
    #: Value of ``T23_RELAY``.
    relay_mode: str
    #: Whether ``T23_PROXY_LOG`` is set.
    follows_log: bool = False
    #: Size of the outbox's write-ahead log, in bytes.
    log_bytes: int = 0
    #: If that log is long: the processes that prevent its reuse.
    readers: tuple[str, ...] = ()

    @property
    def stats(self) -> Stats:
        """The main figures: captured = waiting + sent + dead + lost."""
        return self.outbox.stats

    @property
    def apis(self) -> dict[str, Health]:
        """Host (``""`` if there is one site) -> state of its API."""
        return healths(self.outbox.notes)

    @property
    def open_responses(self) -> int:
        """Counted responses that are in progress, as the relay last noted."""
        return _number_in_notes(self.outbox, OPEN_RESPONSES)

    @property
    def draining(self) -> int:
        """Responses that are sent but not yet acknowledged by the client's kernel, as the relay last noted."""
        return _number_in_notes(self.outbox, DRAINING)

    @property
    def waiting_for_proxy(self) -> WaitingForProxy:
        """Plays that wait for their line in the proxy's log."""
        return waiting_for_proxy(self.outbox)

    @property
    def lost_by_reason(self) -> dict[str, int]:
        """Reason -> reports, over all days."""
        total: Counter[str] = Counter()
        for loss in self.outbox.losses:
            total[loss.reason] += loss.reports
        return dict(total)

    @property
    def other_counters(self) -> dict[str, int]:
        """All other counters: requests that were not reported, unusual cases, errors."""
        return {name: value for name, value in self.outbox.counters.items() if name not in _FIGURES}

    @property
    def oldest_seconds(self) -> float | None:
        """Age of the oldest waiting report."""
        oldest = self.outbox.oldest_ms
        return None if oldest is None else max(self.now_ms - oldest, 0) / 1000

    def waiting_apis(self, state: str) -> dict[str, Health]:
        """Host -> API, for the APIs in *state* that have waiting reports."""
        return {
            host: api for host, api in self.apis.items() if api.state == state and host in self.outbox.hosts
        }

    @property
    def state(self) -> str:
        """``paused``, ``failing``, ``no_relay``, ``delivering`` or ``idle``: the worst that applies."""
        if not self.stats.waiting and not self.journal_bytes:
            return "idle"
        for state in (PAUSED, FAILING):
            if self.waiting_apis(state):
                return state
        return "delivering" if self.relay else "no_relay"


def read_status(settings: Settings) -> Status:
    """Read the current state of the state folder.

    Raises :class:`~t23_middleware.errors.UsageError` if this user may not read the folder, and
    :class:`~t23_middleware.errors.StateError` if its database can't be read.
    """
    folder = StateFolder(settings.state_path())
    refuse_unless_readable(folder.path)
    held = lock_is_held(folder.relay_lock)
    outbox = _snapshot(folder.outbox)
    return Status(
        site=settings.api_url,
        folder=folder.path,
        exists=folder.path.is_dir(),
        now_ms=time.time_ns() // 1_000_000,
        outbox=outbox,
        foreign_journals=len(folder.foreign_journals()),
        journal_bytes=_unread_bytes(folder, outbox),
        relay=(folder.relay_holder() or LockHolder(0, "", "", False)) if held else None,
        relay_mode=settings.relay,
        follows_log=bool(settings.proxy_log),
        log_bytes=log_size(folder.outbox),
        readers=blocking_readers(folder.outbox),
    )


def blocking_readers(outbox: Path) -> tuple[str, ...]:
    """The processes that prevent reuse of the log of *outbox*, if it is long; a placeholder if none is visible."""
    if log_size(outbox) <= LONG_LOG:
        return ()
    return tuple(readers(outbox)) or ("a process that is not visible from here",)


def readers_sentence(names: tuple[str, ...], log_bytes: int) -> str:
    """A sentence about these processes, with the remedy."""
    return (
        f"{', '.join(names)} keeps the outbox open for reading, and its log (outbox.db-wal) has"
        f" {text.size(log_bytes)}: delivery is slow until that process ends or closes the outbox."
    )


def refuse_unless_readable(folder: Path) -> None:
    """Raise :class:`~t23_middleware.errors.UsageError` if this user may not read *folder*.

    Raises :class:`~t23_middleware.errors.StateError` if it belongs to another user and is open to all.
    """
    try:
        closed = folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK)
    except PermissionError:
        closed = True
    if closed:
        raise UsageError(
            f"the state folder {folder} belongs to another user; run this as that user, or as root"
        )
    StateFolder(folder).check_ownership()


def _snapshot(path: Path) -> Snapshot:
    try:
        with OutboxView(path) as view:
            return view.snapshot()
    except NoOutbox:
        return EMPTY_SNAPSHOT


def _unread_bytes(folder: StateFolder, outbox: Snapshot) -> int:
    """Bytes in journals after the relay's offsets. Call this after reading the outbox: a file that was read and
    removed in between is then not counted."""
    total = 0
    for path in folder.readable_journals():
        try:
            total += max(owned.lstat(path).st_size - outbox.offsets.get(path.name, 0), 0)
        except OSError:
            continue  # removed in between, or not a journal: the relay logs what it can't read
    return total


# Output.


def as_json(status: Status) -> dict[str, Any]:
    """The status for programs; times are seconds since the epoch."""
    return {
        **status.stats._asdict(),
        "state": status.state,
        "text": " ".join(sentences(status)),
        "oldest_waiting_seconds": status.oldest_seconds,
        "open_responses": status.open_responses,
        "draining": status.draining,
        "waiting_for_proxy": status.waiting_for_proxy.number,
        "journal_bytes": status.journal_bytes,
        "foreign_journals": status.foreign_journals,
        "log_bytes": status.log_bytes,
        "readers": list(status.readers),
        "lost_by_reason": status.lost_by_reason,
        "losses": [loss._asdict() for loss in status.outbox.losses],
        "counters": status.other_counters,
        "relay": None if status.relay is None else _relay_json(status.relay),
        "apis": {host: _api_json(health) for host, health in status.apis.items()},
        "folder": str(status.folder),
        "time": status.now_ms / 1000,
    }


def _relay_json(holder: LockHolder) -> dict[str, Any]:
    pid = None if holder.is_elsewhere else holder.pid
    return {"pid": pid, "version": holder.version, "automatic": holder.automatic}


def _api_json(health: Health) -> dict[str, Any]:
    return {
        "state": health.state,
        "reason": health.reason,
        "since": health.since_ms / 1000,
        "last_answer": health.answered_ms / 1000 or None,
    }


def sentences(status: Status) -> list[str]:
    """The state in sentences, the most important first."""
    return [
        *_delivery_sentences(status),
        *_reader_sentences(status),
        *_proxy_sentences(status),
        *_uncounted_sentences(status),
    ]


def _reader_sentences(status: Status) -> list[str]:
    return [readers_sentence(status.readers, status.log_bytes)] if status.readers else []


def _uncounted_sentences(status: Status) -> Iterator[str]:
    if status.outbox.counters.get(UNCOUNTED):
        yield "Not all reports of a corrupt outbox could be counted; relay.log names the file, which is kept."


def _proxy_sentences(status: Status) -> list[str]:
    offloaded = status.other_counters.get("offloaded", 0)
    if not offloaded or status.follows_log:
        return []
    return [
        f"{offloaded:,} plays were left to the proxy (X-Accel-Redirect or similar) and are not reported: set"
        " T23_PROXY_LOG; 't23-middleware check' prints the lines for nginx's configuration."
    ]


def _delivery_sentences(status: Status) -> list[str]:
    match status.state:
        case "idle":
            return [_idle_sentence(status)]
        case "paused":
            lines = [
                f"Paused{_for_host_since(host, api, status)}: {api.reason}"
                for host, api in status.waiting_apis(PAUSED).items()
            ]
        case "failing":
            lines = [
                f"The API is down{_for_host_since(host, api, status)}: {api.reason}. Reports wait until it answers again."
                for host, api in status.waiting_apis(FAILING).items()
            ]
        case "delivering":
            return ["Delivering."]
        case _:
            lines = []
    return lines if status.relay else [*lines, _no_relay_sentence(status)]


def _for_host_since(host: str, api: Health, status: Status) -> str:
    where = f" for {host}" if host else ""
    return (
        f"{where} since {text.moment(api.since_ms)} ({text.duration((status.now_ms - api.since_ms) / 1000)})"
    )


def _idle_sentence(status: Status) -> str:
    if status.waiting_for_proxy.number:
        return "Nothing waits to be delivered, but plays wait for their lines in the proxy's log."
    if status.draining:
        return "Nothing waits to be delivered, but responses are draining: clients have not acknowledged all bytes yet."
    if not status.exists:
        return (
            "Nothing was captured: there is no state folder yet. Does this command run as the workers' user? Do the"
            " media URLs name a session and a video?"
        )
    if not status.stats.captured:
        return "Nothing waits: no report was captured yet."
    if status.stats.dead or status.stats.lost:
        return "Nothing waits, but not all captured reports were sent: see dead and lost."
    return "Nothing waits: all captured reports were sent."


def _no_relay_sentence(status: Status) -> str:
    what = text.reports(status.stats.waiting) if status.stats.waiting else "the workers' data"
    wait = f"No relay runs, so {what} {'waits' if status.stats.waiting <= 1 else 'wait'}"
    if status.relay_mode == "external":
        return f"{wait}: with T23_RELAY=external you have to run 't23-middleware relay'."
    if status.relay_mode == "off":
        return f"{wait}: T23_RELAY=off; 't23-middleware relay --once' delivers now."
    return f"{wait} until the app's next play starts one; 't23-middleware relay --once' delivers now."


def screen(status: Status, columns: int) -> Iterator[str]:
    """The status as lines of text, for a terminal with this number of *columns*."""
    for sentence in sentences(status):
        yield text.wrapped(sentence, columns)
    yield ""
    for name, value, remark in _figures(status):
        yield text.wrapped(remark, columns, " " * 32, f"  {name:15} {value:>12,}  ")
    yield ""
    for name, words in _details(status):
        yield text.wrapped(words, columns, " " * 18, f"  {name:15} ")
    if status.other_counters:
        yield "\n  Not reported, or unusual:"
    for name, value in sorted(status.other_counters.items()):
        yield f"    {name:30}{value:>12,}"


def _figures(status: Status) -> Iterator[tuple[str, int, str]]:
    stats, oldest = status.stats, status.oldest_seconds
    yield "captured", stats.captured, ""
    yield "waiting", stats.waiting, "" if oldest is None else f"the oldest for {text.duration(oldest)}"
    yield "sent", stats.sent, ""
    yield "dead", stats.dead, "refused by the API: 't23-middleware dead list'" if stats.dead else ""
    reasons = sorted(status.lost_by_reason.items())
    yield "lost", stats.lost, ", ".join(f"{reason} {number:,}" for reason, number in reasons)


def _details(status: Status) -> Iterator[tuple[str, str]]:
    yield "open responses", f"{status.open_responses:,}"
    if status.draining:
        yield "draining", f"{status.draining:,} are sent but not yet acknowledged by their clients"
    if words := counting_description(status.outbox.notes):
        yield "counted", words
    plays = status.waiting_for_proxy
    if plays.number:
        age = text.duration((status.now_ms - plays.since_ms) / 1000)
        yield "proxy", f"{plays.number:,} plays wait for their lines in its log, the oldest for {age}"
    yield "journals", f"{text.size(status.journal_bytes)} not read yet"
    if status.foreign_journals:
        yield (
            "",
            f"{status.foreign_journals:,} of another version of t23_middleware; only its relay can read them",
        )
    yield "relay", relay_description(status.relay)
    answered_ms = max((api.answered_ms for api in status.apis.values()), default=0)
    if answered_ms:
        ago = text.duration((status.now_ms - answered_ms) / 1000)
        yield "last answer", f"{text.moment(answered_ms)} ({ago} ago)"
    yield "site", status.site
    yield "state folder", str(status.folder)


def relay_description(relay: LockHolder | None) -> str:
    """The relay in words: process, version and how it was started."""
    if relay is None:
        return "not running"
    if not relay.pid:
        return "running"  # it could not write its process id, because the disk is full
    how = "started by a worker" if relay.automatic else "run as a service"
    where = (
        f"in another container (process {relay.pid} there)" if relay.is_elsewhere else f"process {relay.pid}"
    )
    stopped = f", stopped by a signal; 'kill -CONT {relay.pid}' continues it" if relay.is_stopped else ""
    return f"{where}, version {relay.version}, {how}{stopped}"


# The command.


def run_status(settings: Settings, *, machine: bool, watch: bool) -> int:
    """Print the status, as JSON if *machine*; if *watch*, refresh it every 2 seconds until Ctrl-C."""
    try:
        while True:
            _show(read_status(settings), machine=machine, repeated=watch)
            if not watch:
                return 0
            time.sleep(REFRESH)
    except KeyboardInterrupt:
        return 0


def _show(status: Status, *, machine: bool, repeated: bool) -> None:
    if machine:
        print(json.dumps(as_json(status), indent=None if repeated else 2), flush=True)
        return
    lines = [*screen(status, text.width())]
    if repeated:
        lines.append(f"\n{text.moment(status.now_ms)}, refreshed every {REFRESH:.0f} s; Ctrl-C ends")
    if repeated and sys.stdout.isatty():
        # Cursor to the top, then erase the rest of each line and what is below: clearing the screen would flicker.
        print("\x1b[H" + "\n".join(lines).replace("\n", "\x1b[K\n") + "\x1b[K\n\x1b[J", end="", flush=True)
    else:
        print("\n".join(lines), flush=True)
