"""The API for these tests, and a relay as a service runs it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from t23_middleware.ops.standin import StandIn, StandInServer

from ..harness import ROOT


class PlainAPI(StandIn):
    """A stand-in without a cache, so that a report which comes twice is recorded twice; counts the requests."""

    def __init__(self) -> None:
        # An hour at each look: no answer is young enough to be given again.
        super().__init__(clock=itertools.count(1_700_000_000, 3600).__next__)
        self.asked = 0

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        self.asked += 1
        return super().__call__(environ, start_response)


def plain_api() -> StandInServer:
    return StandInServer(app=PlainAPI())


@contextmanager
def relay(state: Path, api_url: str, *options: str, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """``t23-middleware relay`` on *state*; told to end, and waited for, where it still runs."""
    settings = {"T23_API_URL": api_url, "T23_STATE_DIR": str(state), **environ}
    with state.with_suffix(".relay.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "t23_middleware", "relay", *options],
            env=os.environ | settings,
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
