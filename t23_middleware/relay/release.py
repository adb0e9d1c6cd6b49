"""The files that a relay was started from: its own, its libraries' and its interpreter's. A deploy may remove them."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import time
from pathlib import Path

#: Seconds between two checks.
CHECK_EVERY = 1.0
#: Packages whose files are checked.
_PACKAGES = ("t23_middleware", "requests", "urllib3", "certifi")
#: Modules that the standard library and our libraries import late: for host names, and for the charsets of answers.
_LATE = (
    "encodings.ascii",
    "encodings.idna",
    "encodings.latin_1",
    "encodings.utf_16",
    "encodings.utf_16_be",
    "encodings.utf_16_le",
    "encodings.utf_32",
    "encodings.utf_8_sig",
    "stringprep",
    "unicodedata",
)


class Release:
    """The files of this process's code, as they are now. For code in an archive, the archive's file."""

    def __init__(self) -> None:
        files = [getattr(sys.modules.get(name), "__file__", None) for name in _PACKAGES]
        stamps = {file: _stamp(file) for file in (*files, sys.executable) if file}
        self._stamps = {file: stamp for file, stamp in stamps.items() if stamp is not None}
        self._check_at = 0.0
        self._replaced = False

    def is_replaced(self) -> bool:
        """Whether one of them was removed or replaced; checked once a second."""
        now = time.monotonic()
        if not self._replaced and now >= self._check_at:
            self._check_at = now + CHECK_EVERY
            self._replaced = any(_stamp(file) != stamp for file, stamp in self._stamps.items())
        return self._replaced


def import_all() -> None:
    """Import all modules now, since a deploy may remove their files before they are needed."""
    for package in ("t23_middleware.relay", "t23_middleware.relay.outbox"):
        for module in pkgutil.iter_modules(sys.modules[package].__path__, f"{package}."):
            importlib.import_module(module.name)
    for name in _LATE:
        importlib.import_module(name)


def _stamp(file: str) -> tuple[int, int, int, int] | None:
    try:
        found = Path(file).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
