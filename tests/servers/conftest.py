"""One server at a time, started once for all of its tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ..harness import lacking
from .process import Site, make_files, running
from .setups import SETUPS, missing


@pytest.fixture(scope="package")
def served() -> Iterator[Path]:
    """The folder with the films. Under no folder of pytest's: Apache's own user may not enter those."""
    folder = Path(tempfile.mkdtemp(prefix="served-"))
    folder.chmod(0o755)
    make_files(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module", params=SETUPS)
def site(request: pytest.FixtureRequest, served: Path) -> Iterator[Site]:
    """A running server of the matrix."""
    with started(request.param, served) as site:
        yield site


@pytest.fixture(scope="module")
def waitress(served: Path) -> Iterator[Site]:
    with started("waitress", served) as site:
        yield site


@contextmanager
def started(name: str, served: Path) -> Iterator[Site]:
    """The server of that name, in a folder of its own."""
    setup = SETUPS[name]
    reason = missing(setup)
    if reason is not None:
        lacking(reason)
    folder = Path(tempfile.mkdtemp(prefix="server-"))
    folder.chmod(0o755)
    try:
        with running(setup, folder, served) as site:
            yield site
    finally:
        shutil.rmtree(folder)
