"""Commands that root runs act as the owner of the state folder: files of root's would lock the app out."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from ..owned import resolve_mount


def act_as_owner_of(folder: Path) -> None:
    """Become the owner of *folder* for good, if this is root and the folder is there and another's.

    Where it is a mount of root's, the owner of the app's folder in it.
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
        os.setgroups([])  # a user id of a container, without a name here
    os.setgid(owner.st_gid)
    os.setuid(owner.st_uid)
