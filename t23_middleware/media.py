"""Which content types are counted as media; app and proxy log use the same rules."""

from __future__ import annotations

from collections.abc import Sequence
from mimetypes import guess_type

#: Segments and playlists of HLS and DASH: a viewing has hundreds, and how to report them is not decided yet.
SEGMENT_TYPES = frozenset(
    ("video/mp2t", "video/iso.segment", "audio/iso.segment", "application/dash+xml")
    + ("application/vnd.apple.mpegurl", "application/x-mpegurl", "audio/mpegurl", "audio/x-mpegurl")
)
SEGMENT_ENDINGS = (".ts", ".m4s", ".m3u8", ".mpd")
#: The type of a response with several ranges of a file; the file's own type is in the body (RFC 9110, section 14.6).
BYTERANGES = "multipart/byteranges"
#: How many content types are cached, so that an app which generates new ones can't fill the memory.
REMEMBERED_TYPES = 1000


class MediaTypes:
    """The content types of ``T23_MEDIA_TYPES``, such as ``video/*``, ``audio/mpeg`` or ``*/*``."""

    def __init__(self, wanted: Sequence[str]) -> None:
        self._wanted = tuple("" if kind == "*/*" else kind.removesuffix("*") for kind in wanted)
        self._verdicts: dict[str, bool] = {}

    def counts(self, content_type: str, path: str = "") -> bool:
        """Whether a response of *content_type* is media that is counted.

        *path* is the request's path, ``""`` if unknown. :data:`BYTERANGES` is counted unless the ending of *path* means
        a type that is not counted: a client that requests several ranges usually requests media.
        """
        if path.endswith(SEGMENT_ENDINGS):
            return False
        if content_type.lower().startswith(BYTERANGES):
            guessed = guess_type(path)[0]
            return guessed is None or self._wants(guessed) or self._wants(content_type)
        return self._wants(content_type)

    def _wants(self, content_type: str) -> bool:
        verdict = self._verdicts.get(content_type)
        if verdict is None:
            kind = content_type.partition(";")[0].strip().lower()
            verdict = kind not in SEGMENT_TYPES and any(
                kind.startswith(wanted) if wanted[-1:] in ("", "/") else kind == wanted
                for wanted in self._wanted
            )
            if len(self._verdicts) < REMEMBERED_TYPES:
                self._verdicts[content_type] = verdict
        return verdict
