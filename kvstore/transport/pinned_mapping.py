"""Makes a peer's mapped file reachable for the device's copy engines, so that no copy by the host is needed."""

from typing import Any, Protocol

import numpy as np
import torch

from common.errors import PeerFailed
from kvstore.transport.device_tensor import PinnedRows, bytes_at, pinned_rows
from kvstore.transport.page_mover import PageNumbers
from kvstore.transport.pages import Rows
from kvstore.transport.refusals import refusals
from kvstore.transport.shared_pages import SharedPages

_PORTABLE_AND_MAPPED = 0x01 | 0x02  # for every context, and at the same address on the device


class PinDriver(Protocol):
    """Of `kvstore.memory.cuda_driver.CudaDriver`."""

    def enter(self, name: str, *arguments: Any) -> Any:  # Any: the bindings have no types
        """Call the driver in the device's context."""
        ...


class PinnedMapping:
    """The rows of a mapping from its first page to its last, pinned until `end`. Holes between them get memory."""

    def __init__(self, driver: PinDriver, shared: SharedPages, device: torch.device) -> None:
        """Takes some 0.1 s per GiB. Raises PeerFailed if the system does not pin so much."""
        self._driver = driver
        page_bytes = shared.description.page_bytes
        per_chunk = shared.description.chunk_bytes // page_bytes
        firsts = [start // page_bytes for start in shared.description.chunk_offsets]
        if not firsts:
            raise PeerFailed(f"{shared.description.peer} has no pages to pin")
        self.first_row, self._end_row = min(firsts), max(firsts) + per_chunk
        with shared.using() as rows:
            part = rows[self.first_row : self._end_row]
            self._kept: Rows | None = part  # nothing is unmapped while it is pinned
            self._address = part.ctypes.data
            with refusals(f"pin {part.nbytes} bytes of"):
                driver.enter("cuMemHostRegister", self._address, part.nbytes, _PORTABLE_AND_MAPPED)
            host = bytes_at(self._address, part.nbytes, torch.device("cpu")).view(part.shape)
            self.rows: PinnedRows = pinned_rows(host, device)

    def covers(self, rows: PageNumbers) -> bool:
        """Whether all these rows of the mapping are pinned."""
        return rows.size == 0 or (self.first_row <= int(np.min(rows)) and int(np.max(rows)) < self._end_row)

    def end(self) -> None:
        """Let go of the memory, which stays mapped. No copy is in progress."""
        self._driver.enter("cuMemHostUnregister", self._address)
        self._kept = None
