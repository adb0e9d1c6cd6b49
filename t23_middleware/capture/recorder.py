"""From a response to its two journal lines: one when it starts, one when it is over."""

from __future__ import annotations

import os
import time
from itertools import count

from ..settings import Settings
from ..state import StateFolder
from ..transfer import Opening, Part, Play, close_line, open_line, opening_text, progress_line
from .journal import JournalWriter
from .launch import RelayLauncher


class Recorder:
    """Records the responses of whatever process it finds itself in: servers fork after the import."""

    def __init__(self, settings: Settings, version: str) -> None:
        self._settings = settings
        self._version = version
        self._processes: dict[int, _Process] = {}

    def this_process(self) -> _Process:
        """The files of this process; what a parent opened is left alone."""
        pid = os.getpid()
        # setdefault is atomic, so two threads never get two; nothing is opened yet.
        return self._processes.get(pid) or self._processes.setdefault(
            pid, _Process(self._settings, self._version)
        )


class _Process:
    """One process's writer and its way to a relay."""

    def __init__(self, settings: Settings, version: str) -> None:
        folder = StateFolder(settings.state_path())
        self.journal = JournalWriter(folder, version, settings.relay_digest())
        self.launcher = RelayLauncher(settings, folder)
        self._numbers = count(1)

    def begin(self, play: Play, part: Part, status: int, length: int | None) -> Recording:
        """Write the open line of a response that starts now."""
        opening = Opening(
            next(self._numbers), time.monotonic_ns(), time.time_ns() // 1_000_000, play, part, status, length
        )
        text = opening_text(opening)
        if self.journal.write(open_line(text)):
            self.launcher.begun()
        return Recording(self, opening, text)


class Recording:
    """A response that is being counted; its end is written once, whoever ends it how often."""

    __slots__ = ("_process", "_text", "opening")

    def __init__(self, process: _Process, opening: Opening, text: str) -> None:
        self._process: _Process | None = process
        self._text = text
        self.opening = opening

    def progress(self, counted: int) -> None:
        """Write down that *counted* body bytes went out so far."""
        if self._process is not None:
            now_ns, now_ms = time.monotonic_ns(), time.time_ns() // 1_000_000
            self._process.journal.write(progress_line(self._text, now_ns, now_ms, counted))

    def end(self, counted: int, declared: int) -> None:
        """Write the close line: *counted* body bytes went out, or were *declared* to. Only the first call does."""
        process, self._process = self._process, None
        if process is None:
            return
        length = self.opening.length
        sent = counted if length is None else min(counted, length)
        now_ns, now_ms = time.monotonic_ns(), time.time_ns() // 1_000_000
        if process.journal.write(close_line(self._text, now_ns, now_ms, sent, declared)):
            process.launcher.written()
