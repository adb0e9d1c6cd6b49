"""The demo's API: the stand-in, with a plug that can be pulled."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Mapping

from .standin import StandInServer

#: How the API can be -> the fault of the stand-in that makes it so.
WELL, DENY, HANG, DOWN = "well", "deny", "hang", "down"
CONDITIONS: Mapping[str, str | None] = {WELL: None, DENY: "deny", HANG: "hang", DOWN: None}


class APISwitch:
    """Turns the API off and on; *environ* is that of the site, for the relay that delivers once it is back."""

    def __init__(self, api: StandInServer, environ: Mapping[str, str]) -> None:
        self.condition = WELL
        #: How often reports were delivered by hand.
        self.delivered = 0
        self._api = api
        self._environ = environ
        self._switching, self._delivering = threading.Lock(), threading.Lock()
        self._relay: subprocess.Popen[bytes] | None = None
        self._closed = False

    def switch_to(self, condition: str) -> None:
        """From now on the API is so; *condition* is one of :data:`CONDITIONS`."""
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
        """Deliver what waits as an operator does who knows that the API is back, without waiting for the next try.

        In a thread, and after what was delivered so before: that may have met the API while it was off.
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
        """End what :meth:`deliver` began."""
        self._closed = True
        if self._relay is not None and self._relay.poll() is None:
            self._relay.terminate()
        with self._delivering:
            pass  # it has ended
