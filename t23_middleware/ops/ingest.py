"""``t23-middleware ingest``: read a rotated log of the proxy once, in the same way as the relay."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from ..relay.process import stopped_by_signals
from ..relay.proxy_log import ProxyLog
from ..relay.rotated import RotatedRelay, RotatedResult
from ..settings import Settings
from ..state import StateFolder, lock_is_held
from . import text
from .bar import ProgressBar
from .handover import hand_back, start_workers_relay, take_over

#: First bytes of files from gzip, xz, zstd and bzip2.
_COMPRESSED = (b"\x1f\x8b", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"BZh")


def run_ingest(settings: Settings, files: Sequence[str]) -> int:
    """Read *files* and report the plays in them that are not reported yet. Returns 0 if all was read, else 1.

    Raises :class:`~t23_middleware.errors.UsageError` for a file that can't be a log, and if a relay runs that this
    command may not stop.
    """
    os.umask(0o077)
    paths = _oldest_first([Path(file) for file in dict.fromkeys(files)])
    for path in paths:
        _refuse_unless_log(path)
    folder = StateFolder(settings.state_path())
    if not folder.path.exists():
        raise UsageError(
            f"there is no state folder {folder.path}, so no play waits for a line; run this with the app's own settings, as"
            " its user"
        )
    taken = _ingest(settings, folder, paths)
    return _print_result(taken, paths, settings, folder)


def _ingest(settings: Settings, folder: StateFolder, paths: Sequence[Path]) -> RotatedResult:
    bar, total = ProgressBar(), sum(path.stat().st_size for path in paths)

    def show(read: int) -> None:
        bar.show(read, total, f"{text.size(read)} of {text.size(total)}")

    relay, took_over = take_over(folder, lambda: RotatedRelay(settings, folder, paths, show))
    try:
        with stopped_by_signals(relay.stop):
            return relay.run_once()
    finally:
        bar.end()
        if took_over:
            hand_back(settings, folder)


def _oldest_first(paths: Sequence[Path]) -> list[Path]:
    """*paths* by modification time, oldest first: plays have to be read in their order."""
    return sorted(paths, key=lambda path: path.stat().st_mtime if path.exists() else 0.0)


def _refuse_unless_log(path: Path) -> None:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise UsageError(
                f"{path} is {_file_type(mode)}; name a file, for example /var/log/nginx/t23.log.1"
            )
        with path.open("rb") as file:
            head = file.read(6)
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}; to find it, run: ls -l {path.parent}") from None
    except PermissionError:
        raise UsageError(
            f"{path} can't be read by this user; copy it to a place where the app's user may read it, and name the copy"
        ) from None
    except OSError as error:
        raise UsageError(
            f"{path} can't be read ({error.strerror}); correct that, or copy the file first"
        ) from None
    if head.startswith(_COMPRESSED):
        raise UsageError(
            f"{path} is compressed; unpack it into a copy (zcat {path} > /tmp/{path.stem}) and name the copy"
        )
    log = ProxyLog(path, [])
    log.read()
    if log.problem is not None:
        raise UsageError(log.problem)


def _file_type(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _print_result(
    taken: RotatedResult, paths: Sequence[Path], settings: Settings, folder: StateFolder
) -> int:
    files = "1 file" if len(paths) == 1 else f"{len(paths)} files"
    print(f"{text.reports(taken.reports).capitalize()} from {files}.")
    for name, number in sorted(taken.counts.items()):
        if name.startswith("proxy_"):
            print(f"Not reported: {name} {number:,}.")
    if taken.waiting:
        print(_delivery_sentence(taken.waiting, settings, folder))
    if taken.why:
        print(f"t23-middleware: {taken.why}", file=sys.stderr)
        return 1
    return 0


def _delivery_sentence(waiting: int, settings: Settings, folder: StateFolder) -> str:
    who = "start the relay, or run 't23-middleware relay --once'"
    if settings.relay == "auto":
        if not lock_is_held(folder.relay_lock):
            start_workers_relay(settings, folder)
        who = "the relay delivers"
    return f"{text.reports(waiting).capitalize()} {'waits' if waiting == 1 else 'wait'}: {who}."
