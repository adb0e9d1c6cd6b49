"""The relay's loop: one process per state folder that reads the journals, decides what to report, and delivers."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from .. import owned
from ..errors import StateError
from ..settings import Settings
from ..state import LockHolder, StateFolder, boot_id, hold_lock, pid_namespace
from ..version import VERSION
from .bounds import Limits, Reserve
from .client import AnalyticsClient
from .delivery import Delivery
from .elapsed import Elapsed
from .intake import Intake
from .outbox import OutboxCorrupt, OutboxError, OutboxFull, SQLiteOutbox, set_aside
from .release import Release, import_all
from .watchdog import Watchdog

log = logging.getLogger(__name__)

#: Seconds between two polls of the journals.
POLL = 0.1
#: Seconds between two tries while the outbox can't be written.
STORE_RETRY = 1.0
#: Seconds between two log lines about that.
LOG_AGAIN_EVERY = 60.0
#: Seconds for which an automatic relay waits for an outdated one to leave.
SUCCEED_WITHIN = 15.0
#: Seconds after which an automatic relay whose files were replaced ends even while it has work.
GIVE_WAY_AFTER = 30.0
#: Seconds without work before an automatic relay leaves.
LEAVE_AFTER = 1.0
#: The same while plays wait for the proxy's log. A proxy may send for hours, so the relay does not stay for that: the
#: plays and the log's position are stored, and the next relay, which the app's next request starts, continues.
LEAVE_AWAITING_AFTER = 10.0


class AnotherRelay(Exception):
    """Another relay has the folder's lock."""


