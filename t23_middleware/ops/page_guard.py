"""Slows down whoever tries tokens for the operator's pages, and logs it."""

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

#: Seconds that an answer to a wrong token waits. The worker waits with it, so it is short.
DELAY = 0.1
#: Wrong tokens of one address that are looked at in a row; then one each :data:`REFILL` seconds.
BURST, REFILL = 12, 1.0
#: Addresses that are remembered; the one that was quiet for longest is forgotten first.
MAX_ADDRESSES = 1000
#: Seconds between two lines in the log.
LOG_EVERY = 60.0


class Guard:
    """Remembers the wrong tokens of each address, in one process.

    *clock* gives seconds of a clock that never goes back; *sleep* waits for so many seconds.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        #: Address -> the time at which all its wrong tokens are forgiven.
        self._forgiven: OrderedDict[str, float] = OrderedDict()
        self._waiting = False
        self._wrong = 0
        self._logged_at: float | None = None

    def is_closed_to(self, address: str) -> bool:
        """Whether a token of *address* is refused without a look at it; so no guess is answered faster."""
        return self._forgiven.get(address, 0.0) - self._clock() > (BURST - 1) * REFILL

    def wrong(self, address: str) -> None:
        """Note a wrong token of *address*, and delay its answer unless another one is being delayed."""
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
        """Count a refused token, and log one line a minute."""
        self._wrong += 1
        now = self._clock()
        if self._logged_at is not None and now - self._logged_at < LOG_EVERY:
            return
        log.warning(
            "a wrong token was sent for the operator's pages, from %s (%d since the last such line)",
            address,
            self._wrong,
            extra={"t23_event": "token_refused", "t23_address": address, "t23_count": self._wrong},
        )
        self._logged_at, self._wrong = now, 0


def address_of(environ: WSGIEnvironment) -> str:
    """The client's address; behind a proxy of this host or network the last one in ``X-Forwarded-For``."""
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
