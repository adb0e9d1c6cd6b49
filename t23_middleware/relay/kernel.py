"""Asks the kernel about the watched connections, and writes its answers to the relay's own journal.

The listener's thread receives the end of a connection and writes it at once, so that a killed relay loses none. Ends
that were missed (the relay did not run, or the kernel dropped the event) and the progress of draining responses are
read by dumps. Dumps use at most a twentieth of a core, however many connections there are.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import NamedTuple

from ..journal import JournalWriter
from ..settings import Settings
from ..state import StateFolder, network_namespace
from ..transfer import Acknowledged, encode
from ..version import VERSION
from .crash import crash_point
from .drains import Drains, WatchedConnection
from .health import BY_PROXY, OFF
from .journals import RELAY_PREFIX
from .sock_diag import Listener, Row, dump

log = logging.getLogger(__name__)

#: Least seconds between two dumps, and the share of the time that they may use.
DUMP_EVERY = 0.2
SHARE = 0.05
#: How long ends are kept, in seconds, and how many: the response's open line may not be read yet.
KEEP_ENDS = 60.0
MOST_ENDS = 20_000
#: A connection counts as closed after this many dumps without it: its end event may come after the first.
ROUNDS = 2
#: Seconds to wait for the end event of a socket whose client has closed and that a server, or a process that the app
#: forked, still holds. After that the latest acknowledged count is final.
LONGEST_HELD = 20.0
_NEVER_NS = 1 << 62
MS = 1_000_000


class _End(NamedTuple):
    """The end of a connection."""

    at_ns: int
    acked: int | None


@dataclass
class _DumpState:
    """What dumps showed of a connection."""

    #: Time of the latest dump that had it; 0 for none.
    at_ns: int = 0
    #: Number of dumps without it since, and the time of the first of them.
    missed: int = 0
    missed_since_ns: int = 0
    end_written: bool = False
    #: Bytes written into it, by the latest dump.
    position: int | None = None
    #: The highest acknowledged count in the journal.
    written: int = -1


class Kernel:
    """The kernel's view of connections, for one relay on *folder*.

    Call :meth:`begin` before journals are read, then :meth:`poll` at each poll of the journals, and :meth:`stop` at the
    end. Nothing here raises: if the kernel can't be asked, :attr:`problem` has the reason, and responses end with the
    server's count.
    """

    def __init__(self, settings: Settings, folder: StateFolder) -> None:
        self._folder = folder
        self._digest = settings.relay_digest()
        self._listener: Listener | None = None
        self._drains = Drains(0.0)
        self._changing = threading.Lock()
        #: Cookie -> its end; the oldest first. An open line that is read later may need it.
        self._ends: dict[int, _End] = {}
        self._listening_since_ns = 0
        #: Port -> since when its connections' ends are received; other ports since :attr:`_listening_since_ns`.
        self._ports: dict[int, int] = {}
        #: Cookie -> what dumps showed of it.
        self._seen: dict[int, _DumpState] = {}
        self._next_dump = 0.0
        self._dump_fails = False
        #: Why the kernel can't be asked; empty if it can.
        self.problem = BY_PROXY if settings.proxy_log else "" if settings.acked else OFF
        self._wanted = not self.problem
        #: The network namespace whose connections can be asked about; ``None`` for none.
        self.network: int | None = None

    @property
    def writer_name(self) -> str:
        """The writer's name in the journal that this writes; ``""`` without a journal."""
        return "" if self._listener is None else self._writer.name

    def begin(self, drains: Drains) -> None:
        """Listen, and watch *drains* from now on."""
        self._drains = drains
        self._seen.clear()
        if self._listener is None and self._wanted:
            self._listen()

    def _listen(self) -> None:
        self._writer = JournalWriter(self._folder, VERSION, self._digest, prefix=RELAY_PREFIX)
        self._listening_since_ns, self._ports = time.monotonic_ns(), {}
        try:
            dump([1])
            self._listener = Listener(self._on_destroyed, self._on_missed)
        except OSError as error:
            self._log_problem(error)
        else:
            self.problem = ""
            self.network = network_namespace()

    def _log_problem(self, error: OSError) -> None:
        new, self.problem = not self.problem, str(error.strerror or error)
        if new:
            log.warning(
                "the kernel does not show what clients acknowledged (%s): responses are reported with what the server"
                " handed over. A systemd unit needs AF_NETLINK in RestrictAddressFamilies=; T23_ACKED=0 ends this line",
                self.problem,
                extra={"t23_event": "kernel_silent", "t23_reason": self.problem},
            )

    def stop(self) -> None:
        """Stop listening."""
        if self._listener is not None:
            self._listener.stop()
            self._listener = self.network = None
            self._writer.close()

    # Dumps, in the relay's own thread.

    def poll(self, *, now: bool = False) -> None:
        """Write new ends and, if a dump is due or with *now*, the progress of draining responses."""
        if self._listener is None:
            return
        self._writer.flush()
        self._filter_ports(self._listener)
        with self._changing:
            ends = {cookie: self._ends.get(cookie) for cookie in self._drains.take_new()}
        for cookie, end in ends.items():
            if end is not None:
                self._write(cookie, end.acked, end.at_ns, gone=1)
        if len(self._drains) and (now or time.monotonic() >= self._next_dump):
            began = time.perf_counter()
            self._dump()
            took = time.perf_counter() - began
            self._next_dump = time.monotonic() + max(DUMP_EVERY, took / SHARE)

    def _filter_ports(self, listener: Listener) -> None:
        """Receive only events of the apps' ports. Until the first port is known, all are received."""
        new = self._drains.ports - self._ports.keys()
        if not new:
            return
        since_ns = self._listening_since_ns
        try:
            listener.filter_ports(self._drains.ports | self._ports.keys())
            if self._ports:
                since_ns = time.monotonic_ns()
        except OSError as error:
            log.warning(
                "the kernel's notifications can't be filtered: %s",
                error,
                extra={"t23_event": "kernel_silent"},
            )
            since_ns = _NEVER_NS
        self._ports |= dict.fromkeys(new, since_ns)

    def _dump(self) -> None:
        draining: dict[int, list[WatchedConnection]] = {}
        for watched in self._drains.draining():
            draining.setdefault(watched.cookie, []).append(watched)
        at_ns = time.monotonic_ns()
        try:
            rows = dump({watched[0].port for watched in draining.values()})
        except OSError as error:
            if not self._dump_fails:
                log.warning("the kernel can't be asked: %s", error, extra={"t23_event": "kernel_silent"})
            self._dump_fails = True
            return
        self._dump_fails = False
        self._seen = {cookie: self._seen.get(cookie) or _DumpState() for cookie in draining}
        for cookie, responses in draining.items():
            if cookie in rows:
                self._found(rows[cookie], responses, at_ns)
            else:
                self._not_found(cookie, responses)

    def _found(self, row: Row, responses: list[WatchedConnection], at_ns: int) -> None:
        seen, positions = (
            self._seen[row.cookie],
            [each.position for each in responses if each.position is not None],
        )
        seen.at_ns, seen.missed = at_ns, 0
        if row.info is not None:
            acked, seen.position = row.info.acked, row.info.position
        elif row.is_done and (seen.position or positions):
            acked = max(seen.position or 0, *positions, 0)
        else:
            return
        self._drains.last_acked[row.cookie] = acked
        if any(seen.written < position <= acked for position in positions):
            seen.written = acked
            self._write(row.cookie, acked, at_ns, gone=0)

    def _not_found(self, cookie: int, responses: list[WatchedConnection]) -> None:
        """Its end was missed, or a process has not closed its socket yet; then an event follows."""
        seen, now_ns = self._seen[cookie], time.monotonic_ns()
        since_ns = self._ports.get(responses[0].port, self._listening_since_ns)
        would_hear = seen.at_ns > since_ns or min(each.started_ns for each in responses) > since_ns
        seen.missed += 1
        if seen.missed == 1:
            seen.missed_since_ns = now_ns
        waited = now_ns - seen.missed_since_ns >= (LONGEST_HELD * 1e9 if would_hear else 0)
        if seen.missed >= ROUNDS and waited and not seen.end_written:
            seen.end_written = True
            # No event was missed: the latest dump had what its client acknowledged.
            acked = self._drains.last_acked.get(cookie) if would_hear else None
            self._write(cookie, acked, now_ns, gone=1)

    # Events, in the listener's thread.

    def _on_destroyed(self, row: Row) -> None:
        end = _End(time.monotonic_ns(), None if row.info is None else row.info.acked)
        with self._changing:
            self._keep_end(row.cookie, end)
            known = row.cookie in self._drains.cookies
        if known:
            self._write(row.cookie, end.acked, end.at_ns, gone=1)

    def _keep_end(self, cookie: int, end: _End) -> None:
        self._ends[cookie] = end
        while self._ends:
            oldest = next(iter(self._ends))
            if len(self._ends) <= MOST_ENDS and end.at_ns - self._ends[oldest].at_ns < KEEP_ENDS * 1e9:
                break
            del self._ends[oldest]

    def _on_missed(self) -> None:
        with self._changing:
            self._listening_since_ns = time.monotonic_ns()
            self._ports = dict.fromkeys(self._ports, self._listening_since_ns)

    def _write(self, cookie: int, acked: int | None, at_ns: int, *, gone: int) -> None:
        at_ms = time.time_ns() // MS
        self._writer.write(encode(Acknowledged(cookie, at_ns, at_ms, acked, gone)))
        crash_point("after_acknowledged")
