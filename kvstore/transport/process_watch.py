"""Tells when the process at the other end of a Unix socket is gone, with everything that it had open."""

import os
import select
import socket
import struct
from pathlib import Path

_SO_PEERPIDFD = 77  # Linux 6.5; not in Python's socket module yet
_START = 19  # of the fields behind the name in /proc/PID/stat: when the process began


class ProcessWatch:
    """From `watch_peer` to `close`. One thread uses it."""

    def __init__(self, fd: int | None, pid: int, began: str) -> None:
        """`fd`: of the process; None: what /proc says of `pid` counts, as long as that began at `began`."""
        self.fd, self._pid, self._began = fd, pid, began

    @property
    def gone(self) -> bool:
        """Whether the process has ended. With a descriptor it is readable then; without, ask now and then."""
        if self.fd is not None:
            poll = select.poll()
            poll.register(self.fd, select.POLLIN)
            return bool(poll.poll(0))
        try:
            return _began(self._pid) != self._began
        except OSError:  # too many open files, for example: it may live
            return False

    def close(self) -> None:
        """Watch no more. A second call changes nothing."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def watch_peer(connection: socket.socket) -> ProcessWatch | None:
    """Watch the process that connected; None if this system shows nothing of it. Raises OSError: not now."""
    pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        return ProcessWatch(connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD), pid, "")
    except OSError:
        pass  # an older kernel: by the process's number, if it has one here
    if pid <= 0:
        return None
    try:
        return ProcessWatch(os.pidfd_open(pid), pid, "")
    except OSError:
        began = _began(pid)
        return None if began is None else ProcessWatch(None, pid, began)


def _began(pid: int) -> str | None:
    """When the process of that number began, in ticks; None if there is none that lives. Raises OSError: unknown."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in ("Z", "X") else fields[_START - 1]
