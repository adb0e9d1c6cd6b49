"""Which plays were given out to a proxy: per writer the highest number, since writers number their responses in order."""

from __future__ import annotations

from collections.abc import Iterable

#: Writers that are kept; the one that gave out nothing for longest makes room.
MOST_WRITERS = 1000


class IssuedIds:
    """The ids that writers named to the proxy, in a few bytes per writer however many they are."""

    def __init__(self) -> None:
        #: The latest to give one out last.
        self._highest: dict[str, int] = {}
        self._changed: set[str] = set()

    def note(self, writer: str, number: int) -> None:
        """*writer* gave out *number*."""
        self._highest[writer] = max(number, self._highest.pop(writer, 0))
        self._changed.add(writer)
        if len(self._highest) > MOST_WRITERS:
            oldest = next(iter(self._highest))
            del self._highest[oldest]
            self._changed.add(oldest)

    def knows(self, writer: str) -> bool:
        """Whether *writer* gave out any."""
        return writer in self._highest

    def has(self, writer: str, number: int) -> bool:
        """Whether *number* of *writer* was given out."""
        return number <= self._highest.get(writer, -1)

    def changed(self) -> list[tuple[str, int | None]]:
        """Writers and their numbers that changed since the last call, ``None`` for one that is forgotten."""
        changed, self._changed = self._changed, set()
        return [(writer, self._highest.get(writer)) for writer in changed]

    def restore(self, rows: Iterable[tuple[str, int]]) -> None:
        """Take in what :meth:`changed` gave before."""
        self._highest.update(rows)