class Relay:
    """The relay on *folder*, while it has the folder's lock. Raises :class:`AnotherRelay` if another relay has it."""

    def __init__(self, settings: Settings, folder: StateFolder, *, automatic: bool) -> None:
        self._settings = settings
        self._folder = folder
        self._automatic = automatic
        self._ending = False
        self._stop_requested = False
        self._outdated = False
        #: When this relay saw that its files were removed or replaced.
        self._replaced_at: float | None = None
        #: The workers' record of failed starts.
        self._failed_starts: bytes | None = None
        self._store_fails = False
        self._log_again_at = 0.0
        self._last_progress = time.monotonic()
        self._release = Release()
        self.watchdog = Watchdog(settings.exit_seconds)
        folder.create()
        self._lock = self._take_lock()

    def run(self) -> None:
        """Work until :meth:`stop` or, if automatic, until no work is left."""
        try:
            self._run()
        except Exception:
            self._restore_failed_starts()
            raise
        if self._outdated:
            self._restore_failed_starts()

    def _restore_failed_starts(self) -> None:
        """If it stored nothing, its start failed: else each failed start would count as the first."""
        if self._failed_starts:
            with suppress(OSError):
                owned.replace(self._folder.relay_start, self._failed_starts)

    def _run(self) -> None:
        repaired = False
        while True:
            try:
                with self._opened():
                    return self._work_while_needed()
            except OutboxCorrupt as error:
                log.error("%s", error, extra={"t23_event": "outbox_corrupt"})
                if repaired:  # opening it again did not find the damage
                    set_aside(self._folder.outbox, error)
                repaired = not repaired

    def _work_while_needed(self) -> None:
        self._work()
        # A worker that saw the lock taken a moment ago relies on this relay: check once more.
        while not self._ending and self._has_news() and self._retake_lock():
            self._work()

    def _has_news(self) -> bool:
        return self._intake.has_news(of_writers=self._replaced_at is None)

    def stop(self) -> None:
        """End after the reports in flight. Safe in a signal handler."""
        self._ending = self._stop_requested = True

    def _work(self) -> None:
        """The loop, with the lock; the lock is released at the end."""
        self._begin()
        next_poll = 0.0
        while not (self._ending or self._should_leave()):
            self.watchdog.loop_ran()
            now = time.monotonic()
            if now >= next_poll:
                next_poll = now + self._ingest()
            self._pause()
            if self._limits.log_is_full:
                self._delivery.settle()
                self._delivery.wait(STORE_RETRY)
            elif not self._ending and not self._delivery.step():
                self._delivery.wait(max(next_poll - time.monotonic(), 0.001))
            if self._delivery.in_flight:
                self._last_progress = now
        concluded = self._stop_requested and self._conclude()
        if concluded:
            self._delivery.step()
        self._delivery.stop(self._settings.exit_seconds, send_claimed=concluded)
        self._end()

    def _end(self) -> None:
        """Release the lock."""
        try:
            self._intake.end()
        except (OutboxError, OSError) as error:
            self._log_store_fails(error)
        self._remove_unfinished_mark()
        self._write_holder(self._lock, left=not self._outdated and self._replaced_at is None)
        os.close(self._lock)

    def _pause(self) -> None:
        until = time.monotonic() + self._limits.pause_seconds()
        while not self._ending and time.monotonic() < until:
            self.watchdog.loop_ran()
            time.sleep(min(0.1, max(until - time.monotonic(), 0)))

    def _begin(self) -> None:
        with suppress(OSError):  # a full disk, which the outbox logs
            owned.touch(self._folder.unfinished)
        self._outbox.recover_leases(self._settings.retry_ambiguous, _wall_ms())
        # It works: if this relay is killed from here on, its start does not count as failed.
        with suppress(OSError):
            self._failed_starts = self._failed_starts or owned.read(self._folder.relay_start)
            owned.remove(self._folder.relay_start)
        self._intake.begin()

    def _ingest(self) -> float:
        """Move new lines from the journals to the outbox. Returns the seconds until the next poll."""
        if not self._enforce_limits():
            self._ending = self._ending or self._must_end()
            return STORE_RETRY
        try:
            self._intake.read()
            if self._must_end():
                self._ending = True
                return 0.0
            if self._intake.store():
                self._last_progress = time.monotonic()
                self._ending = self._ending or self._must_give_way()
            self._intake.clean_up()
            if self._settings.ephemeral:
                self._touch_delivered(self._intake.read_at_ns)
        except (OutboxError, OSError) as error:
            self._log_store_fails(error)
            self._intake.retry_with_smaller_pieces()
            return STORE_RETRY
        self._store_fails, self._failed_starts = False, None
        return 0.0 if self._intake.has_more else POLL

    def _enforce_limits(self) -> bool:
        """Drop what is over the limits. Returns whether there is room for more."""
        try:
            self._limits.enforce()
            if self._limits.has_room():
                return True
            self._log_store_fails(OutboxFull("the disk is full"))
        except (OutboxError, OSError) as error:
            self._log_store_fails(error)
        return False

    def _touch_delivered(self, until_ns: int) -> None:
        """Set the time up to which all is delivered. Workers that exit wait for this file's time."""
        if not self._intake.all_read() or self._intake.awaiting_line:
            return
        if not self._delivery.in_flight and not self._outbox.hosts():
            owned.touch(self._folder.delivered, until_ns)

    def _should_leave(self) -> bool:
        if not self._automatic or self._intake.has_unstored or self._intake.draining:
            return False
        stays = LEAVE_AWAITING_AFTER if self._intake.awaiting_line else LEAVE_AFTER
        living = self._intake.has_live_writer()
        if time.monotonic() - self._last_progress < stays or (living and self._replaced_at is None):
            return False
        if not self._intake.all_read() or self._intake.orphaned_responses() or self._delivery.can_deliver():
            return False
        return living or not self._conclude()

    def _must_give_way(self) -> bool:
        """Whether it ends before its work is done, since its files were replaced. A worker starts a new relay."""
        if not self._automatic or self._replaced_at is None:
            return False
        self._outdated = time.monotonic() - self._replaced_at > GIVE_WAY_AFTER
        return self._outdated

    def _conclude(self, *, streams: bool = True) -> bool:
        """Report draining responses and, with *streams*, open streams. Returns whether there were any."""
        try:
            reported = self._intake.conclude(streams=streams)
        except OutboxError as error:
            self._log_store_fails(error)
            return False
        self._last_progress = time.monotonic()
        return reported

    def _must_end(self) -> bool:
        """Whether another relay has the folder, or should have it. Checked before anything is stored."""
        if not self._owns_folder():
            log.error(
                "%s was removed or replaced; this relay ends. Do not change the state folder while app or relay run",
                self._folder.relay_lock,
                extra={"t23_event": "relay_lock_removed", "t23_path": str(self._folder.relay_lock)},
            )
            return True
        if self._release.is_replaced():
            self._log_replaced()
        if self._automatic and self._is_outdated():
            log.info(
                "a worker needs a relay of another version or release, or with other settings; this one ends",
                extra={"t23_event": "relay_outdated"},
            )
            self._outdated = True
            return True
        return False

    def _log_replaced(self) -> None:
        """Log it once. The code is in memory, so an automatic relay finishes its work first."""
        if self._replaced_at is None:
            self._replaced_at = time.monotonic()
            log.warning(
                "the files that this relay was started from were replaced or removed; it continues with the code in"
                " memory%s",
                ", until no work is left or another relay is needed"
                if self._automatic
                else ". Restart the service",
                extra={"t23_event": "relay_replaced"},
            )

    def _owns_folder(self) -> bool:
        """Whether our lock file is still in the folder: a person may have removed or replaced it."""
        try:
            return os.path.samestat(owned.lstat(self._folder.relay_lock), os.fstat(self._lock))
        except FileNotFoundError:
            return False
        except OSError:
            return True  # the folder can't be read now; the next poll checks again

    def _is_outdated(self) -> bool:
        """Whether the live writer that started last needs another relay."""
        newest = self._intake.newest_writer()
        if newest is None:
            return False
        # After an upgrade in place, a worker of an older version may have another digest for the same settings.
        if newest.version != VERSION:
            return _parts(newest.version) > _parts(VERSION)
        return newest.digest != self._settings.relay_digest()

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """Open the outbox and the API client, and close them at the end."""
        reserve = Reserve(self._folder.reserve, self._folder.reserved)
        self._outbox = SQLiteOutbox(self._folder.outbox, reserve.release)
        notes = self._outbox.notes()
        elapsed = Elapsed(notes, boot_id(), time.monotonic)
        self._limits = Limits(
            self._outbox,
            self._folder,
            reserve,
            max_age=self._settings.max_age,
            max_bytes=self._settings.max_bytes,
            elapsed=elapsed,
        )
        self._intake = self._make_intake()
        client = AnalyticsClient(self._settings)
        self._delivery = Delivery(
            self._outbox,
            client.send,
            retry_ambiguous=self._settings.retry_ambiguous,
            monotonic=time.monotonic,
            wall_ms=_wall_ms,
            notes=notes,
            elapsed=elapsed,
        )
        try:
            yield
        finally:
            self._intake.stop()
            client.close()
            self._outbox.close()

    def _remove_unfinished_mark(self) -> None:
        """Remove the mark if no work is left. Done with the lock, or it could remove the next relay's mark."""
        try:
            if not self._outbox.stats().waiting and not self._intake.awaiting_line:
                owned.remove(self._folder.unfinished)
        except (OutboxError, OSError) as error:
            self._log_store_fails(error)

    def _make_intake(self) -> Intake:
        return Intake(self._settings, self._folder, self._outbox, self._limits)

    def _log_store_fails(self, error: OutboxError | OSError) -> None:
        new, self._store_fails = not self._store_fails, True
        # On a disk that is almost full, some writes succeed, so the state changes often.
        if new and time.monotonic() >= self._log_again_at:
            self._log_again_at = time.monotonic() + LOG_AGAIN_EVERY
            log.error(
                "%s; until the outbox is writable again, plays wait in the workers' journals",
                error,
                extra={"t23_event": "outbox_unwritable", "t23_reason": str(error)},
            )

    def _take_lock(self) -> int:
        try:
            lock = hold_lock(self._folder.relay_lock)
        except OSError as error:
            raise StateError(f"{self._folder.relay_lock} can't be locked: {error.strerror}") from error
        if lock is None:
            raise AnotherRelay
        self._write_holder(lock, left=False)
        return lock

    def _write_holder(self, lock: int, *, left: bool) -> None:
        digest = self._settings.relay_digest()
        holder = LockHolder(os.getpid(), VERSION, digest, self._automatic, left, pid_namespace())
        text = json.dumps(holder._asdict()).encode()
        with suppress(OSError):  # a full disk: the workers then only lack these details
            os.pwrite(lock, text, 0)
            os.ftruncate(lock, len(text))

    def _retake_lock(self) -> bool:
        try:
            self._lock = self._take_lock()
        except AnotherRelay:
            return False
        self._last_progress = time.monotonic()
        return True


