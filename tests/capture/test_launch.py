"""The relay is started where none runs, not too often, and outlives who started it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from t23_middleware import Settings
from t23_middleware.capture import launch
from t23_middleware.capture.launch import LONGEST_BACKOFF, RelayLauncher, python, start_relay
from t23_middleware.state import StateFolder

from .servers import ask, media

ROOT = Path(__file__).parents[2]


class Clock:
    """Stands in for the ``time`` module; both its clocks go on only when told."""

    def __init__(self) -> None:
        self.passed = 0.0
        self._began = time.time()

    def monotonic(self) -> float:
        return 1000.0 + self.passed

    def time(self) -> float:
        """Wall clock, beside which files get their real times: so a little after the real one."""
        return self._began + 0.05 + self.passed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(launch, "time", clock)
    return clock


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> list[float]:
    """When a relay was started, in seconds since the test began; none of them ever takes its lock."""
    starts: list[float] = []

    def start(settings: Settings, folder: StateFolder) -> int:
        starts.append(clock.passed)
        return os.getpid()  # no child of ours

    monkeypatch.setattr(launch, "start_relay", start)
    return starts


def settings(state: Path, **more: Any) -> Settings:
    return Settings(environ={}, **{"api_url": "http://127.0.0.1:9", "state_dir": str(state), **more})


def launcher(folder: StateFolder, **more: Any) -> RelayLauncher:
    return RelayLauncher(settings(folder.path, **more), folder)


def pass_time(launchers: list[RelayLauncher], clock: Clock, seconds: float, step: float = 0.1) -> None:
    """Each launcher sees a close line every *step* seconds."""
    until = clock.passed + seconds
    while clock.passed < until:
        for one in launchers:
            one.line_written()
        clock.passed = round(clock.passed + step, 3)


HOLD = """
import json, os, sys
from pathlib import Path
from t23_middleware.state import hold_lock
lock = hold_lock(Path(sys.argv[1]))
os.write(lock, sys.argv[2].encode())
print("held", flush=True)
sys.stdin.read()
"""


class Relay:
    """A process that holds the relay's lock, and does nothing else."""

    def __init__(self, folder: StateFolder, digest: str, left: bool = False) -> None:
        holder = json.dumps({"pid": 1, "version": "0", "digest": digest, "automatic": True, "left": left})
        self._process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder.relay_lock), holder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "held\n"

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def relay(folder: StateFolder) -> Iterator[Relay]:
    relay = Relay(folder, settings(folder.path).relay_digest())
    yield relay
    relay.end()


def test_close_line_starts_relay(folder: StateFolder, started: list[float]) -> None:
    """A close line starts a relay if none runs."""
    launcher(folder).line_written()
    assert started == [0.0]


def test_middleware_close_line_starts_relay(wrap: Any, started: list[float]) -> None:
    """A close line that the middleware writes starts a relay."""
    ask(wrap(media(b"film"), relay="auto"))
    assert started == [0.0]


@pytest.mark.parametrize("relay", ["external", "off"])
def test_no_start_with_external_or_off(
    folder: StateFolder, started: list[float], clock: Clock, relay: str
) -> None:
    """No relay is started if a service runs it (``external``) or if none is wanted (``off``)."""
    folder.unfinished.touch()
    one = launcher(folder, relay=relay)
    one.wake()
    pass_time([one], clock, 10)
    assert started == []


def test_no_start_beside_running_relay(
    folder: StateFolder, started: list[float], clock: Clock, relay: Relay
) -> None:
    """No relay is started while another one runs."""
    pass_time([launcher(folder)], clock, 10)
    assert started == []


