"""Formats figures, times and long sentences for a terminal of 80 columns."""

from __future__ import annotations

import re
import shutil
import textwrap
import time
from collections.abc import Iterator, Sequence

#: Quoted commands are never wrapped, so that they can be copied. While wrapping, their spaces are replaced by NUL.
_QUOTED = re.compile(r"'t23-middleware [^']{1,60}'")
_KEPT_SPACE = "\0"
#: A command at the end of an error message, to be typed unchanged.
_COMMAND_AT_END = re.compile(r": (?P<typed>(?:T23_\w+=\S+ )*(?:T23_APP=\S+|t23-middleware) \S.*)$")
#: Maximum columns of the output; a narrower terminal gets narrower lines.
WIDTH = 80


def width() -> int:
    """Columns of the output: 40 to 80, depending on the terminal."""
    return min(max(shutil.get_terminal_size((WIDTH, 24)).columns, 40), WIDTH)


def wrapped(text: str, columns: int, indent: str = "", first: str | None = None) -> str:
    """*text* wrapped at *columns*; *first* comes before the first line, *indent* before the others.

    A long word without spaces, such as a path, is not broken, so that it can be copied; its line may be longer.
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
    """*message* as the commands print it: wrapped at *columns*, with a command at its end on a line of its own.

    *columns* is ``None`` if the output is not a terminal; then the message is one line.
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
    """Lines of a table. Columns with an index in *right* are aligned right; the last gets the rest and is wrapped."""
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
    """A time (ms since the epoch) in this machine's time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ms / 1000))


def duration(seconds: float) -> str:
    """A time span, rounded to one unit."""
    seconds = max(seconds, 0.0)
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def size(number: int) -> str:
    """A number of bytes in binary units."""
    if number < 1024:
        return f"{number} bytes"
    power = min((number.bit_length() - 1) // 10, 3)
    return f"{number / 1024**power:.1f} {'KMG'[power - 1]}iB"


def reports(number: int) -> str:
    """*number* with the word "report" or "reports"."""
    return f"{number:,} report{'' if number == 1 else 's'}"


def masked(session: str) -> str:
    """The first characters of a session: at most four, and at most half of it."""
    shown = session[: min(4, len(session) // 2)]
    return (shown if shown.isprintable() else "") + "…"