def run_relay(settings: Settings, *, automatic: bool) -> None:
    """Run a relay in this process until SIGTERM or SIGINT. Raises :class:`AnotherRelay`."""
    os.umask(0o077)
    import_all()
    relay = _new_relay(settings, StateFolder(settings.state_path()), automatic)
    with relay.watchdog.watching(), stopped_by_signals(relay.stop):
        relay.run()


def _new_relay(settings: Settings, folder: StateFolder, automatic: bool) -> Relay:
    """A new relay, as soon as an outdated one has left."""
    until = time.monotonic() + SUCCEED_WITHIN
    while True:
        try:
            return Relay(settings, folder, automatic=automatic)
        except AnotherRelay:
            holder = folder.relay_holder()
            is_like_us = holder is not None and (holder.digest, holder.version) == (
                settings.relay_digest(),
                VERSION,
            )
            if not automatic or is_like_us or time.monotonic() > until:
                raise
        time.sleep(0.05)


@contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Within this context, SIGTERM and SIGINT call *stop*."""

    def handler(number: int, frame: FrameType | None) -> None:
        stop()

    # uWSGI blocks signals in its threads, and a relay that one of them starts inherits that.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
    former = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, before in former.items():
            signal.signal(number, before)


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


def _parts(version: str) -> tuple[int, ...]:
    """A version's numbers, for comparison; a part that is not a number counts as 0."""
    return tuple(int(part) if part.isdigit() else 0 for part in version.split("."))