def test_lock_checked_once_a_second(
    folder: StateFolder, started: list[float], clock: Clock, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is checked at most once a second."""
    looks: list[float] = []

    def look(path: Path) -> bool:
        looks.append(clock.passed)
        return True

    monkeypatch.setattr(launch, "lock_is_held", look)
    pass_time([launcher(folder)], clock, 5)
    assert looks == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_dead_relay_gets_successor(
    folder: StateFolder, started: list[float], clock: Clock, relay: Relay
) -> None:
    """A relay that dies gets a successor at the next close line."""
    one = launcher(folder)
    pass_time([one], clock, 3)
    relay.end()
    pass_time([one], clock, 1)
    assert started == [3.0]


def test_one_worker_starts_relay(folder: StateFolder, started: list[float], clock: Clock) -> None:
    """While one worker starts the relay, the other workers do not."""
    pass_time([launcher(folder) for _ in range(8)], clock, 0.9)
    assert started == [0.0]


def test_failed_starts_retried_with_backoff(
    folder: StateFolder, started: list[float], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Failed starts are retried with growing waits up to a limit, and logged once."""
    pass_time([launcher(folder)], clock, 300)
    assert started[:6] == [0.0, 1.0, 3.0, 7.0, 15.0, 31.0]
    waits = [after - before for before, after in zip(started, started[1:], strict=False)]
    assert max(waits) == LONGEST_BACKOFF
    assert waits == sorted(waits)
    (told,) = [record.getMessage() for record in caplog.records]
    assert f"T23_STATE_DIR={folder.path} t23-middleware relay" in told


def test_waits_end_with_a_relay_that_works(folder: StateFolder, started: list[float], clock: Clock) -> None:
    """The relay removes the file that counts the tries once it works."""
    one = launcher(folder)
    pass_time([one], clock, 16)
    folder.relay_start.unlink()
    del started[:]
    begun = clock.passed
    pass_time([one], clock, 4)
    first = started[0]
    assert first - begun <= 1.1
    assert [round(start - first, 1) for start in started] == [0.0, 1.0, 3.0][: len(started)]
    assert len(started) >= 2


def test_twelve_workers_try_together(folder: StateFolder, started: list[float], clock: Clock) -> None:
    """All workers of an app together try as often as one would, whenever each began."""
    pass_time([launcher(folder) for _ in range(12)], clock, 60, step=0.5)
    pass_time([launcher(folder) for _ in range(12)], clock, 240, step=0.5)
    assert started[:6] == [0.0, 1.0, 3.0, 7.0, 15.0, 31.0]
    assert len(started) <= 12


def test_each_app_tries_itself(folder: StateFolder, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Of two apps on one folder with other settings each, neither keeps the other from trying, and each has its waits."""
    started: list[tuple[float, float]] = []

    def start(settings: Settings, folder: StateFolder) -> int:
        started.append((settings.timeout, clock.passed))
        return os.getpid()

    monkeypatch.setattr(launch, "start_relay", start)
    pass_time([launcher(folder), launcher(folder, timeout=3), launcher(folder, timeout=4)], clock, 16)
    for timeout in (10, 3, 4):
        assert [at for which, at in started if which == timeout] == [0.0, 1.0, 3.0, 7.0, 15.0]


def test_many_releases_are_forgotten(folder: StateFolder, started: list[float], clock: Clock) -> None:
    """The file of tries stays short, however many settings were tried."""
    for timeout in range(1, 50):
        launcher(folder, timeout=timeout).line_written()
    assert len(started) == 49
    assert len(folder.relay_start.read_bytes().splitlines()) <= 4


@pytest.mark.parametrize("change", ["settings", "code"])
def test_new_release_tries_at_once(
    folder: StateFolder,
    started: list[float],
    clock: Clock,
    change: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tries of a release that could not start its relay don't hold up the next release."""
    pass_time([launcher(folder)], clock, 100)
    del started[:]
    begun = clock.passed
    if change == "code":
        monkeypatch.setattr(launch, "VERSION", "99")
    new = launcher(folder, **({"timeout": 3} if change == "settings" else {}))
    pass_time([new], clock, 2)
    assert started[0] - begun <= 1.0


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"many 1 2", b"3", b"9" * 5000, b"99999999 1 x"])
def test_damaged_count_of_tries(
    folder: StateFolder, started: list[float], clock: Clock, content: bytes
) -> None:
    """A damaged file counts as none."""
    folder.relay_start.write_bytes(content)
    pass_time([launcher(folder)], clock, 2)
    assert started == [0.0, 1.0]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["create", "write"])
