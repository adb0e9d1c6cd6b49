"""``t23-middleware status``: what was captured, waits, was sent, is dead, was lost, and how delivery goes.

:func:`look` gathers it (SQL in one transaction, journals by their size alone), :func:`screen` and :func:`as_json`
show it. Nothing is written, and no journal or writer's lock is opened.
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
from ..state import Holder, StateFolder, lock_is_held
from . import text
from .counted import counted_words

#: Seconds between two screens of ``--watch``.
REFRESH = 2.0
#: Counters that are shown by themselves.
_FIGURES = ("captured", "sent")
#: What is known where no relay ever ran.
NOTHING = Snapshot(Stats(0, 0, 0, 0, 0), [], None, {}, [], {}, {})


class Awaited(NamedTuple):
    """Plays that only their line in the proxy's log is missing of, as the relay knew last."""

    number: int
    #: Since when the oldest does, and when the latest line ended; in ms since the epoch, 0 for never.
    since_ms: int
    last_line_ms: int


def awaited(outbox: Snapshot) -> Awaited:
    """What the relay noted of the proxy."""
    return Awaited(*(_noted(outbox, name) for name in (AWAITED, AWAITED_SINCE, LAST_LINE)))


def _noted(outbox: Snapshot, name: str) -> int:
    noted = outbox.notes.get(name, "")
    return int(noted) if noted.isascii() and noted.isdigit() else 0


@dataclass(frozen=True)
class Status:
    """What one look found; counts are reports, times are ms since the epoch."""

    site: str
    folder: Path
    #: Whether the folder is there.
    exists: bool
    now_ms: int
    outbox: Snapshot
    #: Bytes in journals that no relay has taken in yet.
    journal_bytes: int
    #: Journals that only another version's relay can read.
    foreign_journals: int
    #: The relay that runs, if one does.
    relay: Holder | None
    #: Who is to run it, as ``T23_RELAY`` says.
    relay_mode: str
    #: Whether a proxy's log is followed, as ``T23_PROXY_LOG`` says.
    follows_log: bool = False
    #: Bytes of the outbox's write-ahead log.
    log_bytes: int = 0
    #: Where the log is long: the processes that keep it so.
    readers: tuple[str, ...] = ()

    @property
    def stats(self) -> Stats:
        """The figures, which add up: captured = waiting + sent + dead + lost."""
        return self.outbox.stats

    @property
    def apis(self) -> dict[str, Health]:
        """Host (``""`` where there is one site) -> how its API is."""
        return healths(self.outbox.notes)

    @property
    def open_responses(self) -> int:
        """Counted responses that are under way, as the relay knew last."""
        return _noted(self.outbox, OPEN_RESPONSES)

    @property
    def draining(self) -> int:
        """Responses that are over for the server and not for the client's kernel, as the relay knew last."""
        return _noted(self.outbox, DRAINING)

    @property
    def awaited(self) -> Awaited:
        """Plays that wait for the proxy."""
        return awaited(self.outbox)

    @property
    def lost_by_reason(self) -> dict[str, int]:
        """Reason -> reports, over all days."""
        total: Counter[str] = Counter()
        for loss in self.outbox.losses:
            total[loss.reason] += loss.reports
        return dict(total)

    @property
    def ignored(self) -> dict[str, int]:
        """Every other counter: what was seen and not reported, and what went wrong."""
        return {name: value for name, value in self.outbox.counters.items() if name not in _FIGURES}

    @property
    def oldest_seconds(self) -> float | None:
        """Age of the oldest report that waits."""
        oldest = self.outbox.oldest_ms
        return None if oldest is None else max(self.now_ms - oldest, 0) / 1000

    def troubled(self, state: str) -> dict[str, Health]:
        """The APIs in *state* that reports wait for."""
        return {
            host: api for host, api in self.apis.items() if api.state == state and host in self.outbox.hosts
        }

    @property
    def state(self) -> str:
        """``paused``, ``failing``, ``no_relay``, ``delivering`` or ``idle``: the worst that is so."""
        if not self.stats.waiting and not self.journal_bytes:
            return "idle"
        for state in (PAUSED, FAILING):
            if self.troubled(state):
                return state
        return "delivering" if self.relay else "no_relay"


def look(settings: Settings) -> Status:
    """What is known of the state folder now.

    Raises :class:`~t23_middleware.errors.UsageError` where this user may not look into it, and
    :class:`~t23_middleware.errors.StateError` where its database can't be read.
    """
    folder = StateFolder(settings.state_path())
    refuse_if_closed(folder.path)
    held = lock_is_held(folder.relay_lock)
    outbox = _snapshot(folder.outbox)
    return Status(
        site=settings.api_url,
        folder=folder.path,
        exists=folder.path.is_dir(),
        now_ms=time.time_ns() // 1_000_000,
        outbox=outbox,
        foreign_journals=len(folder.foreign_journals()),
        journal_bytes=_not_taken_in(folder, outbox),
        relay=(folder.relay_holder() or Holder(0, "", "", False)) if held else None,
        relay_mode=settings.relay,
        follows_log=bool(settings.proxy_log),
        log_bytes=log_size(folder.outbox),
        readers=long_readers(folder.outbox),
    )


