"""Whole pages between memories that one device reaches: its own, a peer's mapped there, pinned memory of the host."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import PeerFailed
from kvstore.transport.device_tensor import PinnedRows

PageNumbers = NDArray[np.int64]

_LONG_RUN_BYTES = 256 * 1024
"""Runs of neighbours that are this long on average go by the copy engines, others by a kernel: a copy engine needs a
launch for each run, which takes as long as moving about so much over PCIe."""


class PageMover:
    """A stream of its own on one device. One thread uses it.

    What is moved is there when `finish` returns; until then both memories must stay.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Before the engine's waiting blocks: a copy is short, and behind a product that fills the device it comes late.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @property
    def device(self) -> torch.device:
        """The device."""
        return self._device

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        """Work that is launched inside goes to the mover's stream. Raises PeerFailed if the device has no memory for it.

        A full device fails one copy, not the process.
        """
        try:
            with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                yield
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise PeerFailed(f"no memory to copy pages on {self._device}: {error}") from error

    def move(self, source: Tensor, source_pages: PageNumbers, target: Tensor, target_pages: PageNumbers) -> None:
        """target[target_pages[i]] = source[source_pages[i]], rows of bytes both; only launches. Inside `launching`.

        The caller has made sure that all pages are there.
        """
        if len(source_pages) == 0:
            return
        both = torch.from_numpy(np.stack([source_pages, target_pages]))
        if self._stream is not None:
            both = both.pin_memory().to(self._device, non_blocking=True)
        copy_rows(source, both[0], target, both[1])

    def move_out(
        self, source: Tensor, source_pages: PageNumbers, target: PinnedRows, target_pages: PageNumbers
    ) -> None:
        """As `move`, from the device to the host."""
        if (runs := long_runs(source_pages, target_pages, source.shape[1])) is None:
            self.move(source, source_pages, target.device, target_pages)
            return
        for at, to, count in runs:
            target.host[to : to + count].copy_(source[at : at + count], non_blocking=True)

    def move_in(self, source: PinnedRows, source_pages: PageNumbers, target: Tensor, target_pages: PageNumbers) -> None:
        """As `move`, from the host to the device."""
        if (runs := long_runs(source_pages, target_pages, target.shape[1])) is None:
            self.move(source.device, source_pages, target, target_pages)
            return
        for at, to, count in runs:
            target[to : to + count].copy_(source.host[at : at + count], non_blocking=True)

    def mark(self) -> "Mark":
        """The end of what was launched so far."""
        event = None
        if self._stream is not None:
            event = torch.cuda.Event()
            event.record(self._stream)
        return Mark(event)

    def finish(self) -> None:
        """Return when everything launched so far is done. Waits on the host, without the interpreter's lock."""
        self.mark().wait()


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a mover's stream."""

    event: torch.cuda.Event | None

    def wait(self) -> None:
        """Return when the stream has passed it."""
        if self.event is not None:
            self.event.synchronize()


def long_runs(
    source_pages: PageNumbers, target_pages: PageNumbers, page_bytes: int
) -> list[tuple[int, int, int]] | None:
    """The copy as runs of neighbours on both sides (first source page, first target page, count); None if they are short."""
    breaks = np.flatnonzero((np.diff(source_pages) != 1) | (np.diff(target_pages) != 1)) + 1
    n_runs = len(breaks) + 1
    if len(source_pages) * page_bytes < n_runs * _LONG_RUN_BYTES:
        return None
    begins = np.concatenate([[0], breaks])
    counts = np.diff(np.concatenate([begins, [len(source_pages)]]))
    return list(zip(source_pages[begins].tolist(), target_pages[begins].tolist(), counts.tolist(), strict=True))


def copy_rows(source: Tensor, source_ids: Tensor, target: Tensor, target_ids: Tensor) -> None:
    """target[target_ids[i]] = source[source_ids[i]] on the current stream."""
    if source.is_cuda:
        from kernels.page_copy import copy_pages  # here: CPU installations have no Triton

        copy_pages(source, source_ids, target, target_ids)
    else:
        target.index_copy_(0, target_ids, source.index_select(0, source_ids))
