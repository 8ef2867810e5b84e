"""A folder of block files that meets the fault kit: what cannot be read or written, and what is not as it was written."""

import errno
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common.faults.plan import Outcome
from common.faults.points import Kind, Point, Side
from common.kv_layout import KvLayout
from common.messages.blocks import BlockName
from common.net.fault_kit import FaultKit
from kvstore.server.disk_folder import DiskFolder, Parts, write_file


class FaultyDiskFolder(DiskFolder):
    """Each file strikes `disk` when it is read or written, with `read` or `write` as the peer.

    What is corrupt or torn is so in the file, under its right name and before it is read: only a check finds it.
    """

    def __init__(
        self, folder: Path, cap_bytes: int, kit: FaultKit, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """As DiskFolder. `sleep` takes seconds."""
        super().__init__(folder, cap_bytes, write=self._write_struck)
        self._kit, self._sleep = kit, sleep

    def read(self, block: BlockName, layout: KvLayout, parts: Sequence[memoryview]) -> bool:
        """As DiskFolder, with faults."""
        path = self._path(block.name)
        try:
            _spoil(path, self._strike("read", path))
        except OSError:  # as one of the file's own: what cannot be read is no good any more
            self.delete(block.name, layout)
            return False
        return super().read(block, layout, parts)

    def _write_struck(self, path: Path, parts: Parts) -> None:
        outcome = self._strike("write", path)
        write_file(path, parts)
        _spoil(path, outcome)

    def _strike(self, what: str, path: Path) -> Outcome:
        outcome = self._kit.strike(Point.DISK, Side.WORK, what)
        late_ms = outcome.ms_of(Kind.DELAY)
        if late_ms:
            self._sleep(late_ms / 1000)
        if outcome.has(Kind.FAIL, Kind.CUT):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return outcome


def _spoil(path: Path, outcome: Outcome) -> None:
    """Change a file as a rule asks. Raises OSError."""
    if not outcome.has(Kind.CORRUPT, Kind.TORN):
        return
    with open(path, "r+b") as file:
        half = os.fstat(file.fileno()).st_size // 2
        if outcome.has(Kind.TORN):
            file.truncate(half)
            return
        file.seek(half)
        (byte,) = file.read(1)
        file.seek(half)
        file.write(bytes([byte ^ 0xFF]))
