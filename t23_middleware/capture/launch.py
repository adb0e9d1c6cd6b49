"""Starts the relay if none runs.

The relay must outlive the worker and not become a zombie in it: a Python process that becomes a daemon starts it, so
that the relay's parent is init. If the worker itself is init (PID 1 of a container), the launcher reaps ended ones.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .. import owned
from ..errors import StateError
from ..journal import FULL
from ..settings import Settings
from ..state import StateFolder, lock_is_held
from ..version import VERSION

log = logging.getLogger(__name__)

#: Seconds between two checks of the relay's lock.
CHECK_EVERY = 1.0
#: Longest wait between two failing starts, in seconds; the first is CHECK_EVERY, and each wait doubles.
LONGEST_BACKOFF = 60.0
#: Failed starts before an ERROR is logged: a busy machine may need more than a second for one.
UNREPORTED_FAILURES = 2
#: Most relays with other code or settings whose tries are recorded, and the most bytes that are read of that.
MOST_WANTED, LONGEST_TRIES = 4, 1 << 16
#: Size in bytes above which the relay's log is rotated.
LOG_LIMIT = 1 << 20
#: Most seconds that a request waits for the process that starts the relay, which takes about 0.02 s; one that takes
#: longer is reaped at a later request.
START_SECONDS = 1.0

#: Packages that the relay imports, with their dependencies.
NEEDED = (
    "requests",
    "urllib3",
    "certifi",
    "idna",
    "charset_normalizer",
    "chardet",
    "socks",
    "werkzeug",
    "itsdangerous",
    "markupsafe",
)

#: The program of the new process: it becomes a daemon, then the relay. Its arguments are "relay" (for lists of
#: processes), the folder of this package, and the import paths that follow the standard library's. The package is
#: imported from the worker's folder, regardless of the order of paths.
_DAEMON = """
import os, sys
os.setsid()
if os.fork(): os._exit(0)
os.chdir("/")
for number in os.listdir("/dev/fd"):
    try: int(number) > 2 and os.close(int(number))
    except OSError: pass
