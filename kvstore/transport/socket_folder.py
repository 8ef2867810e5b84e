"""Folders of sockets that share memory: one for each life of a process, in its `--run-dir`.

A life that is killed leaves its folder behind. Who comes next removes it, and never that of the living: a life holds a lock
on its folder (flock) from before its socket is there, the kernel lets go of it with the process, and only a folder that has a
socket, whose lock is free, and where nobody listens is removed. Lives have random names, so none comes back.
"""

import errno
import fcntl
import os
import shutil
import socket
import stat
from contextlib import suppress
from pathlib import Path

from kvstore.transport.socket_path import short_name

_SOCKET = "pages.sock"
_CONNECT_S = 0.5


class SocketFolder:
    """A new folder of mode 0700, this life's until `close`."""

    def __init__(self, run_dir: Path, name: str) -> None:
        """Raises OSError."""
        self._folder = run_dir / name
        run_dir.mkdir(parents=True, exist_ok=True)
        self._folder.mkdir(mode=stat.S_IRWXU)
        self._fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(OSError):  # a file system without locks: then nobody else gets this one either
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.path = self._folder / _SOCKET
        """Where to bind."""

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self._folder, ignore_errors=True)  # a folder removed by others is as gone as ours
        os.close(self._fd)


def left_behind(run_dir: Path) -> list[Path]:
    """Folders in `run_dir` whose process is gone; nothing is changed. A folder that cannot be looked at is not one."""
    try:
        folders = sorted(path.parent for path in run_dir.glob(f"*/{_SOCKET}"))
    except OSError:
        return []
    return [folder for folder in folders if _is_left(folder, remove=False)]


def sweep(run_dir: Path) -> list[Path]:
    """Remove those; returns which. Several may sweep at the same time, while others come and go."""
    return [folder for folder in left_behind(run_dir) if _is_left(folder, remove=True)]


def _is_left(folder: Path, *, remove: bool) -> bool:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False  # another one was faster
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        left = stat.S_ISSOCK((folder / _SOCKET).lstat().st_mode) and _is_silent(folder / _SOCKET)
        if left and remove:
            shutil.rmtree(folder, ignore_errors=True)
        return left
    except OSError:
        return False
    finally:
        os.close(fd)


def _is_silent(path: Path) -> bool:
    """Whether the kernel says that nobody listens there. A life without lock, of an older version, does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller, short_name(path) as name:
        caller.settimeout(_CONNECT_S)
        try:
            caller.connect(name)
        except OSError as error:
            return error.errno == errno.ECONNREFUSED
    return False
