"""One finding of ``check``: what it tested and the result."""

from __future__ import annotations

from typing import NamedTuple

#: Levels of a finding: no problem; a problem, but plays are reported; plays are not reported.
OK, WARN, WRONG = "ok", "warn", "WRONG"


class Finding(NamedTuple):
    """The result of one test."""

    level: str
    name: str
    #: The result in words; with the remedy unless the level is :data:`OK`.
    text: str
    #: Lines for the user to copy, printed unchanged.
    lines: str = ""
