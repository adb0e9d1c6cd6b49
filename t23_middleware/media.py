"""Which content types are media that is counted: told alike by the app's side and by what a proxy's log says."""

from __future__ import annotations

from collections.abc import Sequence

#: Segments of HLS and DASH: a viewing is hundreds of them, and what they would report is not settled.
SEGMENT_TYPES = frozenset(("video/mp2t", "video/iso.segment", "audio/iso.segment"))
SEGMENT_ENDINGS = (".ts", ".m4s")
#: Content types whose verdict is remembered; an app that makes them up can't fill the memory.
REMEMBERED_TYPES = 1000


class MediaTypes:
    """The content types of ``T23_MEDIA_TYPES``, such as ``video/*`` or ``audio/mpeg``."""

    def __init__(self, wanted: Sequence[str]) -> None:
        self._wanted = tuple(kind.removesuffix("*") for kind in wanted)
        self._verdicts: dict[str, bool] = {}

    def counts(self, content_type: str) -> bool:
        """Whether a response of *content_type* is media that is counted."""
        verdict = self._verdicts.get(content_type)
        if verdict is None:
            kind = content_type.partition(";")[0].strip().lower()
            verdict = kind not in SEGMENT_TYPES and any(
                kind.startswith(wanted) if wanted.endswith("/") else kind == wanted for wanted in self._wanted
            )
            if len(self._verdicts) < REMEMBERED_TYPES:
                self._verdicts[content_type] = verdict
        return verdict
