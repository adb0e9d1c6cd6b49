"""A relay that may write no large file, on a disk that says it has room: what waits leaves without help."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from t23_middleware.ops.standin import StandInServer
from t23_middleware.state import StateFolder

from ..harness import PATIENCE, ROOT, until
from .readers import stats
from .writers import journal, transfer


@pytest.mark.parametrize("limit", [600_000, 700_000])
def test_all_leaves_though_no_file_may_grow(limit: int, state: Path) -> None:
    """RLIMIT_FSIZE: the outbox fills up, the rest waits in the journals, and all of it is delivered once."""
    folder, count = StateFolder(state), 20_000
    plays = [transfer(n, time.monotonic_ns() - 10**9 + n, f"session-{n % 50}") for n in range(count)]
    for part in range(4):
        journal(folder, f"{part}-dead", *plays[part::4])
    with StandInServer() as api:
        api.fault("status", status=503)
        environ = os.environ | {"T23_API_URL": api.url, "T23_STATE_DIR": str(state)}
        with (state / "said.log").open("wb") as log:
            relay = subprocess.Popen(
                [sys.executable, "-m", "t23_middleware", "relay"],
                env=environ,
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )
        resource.prlimit(relay.pid, resource.RLIMIT_FSIZE, (limit, limit))
        try:
            assert until(lambda: folder.outbox.exists() and stats(folder).waiting > 200)
            assert until(lambda: b"until the outbox is writable again" in (state / "said.log").read_bytes())
            assert stats(folder).waiting < count
            assert relay.poll() is None
            api.heal()
            assert until(lambda: stats(folder)[:3] == (count, 0, count), 6 * PATIENCE), stats(folder)
        finally:
            relay.send_signal(signal.SIGTERM)
            relay.wait(PATIENCE)
        assert len(api.recorded()) == count
        assert b"Traceback" not in (state / "said.log").read_bytes()
