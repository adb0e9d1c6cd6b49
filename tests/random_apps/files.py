"""Files as apps open them, and objects that are nearly files."""

from __future__ import annotations

import gzip
import io
import os
import tempfile
from pathlib import Path
from typing import Any

#: The file that random apps serve; bytes of it at any place are unlike those at another.
FILM = b"".join(number.to_bytes(4, "big") for number in range(30_000))


def make_files(folder: Path) -> None:
    (folder / "film").write_bytes(FILM)
    (folder / "film.gz").write_bytes(gzip.compress(FILM, 1))
    (folder / "text").write_text("film \xe9\n" * 1000, encoding="utf-8")


class Minimal:
    """No more than what PEP 3333 asks of a file."""

    def __init__(self, _: Path) -> None:
        self.file = io.BytesIO(FILM)
        self.reads = 0

    def read(self, size: int = -1) -> Any:
        self.reads += 1
        return self.file.read(size)

    def close(self) -> None:
        self.file.close()


class Slots:
    __slots__ = ("file",)

    def __init__(self, folder: Path) -> None:
        self.file = (folder / "film").open("rb")

    def read(self, size: int = -1) -> Any:
        return self.file.read(size)

    def close(self) -> None:
        self.file.close()


class Disk:
    """A plain file with one thing odd in a subclass."""

    def __init__(self, folder: Path) -> None:
        self.file = (folder / "film").open("rb")
        self.reads = 0

    def read(self, size: int = -1) -> Any:
        self.reads += 1
        return self.file.read(size)

    def __iter__(self) -> Any:
        return iter(self.file)

    def fileno(self) -> Any:
        return self.file.fileno()

    def tell(self) -> Any:
        return self.file.tell()

    def seek(self, *place: int) -> Any:
        return self.file.seek(*place)

    def seekable(self) -> Any:
        return True

    def close(self) -> None:
        self.file.close()


class ShortReads(Minimal):
    def read(self, size: int = -1) -> Any:
        return super().read(min(size, 100) if size and size > 0 else 100)


class NoneOnce(Minimal):
    def read(self, size: int = -1) -> Any:
        data = super().read(size)
        return None if self.reads == 3 else data


class Bytearrays(Minimal):
    def read(self, size: int = -1) -> Any:
        return bytearray(super().read(size))


class Texts(Minimal):
    def read(self, size: int = -1) -> Any:
        return super().read(size).decode("latin-1")


class ReadRaises(Disk):
    """A disk that fails at one place, however large the blocks are."""

    def read(self, size: int = -1) -> Any:
        left = 70_000 - self.file.tell()
        if left <= 0:
            raise OSError("the disk failed")
        return super().read(left if size is None or size < 0 else min(size, left))


class NoSeek(Slots):
    """What a class of an app's own may have no more of, which is enough for sendfile."""

    __slots__ = ()

    def fileno(self) -> Any:
        return self.file.fileno()


class TellsOnly(NoSeek):
    __slots__ = ()

    def tell(self) -> Any:
        return self.file.tell()


class FilenoRaises(Disk):
    def fileno(self) -> Any:
        raise RuntimeError("no descriptor today")


class FilenoLies(Disk):
    def fileno(self) -> Any:
        return 987_654


class FilenoIsNone(Disk):
    def fileno(self) -> Any:
        return None


class TellRaises(Disk):
    def tell(self) -> Any:
        raise NotImplementedError


class TellLies(Disk):
    def tell(self) -> Any:
        return "here"


class SeekRaises(Disk):
    def seek(self, *place: int) -> Any:
        raise NotImplementedError


class SeekableRaises(Disk):
    def seekable(self) -> Any:
        raise RuntimeError("the stream's owner is gone")


class SeekableIsAFlag(Disk):
    seekable = True  # type: ignore[assignment]


class CloseRaises(Disk):
    def close(self) -> None:
        self.file.close()
        raise OSError("close failed")


class NoClose:
    def __init__(self, _: Path) -> None:
        self.file = io.BytesIO(FILM)

    def read(self, size: int = -1) -> Any:
        return self.file.read(size)


class Hostile(Minimal):
    """Everything but read() and close() fails, and not as a missing attribute does."""

    def __getattr__(self, name: str) -> Any:
        if name in ("file", "reads"):
            raise AttributeError(name)
        raise RuntimeError(f"no {name} here")


class MostHostile:
    """Any attribute fails."""

    def __init__(self, _: Path) -> None:
        pass

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} here")


class Sequential(Disk):
    def seekable(self) -> Any:
        return False

    def seek(self, *place: int) -> Any:
        raise io.UnsupportedOperation("seek")

    def fileno(self) -> Any:
        raise io.UnsupportedOperation("fileno")


ODD = {
    "minimal": Minimal, "slots": Slots, "short reads": ShortReads, "none once": NoneOnce, "bytearrays": Bytearrays,
    "texts": Texts, "read raises": ReadRaises, "fileno raises": FilenoRaises, "fileno lies": FilenoLies,
    "fileno is none": FilenoIsNone, "tell raises": TellRaises, "tell lies": TellLies, "seek raises": SeekRaises,
    "seekable raises": SeekableRaises, "seekable is a flag": SeekableIsAFlag, "close raises": CloseRaises,
    "no close": NoClose, "hostile": Hostile, "most hostile": MostHostile, "sequential": Sequential,
    "no seek": NoSeek, "tells only": TellsOnly,
}  # fmt: skip


def opened(kind: str, position: str, folder: Path) -> Any:
    """A file of that kind, set to *position* where it can be."""
    file = _opened(kind, folder)
    try:
        if position == "after a read":
            file.read(10)
        elif position == "end":
            file.seek(0, os.SEEK_END)
        elif position != "0":
            file.seek(len(FILM) + 10 if position == "beyond" else int(position))
    except (OSError, ValueError, RuntimeError, AttributeError, NotImplementedError):
        pass
    return file


def _opened(kind: str, folder: Path) -> Any:
    if kind in ODD:
        return ODD[kind](folder)
    if kind == "raw":
        return (folder / "film").open("rb", buffering=0)
    if kind == "bytesio":
        return io.BytesIO(FILM)
    if kind == "gzip":
        return gzip.open(folder / "film.gz")
    if kind == "text":
        return (folder / "text").open(encoding="utf-8")
    if kind == "pipe":
        reading, writing = os.pipe()
        # gevent's os.close() may close no sooner than its loop goes round, and a read of ours would wait for that.
        with os.fdopen(writing, "wb") as into:
            into.write(FILM[:5000])
        return os.fdopen(reading, "rb")
    if kind in ("temporary", "spooled"):
        kinds: Any = {"temporary": tempfile.TemporaryFile, "spooled": tempfile.SpooledTemporaryFile}
        made = kinds[kind]()
        made.write(FILM)
        made.seek(0)
        return made
    file = (folder / "film").open("rb")
    if kind == "closed":
        file.close()
    return file
