"""How the commands put figures, times and long sentences on a terminal of 80 columns."""

from __future__ import annotations

import re
import shutil
import textwrap
import time
from collections.abc import Iterator, Sequence

#: What stays on one line, since it is copied: a command in quotes; its spaces are held by a character that is none.
_QUOTED = re.compile(r"'t23-middleware [^']{1,60}'")
_KEPT_SPACE = "\0"
#: A command at the end of an error, to be typed as it stands.
_COMMAND_AT_END = re.compile(r": (?P<typed>(?:T23_\w+=\S+ )*(?:T23_APP=\S+|t23-middleware) \S.*)$")
#: Columns that a screen is made for; a narrower terminal gets narrower ones.
WIDTH = 80


def width() -> int:
    """Columns to write in: at most 80, at least 40."""
    return min(max(shutil.get_terminal_size((WIDTH, 24)).columns, 40), WIDTH)


def wrapped(text: str, columns: int, indent: str = "", first: str | None = None) -> str:
    """*text* in lines of *columns*; *first* stands before the first line, *indent* before the others.

    What has no spaces, as most paths, stays whole on a line that may be longer: it is there to be copied.
    """
    start = indent if first is None else first
    whole = _QUOTED.sub(lambda quoted: quoted[0].replace(" ", _KEPT_SPACE), text)
    lines = textwrap.wrap(
        whole,
        columns,
        initial_indent=start,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return "\n".join(lines or [start.rstrip()]).replace(_KEPT_SPACE, " ")


def error_message(message: str, columns: int | None) -> str:
    """*message* as the commands say it; on a terminal of *columns* in lines, and what is to be typed on its own.

    ``None`` for what is no terminal, where a message is one line.
    """
    line = f"t23-middleware: {message}"
    if columns is None:
        return line
    sentence, colon, command = line, "", ""
    if (found := _COMMAND_AT_END.search(line)) is not None:
        sentence, colon, command = line[: found.start()], ":", f"\n  {found['typed']}"
    return wrapped(sentence + colon, columns, "  ", "") + command


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int], columns: int
) -> Iterator[str]:
    """Lines of a table; the columns numbered *right* hold figures, the last takes what is left and is wrapped."""
    widths = [max(map(len, cells)) for cells in zip(head, *rows, strict=True)][:-1]
    room = max(columns - sum(widths) - 2 * len(widths), 20)
    for row in [head, *rows]:
        cells = [
            cell.rjust(size) if number in right else cell.ljust(size)
            for number, (cell, size) in enumerate(zip(row, widths, strict=False))
        ]
        start = "  ".join([*cells, ""])
        lines = textwrap.wrap(row[-1], room, break_on_hyphens=False) or [""]
        yield (start + lines[0]).rstrip()
        yield from (" " * len(start) + line for line in lines[1:])


def moment(ms: int) -> str:
    """A time in ms since the epoch, in this machine's zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ms / 1000))


def duration(seconds: float) -> str:
    """A time span in its one fitting unit."""
    seconds = max(seconds, 0.0)
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def size(number: int) -> str:
    """A number of bytes in a binary unit."""
    if number < 1024:
        return f"{number} bytes"
    power = min((number.bit_length() - 1) // 10, 3)
    return f"{number / 1024**power:.1f} {'KMG'[power - 1]}iB"


def reports(number: int) -> str:
    """*number* of reports, in words."""
    return f"{number:,} report{'' if number == 1 else 's'}"


def masked(session: str) -> str:
    """The first characters of a session, at most four and at most half of it."""
    shown = session[: min(4, len(session) // 2)]
    return (shown if shown.isprintable() else "") + "…"
