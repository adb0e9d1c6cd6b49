"""File classes of an app's own, inside a server's wrapper: what they lack must be missed by nothing of ours."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
from gunicorn.http.wsgi import FileWrapper
from waitress.buffers import ReadOnlyFileBasedBuffer

from .servers import OldFileWrapper, as_gunicorn, request

FILM = bytes(range(256)) * 1000
HEADERS = [("Content-Type", "video/mp4")]
gunicorns = pytest.mark.parametrize(
    "wrapper", [FileWrapper, OldFileWrapper], ids=["gunicorn", "gunicorn < 24"]
)


@pytest.fixture
def film(tmp_path: Path) -> Path:
    path = tmp_path / "film.mp4"
    path.write_bytes(FILM)
    return path


class Own:
    """A file of an app's own, which has no more than is said."""

    def __init__(self, path: Path, seek: int, *names: str) -> None:
        self.file = path.open("rb")
        os.lseek(self.file.fileno(), seek, os.SEEK_SET)
        for name in ("read", "close", *names):
            setattr(self, name, getattr(self.file, name))


class TellFails(Own):
    def tell(self) -> int:
        raise io.UnsupportedOperation("tell")


class TellsText(Own):
    def tell(self) -> str:
        return "here"


def own_file(path: Path, kind: type[Own], seek: int, *names: str) -> Any:
    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", HEADERS)
        return environ["wsgi.file_wrapper"](kind(path, seek, *names))

    return app


@gunicorns
@pytest.mark.parametrize("seek", [0, 200_000])
@pytest.mark.parametrize(
    ("kind", "names"),
    [(Own, ["fileno"]), (Own, ["fileno", "tell"]), (TellFails, ["fileno", "seek"]), (TellsText, ["fileno", "seek"])],
    ids=["no seek", "tells only", "tell fails", "tell gives text"],
)  # fmt: skip
def test_sendfile_of_own_file_class(
    wrap: Any, journals: Any, film: Path, wrapper: Any, kind: type[Own], names: list[str], seek: int
) -> None:
    """``socket.sendfile`` asks for a descriptor, and seeks only what can be sought."""
    answer = as_gunicorn(wrap(own_file(film, kind, seek, *names)), request(), wrapper=wrapper)
    assert (answer.body, answer.error) == (FILM[seek:], None)
    assert journals.sent() == [len(FILM) - seek]


@pytest.mark.parametrize("names", [["fileno"], ["fileno", "tell"], ["tell"]], ids=" ".join)
def test_waitress_reads_file_without_seek(wrap: Any, journals: Any, film: Path, names: list[str]) -> None:
    """What it can't seek it reads as any iterable."""
    body = wrap(own_file(film, Own, 0, *names))(
        request(**{"wsgi.file_wrapper": ReadOnlyFileBasedBuffer}), lambda *head: None
    )
    assert not isinstance(body, ReadOnlyFileBasedBuffer) or body.prepare(len(FILM)) == 0
    assert b"".join(body) == FILM
    body.close()
    assert journals.sent() == [len(FILM)]


@gunicorns
def test_sendfile_of_file_that_fails_to_seek(wrap: Any, journals: Any, film: Path, wrapper: Any) -> None:
    """``socket.sendfile`` seeks when all is sent: the error is the server's, the bytes are the client's."""

    class Fails(Own):
        def seek(self, *place: int) -> int:
            raise io.UnsupportedOperation("seek")

    answer = as_gunicorn(wrap(own_file(film, Fails, 5, "fileno")), request(), wrapper=wrapper)
    assert (answer.body, type(answer.error)) == (FILM[5:], io.UnsupportedOperation)
    assert journals.sent() == [len(FILM) - 5]


@pytest.mark.parametrize("wrapper", [FileWrapper, ReadOnlyFileBasedBuffer], ids=["gunicorn", "waitress"])
@pytest.mark.parametrize("names", [[], ["seek", "tell"]], ids=["reads only", "seeks"])
def test_text_file_counts_nothing(
    wrap: Any, journals: Any, film: Path, wrapper: Any, names: list[str]
) -> None:
    """Servers refuse text, so that none of it is sent."""

    class Text(Own):
        def read(self, size: int = -1) -> str:
            return self.file.read(size).decode("latin-1")

        def __init__(self, path: Path, seek: int, *names: str) -> None:
            super().__init__(path, seek, *names)
            del vars(self)["read"]

    body = wrap(own_file(film, Text, 0, *names))(
        request(**{"wsgi.file_wrapper": wrapper}), lambda *head: None
    )
    assert isinstance(next(iter(body)), str)
    body.close()
    assert journals.sent() == [0]


def test_waitress_with_tell_of_text(wrap: Any, journals: Any, film: Path) -> None:
    """waitress fails on it as without us, and the close() adds no error of ours."""
    body = wrap(own_file(film, TellsText, 0, "seek"))(
        request(**{"wsgi.file_wrapper": ReadOnlyFileBasedBuffer}), lambda *head: None
    )
    with pytest.raises(TypeError):
        body.prepare(len(FILM))
    body.close()
    assert len(journals.sent()) == 1


def test_unread_file_counts_nothing(wrap: Any, journals: Any, film: Path) -> None:
    """waitress fails after it has found the file's size at its end, and sends nothing of it."""
    body = ReadOnlyFileBasedBuffer(TellsText(film, 0, "seek", "fileno"))

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [*HEADERS, ("Content-Length", str(len(FILM)))])
        return body

    environ = request() | {"wsgi.file_wrapper": ReadOnlyFileBasedBuffer}
    answer = wrap(app)(environ, lambda *given: None)
    with pytest.raises(TypeError):
        answer.prepare(len(FILM))
    answer.close()
    assert journals.sent() == [0]
