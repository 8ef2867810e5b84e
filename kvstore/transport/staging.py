"""Device pages to and from any host memory, by way of two pinned buffers: one is moved while the other is copied.

Memory that is not pinned cannot be reached by the device's copy engines; torch would then copy through a small buffer of
its own and let the caller wait for each part.
"""

from collections.abc import Callable

import numpy as np
import torch

from common.errors import PeerFailed
from kvstore.transport.device_tensor import PinnedRows, pinned_rows
from kvstore.transport.page_mover import Mark, PageMover, PageNumbers
from kvstore.transport.pages import Rows

BUFFER_BYTES = 8 * 2**20
"""Of each of the two buffers, or one page."""

Part = tuple[int, int]
"""First page, end: positions in the list of pages that is moved."""


class StagingRing:
    """Two pinned buffers of whole pages. One thread uses it. The buffers are taken when they are first needed."""

    def __init__(self, mover: PageMover, page_bytes: int) -> None:
        self._mover, self._page_bytes = mover, page_bytes
        self._pages_at_once = max(1, BUFFER_BYTES // page_bytes)
        self._buffers: list[PinnedRows] = []

    def take_out(self, source: torch.Tensor, pages: PageNumbers, take: Callable[[Rows, Part], None]) -> None:
        """Call `take(rows, part)` for each part of `pages`, in order: those pages' bytes, good during the call.

        Raises PeerFailed if there is no memory for it.
        """
        buffers, waiting = self._take_buffers(), list[tuple[Mark, PinnedRows, Part]]()
        try:
            for number, part in enumerate(self._parts(len(pages))):
                buffer = buffers[number % 2]
                with self._mover.launching():
                    self._mover.move_out(source, pages[slice(*part)], buffer, np.arange(part[1] - part[0]))
                waiting.append((self._mover.mark(), buffer, part))
                if len(waiting) == 2:
                    _hand_on(waiting.pop(0), take)
            while waiting:
                _hand_on(waiting.pop(0), take)
        finally:
            self._mover.finish()  # also after an error: the buffers are used again

    def bring_in(self, fill: Callable[[Rows, Part], None], target: torch.Tensor, pages: PageNumbers) -> None:
        """Call `fill(rows, part)` for each part of `pages`, which writes their bytes; all are there on return.

        Raises PeerFailed if there is no memory for it.
        """
        buffers, marks = self._take_buffers(), list[Mark]()
        try:
            for number, part in enumerate(self._parts(len(pages))):
                buffer = buffers[number % 2]
                if number >= 2:
                    marks[number - 2].wait()  # what was in the buffer has gone
                fill(buffer.host.numpy()[: part[1] - part[0]], part)
                with self._mover.launching():
                    self._mover.move_in(buffer, np.arange(part[1] - part[0]), target, pages[slice(*part)])
                marks.append(self._mover.mark())
        finally:
            self._mover.finish()

    def _parts(self, n_pages: int) -> list[Part]:
        step = self._pages_at_once
        return [(first, min(first + step, n_pages)) for first in range(0, n_pages, step)]

    def _take_buffers(self) -> list[PinnedRows]:
        device = self._mover.device
        while len(self._buffers) < 2:
            shape = self._pages_at_once, self._page_bytes
            try:
                host = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
            except RuntimeError as error:  # torch's out of memory among them
                raise PeerFailed(f"no pinned memory to copy pages through: {str(error).splitlines()[0]}") from error
            self._buffers.append(pinned_rows(host, device))
        return self._buffers


def _hand_on(moved: tuple[Mark, PinnedRows, Part], take: Callable[[Rows, Part], None]) -> None:
    mark, buffer, part = moved
    mark.wait()
    take(buffer.host.numpy()[: part[1] - part[0]], part)
