"""The test suites of WSGI frameworks, from their sdists, with every app behind the middleware and without.

A test with another result with the middleware is a difference. A difference counts if it appears twice. The exit code is
1 if one is not explained below, 2 if a suite can't be run. Needs PyPI; with ``--cache`` only once.
``wrap_every_app.py`` does the wrapping.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import t23_middleware  # noqa: E402
from t23_middleware.transfer import NotALine, Opening, decode  # noqa: E402

#: With newer ones Flask's and Falcon's tests fail, bare or not.
PYTEST = "pytest==9.0.2"
#: What the middleware itself needs.
OURS = ("werkzeug", "itsdangerous")
#: Seconds that one run of a suite may take.
PATIENCE = 1200

#: Test id -> its result; the worse of two under one id.
Outcomes = dict[str, str]
WORST = ("failed", "passed", "skipped")


class Cannot(Exception):
    """A suite that can't be run here; the argument says why and what to do."""


class Suite(NamedTuple):
    """A framework's own tests."""

    version: str
    #: What pip installs beside the framework; ``{source}`` is the unpacked sdist.
    requirements: tuple[str, ...]
    #: What pytest gets.
    arguments: tuple[str, ...] = ("tests",)
    environ: Mapping[str, str] = {}
    extras: str = ""
    #: Tests with another result with the middleware, and why that must be so.
    explained: Mapping[str, str] = {}


SUITES: dict[str, Suite] = {
    "flask": Suite("3.1.3", ("asgiref", "greenlet", "python-dotenv")),
    "bottle": Suite("0.13.4", ("mako", "jinja2"), ("test",)),
    "webtest": Suite("3.0.7", (), extras="[tests]"),
    "falcon": Suite(
        "4.4.0",
        ("-r", "{source}/requirements/tests"),
        # It starts ASGI servers, which never call a WSGI app.
        ("tests", "--ignore=tests/asgi/test_asgi_servers.py"),
        {"FALCON_DISABLE_CYTHON": "Y", "PYTHONASYNCIODEBUG": "1"},
    ),
    "werkzeug": Suite(
        "3.1.9",
        # With watchdog 7 the tests of the reloader never end, bare or not.
        ("cffi", "cryptography", "ephemeral-port-reserve", "pytest-timeout", "watchdog<7"),
        ("tests", "--timeout=120"),
    ),
    "webob": Suite(
        "1.8.11",
        (),
        extras="[testing]",
        explained={
            "tests.test_request.TestRequest_functional::test_call_WSGI_app": (
                "identity: compares the returned body with a list; a counted one is our iterable of the same chunks"
            ),
            "tests.test_response::test_response": (
                "identity: the app yields str, which PEP 3333 forbids, and only a body that is a list itself gets by"
            ),
            "tests.test_static.TestFileApp::test_use_wsgi_filewrapper": (
                "identity: asks for the class of a file_wrapper that can't be iterated, so the file is read by our own"
            ),
        },
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 0 where all differences are explained, 1 where one is not, 2 where a suite can't be run."""
    options = _options(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))  # so that nothing is left running
    cache = Path(options.cache or tempfile.mkdtemp(prefix="t23-foreign-suites-")).resolve()
    try:
        print(HEADING, flush=True)
        verdicts = [verdict(name, cache / name) for name in options.suite or SUITES]
    except (Cannot, OSError, subprocess.SubprocessError) as error:
        print(f"foreign_suites: {error}", file=sys.stderr)
        return 2
    finally:
        if options.cache is None:
            shutil.rmtree(cache, ignore_errors=True)
    return 0 if all(verdicts) else 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite", nargs="*", help=f"{', '.join(SUITES)}; without any, all")
    parser.add_argument("--cache", help="where sdists and environments are kept for the next run")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.suite if name not in SUITES]
    if unknown:
        parser.error(f"there is no suite {unknown[0]!r}; take one of {', '.join(SUITES)}")
    return options


HEADING = f"{'suite':18}{'bare':>24}{'wrapped':>24}{'counted':>9}  difference"


def verdict(name: str, folder: Path) -> bool:
    """Print the row of suite *name* and its differences; whether all of them are explained."""
    suite = SUITES[name]
    place = Place.prepared(name, suite, folder)
    bare, wrapped = place.run(suite, wrap=False), place.run(suite, wrap=True)
    counted = place.counted()
    if not counted:
        raise Cannot(f"{name}: not one response was counted, so nothing was wrapped; mend wrap_every_app.py")
    found = differences(bare, wrapped)
    if found.keys() - suite.explained.keys():
        again = differences(place.run(suite, wrap=False), place.run(suite, wrap=True))
        found = {test: what for test, what in found.items() if test in again}
    tail = f"{len(found)}" if found else "none"
    print(f"{f'{name} {suite.version}':18}{told(bare):>24}{told(wrapped):>24}{counted:>9}  {tail}")
    for test, (before, after) in found.items():
        print(f"    {test}: {before} -> {after}; {suite.explained.get(test, 'NOT EXPLAINED')}", flush=True)
    return not found.keys() - suite.explained.keys()


def differences(bare: Outcomes, wrapped: Outcomes) -> dict[str, tuple[str, str]]:
    """The tests with another result, and both results."""
    ends = ((test, bare.get(test, "absent"), wrapped.get(test, "absent")) for test in {**bare, **wrapped})
    return {test: (before, after) for test, before, after in ends if before != after}


