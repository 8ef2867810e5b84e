"""Memory of one step beside weights and KV pages: a stack, from which the step takes and to which it gives back.

with scratch.frame():                            a step
    hidden = scratch.take((rows, width), dtype)  lives until the frame ends
    with scratch.frame():
        keys = scratch.take(...)                 given back at once
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from math import prod
from typing import Protocol

import torch
from torch import Tensor

ALIGNMENT_BYTES = 64
"""A cache line: what begins at one is read at full width."""


class OutOfScratch(RuntimeError):
    """A step took more than was reserved for it: a bug of ours, never of a request."""


class Scratch(Protocol):
    """Where a step's tensors lie. One thread, first in, last out."""

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised, contiguous tensor at a multiple of ALIGNMENT_BYTES. Lives until the innermost frame ends.

        Raises OutOfScratch.
        """
        ...

    def frame(self) -> AbstractContextManager[None]:
        """What is taken inside is given back at its end."""
        ...

    @property
    def peak_bytes(self) -> int:
        """The most that was taken at once since the outermost frame began, gaps of alignment included."""
        ...


def taken_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """What `take` counts for such a tensor."""
    n_bytes = prod(shape) * dtype.itemsize
    return -(-n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class _Stack:
    """How far a scratch is taken. Heights are multiples of ALIGNMENT_BYTES."""

    def __init__(self) -> None:
        self.height_bytes = 0
        self.peak_bytes = 0
        self._depth = 0

    @property
    def outermost(self) -> bool:
        """No frame is open."""
        return self._depth == 0

    def push(self, n_bytes: int) -> int:
        """Take; returns where it begins."""
        start = self.height_bytes
        self.height_bytes = start + n_bytes
        self.peak_bytes = max(self.peak_bytes, self.height_bytes)
        return start

    @contextmanager
    def frame(self) -> Iterator[None]:
        height_bytes = self.height_bytes
        if self._depth == 0:
            self.peak_bytes = height_bytes
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            self.height_bytes = height_bytes


class ArenaScratch:
    """A Scratch in memory that somebody else lends. Owns how much of it is taken, and nothing of the memory."""

    def __init__(self, memory: Tensor) -> None:
        """`memory` [n] uint8, contiguous."""
        self._stack = _Stack()
        self.use(memory)

    def use(self, memory: Tensor) -> None:
        """Take from this memory from now on. Between steps only: whatever was taken must have been given back."""
        assert self._stack.outermost and self._stack.height_bytes == 0, "scratch changes between steps only"
        assert memory.dtype is torch.uint8 and memory.is_contiguous(), "scratch is plain bytes"
        skipped_bytes = min(memory.numel(), -memory.data_ptr() % ALIGNMENT_BYTES)
        self._memory = memory[skipped_bytes:]

    @property
    def capacity_bytes(self) -> int:
        """How much can be taken at once."""
        return self._memory.numel()

    @property
    def peak_bytes(self) -> int:
        """See Scratch."""
        return self._stack.peak_bytes

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See Scratch."""
        n_bytes = prod(shape) * dtype.itemsize
        start = self._stack.height_bytes
        if start + n_bytes > self.capacity_bytes:
            raise OutOfScratch(
                f"a step takes {list(shape)} {dtype} ({n_bytes} bytes) where {self.capacity_bytes - start} of "
                f"{self.capacity_bytes} bytes are left; what was reserved for it does not suffice"
            )
        self._stack.push(taken_bytes(shape, dtype))
        return _tensor_at(self._memory, start, n_bytes, shape, dtype)

    def frame(self) -> AbstractContextManager[None]:
        """See Scratch."""
        return self._stack.frame()


class GrowingScratch:
    """A Scratch with memory of its own, as much as the largest step so far took at once.

    It grows when a step has ended. Until then what does not fit is allocated by itself, so nothing that was taken moves.
    """

    def __init__(self, device: torch.device) -> None:
        self._stack = _Stack()
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    @property
    def held_bytes(self) -> int:
        """Memory kept between steps."""
        return self._memory.numel()

    @property
    def peak_bytes(self) -> int:
        """See Scratch."""
        return self._stack.peak_bytes

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See Scratch. Raises torch's own error where the machine has no memory left."""
        n_bytes = prod(shape) * dtype.itemsize
        start = self._stack.push(taken_bytes(shape, dtype))
        if start + n_bytes > self.held_bytes:
            return torch.empty(shape, dtype=dtype, device=self._memory.device)
        return _tensor_at(self._memory, start, n_bytes, shape, dtype)

    @contextmanager
    def frame(self) -> Iterator[None]:
        """See Scratch."""
        with self._stack.frame():
            yield
        if self._stack.outermost and self.peak_bytes > self.held_bytes:
            device = self._memory.device
            self._memory = torch.empty(0, dtype=torch.uint8, device=device)  # both at once would be twice the memory
            self._memory = torch.empty(self.peak_bytes, dtype=torch.uint8, device=device)


def _tensor_at(memory: Tensor, start: int, n_bytes: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return memory[start : start + n_bytes].view(dtype).view(shape)