def long_readers(outbox: Path) -> tuple[str, ...]:
    """Where the log of *outbox* is long: who keeps it so; a name for nobody that can be seen."""
    if log_size(outbox) <= LONG_LOG:
        return ()
    return tuple(readers(outbox)) or ("a process that can't be seen from here",)


def reader_words(names: tuple[str, ...], log_bytes: int) -> str:
    """What to do about them."""
    return (
        f"{', '.join(names)} keeps the outbox open for reading, and its log (outbox.db-wal) takes"
        f" {text.size(log_bytes)}: delivery is slow until that process ends or closes it."
    )


def refuse_if_closed(folder: Path) -> None:
    """Raise :class:`~t23_middleware.errors.UsageError` where this user may not look into *folder*.

    Raises :class:`~t23_middleware.errors.StateError` where it is another user's, and open to all.
    """
    try:
        closed = folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK)
    except PermissionError:
        closed = True
    if closed:
        raise UsageError(f"the state folder {folder} is another user's; run this as that user, or as root")
    StateFolder(folder).refuse_if_foreign()


def _snapshot(path: Path) -> Snapshot:
    try:
        with OutboxView(path) as view:
            return view.snapshot()
    except NoOutbox:
        return NOTHING


def _not_taken_in(folder: StateFolder, outbox: Snapshot) -> int:
    """Looked at after the outbox: what was taken in and removed since is no longer there to be counted."""
    total = 0
    for path in folder.readable_journals():
        try:
            total += max(owned.look_at(path).st_size - outbox.offsets.get(path.name, 0), 0)
        except OSError:
            continue  # removed since, or no journal: the relay says of what it can't read
    return total


# What is shown.


def as_json(status: Status) -> dict[str, Any]:
    """The same for programs; times are seconds since the epoch."""
    return {
        **status.stats._asdict(),
        "state": status.state,
        "text": " ".join(sentences(status)),
        "oldest_waiting_seconds": status.oldest_seconds,
        "open_responses": status.open_responses,
        "draining": status.draining,
        "waiting_for_proxy": status.awaited.number,
        "journal_bytes": status.journal_bytes,
        "foreign_journals": status.foreign_journals,
        "log_bytes": status.log_bytes,
        "readers": list(status.readers),
        "lost_by_reason": status.lost_by_reason,
        "losses": [loss._asdict() for loss in status.outbox.losses],
        "counters": status.ignored,
        "relay": None if status.relay is None else _holder(status.relay),
        "apis": {host: _api(health) for host, health in status.apis.items()},
        "folder": str(status.folder),
        "time": status.now_ms / 1000,
    }


def _holder(holder: Holder) -> dict[str, Any]:
    pid = None if holder.is_elsewhere else holder.pid
    return {"pid": pid, "version": holder.version, "automatic": holder.automatic}


def _api(health: Health) -> dict[str, Any]:
    return {
        "state": health.state,
        "reason": health.reason,
        "since": health.since_ms / 1000,
        "last_answer": health.answered_ms / 1000 or None,
    }


def sentences(status: Status) -> list[str]:
    """How it goes, in words: what matters first."""
    return [*_of_delivery(status), *_of_readers(status), *_of_the_proxy(status), *_unknown(status)]


def _of_readers(status: Status) -> list[str]:
    return [reader_words(status.readers, status.log_bytes)] if status.readers else []


def _unknown(status: Status) -> Iterator[str]:
    if status.outbox.counters.get(UNCOUNTED):
        yield "What a corrupt outbox held could not all be counted; relay.log names the file, which is set aside."


def _of_the_proxy(status: Status) -> list[str]:
    offloaded = status.ignored.get("offloaded", 0)
    if not offloaded or status.follows_log:
        return []
    return [
        f"{offloaded:,} plays were left to the proxy (X-Accel-Redirect or the like) and are not reported: set"
        " T23_PROXY_LOG; 't23-middleware check' prints what to add to nginx's configuration."
    ]


def _of_delivery(status: Status) -> list[str]:
    match status.state:
        case "idle":
            return [_idle(status)]
        case "paused":
            said = [
                f"Paused{_of(host, api, status)}: {api.reason}"
                for host, api in status.troubled(PAUSED).items()
            ]
        case "failing":
            said = [
                f"The API is down{_of(host, api, status)}: {api.reason}. Reports wait here until it is back."
                for host, api in status.troubled(FAILING).items()
            ]
        case "delivering":
            return ["Delivering."]
        case _:
            said = []
    return said if status.relay else [*said, _no_relay(status)]


def _of(host: str, api: Health, status: Status) -> str:
    where = f" for {host}" if host else ""
    return (
        f"{where} since {text.moment(api.since_ms)} ({text.duration((status.now_ms - api.since_ms) / 1000)})"
    )


