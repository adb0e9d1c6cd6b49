"""Starts the relay where none runs.

The relay must outlive the worker and leave no zombie in it: a shell starts it in a session of its own and ends at
once, so that the relay's parent is init. This was seen to survive SIGTERM and SIGKILL of every server tried.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .. import owned
from ..errors import StateError
from ..settings import Settings
from ..state import StateFolder, lock_is_held

log = logging.getLogger(__name__)

#: Seconds between two looks at the relay's lock.
LOOK_EVERY = 1.0
#: Longest wait between two starts that fail, in seconds; the first is LOOK_EVERY, then each doubles.
LONGEST_BACKOFF = 60.0
#: Starts that fail before the log says so: a busy machine may need more than a second for one.
FAILURES_UNTOLD = 2
#: Size in bytes past which the relay's log is set aside.
LOG_LIMIT = 1 << 20


class RelayLauncher:
    """Looks whether a relay runs on the folder, and starts one. Never raises.

    *say_refused* is called with the reason where the folder is another user's.
    """

    def __init__(
        self,
        settings: Settings,
        folder: StateFolder,
        say_refused: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._say_refused = say_refused
        self._next_look = 0.0
        self._failures = 0
        self._told = False
        #: Whether something was written of which no relay was seen to take care; unknown before the first request.
        self._owed: bool | None = None
        self._written_ns = 0
        self._pid = os.getpid()

    def begun(self) -> None:
        """A counted response starts: this process's first one brings the relay up before its server can be killed."""
        if self._next_look == 0:
            self._look()

    def written(self) -> None:
        """A close line was written: see that a relay takes care of it."""
        self._owed = True
        if self._settings.ephemeral:
            self._wait_at_exit()
        self._look()

    def _wait_at_exit(self) -> None:
        if self._written_ns == 0:
            atexit.register(self._wait_until_delivered)
        self._written_ns = time.time_ns()

    def _wait_until_delivered(self) -> None:
        """The state folder dies with the container: give the relay its seconds before this worker ends.

        Servers that end without running exit handlers (waitress, werkzeug, bjoern at SIGTERM) don't come here.
        """
        if os.getpid() != self._pid:
            return
        deadline = time.monotonic() + self._settings.exit_seconds
        with contextlib.suppress(OSError):  # what drains then takes its time
            self._folder.say_leaving()
        self._written_ns = time.time_ns()
        while time.monotonic() < deadline and not self._is_delivered():
            time.sleep(0.02)

    def _is_delivered(self) -> bool:
        try:
            return owned.look_at(self._folder.delivered).st_mtime_ns > self._written_ns
        except OSError:
            return False

    def wake(self) -> None:
        """A request of any kind came: what was left here, or what a relay that died or left did not take, gets one."""
        if self._owed is None:
            self._owed = self._settings.relay == "auto" and self._is_left_work()
        if self._owed:
            self._look()

    def _is_left_work(self) -> bool:
        try:
            self._folder.refuse_if_foreign()
        except StateError as error:
            self._say_refused(error)
            return False
        return self._folder.holds_work()

    def _look(self) -> None:
        """Start a relay unless the right one runs; does nothing when it looked less than a second ago."""
        now = time.monotonic()
        if now < self._next_look or self._settings.relay != "auto":
            return
        self._next_look = now + LOOK_EVERY
        try:
            if lock_is_held(self._folder.relay_lock):
                # One with other settings will leave to a successor, whom somebody has to start then.
                self._owed = not self._is_ours()
                self._failures = 0
            elif not self._a_sibling_starts_it():
                self._start(now)
        except Exception as error:
            self._say_once(error)

    def _is_ours(self) -> bool:
        holder = self._folder.relay_holder()
        return holder is not None and holder.digest == self._settings.relay_digest()

    def _a_sibling_starts_it(self) -> bool:
        try:
            return 0 <= time.time() - owned.look_at(self._folder.relay_start).st_mtime < LOOK_EVERY
        except OSError:
            return False

    def _start(self, now: float) -> None:
        self._failures += 1
        self._next_look = now + min(LOOK_EVERY * 2 ** (self._failures - 1), LONGEST_BACKOFF)
        if self._failures > FAILURES_UNTOLD:
            self._say_once(f"it ended {FAILURES_UNTOLD} times")
        owned.touch(self._folder.relay_start)
        start_relay(self._settings, self._folder)

    def _say_once(self, why: object) -> None:
        if not self._told:
            self._told = True
            log.error(
                "the relay can't be started (%s): reports wait in %s. See relay.log there, or run it yourself:"
                " T23_STATE_DIR=%s t23-middleware relay",
                why,
                self._folder.path,
                self._folder.path,
                extra={
                    "t23_event": "relay_not_started",
                    "t23_reason": str(why),
                    "t23_path": str(self._folder.path),
                },
            )


def start_relay(settings: Settings, folder: StateFolder) -> None:
    """Start a relay process on *folder* and come back at once. Raises :class:`OSError`."""
    import subprocess  # 1.7 MB that only a process that starts a relay pays for

    if owned.check_file(folder.relay_log) and owned.look_at(folder.relay_log).st_size > LOG_LIMIT:
        owned.rename(folder.relay_log, folder.relay_log.with_suffix(".log.1"))
    output = owned.open_file(folder.relay_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        subprocess.Popen(
            ["/bin/sh", "-c", '"$@" &', "sh", python(), "-m", "t23_middleware", "relay"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            env=settings.relay_environment(folder.path),
            start_new_session=True,
        ).wait()
    finally:
        os.close(output)


def python() -> str:
    """The interpreter; ``sys.executable`` is the server's own binary under uWSGI and mod_wsgi.

    By its full name first: Debian's own Python has no ``python``, or one of another version.
    """
    folder = Path(sys.prefix, "bin")
    names = (f"python{sys.version_info.major}.{sys.version_info.minor}", "python3")
    return str(next((folder / name for name in names if (folder / name).exists()), folder / "python"))
