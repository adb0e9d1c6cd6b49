"""What ``check`` says of one thing that it looked at."""

from __future__ import annotations

from typing import NamedTuple

#: How an item is: as it should be; worth a look; so that plays are not reported.
OK, WARN, WRONG = "ok", "warn", "WRONG"


class Finding(NamedTuple):
    """One thing that was looked at."""

    level: str
    name: str
    #: What is so; where it is not :data:`OK`, with its remedy.
    text: str
    #: Lines to be copied, as they are.
    lines: str = ""