def test_full_disk_starts_relay(
    folder: StateFolder,
    started: list[float],
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    where: str,
) -> None:
    """A relay that died is replaced also where its file of tries can't be created or written, with the same waits."""

    def refused(*args: object) -> int:
        raise OSError(code, os.strerror(code))

    if where == "write":
        monkeypatch.setattr(os, "pwrite", refused)
    else:
        monkeypatch.setattr(launch.owned, "open_file", refused)
    pass_time([launcher(folder)], clock, 16)
    assert started == [pytest.approx(second, abs=1) for second in (0, 1, 3, 7, 15)]


def test_full_disk_starts_without_log(folder: StateFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the relay's log can't be created, the relay starts and logs nothing; another error is reported."""
    spawned: list[object] = []
    monkeypatch.setattr(
        launch.os, "posix_spawn", lambda *args, **options: spawned.append(args) or os.getpid()
    )
    for code, starts in ((errno.ENOSPC, 1), (errno.EACCES, 1)):

        def refused(*args: object, code: int = code) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(launch.owned, "open_file", refused)
        with contextlib.suppress(PermissionError):
            start_relay(settings(folder.path), folder)
        assert len(spawned) == starts


def test_each_failure_is_logged(
    folder: StateFolder, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After a relay ran in between, a start that fails again is logged again."""

    def refused(settings: Settings, folder: StateFolder) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(launch, "start_relay", refused)
    one = launcher(folder)
    pass_time([one], clock, 5)
    relay = Relay(folder, settings(folder.path).relay_digest())
    pass_time([one], clock, 2)
    relay.end()
    pass_time([one], clock, 20)
    assert [record.t23_event for record in caplog.records] == ["relay_not_started"] * 2


@pytest.mark.parametrize("left", [False, True])
def test_any_request_replaces_dead_relay(
    folder: StateFolder, started: list[float], clock: Clock, left: bool
) -> None:
    """A relay that was killed with work left gets a successor by any request; one that left by itself does not."""
    relay = Relay(folder, settings(folder.path).relay_digest(), left=left)
    one = launcher(folder)
    one.response_started()
    relay.end()
    folder.unfinished.touch()
    for _ in range(3):
        clock.passed += 1.1
        one.wake()
    assert len(started) == (0 if left else 2)


def test_successor_waits_for_outdated_relay(folder: StateFolder, started: list[float], clock: Clock) -> None:
    """A worker that is newer than a relay with other settings starts the next one at once: no request may follow."""
    other = Relay(folder, "00000000")
    os.utime(folder.relay_lock, (clock.time() - 10, clock.time() - 10))
    try:
        launcher(folder).response_started()
        assert started == [0.0]
    finally:
        other.end()


def test_raising_start_logged_once(
    folder: StateFolder, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A start that raises is logged once, and the exception never reaches the app."""

    def refused(settings: Settings, folder: StateFolder) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(launch, "start_relay", refused)
    pass_time([launcher(folder)], clock, 20)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "Resource temporarily unavailable" in told


def test_first_request_starts_only_with_work(folder: StateFolder, started: list[float]) -> None:
    """The first request starts a relay only if work waits."""
    launcher(folder).wake()
    assert started == []
    folder.unfinished.touch()
    launcher(folder).wake()
    assert started == [0.0]


def test_requests_replace_outdated_relay(folder: StateFolder, started: list[float], clock: Clock) -> None:
    """After a relay with other settings has ended, the next request starts its successor."""
    other = Relay(folder, "00000000")
    one = launcher(folder)
    try:
        one.line_written()
    finally:
        other.end()
    clock.passed += 1
    one.wake()
    assert started == [1.0]


# The real start.

STAND_IN = """
import json, os, sys
def main(words):
    told = {
        "pid": os.getpid(), "parent": os.getppid(), "session": os.getsid(0), "group": os.getpgid(0), "cwd": os.getcwd(),
        "arguments": words, "environment": dict(os.environ), "path": sys.path, "modules": sorted(sys.modules),
        "files": sorted({os.path.realpath(f"/proc/self/fd/{fd}") for fd in ("0", "1", "2")}),
        "inherited": [
            fd for fd in map(int, os.listdir("/proc/self/fd")) if fd > 2 and os.path.exists(f"/proc/self/fd/{fd}")
        ],
    }
    print("the relay speaks", flush=True)
    place = os.environ["T23_STATE_DIR"]
    with open(f"{place}/told.part", "w") as file:
        json.dump(told, file)
    os.rename(f"{place}/told.part", f"{place}/told")
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in the place of ours that says how it was started."""
    package = tmp_path / "package" / "t23_middleware"
    (package / "ops").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "ops" / "__init__.py").touch()
    (package / "ops" / "cli.py").write_text(STAND_IN)
    monkeypatch.setattr(launch, "_package_folder", lambda: package.parent)
    return package.parent


def told_by_the_relay(folder: StateFolder) -> Any:
    deadline = time.monotonic() + 60
    while not (folder.path / "told").exists():
        assert time.monotonic() < deadline, folder.relay_log.read_text()
        time.sleep(0.01)
    return json.loads((folder.path / "told").read_text())


def has_children() -> bool:
    """Whether this process has any child, living or dead."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def start_and_reap(settings: Settings, folder: StateFolder) -> None:
    process = start_relay(settings, folder)
    deadline = time.monotonic() + 60
    while launch._is_our_child(process):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not has_children()


@pytest.mark.usefixtures("stand_in")
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_relay_is_detached_process(folder: StateFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The relay is not a child of the app, has a session of its own, and leaves no zombie."""
    monkeypatch.setenv("DATABASE_PASSWORD", "hidden")
    start_and_reap(settings(folder.path, session_secret="hidden-too", timeout=7), folder)
    told = told_by_the_relay(folder)
    assert told["parent"] != os.getpid()
    assert told["session"] != os.getsid(0)
    assert told["group"] != os.getpgid(0)
    assert told["cwd"] == "/"
    assert told["arguments"] == ["relay"]
    assert told["files"] == ["/dev/null", str(folder.relay_log)]
    assert told["inherited"] == []
    assert not any("hidden" in value for value in told["environment"].values())
    assert told["environment"]["T23_API_URL"] == "http://127.0.0.1:9"
    assert told["environment"]["T23_TIMEOUT"] == "7"
    assert "the relay speaks" in folder.relay_log.read_text()
    assert folder.relay_log.stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("stand_in")
def test_relay_log_rotation(folder: StateFolder) -> None:
    """A relay log that has grown too large is renamed, and a new one begins (rotation)."""
    folder.relay_log.write_text("x" * (launch.LOG_LIMIT + 1))
    start_relay(settings(folder.path), folder)
    told_by_the_relay(folder)
    assert folder.relay_log.stat().st_size < 1000
    assert folder.relay_log.with_suffix(".log.1").stat().st_size == launch.LOG_LIMIT + 1


def test_missing_interpreter_is_told(
    folder: StateFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The app's log says that the relay can't be started, and nothing is left of the try."""
    monkeypatch.setattr(launch, "python", lambda: str(tmp_path / "nothing"))
    launcher(folder).line_written()
    (told,) = [record.getMessage() for record in caplog.records]
    assert "No such file or directory" in told
    assert not has_children()


@pytest.mark.usefixtures("stand_in")
def test_start_with_closed_standard_files(folder: StateFolder) -> None:
    """A daemon that closed its standard files starts a relay whose output is in relay.log."""
    script = (
        "import os, sys; from pathlib import Path; from t23_middleware import Settings;"
        "from t23_middleware.capture import launch; from t23_middleware.state import StateFolder;"
        "launch._package_folder = lambda: Path(sys.argv[2]);"
        "[os.close(number) for number in (0, 1, 2)];"
        "state = Path(sys.argv[1]);"
        "launch.start_relay(Settings(environ={}, api_url='http://127.0.0.1:9', state_dir=str(state)), StateFolder(state))"
    )
    place = str(launch._package_folder())
    subprocess.run([sys.executable, "-c", script, str(folder.path), place], cwd=ROOT, check=True, timeout=60)
    assert told_by_the_relay(folder)["files"] == ["/dev/null", str(folder.relay_log)]
    assert "the relay speaks" in folder.relay_log.read_text()


# Where the relay imports from.

HOOKED = """
import importlib.abc, importlib.util, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "socks":
            return importlib.util.spec_from_file_location(name, {file!r})
sys.meta_path.insert(0, Finder())
"""


def start_from(script: str, folder: StateFolder, stand_in: Path, cwd: Path, **environ: str) -> Any:
    """How a relay was started that an app starts in *cwd*, after it ran *script*."""
    script += f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from t23_middleware import Settings
from t23_middleware.capture import launch
from t23_middleware.state import StateFolder
launch._package_folder = lambda: Path({str(stand_in)!r})
state = Path({str(folder.path)!r})
launch.start_relay(Settings(environ={{}}, api_url="http://127.0.0.1:9", state_dir=str(state)), StateFolder(state))
"""
    subprocess.run([sys.executable, "-c", script], cwd=cwd, env=os.environ | environ, check=True, timeout=60)
    return told_by_the_relay(folder)


def test_relay_imports_as_its_worker(folder: StateFolder, stand_in: Path, tmp_path: Path) -> None:
    """Places that only the worker knows come behind the standard library; its working directory is none of them."""
    eggs, here = tmp_path / "eggs", tmp_path / "here"
    eggs.mkdir()
    here.mkdir()
    (eggs / "json.py").write_text("raise SystemExit('shadowed')")
    (here / "sitecustomize.py").write_text("raise SystemExit('customized')")
    script = f"import json, sys; sys.path[0:0] = [{str(eggs)!r}, '', {str(here)!r}, '.']"
    told = start_from(script, folder, stand_in, here)
    assert str(eggs) in told["path"]
    library = str(Path(json.__file__).parents[1])
    assert told["path"].index(library) < told["path"].index(str(eggs))
    assert not {"", ".", str(here)} & set(told["path"])
    assert not {"site", "sitecustomize"} & set(told["modules"])


def test_relay_knows_what_hooks_find(folder: StateFolder, stand_in: Path, tmp_path: Path) -> None:
    """An import hook, as an editable installation has one, is no place; what it finds is found all the same."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "socks.py").touch()
    told = start_from(HOOKED.format(file=str(hidden / "socks.py")), folder, stand_in, tmp_path)
    assert told["path"][-1] == str(hidden) or str(hidden) in told["path"]


def test_relay_starts_from_removed_folder(folder: StateFolder, stand_in: Path, tmp_path: Path) -> None:
    """The working directory of an old release is gone, and relative places with it."""
    gone = tmp_path / "gone"
    gone.mkdir()
    # Python 3.13.0 itself can't import socket there.
    script = "import os, socket, sys; os.rmdir(os.getcwd()); sys.path.append('lib')"
    told = start_from(script, folder, stand_in, gone)
    assert all(place.startswith("/") for place in told["path"])


def test_own_package_wins(folder: StateFolder, stand_in: Path, tmp_path: Path) -> None:
    """Another copy of this package on the path is not taken for the worker's."""
    other = tmp_path / "other" / "t23_middleware"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise SystemExit('the wrong one')")
    told = start_from(f"import sys; sys.path.append({str(other.parent)!r})", folder, stand_in, tmp_path)
    assert told["arguments"] == ["relay"]


def test_interpreter_of_prefix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The interpreter is the one in ``sys.prefix``, even if ``sys.executable`` is another program."""
    monkeypatch.setattr(sys, "executable", "/usr/bin/uwsgi")
    version = subprocess.run(
        [python(), "-c", "import sys; print(sys.prefix, *sys.version_info[:2])"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert version.stdout.split() == [sys.prefix, *map(str, sys.version_info[:2])]


def test_interpreter_without_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter that has only the name ``python3`` is found."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    (tmp_path / "bin").mkdir()
    assert python() == str(tmp_path / "bin" / "python")
    (tmp_path / "bin" / "python3").touch()
    assert python() == str(tmp_path / "bin" / "python3")
