"""Where a relay can be told to die: between two steps that no crash may come between. For our own tests."""

from __future__ import annotations

import os
import signal

from ..settings import Settings

_AT = Settings.crash_at()


def crash_point(name: str) -> None:
    """Die at once, without a word, where the test that started this process said so."""
    if name == _AT:
        os.kill(os.getpid(), signal.SIGKILL)