import importlib.machinery, importlib.util
sys.path += [place for place in sys.argv[3:] if place not in sys.path]
found = importlib.machinery.PathFinder.find_spec("t23_middleware", sys.argv[2:3])
sys.modules["t23_middleware"] = package = importlib.util.module_from_spec(found)
found.loader.exec_module(package)
from t23_middleware.ops.cli import main
sys.exit(main(["relay"]))
"""


class RelayLauncher:
    """Checks whether a relay runs on the folder, and starts one if needed. Never raises.

    *on_refused* is called with the reason if the folder belongs to another user.
    """

    def __init__(
        self,
        settings: Settings,
        folder: StateFolder,
        on_refused: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._on_refused = on_refused
        self._next_check = 0.0
        self._has_started = False
        self._created_s = time.time()
        self._has_logged = False
        #: Whether a relay was started that waits until one with other settings exits.
        self._has_successor = False
        #: Started processes that may have to be reaped here.
        self._started: list[int] = []
        #: Whether the journal may have lines for which no relay runs; ``None`` (unknown) before the first request.
        self._needs_relay: bool | None = None
        self._written_ns = 0
        self._pid = os.getpid()
        #: Number of tries to start a relay while the disk is full, and when the last one was.
        self._own_tries = 0, 0.0

    def response_started(self) -> None:
        """A counted response starts: start the relay at the process's first one, before the server can be killed."""
        if not self._has_started:
            self._has_started, self._needs_relay, self._next_check = True, True, 0.0
            self._check_relay()

    def line_written(self) -> None:
        """A close line, or a line of counts, was written: start a relay for it if none runs."""
        self._needs_relay = True
        if (
            not self._has_started
        ):  # counts without a play: the request's check ran before this line was written
            self._has_started, self._next_check = True, 0.0
        if self._settings.ephemeral:
            self._wait_at_exit()
        self._check_relay()

    def _wait_at_exit(self) -> None:
        if self._written_ns == 0:
            atexit.register(self._wait_until_delivered)
        self._written_ns = time.time_ns()

    def _wait_until_delivered(self) -> None:
        """Wait for the delivery before this worker ends, because the state folder is lost with the container.

        Servers that end without exit handlers (waitress, werkzeug, bjoern at SIGTERM) don't call this.
        """
        if os.getpid() != self._pid:
            return
        deadline = time.monotonic() + self._settings.exit_seconds
        with contextlib.suppress(OSError):  # without the record, draining responses are reported later
            self._folder.record_leaving()
        self._written_ns = time.time_ns()
        while time.monotonic() < deadline and not self._is_delivered():
            time.sleep(0.02)

    def _is_delivered(self) -> bool:
        try:
            return owned.lstat(self._folder.delivered).st_mtime_ns > self._written_ns
        except OSError:
            return False

    def wake(self) -> None:
        """A request of any kind arrived: start a relay for work that an earlier process or a dead relay left."""
        if self._started:
            self._started = [process for process in self._started if _is_our_child(process)]
        if self._settings.relay != "auto" or time.monotonic() < self._next_check:
            return
        if self._needs_relay is None:
            self._needs_relay = self._has_left_work()
        self._check_relay()

    def _has_left_work(self) -> bool:
        try:
            self._folder.check_ownership()
        except StateError as error:
            self._on_refused(error)
            return False
        return self._folder.has_work()

    def _check_relay(self) -> None:
        """Start a relay unless one with our settings runs; checks at most once per ``CHECK_EVERY`` seconds."""
        now = time.monotonic()
        if now < self._next_check or self._settings.relay != "auto":
            return
        self._next_check = now + CHECK_EVERY
        try:
            if lock_is_held(self._folder.relay_lock):
                self._has_logged = False
                self._needs_relay = not self._has_our_settings()
                if self._needs_relay and not self._has_successor and self._will_leave_for_us():
                    self._has_successor = True
                    self._start()
            elif self._needs_relay or (self._died() and self._has_left_work()):
                self._start()
        except Exception as error:
            self._log_once(error)

    def _has_our_settings(self) -> bool:
        holder = self._folder.relay_holder()
        return holder is not None and holder.digest == self._settings.relay_digest()

    def _will_leave_for_us(self) -> bool:
        """Whether the relay with other settings started before us: it will exit, and its successor waits for that."""
        return self._has_started and owned.lstat(self._folder.relay_lock).st_mtime < self._created_s

    def _died(self) -> bool:
        """Whether the last relay ended with work left."""
        holder = self._folder.relay_holder()
        return holder is not None and not holder.left

    def _start(self) -> None:
        try:
            tries = self._next_try()
        except OSError as error:
            if error.errno not in FULL:
                raise
            tries = self._next_own_try()
        if tries > UNREPORTED_FAILURES:
            self._log_once(f"it ended {tries - 1} times")
        if tries:
            self._started.append(start_relay(self._settings, self._folder))

    def _next_try(self) -> int:
        """The number of this try among those of all workers, 0 if it is too early for one.

        The relay removes the file when it works. A try for another relay, such as that of a new release or of another
        app, is counted for itself and does not wait: otherwise the app whose relay ends at once could always be first.
        """
        descriptor = owned.open_file(self._folder.relay_start, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            others, wanted = _last_tries(os.pread(descriptor, LONGEST_TRIES, 0)), self._wanted_relay()
            tries, at_s = others.pop(wanted, (0, 0.0))
            if tries and 0 <= time.time() - at_s < _backoff(tries):
                return 0
            lines = [f"{tries + 1} {time.time()} {wanted}"]
            lines += [f"{number} {other_s} {other}" for other, (number, other_s) in others.items()]
            text = "\n".join(lines[:MOST_WANTED]).encode()
            os.pwrite(descriptor, text, 0)
            os.ftruncate(descriptor, len(text))
            return tries + 1
        except BlockingIOError:
            return 0  # another worker is starting it
        finally:
            os.close(descriptor)

    def _next_own_try(self) -> int:
        """As :meth:`_next_try`, for this worker alone: the disk is too full to record the tries of all.

        The relay needs no new room to deliver what waits.
        """
        tries, at = self._own_tries
        now = time.monotonic()
        if tries and now - at < _backoff(tries):
            return 0
        self._own_tries = tries + 1, now
        return tries + 1

    def _wanted_relay(self) -> str:
        """Identifies the relay to start: its settings and its current code."""
        try:
            code = Path(__file__).stat().st_mtime_ns
        except OSError:
            code = 0
        return f"{VERSION} {self._settings.relay_digest()} {code} {python()}"

    def _log_once(self, why: object) -> None:
        if not self._has_logged:
            self._has_logged = True
            log.error(
                "the relay can't be started (%s): reports wait in %s. See relay.log there, or start it by hand:"
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


def start_relay(settings: Settings, folder: StateFolder) -> int:
    """Start a relay on *folder* without waiting for it; returns the process id of the process that starts it.

    Raises :class:`OSError`.
    """
    if owned.check_file(folder.relay_log) and owned.lstat(folder.relay_log).st_size > LOG_LIMIT:
        owned.rename(folder.relay_log, folder.relay_log.with_suffix(".log.1"))
    output = _open_log(folder.relay_log)
    # Isolated and without site: no sitecustomize, no .pth file, and no import path before the standard library.
    command = [python(), "-I", "-S", *(("-B",) if sys.dont_write_bytecode else ()), "-c", _DAEMON]
    try:
        # Not fork, which runs the app's fork handlers, nor subprocess, which takes 1.7 MB and which gevent may patch.
        process = os.posix_spawn(
            command[0],
            [*command, "relay", str(_package_folder()), *dict.fromkeys(_import_paths())],
            settings.relay_environment(folder.path),
            file_actions=[
                (os.POSIX_SPAWN_DUP2, output, 1),
                (os.POSIX_SPAWN_DUP2, output, 2),
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            ],
            setsigmask=(),
        )
    finally:
        os.close(output)
    until = time.monotonic() + START_SECONDS
    while _reap(process) and time.monotonic() < until:
        time.sleep(0.001)
    return process


def _open_log(path: Path) -> int:
    """The relay's log; on a disk that is too full to create it, a relay without a log is better than none."""
    try:
        return owned.open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    except OSError as error:
        if error.errno not in FULL:
            raise
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def _is_our_child(process: int) -> bool:
    """Whether *process*, or the relay in its process group, is a living child of ours; reaps ended ones."""
    return any([_reap(process), _reap(-process)])


def _reap(process: int) -> bool:
    try:
        return os.waitpid(process, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return False


def _backoff(tries: int) -> float:
    """Seconds from the last of *tries* failed starts to the next one."""
    return min(CHECK_EVERY * 2.0 ** min(tries - 1, 10), LONGEST_BACKOFF)


def _last_tries(text: bytes) -> dict[str, tuple[int, float]]:
    """Parse what :meth:`RelayLauncher._next_try` wrote: wanted relay -> number and time of its last try."""
    found = {}
    for line in text.decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            tries, at_s, wanted = line.split(" ", 2)
            found[wanted] = int(tries), float(at_s)
    return found


def _package_folder() -> Path:
    return Path(__file__).parents[2]


def _import_paths() -> Iterator[str]:
    """This process's import paths without its working directory, and the folders of the needed packages.

    The latter are for import hooks: the packages of an editable installation are in no folder of ``sys.path``.
    """
    try:
        here = os.path.realpath(Path.cwd())
    except FileNotFoundError:  # removed together with the release that started the app
        here = ""
    for place in filter(None, map(str, sys.path)):
        if place.startswith("/") or here:
            full = os.path.realpath(place)
            if full != here:
                yield full
    for name in NEEDED:
        with contextlib.suppress(ImportError, ValueError):
            found = importlib.util.find_spec(name)
            if found is not None and found.origin:
                file = Path(found.origin)
                yield str(file.parents[1] if file.stem == "__init__" else file.parent)


def python() -> str:
    """Path of the Python interpreter; under uWSGI and mod_wsgi ``sys.executable`` is the server's own binary.

    Tries the full name first: Debian's own Python has no ``python``, or one of another version.
    """
    folder = Path(sys.prefix, "bin")
    names = (f"python{sys.version_info.major}.{sys.version_info.minor}", "python3")
    return str(next((folder / name for name in names if (folder / name).exists()), folder / "python"))
