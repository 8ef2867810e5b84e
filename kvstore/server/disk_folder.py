"""Block files in a folder: written whole or not at all, checked on every read, never more than the cap.

    <folder>/lock             held while a store uses the folder
    <folder>/3f/3f....kv      one block; see core/disk_format.py
    <folder>/3f/3f....tmp     one that is being written, or that a crash left behind

A file gets its name only when it is complete. Nothing is forced to the platter: after a power failure a file may be
torn all the same, which its checksum shows, and a block that is lost is computed again.
"""

import errno
import fcntl
import heapq
import io
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from common.errors import ConfigError
from common.kv_layout import KvLayout
from common.messages.blocks import BlockName
from kvstore.server.core.disk_format import (
    CHECKSUM_BYTES,
    checksum,
    disk_bytes,
    file_bytes,
    file_header,
    header_bytes,
    read_header,
)

_NAME = re.compile(r"[0-9a-f]{32}\.(kv|tmp)")
_FOLDER = re.compile(r"[0-9a-f]{2}")
Parts = Sequence[bytes | memoryview]


def write_file(path: Path, parts: Parts) -> None:
    """A new file with these contents, in place of whatever had its name. Raises OSError, and may leave a part of it behind."""
    path.unlink(missing_ok=True)  # never through a link to elsewhere, never into a pipe that nobody reads
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
        for part in parts:
            file.write(part)


@dataclass(frozen=True, slots=True)
class _Found:
    """A file whose header is whole."""

    used_ns: int
    block: BlockName

    def __lt__(self, other: "_Found") -> bool:
        """Less worth keeping. File times may tie: of a chain the end goes first."""
        mine, theirs = self.block, other.block
        return (self.used_ns, -mine.depth, mine.name) < (other.used_ns, -theirs.depth, theirs.name)


