"""Commands that root runs act as the owner of the state folder: files owned by root would lock out the app."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from ..owned import resolve_mount


def act_as_owner_of(folder: Path) -> None:
    """Take the user id of the owner of *folder* permanently, if this is root and another user owns the folder.

    If *folder* is a mount owned by root, take the owner of the app's folder in it.
    """
    folder = resolve_mount(folder)
    if os.geteuid() != 0 or not folder.is_dir():
        return
    owner = folder.stat()
    if owner.st_uid == 0:
        return
    try:
        os.initgroups(pwd.getpwuid(owner.st_uid).pw_name, owner.st_gid)
    except KeyError:
        os.setgroups([])  # a user id from a container, which has no name here
    os.setgid(owner.st_gid)
    os.setuid(owner.st_uid)
