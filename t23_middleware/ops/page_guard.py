"""Limits and logs attempts to guess the token of the operator's pages."""

from __future__ import annotations

import ipaddress
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

log = logging.getLogger(__name__)

#: Seconds by which the response to a wrong token is delayed. It is short because the worker waits, too.
DELAY = 0.1
#: Wrong tokens in a row that are checked for one address; after that, one per :data:`REFILL` seconds.
BURST, REFILL = 12, 1.0
#: Addresses that are remembered; beyond that, the one with the oldest wrong token is forgotten.
MAX_ADDRESSES = 1000
#: Seconds between two log lines, at least.
LOG_EVERY = 60.0


class Guard:
    """Counts the wrong tokens of each address, in one process.

    *clock* returns seconds of a monotonic clock; *sleep* waits for a number of seconds.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        #: Address -> the time at which all its wrong tokens expire.
        self._forgiven: OrderedDict[str, float] = OrderedDict()
        self._waiting = False
        self._wrong = 0
        self._logged_at: float | None = None

    def is_closed_to(self, address: str) -> bool:
        """Whether any token of *address* is refused unchecked, so that guessing gets no faster."""
        return self._forgiven.get(address, 0.0) - self._clock() > (BURST - 1) * REFILL

    def wrong(self, address: str) -> None:
        """Count a wrong token of *address*, and delay its response unless another response is being delayed."""
        forgiven = max(self._forgiven.pop(address, 0.0), self._clock())
        self._forgiven[address] = forgiven + REFILL
        if len(self._forgiven) > MAX_ADDRESSES:
            self._forgiven.popitem(last=False)
        self.log(address)
        if not self._waiting:
            self._waiting = True
            try:
                self._sleep(DELAY)
            finally:
                self._waiting = False

    def log(self, address: str) -> None:
        """Count a refused token, and log at most one line per minute."""
        self._wrong += 1
        now = self._clock()
        if self._logged_at is not None and now - self._logged_at < LOG_EVERY:
            return
        log.warning(
            "wrong token for the operator's pages from %s (%d since the last such line)",
            address,
            self._wrong,
            extra={"t23_event": "token_refused", "t23_address": address, "t23_count": self._wrong},
        )
        self._logged_at, self._wrong = now, 0


def address_of(environ: WSGIEnvironment) -> str:
    """The client's address; behind a proxy on this host or network the last address in ``X-Forwarded-For``."""
    near = _address(environ.get("REMOTE_ADDR", ""))
    if near is None or near.is_private or near.is_loopback:
        forwarded = _address(environ.get("HTTP_X_FORWARDED_FOR", "").rpartition(",")[2])
        near = forwarded or near
    return "an unknown address" if near is None else str(near)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text.partition("%")[0].strip())
    except ValueError:
        return None