class DiskFolder:
    """Owns the files of one folder, which nobody else writes to; other files in it are left alone.

    One thread uses it. A name of ours is ours, whatever lies there: what is no plain file or does not check is deleted. Links
    are not followed, and what is no plain file is not waited for.
    """

    def __init__(self, folder: Path, cap_bytes: int, *, write: Callable[[Path, Parts], None] = write_file) -> None:
        """Takes the folder, made if it is missing. Raises ConfigError if it cannot be used or is in use."""
        self._folder, self._cap_bytes, self._write = folder, cap_bytes, write
        self._held: set[bytes] = set()  # names of complete files
        self.used_bytes = 0
        """Of all files, in whole units of the file system; right after `scan`."""
        self.discarded_files = 0
        """By the last scan: torn, of another layout, or too many."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with os.scandir(folder):
                pass
            self._lock: BinaryIO = open(_lock_fd(folder / "lock"), "ab")  # noqa: SIM115 (open as long as the folder is ours)
        except OSError as error:
            raise ConfigError(f"--disk={folder}: cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ConfigError(f"--disk={folder}: another KV store uses this folder; give each its own") from error

    def close(self) -> None:
        """Let go of the folder. Files stay."""
        self._lock.close()

    def scan(self, layout: KvLayout, limit_blocks: int) -> list[BlockName]:
        """Blocks that are there, the least recently used first; the newest `limit_blocks` stay, all others are deleted.

        Reads headers only. Takes memory for `limit_blocks` names. What cannot be read counts as not there.
        """
        kept: list[_Found] = []
        self.used_bytes = self.discarded_files = 0
        for path in self._files():
            found = None if path.suffix == ".tmp" else _look(path, layout)
            if found is not None and len(kept) < limit_blocks:
                heapq.heappush(kept, found)
                continue
            if found is not None:
                path = self._path(heapq.heappushpop(kept, found).block.name)
            self.discarded_files += 1
            if not _unlink(path):
                self.used_bytes += _size_bytes(path)  # it takes its room whatever we want
        self._held = {found.block.name for found in kept}
        self.used_bytes += len(kept) * disk_bytes(layout)
        return [found.block for found in sorted(kept)]

    def write(self, block: BlockName, layout: KvLayout, parts: Sequence[memoryview]) -> str:
        """Write a block's file; returns why that was not possible, or nothing."""
        path = self._path(block.name)
        needed_bytes = 0 if block.name in self._held else disk_bytes(layout)
        if self.used_bytes + needed_bytes > self._cap_bytes:
            return f"{self.used_bytes} of {self._cap_bytes} bytes are used"
        header, new = file_header(block, layout), path.with_suffix(".tmp")
        try:
            _own_folder(path.parent)
            self._write(new, [header, *parts, checksum(header, list(parts))])
            os.replace(new, path)
        except OSError as error:
            _unlink(new)
            return f"cannot write {path}: {error.strerror}"
        self._held.add(block.name)
        self.used_bytes += needed_bytes
        return ""

    def read(self, block: BlockName, layout: KvLayout, parts: Sequence[memoryview]) -> bool:
        """Read a block into `parts`. False if it is not there or not as it was written; its file is deleted then."""
        path, header = self._path(block.name), file_header(block, layout)
        try:
            with _opened(path) as file:
                whole = os.fstat(file.fileno()).st_size == file_bytes(layout) and _fill(file, header, parts)
                if whole:
                    os.utime(path)  # the order of use outlives a restart
        except OSError:
            whole = False
        if not whole:
            self.delete(block.name, layout)
        return whole

    def delete(self, name: bytes, layout: KvLayout) -> None:
        """Delete a block's file. One that cannot be deleted keeps its room."""
        if _unlink(self._path(name)) and name in self._held:
            self._held.discard(name)
            self.used_bytes -= disk_bytes(layout)

    def _path(self, name: bytes) -> Path:
        text = name.hex()
        return self._folder / text[:2] / f"{text}.kv"

    def _files(self) -> Iterator[Path]:
        """Whatever has a name of ours but folders, in no order. A folder that cannot be read has none."""
        for folder in _entries(self._folder):
            if _FOLDER.fullmatch(folder.name) and folder.is_dir(follow_symlinks=False):
                for entry in _entries(Path(folder.path)):
                    ours = _NAME.fullmatch(entry.name) and entry.name[:2] == folder.name
                    if ours and not entry.is_dir(follow_symlinks=False):
                        yield Path(entry.path)


def _lock_fd(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _own_folder(path: Path) -> None:
    """Make it, if it is missing. Raises OSError for anything else of that name, a link to a folder elsewhere among them."""
    path.mkdir(exist_ok=True)
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def _opened(path: Path) -> io.FileIO:
    """To read. Raises OSError, also for what is no plain file."""
    file = io.FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC))
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "is no plain file", str(path))


def _entries(folder: Path) -> Iterator["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError:
        return


def _look(path: Path, layout: KvLayout) -> _Found | None:
    """The block of a file, by its header; None if that is not one of this layout, or not of this name and length."""
    try:
        with _opened(path) as file:
            state = os.fstat(file.fileno())
            block = read_header(file.read(header_bytes(layout)), layout)
    except OSError:
        return None
    if block is None or block.name.hex() != path.stem or state.st_size != file_bytes(layout):
        return None
    return _Found(state.st_mtime_ns, block)


def _fill(file: io.FileIO, header: bytes, parts: Sequence[memoryview]) -> bool:
    """Read everything that follows, and check it against the header it must have and the checksum it ends with."""
    if file.read(len(header)) != header:
        return False
    for part in parts:
        at = 0
        while at < len(part):
            n_bytes = file.readinto(part[at:])
            if not n_bytes:
                return False
            at += n_bytes
    return file.read(CHECKSUM_BYTES) == checksum(header, list(parts))


def _unlink(path: Path) -> bool:
    """Whether there is no such file any more."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False  # it stays, and is checked like any other when it is read
    return True


def _size_bytes(path: Path) -> int:
    try:
        return os.stat(path, follow_symlinks=False).st_size
    except OSError:
        return 0  # gone meanwhile
