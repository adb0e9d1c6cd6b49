"""The demo's API: the stand-in, with a switch for its conditions."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Mapping

from .standin import StandInServer

#: Condition of the API -> the stand-in's fault for it.
WELL, DENY, HANG, DOWN = "well", "deny", "hang", "down"
CONDITIONS: Mapping[str, str | None] = {WELL: None, DENY: "deny", HANG: "hang", DOWN: None}


class APISwitch:
    """Sets the condition of the API. *environ* is the site's environment, for the relay that :meth:`deliver` starts."""

    def __init__(self, api: StandInServer, environ: Mapping[str, str]) -> None:
        self.condition = WELL
        #: Number of calls of :meth:`deliver`.
        self.delivered = 0
        self._api = api
        self._environ = environ
        self._switching, self._delivering = threading.Lock(), threading.Lock()
        self._relay: subprocess.Popen[bytes] | None = None
        self._closed = False

    def switch_to(self, condition: str) -> None:
        """Set the condition of the API, one of :data:`CONDITIONS`."""
        with self._switching:
            if condition == self.condition:
                return
            if condition == DOWN:
                self._api.stop()
            elif self.condition == DOWN:
                self._api.start()
            fault = CONDITIONS[condition]
            self._api.heal() if fault is None else self._api.fault(fault)
            self.condition = condition

    def deliver(self) -> None:
        """Deliver the waiting reports with ``relay --once``, instead of waiting for the relay's next attempt.

        This runs in a thread, after any earlier call: that one may have found the API still off.
        """
        self.delivered += 1
        threading.Thread(target=self._deliver, name="deliver", daemon=True).start()

    def _deliver(self) -> None:
        command = [sys.executable, "-m", "t23_middleware", "relay", "--once"]
        with self._delivering:
            if self.condition != WELL or self._closed:
                return
            self._relay = subprocess.Popen(
                command, env=self._environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            self._relay.wait()

    def close(self) -> None:
        """Stop the relay that :meth:`deliver` started."""
        self._closed = True
        if self._relay is not None and self._relay.poll() is None:
            self._relay.terminate()
        with self._delivering:
            pass  # wait until it has ended
