"""One nginx with gunicorn and uWSGI behind it, for all that does not break it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .stage import Stage, behind_nginx


@pytest.fixture(scope="package")
def stage() -> Iterator[Stage]:
    with behind_nginx("gunicorn", "uwsgi") as stage:
        yield stage
