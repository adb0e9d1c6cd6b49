"""A command works on a state folder in the place of the workers' relay, and hands it back."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from .. import owned
from ..capture.launch import start_relay
from ..errors import StateError, UsageError
from ..relay.process import AnotherRelay, Relay
from ..settings import Settings
from ..state import Holder, StateFolder, lock_is_held, lock_owner

#: Seconds for another relay to finish what it has in flight.
HANDOVER_SECONDS = 15.0

R = TypeVar("R", bound=Relay)


def take_over(folder: StateFolder, make: Callable[[], R]) -> tuple[R, bool]:
    """The relay that *make* gives, which holds the lock, and whether an automatic one had to leave for it.

    Raises :class:`~t23_middleware.errors.UsageError` where a relay runs that is not ours to stop, and
    :class:`~t23_middleware.errors.StateError` where one does not end within :data:`HANDOVER`.
    """
    signalled: set[int] = set()
    until = time.monotonic() + HANDOVER_SECONDS
    while True:
        try:
            return make(), bool(signalled)
        except AnotherRelay:
            _ask_to_stop(folder, signalled)
        if time.monotonic() > until:
            raise StateError(
                f"the relay of the workers (process {max(signalled, default=0)}) does not end; look at {folder.relay_log}"
            )
        time.sleep(0.01)


def hand_back(settings: Settings, folder: StateFolder) -> None:
    """Workers that saw our lock rely on a relay: start them theirs again."""
    if any(lock_is_held(folder.journals / name) for name in owned.names(folder.journals, ".lock")):
        start_workers_relay(settings, folder)


def start_workers_relay(settings: Settings, folder: StateFolder) -> None:
    """An automatic relay, as a worker starts it; where that fails, the reason is told."""
    try:
        start_relay(settings, folder)
    except OSError as error:
        print(f"t23-middleware: the workers' relay can't be started again ({error})", file=sys.stderr)


def _ask_to_stop(folder: StateFolder, signalled: set[int]) -> None:
    """SIGTERM to the relay that holds the lock, once each: a worker may start another in between."""
    pid, holder = lock_owner(folder.relay_lock), folder.relay_holder()
    if pid is None or pid in signalled:
        return
    if holder is not None and not holder.left:
        _refuse_other_container(folder, holder)
    if holder is None or (pid and pid != holder.pid):
        return  # it has only now taken the lock, and will say who it is
    _refuse_service(folder, holder, pid)
    signalled.add(pid)
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        pass  # it was leaving
    except PermissionError:
        raise UsageError(
            f"process {pid} is another user's relay; run this as that user, or as root"
        ) from None


def _refuse_other_container(folder: StateFolder, holder: Holder) -> None:
    if holder.is_elsewhere:
        raise UsageError(
            f"a relay in another container (process {holder.pid} there) delivers from {folder.path};"
            " run this in that container, or stop that one first"
        )


def _refuse_service(folder: StateFolder, holder: Holder, pid: int) -> None:
    if not holder.automatic:
        raise UsageError(
            f"a relay that runs as a service (process {holder.pid}) delivers from {folder.path};"
            " stop that service first, or leave it to it"
        )
    if not pid:
        raise UsageError(f"a relay in another container delivers from {folder.path}; run this in that one")
