"""A film that is long enough to be scrubbed in: made by ffmpeg, with what ffprobe knows of its bytes."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..harness import need

SECONDS = 150
#: Noise, so that the picture needs its bit rate and a second is a second's bytes; the index comes first.
_MAKE = f"""
    -v error -f lavfi -i testsrc=size=320x180:rate=10:duration={SECONDS} -f lavfi -i sine=440:duration={SECONDS}
    -vf noise=alls=60:allf=t -c:v libx264 -preset ultrafast -pix_fmt yuv420p -g 20
    -b:v 1050k -minrate 1050k -maxrate 1050k -bufsize 500k -c:a aac -b:a 64k -movflags +faststart
"""
_PROBE = "-v error -select_streams v -show_entries packet=pts_time,pos -of csv=p=0"


@dataclass(frozen=True)
class Film:
    path: Path

    @classmethod
    def made_in(cls, folder: Path) -> Film:
        path = folder / "film.mp4"
        subprocess.run([need("ffmpeg"), *_MAKE.split(), str(path)], check=True)
        return cls(path)

    @cached_property
    def content(self) -> bytes:
        return self.path.read_bytes()

    @property
    def size(self) -> int:
        return len(self.content)

    def bytes_between(self, start: float, end: float) -> int:
        """How much of the file lies between the pictures at *start* and *end* seconds."""
        positions = [position for time, position in self._packets if start <= time < end]
        return max(positions) - min(positions)

    @cached_property
    def _packets(self) -> list[tuple[float, int]]:
        """Time in seconds and place in the file of each picture."""
        command = [need("ffprobe"), *_PROBE.split(), str(self.path)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows = [line.split(",") for line in listing.split()]
        return [(float(time), int(position)) for time, position, *_ in rows]
