"""Lets a command replace the workers' relay on a state folder for a while."""

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
from ..state import LockHolder, StateFolder, lock_is_held, lock_owner

#: Seconds that the other relay gets to finish the reports that it is sending.
HANDOVER_SECONDS = 15.0

R = TypeVar("R", bound=Relay)


def take_over(folder: StateFolder, make: Callable[[], R]) -> tuple[R, bool]:
    """Call *make* until its relay gets the lock. Returns that relay, and whether an automatic one was stopped for it.

    Raises :class:`~t23_middleware.errors.UsageError` if a relay runs that this command may not stop, and
    :class:`~t23_middleware.errors.StateError` if one does not stop within :data:`HANDOVER_SECONDS`.
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
                f"the relay of the workers (process {max(signalled, default=0)}) does not stop; read {folder.relay_log}"
            )
        time.sleep(0.01)


def hand_back(settings: Settings, folder: StateFolder) -> None:
    """Start the workers' relay again if a worker is alive: one that saw our lock did not start a relay."""
    if any(lock_is_held(folder.journals / name) for name in owned.names(folder.journals, ".lock")):
        start_workers_relay(settings, folder)


def start_workers_relay(settings: Settings, folder: StateFolder) -> None:
    """Start an automatic relay in the same way as a worker; if that fails, print the reason."""
    try:
        start_relay(settings, folder)
    except OSError as error:
        print(f"t23-middleware: the workers' relay can't be started again ({error})", file=sys.stderr)


def _ask_to_stop(folder: StateFolder, signalled: set[int]) -> None:
    """Send SIGTERM once to each relay that holds the lock: a worker may start another one in between."""
    pid, holder = lock_owner(folder.relay_lock), folder.relay_holder()
    if pid is None or pid in signalled:
        return
    if holder is not None and not holder.left:
        _refuse_other_container(folder, holder)
    if holder is None or (pid and pid != holder.pid):
        return  # it has just taken the lock and not yet written its process id
    _refuse_service(folder, holder, pid)
    signalled.add(pid)
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        pass  # it has just stopped
    except PermissionError:
        raise UsageError(
            f"process {pid} is a relay of another user; run this as that user, or as root"
        ) from None


def _refuse_other_container(folder: StateFolder, holder: LockHolder) -> None:
    if holder.is_elsewhere:
        raise UsageError(
            f"a relay in another container (process {holder.pid} there) delivers from {folder.path};"
            " run this in that container, or stop that relay first"
        )


def _refuse_service(folder: StateFolder, holder: LockHolder, pid: int) -> None:
    if not holder.automatic:
        raise UsageError(
            f"a relay that runs as a service (process {holder.pid}) delivers from {folder.path};"
            " stop that service first, or let it deliver"
        )
    if not pid:
        raise UsageError(
            f"a relay in another container delivers from {folder.path}; run this in that container"
        )
