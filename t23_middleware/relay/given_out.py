"""The play ids that writers issued to a proxy. Writers number their responses in order, so the highest is enough."""

from __future__ import annotations

from collections.abc import Iterable

#: Most writers in memory; beyond this, the one that issued no id for longest is dropped.
MOST_WRITERS = 1000


class IssuedIds:
    """The issued play ids: the highest number of each writer."""

    def __init__(self) -> None:
        #: Writer -> highest number; the writer that issued the latest id is last.
        self._highest: dict[str, int] = {}
        self._changed: set[str] = set()

    def note(self, writer: str, number: int) -> None:
        """*writer* issued *number*."""
        self._highest[writer] = max(number, self._highest.pop(writer, 0))
        self._changed.add(writer)
        if len(self._highest) > MOST_WRITERS:
            oldest = next(iter(self._highest))
            del self._highest[oldest]
            self._changed.add(oldest)

    def knows(self, writer: str) -> bool:
        """Whether *writer* issued any id."""
        return writer in self._highest

    def has(self, writer: str, number: int) -> bool:
        """Whether *writer* issued *number*."""
        return number <= self._highest.get(writer, -1)

    def changed(self) -> list[tuple[str, int | None]]:
        """Writers and their numbers that changed since the last call; ``None`` if a writer was dropped."""
        changed, self._changed = self._changed, set()
        return [(writer, self._highest.get(writer)) for writer in changed]

    def restore(self, rows: Iterable[tuple[str, int]]) -> None:
        """Load the *rows* that :meth:`changed` returned before."""
        self._highest.update(rows)