def told(outcomes: Outcomes) -> str:
    """Passed, failed and skipped tests in few words."""
    counts = Counter(outcomes.values())
    return f"{counts['passed']} / {counts['failed']} / {counts['skipped']}"


class Place(NamedTuple):
    """A suite's folder: its source, its environment, the code that wraps, and the journals."""

    folder: Path
    source: Path

    @classmethod
    def prepared(cls, name: str, suite: Suite, folder: Path) -> Place:
        """Download, unpack and install *suite* into *folder*, unless that is done."""
        kept = folder / f"{name}-{suite.version}-{tag(suite)}"
        ready = kept / "ready"
        if not ready.exists():
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir(parents=True)
            place = cls(kept, kept)
            place._command(sys.executable, "-m", "venv", str(kept / "venv"))
            place = cls(kept, place._unpacked(name, suite))
            place._install(suite)
            ready.write_text(str(place.source))
        place = cls(kept, Path(ready.read_text()))
        place._inject()
        return place

    @property
    def _python(self) -> str:
        return str(self.folder / "venv" / "bin" / "python")

    def run(self, suite: Suite, *, wrap: bool) -> Outcomes:
        """The result of each test of *suite*."""
        report = self.folder / "report.xml"
        report.unlink(missing_ok=True)
        variables = clean_environ() | dict(suite.environ)
        if wrap:
            shutil.rmtree(self._state, ignore_errors=True)
            variables["WRAP_EVERY_APP_STATE"] = str(self._state)
        options = ("-q", "-p", "no:cacheprovider", f"--junitxml={report}", "-o", "junit_family=xunit2")
        command = [self._python, "-m", "pytest", *options, *suite.arguments]
        said = self.folder / "output.txt"
        with said.open("wb") as output:
            code = ended(
                subprocess.Popen(
                    command,
                    cwd=self.source,
                    env=variables,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
        if code not in (0, 1) or not report.exists():
            raise Cannot(f"pytest ended with {code} in {self.source}: {last_lines(said)}")
        return outcomes_in(report)

    def counted(self) -> int:
        """Responses that the last wrapped run counted; test clients don't close them all."""
        return sum(1 for line in self._lines() if isinstance(line, Opening))

    def _lines(self) -> Iterator[object]:
        for path in sorted(self._state.rglob("*.journal")):
            for line in path.read_bytes().splitlines():
                try:
                    yield decode(line)
                except NotALine:
                    continue  # of a process that a test killed

    @property
    def _state(self) -> Path:
        return self.folder / "state"

    def _unpacked(self, name: str, suite: Suite) -> Path:
        target = self.folder / "sdist"
        sdist = ("--no-deps", "--no-binary", name, "-d", str(target), f"{name}=={suite.version}")
        self._command(self._python, "-m", "pip", "download", "-q", *sdist)
        [archive] = target.iterdir()
        source = self.folder / "source"
        with tarfile.open(archive) as packed:
            packed.extractall(source, filter="data")
        [top] = source.iterdir()
        return top

    def _install(self, suite: Suite) -> None:
        wanted = [word.format(source=self.source) for word in suite.requirements]
        project = f"{self.source}{suite.extras}"
        pip = (self._python, "-m", "pip", "install", "-q")
        self._command(*pip, project, PYTEST, *wanted, variables=suite.environ)
        # Not in one go: a suite whose own framework we need must keep its sdist.
        self._command(*pip, *OURS)

    def _inject(self) -> None:
        """Let each Python of the environment load the wrapping, also servers that a test starts.

        A copy, because Werkzeug's reloader restarts on every file that changes.
        """
        place = self.folder / "injected"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        package = Path(t23_middleware.__file__).parent
        shutil.copytree(package, place / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(HERE / "wrap_every_app.py", place)
        load = 'import os; "WRAP_EVERY_APP_STATE" in os.environ and __import__("wrap_every_app")'
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        libraries = subprocess.run([self._python, "-c", ask], check=True, stdout=subprocess.PIPE, text=True)
        (Path(libraries.stdout.strip()) / "wrap_every_app.pth").write_text(f"{place}\n{load}\n")

    def _command(self, *command: str, variables: Mapping[str, str] | None = None) -> None:
        environ = clean_environ() | dict(variables or {})
        done = subprocess.run(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise Cannot(f"{' '.join(command)} failed: {done.stdout.strip()[-500:]}")


def tag(suite: Suite) -> str:
    """A name that differs for other requirements or another Python."""
    words = "|".join((*suite.requirements, PYTEST, suite.extras, sys.version))
    return hashlib.sha256(words.encode()).hexdigest()[:8]


def clean_environ() -> dict[str, str]:
    """The environment without variables that change how the suites run."""
    foreign = ("T23_", "PYTEST_", "PYTHON", "FLASK_", "WRAP_EVERY_APP_")
    return {name: text for name, text in os.environ.items() if not name.startswith(foreign)}


def ended(process: subprocess.Popen[bytes]) -> int:
    """The exit code of *process*; if it takes too long, it and its children are ended."""
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        raise Cannot(f"a suite took more than {PATIENCE} s; look at which of its tests waits") from None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait(10)


def last_lines(path: Path) -> str:
    return path.read_text(errors="replace").strip()[-500:]


def outcomes_in(report: Path) -> Outcomes:
    """The result of each test in pytest's JUnit report."""
    found: Outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        test = f"{case.get('classname')}::{case.get('name')}"
        said = outcome(case)
        found[test] = min(said, found.get(test, said), key=WORST.index)
    return found


def outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


if __name__ == "__main__":
    sys.exit(main())
