"""The demo as a process, as a newcomer starts it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import t23_middleware

from ..harness import PATIENCE, need, until

_SCRIPT = """
import sys
from t23_middleware.ops.cli import main
raise SystemExit(main(["demo", *sys.argv[1:]]))
"""


class Demo:
    """A demo whose temporary files are in *folder*, started in *cwd*; with its output, and asked by HTTP."""

    def __init__(self, folder: Path, *options: str, cwd: Path | None = None) -> None:
        need("gunicorn")
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        self._output, script = folder / "output", folder / "demo.py"
        script.write_text(_SCRIPT)
        environ = os.environ | {
            "PYTHONPATH": str(Path(t23_middleware.__file__).parents[1]),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "TMPDIR": str(self.temporary),
        }
        with self._output.open("wb") as file:
            command = [sys.executable, script, *options]
            self.process = subprocess.Popen(command, cwd=cwd or folder, env=environ, stdout=file, stderr=file)

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def relay_log(self) -> str:
        """What its relay had to say."""
        return "".join(log.read_text() for log in self.temporary.glob("t23-demo-*/state/relay.log"))

    def wait_until_ready(self) -> None:
        assert until(lambda: "Each report appears" in self.output or self.process.poll() is not None)
        assert self.process.poll() is None, self.output

    @property
    def port(self) -> int:
        return int(self._found(r"running at http://127.0.0.1:(\d+)/"))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def api_port(self) -> int:
        return int(self._found(r"stand-in at http://127.0.0.1:(\d+)\."))

    def ask(
        self, path: str, body: str | None = None, port: int | None = None, **headers: str
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """Answer and body of a GET, or of a POST with *body*, on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=PATIENCE)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request("GET" if body is None else "POST", path, body, named)
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()

    def state(self) -> dict[str, Any]:
        """What the page shows."""
        state: dict[str, Any] = json.loads(self.ask("/demo/state.json")[1])
        return state

    def turn(self, condition: str) -> int:
        """HTTP status of turning the API."""
        body = json.dumps({"is": condition})
        return self.ask("/demo/api", body, Content_Type="application/json")[0].status

    def end(self) -> int:
        """Ctrl-C; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def _found(self, pattern: str) -> str:
        found = re.search(pattern, self.output)
        assert found is not None, self.output
        return found[1]


@contextmanager
def demo(folder: Path, *options: str, cwd: Path | None = None) -> Iterator[Demo]:
    """The demo, once it is ready; ended by Ctrl-C."""
    running = Demo(folder, *options, cwd=cwd)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.end()


def fault(demo: Demo, **fault: str) -> None:
    """Turn on a fault of the demo's stand-in, or heal it where none is named."""
    connection = http.client.HTTPConnection("127.0.0.1", demo.api_port, timeout=PATIENCE)
    try:
        method = "POST" if fault else "DELETE"
        connection.request(method, "/_faults", json.dumps(fault), {"Content-Type": "application/json"})
        assert connection.getresponse().status < 300
    finally:
        connection.close()