def _idle(status: Status) -> str:
    if status.awaited.number:
        return "Nothing waits to be delivered, but plays wait for their lines in the proxy's log."
    if status.draining:
        return (
            "Nothing waits to be delivered, but responses drain: their clients have not acknowledged all yet."
        )
    if not status.exists:
        return (
            "Nothing was captured: there is no state folder yet. Is it the one of the workers' user, and do the media"
            " URLs name a session and a video?"
        )
    if not status.stats.captured:
        return "Nothing waits: nothing was captured yet."
    if status.stats.dead or status.stats.lost:
        return "Nothing waits, but not all that was captured was taken: see dead and lost."
    return "Nothing waits: all that was captured was sent."


def _no_relay(status: Status) -> str:
    what = text.reports(status.stats.waiting) if status.stats.waiting else "what the workers wrote"
    wait = f"No relay runs, so {what} {'waits' if status.stats.waiting <= 1 else 'wait'}"
    if status.relay_mode == "external":
        return f"{wait}: T23_RELAY=external asks you to run 't23-middleware relay'."
    if status.relay_mode == "off":
        return f"{wait}: T23_RELAY=off; 't23-middleware relay --once' delivers by hand."
    return f"{wait} for the app's next play; 't23-middleware relay --once' delivers now."


def screen(status: Status, columns: int) -> Iterator[str]:
    """The lines of the screen."""
    for sentence in sentences(status):
        yield text.wrapped(sentence, columns)
    yield ""
    for name, value, remark in _figures(status):
        yield text.wrapped(remark, columns, " " * 32, f"  {name:15} {value:>12,}  ")
    yield ""
    for name, words in _circumstances(status):
        yield text.wrapped(words, columns, " " * 18, f"  {name:15} ")
    if status.ignored:
        yield "\n  Counted aside:"
    for name, value in sorted(status.ignored.items()):
        yield f"    {name:30}{value:>12,}"


def _figures(status: Status) -> Iterator[tuple[str, int, str]]:
    stats, oldest = status.stats, status.oldest_seconds
    yield "captured", stats.captured, ""
    yield "waiting", stats.waiting, "" if oldest is None else f"the oldest for {text.duration(oldest)}"
    yield "sent", stats.sent, ""
    yield "dead", stats.dead, "refused by the API: 't23-middleware dead list'" if stats.dead else ""
    reasons = sorted(status.lost_by_reason.items())
    yield "lost", stats.lost, ", ".join(f"{reason} {number:,}" for reason, number in reasons)


def _circumstances(status: Status) -> Iterator[tuple[str, str]]:
    yield "open responses", f"{status.open_responses:,}"
    if status.draining:
        yield "draining", f"{status.draining:,} are sent and not yet acknowledged by their clients"
    if words := counted_words(status.outbox.notes):
        yield "counted", words
    plays = status.awaited
    if plays.number:
        age = text.duration((status.now_ms - plays.since_ms) / 1000)
        yield "proxy", f"{plays.number:,} plays wait for their lines in its log, the oldest for {age}"
    yield "journals", f"{text.size(status.journal_bytes)} not taken in yet"
    if status.foreign_journals:
        yield (
            "",
            f"{status.foreign_journals:,} of another version of t23_middleware, whose relay can read them",
        )
    yield "relay", relay_words(status.relay)
    answered_ms = max((api.answered_ms for api in status.apis.values()), default=0)
    if answered_ms:
        ago = text.duration((status.now_ms - answered_ms) / 1000)
        yield "last answer", f"{text.moment(answered_ms)} ({ago} ago)"
    yield "site", status.site
    yield "state folder", str(status.folder)


def relay_words(relay: Holder | None) -> str:
    """Which relay runs."""
    if relay is None:
        return "none runs"
    if not relay.pid:
        return "runs"  # it could not write its name: the disk is full
    how = "started by a worker" if relay.automatic else "run as a service"
    where = (
        f"in another container (process {relay.pid} there)" if relay.is_elsewhere else f"process {relay.pid}"
    )
    return f"{where}, version {relay.version}, {how}"


# The command.


def run_status(settings: Settings, *, machine: bool, watch: bool) -> int:
    """Print it, with *machine* as JSON; with *watch* again each 2 seconds until Ctrl-C."""
    try:
        while True:
            _show(look(settings), machine=machine, again=watch)
            if not watch:
                return 0
            time.sleep(REFRESH)
    except KeyboardInterrupt:
        return 0


def _show(status: Status, *, machine: bool, again: bool) -> None:
    if machine:
        print(json.dumps(as_json(status), indent=None if again else 2), flush=True)
        return
    lines = [*screen(status, text.width())]
    if again:
        lines.append(f"\n{text.moment(status.now_ms)}, again each {REFRESH:.0f} s; Ctrl-C ends")
    if again and sys.stdout.isatty():
        # To the top, and erase what is left of each line and below: a cleared screen would flicker.
        print("\x1b[H" + "\n".join(lines).replace("\n", "\x1b[K\n") + "\x1b[K\n\x1b[J", end="", flush=True)
    else:
        print("\n".join(lines), flush=True)
