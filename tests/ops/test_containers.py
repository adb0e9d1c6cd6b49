"""A relay in another PID namespace, as in a container, and an app that is PID 1 of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from t23_middleware.ops.standin import StandInServer
from t23_middleware.state import LockHolder, StateFolder, lock_is_held, pid_namespace

from ..harness import PATIENCE, ROOT, until
from .commands import Site

UNSHARE = ("unshare", "-p", "--fork", "--mount-proc", "--kill-child")


def can_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARE, "true"], capture_output=True, timeout=30).returncode == 0


pytestmark = pytest.mark.skipif(not can_unshare(), reason="PID namespaces need root")


@pytest.fixture
def site(state: Path, api: StandInServer) -> Site:
    return Site(state, api)


@contextmanager
def relay_elsewhere(site: Site, **environ: str) -> Iterator[None]:
    """A relay in a PID namespace of its own."""
    process = subprocess.Popen(
        [*UNSHARE, sys.executable, "-m", "t23_middleware", "relay"],
        env=os.environ | site.environ | environ,
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert until(lambda: site.folder.outbox.exists() and lock_is_held(site.folder.relay_lock))
        yield
    finally:
        process.kill()  # --kill-child ends the relay with it
        process.wait()
        assert until(lambda: not lock_is_held(site.folder.relay_lock))


def test_take_over_refused_at_once(site: Site) -> None:
    """A command on the host says where the relay is, and ends no process here that has the same id."""
    with relay_elsewhere(site, _T23_STARTED_BY_WORKER="1"):
        done = site.run("relay", "--once")
        assert done.returncode == 2
        assert "a relay in another container (process 1 there)" in done.stderr
        assert lock_is_held(site.folder.relay_lock)


@pytest.mark.parametrize("command", ["status", "check"])
def test_relay_elsewhere_is_named(site: Site, command: str) -> None:
    """Its process id is never shown as if it were one of here."""
    with relay_elsewhere(site):
        done = site.run(command)
        assert "in another container (process 1 there)" in " ".join(done.stdout.split())


def test_json_has_no_foreign_pid(site: Site) -> None:
    """Programs get no process id that would be another's here."""
    with relay_elsewhere(site):
        done = site.run("status", "--json")
        assert json.loads(done.stdout)["relay"]["pid"] is None


def test_holder_knows_its_namespace() -> None:
    """One that says nothing of its namespace, or is in ours, is here."""
    assert not LockHolder(1, "0", "", True).is_elsewhere
    assert not LockHolder(1, "0", "", True, False, pid_namespace()).is_elsewhere
    assert LockHolder(1, "0", "", True, False, pid_namespace() + 1).is_elsewhere


#: An app that is PID 1 and never reaps: after each second it counts the zombies that it has.
PID_1 = """
import os, sys, time
from pathlib import Path
from t23_middleware import T23Middleware
from t23_middleware.capture import launch
launch._package_folder = lambda: Path(sys.argv[1])
assert os.getpid() == 1

def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "video/mp4"), ("Content-Length", "5")])
    return [b"12345"]

def zombies():
    stats = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")]
    return sum(stat[:2] == ["Z", "1"] for stat in stats)

wrapped = T23Middleware(app)
starts = Path(sys.argv[1], "starts")
until = time.monotonic() + 30
while time.monotonic() < until:
    body = wrapped({"REQUEST_METHOD": "GET", "PATH_INFO": "/", "QUERY_STRING": "session_id=s&photo_id=7"}, lambda *a: None)
    list(body)
    body.close()
    time.sleep(0.1)
    if starts.exists() and len(starts.read_text()) >= 3 and not zombies():
        print("none")
        break
else:
    print(zombies())
"""
#: A relay that ends at once.
ENDS = """
from pathlib import Path
def main(words):
    with (Path(__file__).parents[2] / "starts").open("a") as file:
        file.write("x")
    return 1
"""


def test_app_as_pid_1_keeps_no_zombie(folder: StateFolder, tmp_path: Path) -> None:
    """Relays that end are reaped by the app that is their init."""
    package = tmp_path / "package" / "t23_middleware"
    (package / "ops").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "ops" / "__init__.py").touch()
    (package / "ops" / "cli.py").write_text(ENDS)
    done = subprocess.run(
        [*UNSHARE, sys.executable, "-c", PID_1, str(package.parent)],
        env=os.environ | {"T23_API_URL": "http://127.0.0.1:9", "T23_STATE_DIR": str(folder.path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert done.stdout == "none\n", done.stderr


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bwrap is not installed")
def test_no_shell_is_needed(folder: StateFolder) -> None:
    """An image without /bin/sh."""
    script = (
        "import sys; from pathlib import Path; from t23_middleware import Settings;"
        "from t23_middleware.capture.launch import start_relay; from t23_middleware.state import StateFolder;"
        "import time; assert not Path('/bin/sh').stat().st_size;"
        "folder = StateFolder(Path(sys.argv[1]));"
        "start_relay(Settings(environ={}, api_url='http://127.0.0.1:9', state_dir=sys.argv[1]), folder);"
        "until = time.monotonic() + 30\n"
        "while not folder.outbox.exists() and time.monotonic() < until: time.sleep(0.05)"
    )
    shells = [path for path in ("/usr/bin/sh", "/usr/bin/dash", "/usr/bin/bash") if Path(path).exists()]
    hidden = [word for path in shells for word in ("--ro-bind", "/dev/null", path)]
    begin = [
        "bwrap",
        "--die-with-parent",
        "--unshare-pid",
        "--bind",
        "/",
        "/",
        "--dev",
        "/dev",
        "--proc",
        "/proc",
    ]
    subprocess.run(
        [*begin, *hidden, "--chdir", str(ROOT), sys.executable, "-c", script, str(folder.path)],
        check=True,
        timeout=2 * PATIENCE,
    )
    assert folder.outbox.exists(), folder.relay_log.read_text()


def test_signals_reach_a_started_relay(folder: StateFolder) -> None:
    """A thread of uWSGI blocks signals; the relay that it starts must not inherit that."""
    script = (
        "import signal, sys; from pathlib import Path; from t23_middleware import Settings;"
        "from t23_middleware.capture.launch import start_relay; from t23_middleware.state import StateFolder;"
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals());"
        "start_relay(Settings(environ={}, api_url='http://127.0.0.1:9', state_dir=sys.argv[1]),"
        " StateFolder(Path(sys.argv[1])))"
    )
    (folder.unfinished).touch()
    subprocess.run([sys.executable, "-c", script, str(folder.path)], cwd=ROOT, check=True, timeout=60)
    assert until(lambda: folder.relay_holder() is not None)
    holder = folder.relay_holder()
    assert holder is not None
    try:
        os.kill(holder.pid, signal.SIGTERM)
    except ProcessLookupError:
        return  # it had left by itself
    assert until(lambda: not lock_is_held(folder.relay_lock))
