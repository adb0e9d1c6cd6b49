"""Volumes that are mounted for a group: the mount is root's, and the app's user may write in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from t23_middleware.errors import StateError
from t23_middleware.state import StateFolder

from .harness import let_others_in

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
pytestmark = as_root

USER, GROUP = 1000, 2000


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    """As the kubelet leaves it for an fsGroup."""
    let_others_in(tmp_path)
    path = tmp_path / "volume"
    path.mkdir()
    os.chown(path, 0, GROUP)
    path.chmod(0o2775)
    return path


def as_user(path: Path, groups: list[int]) -> tuple[str, int, str]:
    """The folder that *USER* uses with *path*, its mode, and what is wrong with it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups(groups)
            os.setgid(USER)
            os.setuid(USER)
            folder, wrong, mode = StateFolder(path), "", 0
            try:
                folder.create()
                mode = folder.path.stat().st_mode & 0o777
            except StateError as error:
                wrong = str(error)
            os.write(writing, json.dumps([str(folder.path), mode, wrong]).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as file:
        told = json.loads(file.read())
    return told[0], told[1], told[2]


@pytest.mark.parametrize("mode", [0o2775, 0o2770, 0o777, 0o1777])
def test_mount_is_used_by_own_folder(mount: Path, mode: int) -> None:
    """A volume for a group, an emptyDir, a folder for everybody: each holds a folder of the user's own."""
    mount.chmod(mode)
    assert as_user(mount, [GROUP]) == (str(mount / "t23-middleware"), 0o700, "")
    assert as_user(mount / "t23-middleware", [GROUP]) == (str(mount / "t23-middleware"), 0o700, "")


def test_closed_mount_is_refused_with_line(mount: Path) -> None:
    """A user that may not write there reads the line that makes the folder."""
    path, _, wrong = as_user(mount, [])
    assert path == str(mount)
    assert f"install -d -m 0700 -o {USER} -g {USER} {mount}" in wrong


def test_own_mount_is_used_itself(mount: Path) -> None:
    """A volume that belongs to the user is the state folder."""
    os.chown(mount, USER, USER)
    assert as_user(mount, []) == (str(mount), 0o700, "")


def test_anothers_folder_in_mount(mount: Path) -> None:
    """Somebody else's folder in the mount is refused as everywhere."""
    mount.chmod(0o777)
    (mount / "t23-middleware").mkdir()
    os.chown(mount / "t23-middleware", 3000, 3000)
    assert "another user's" in as_user(mount, [])[2]


def test_commands_of_root_find_it(mount: Path) -> None:
    """What root runs in the container acts as the owner of the folder in the mount."""
    assert StateFolder(mount).path == mount
    as_user(mount, [GROUP])
    assert StateFolder(mount).path == mount / "t23-middleware"
    script = (
        "import os, sys; from pathlib import Path; from t23_middleware.ops.owner import act_as_owner_of;"
        "act_as_owner_of(Path(sys.argv[1])); print(os.geteuid())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(mount)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert int(done.stdout) == USER
