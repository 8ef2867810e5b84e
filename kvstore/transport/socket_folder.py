"""Folders of sockets that share memory: one for each life of a process, in its `--run-dir`.

A life that is killed leaves its folder behind. Who comes next removes it, and never that of the living: a life holds a lock
on its folder (flock) from before its socket is there, the kernel lets go of it with the process, and only a folder that has a
socket, whose lock is free, and where nobody listens is removed. Who was killed before it had a socket leaves a folder with
nothing of worth, which goes when it is a minute old. Lives have random names, so none comes back.

Locks of folders and sockets are one kernel's alone, also on a file system that several kernels see: there the folder of a
living process of another one looks like that of a dead one. So each folder names its kernel, and goes only by a process of that
one. What was there before a restart of the machine stays, therefore.
"""

import errno
import fcntl
import os
import shutil
import socket
import stat
from contextlib import suppress
from pathlib import Path

from common.net.host import kernel_identity
from kvstore.transport.socket_path import short_name

_SOCKET = "pages.sock"
_KERNEL = "kernel"
_LIVES = "*@*"  # names of folders: those of lives (common.ids.peer_id); a run directory may hold others
_CONNECT_S = 0.5
_BARE_S = 60.0
"""A life is much sooner done with making its folder."""


class SocketFolder:
    """A new folder of mode 0700, this life's until `close`."""

    def __init__(self, run_dir: Path, name: str) -> None:
        """Raises OSError."""
        self._folder = run_dir / name
        self.path = self._folder / _SOCKET
        """Where to bind."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._folder.mkdir(mode=stat.S_IRWXU)
        self._fd: int | None = None
        try:
            self._fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            with suppress(OSError):  # no locks on this file system: who sweeps gets none either, and removes nothing
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (self._folder / _KERNEL).write_text(kernel_identity())
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Remove it. Once more: nothing happens."""
        shutil.rmtree(self._folder, ignore_errors=True)  # a folder removed by others is as gone as ours
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def left_behind(run_dir: Path, now_s: float) -> list[Path]:
    """Folders in `run_dir` whose process is gone; nothing is changed. A folder that cannot be looked at is not one.

    `now_s`: seconds since 1970, as file systems count them.
    """
    try:
        folders = sorted(run_dir.glob(_LIVES))
    except OSError:
        return []
    return [folder for folder in folders if _is_left(folder, now_s, remove=False)]


def sweep(run_dir: Path, now_s: float) -> list[Path]:
    """Remove those; returns which. Several may sweep at the same time, while others come and go."""
    return [folder for folder in left_behind(run_dir, now_s) if _is_left(folder, now_s, remove=True)]


def _is_left(folder: Path, now_s: float, *, remove: bool) -> bool:
    try:
        if not (folder / _SOCKET).exists() and not _is_old(folder, now_s):
            return False  # and unlocked: a life that has just made it must find its lock free
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False  # another one was faster
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        names = set(os.listdir(fd))
        if _SOCKET in names:
            left = _kernel_of(folder) == kernel_identity() and _is_dead(folder / _SOCKET)
        else:  # killed before the lock, before the name was written, or after it
            left = not names or (names == {_KERNEL} and _kernel_of(folder) in ("", kernel_identity()))
        if left and remove:
            shutil.rmtree(folder, ignore_errors=True)
        return left
    except OSError:
        return False
    finally:
        os.close(fd)


def _is_old(folder: Path, now_s: float) -> bool:
    return now_s - folder.lstat().st_mtime > _BARE_S


def _kernel_of(folder: Path) -> str:
    return (folder / _KERNEL).read_text()


def _is_dead(path: Path) -> bool:
    return stat.S_ISSOCK(path.lstat().st_mode) and _is_silent(path)


def _is_silent(path: Path) -> bool:
    """Whether the kernel says that nobody listens there. A life without lock does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller, short_name(path) as name:
        caller.settimeout(_CONNECT_S)
        try:
            caller.connect(name)
        except OSError as error:
            return error.errno == errno.ECONNREFUSED
    return False
