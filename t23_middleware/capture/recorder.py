"""Writes the two journal lines of a response: one when it starts, one when it ends."""

from __future__ import annotations

import os
import time
from itertools import count

from ..settings import Settings
from ..state import StateFolder
from ..transfer import (
    APP,
    Connection,
    Opening,
    Part,
    Play,
    close_line,
    open_line,
    opening_text,
    play_id,
    progress_line,
)
from .journal import JournalWriter
from .launch import RelayLauncher


class Recorder:
    """Records the responses of the current process: servers fork after the import."""

    def __init__(self, settings: Settings, version: str) -> None:
        self._settings = settings
        self._version = version
        self._processes: dict[int, _Process] = {}
        self._latest: _Process | None = None

    def this_process(self) -> _Process:
        """The files of this process; files that a parent process opened are not used."""
        pid = os.getpid()
        process = self._processes.get(pid)
        if process is None:
            # setdefault is atomic, so two threads never get two; nothing is opened yet.
            process = self._processes.setdefault(pid, _Process(self._settings, self._version))
            self._latest = process
        return process

    def wake(self) -> None:
        """A request of any kind arrived: start a relay if one is needed.

        After a fork this uses the parent's launcher until the child records something itself. That writes nothing; and
        a ``getpid()`` for each request would be a tenth of its cost.
        """
        process = self._latest or self.this_process()
        process.launcher.wake()


class _Process:
    """The journal writer and the relay launcher of one process."""

    def __init__(self, settings: Settings, version: str) -> None:
        folder = StateFolder(settings.state_path())
        self.journal = JournalWriter(folder, version, settings.relay_digest(), settings.max_bytes)
        self.launcher = RelayLauncher(settings, folder, self.journal.log_unwritable)
        self._numbers = count(1)
        self._counted_once: set[str] = set()

    def begin(
        self,
        play: Play,
        part: Part,
        status: int,
        length: int | None,
        counted_by: str = APP,
        asked_first: int | None = None,
        connection: Connection | None = None,
    ) -> Recording:
        """Write the open line of a response that starts now."""
        now_ns, now_ms = time.monotonic_ns(), time.time_ns() // 1_000_000
        opening = Opening(
            next(self._numbers),
            now_ns,
            now_ms,
            play,
            part,
            status,
            length,
            counted_by,
            asked_first,
            connection,
        )
        text = opening_text(opening)
        if self.journal.append(open_line(text)):
            self.launcher.response_started()
        kind = Recording if counted_by == APP else ProxiedRecording
        return kind(self, opening, text)

    def count_once(self, name: str) -> None:
        """Count a fact about the requests' path, such as a proxy: once per process, with the next line."""
        if name not in self._counted_once:
            self._counted_once.add(name)
            self.journal.count(name)

    def count_now(self, name: str) -> None:
        """Count an event and write it now, because no other line may follow."""
        self.journal.count(name)
        if self.journal.write_counts():
            self.launcher.line_written()


class Recording:
    """A response that is being counted; its close line is written once, however often :meth:`end` is called."""

    __slots__ = ("_process", "_text", "opening")

    def __init__(self, process: _Process, opening: Opening, text: str) -> None:
        self._process: _Process | None = process
        self._text = text
        self.opening = opening

    def progress(self, counted: int, position: int | None) -> None:
        """Write a progress line: *counted* body bytes were handed over so far; the connection is at *position*."""
        if self._process is not None:
            now_ns, now_ms = time.monotonic_ns(), time.time_ns() // 1_000_000
            self._process.journal.write(progress_line(self._text, now_ns, now_ms, counted, position))

    def end(self, counted: int, declared: int, position: int | None) -> None:
        """Write the close line with *counted* body bytes; only the first call does.

        *declared* is 1 if the bytes are those that the app declared. *position* is the connection's position after the
        body, ``None`` if the client's kernel has acknowledged all of it.
        """
        process, self._process = self._process, None
        if process is None:
            return
        length = self.opening.length
        sent = counted if length is None else min(counted, length)
        now_ns, now_ms = time.monotonic_ns(), time.time_ns() // 1_000_000
        line = close_line(self._text, now_ns, now_ms, sent, declared, position)
        if process.journal.write(line) or process.journal.relay_must_free_room:
            process.launcher.line_written()


class ProxiedRecording(Recording):
    """A response whose play id goes to the proxy, which counts it."""

    __slots__ = ("_writer",)

    def __init__(self, process: _Process, opening: Opening, text: str) -> None:
        super().__init__(process, opening, text)
        # Read after the open line is written: writing it may start a new journal under another name.
        self._writer = process.journal.name

    @property
    def play_id(self) -> str:
        """The play id for the proxy."""
        return play_id(self._writer, self.opening.number)

    def void(self) -> None:
        """Another response is sent in its place, without the play id: the proxy's log will have no line for it."""
        self.opening = self.opening._replace(counted_by=APP)
        self._text = opening_text(self.opening)

    def end(self, counted: int, declared: int, position: int | None) -> None:
        """As :meth:`Recording.end`, but writes nothing if the journal has a new name since the start.

        Under the new name the proxy's log has no line for this response. Under the old name, which the relay has most
        likely read, the log's line decides.
        """
        if self._process is not None and self._writer == self._process.journal.name:
            super().end(counted, declared, position)
