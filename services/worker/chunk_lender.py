"""Moves chunks of page memory while the core decides, which hears at once if the system does not bear it; the engine hears
of a new arena.

Which chunks may go, the core has decided: nobody uses their pages, and no step in flight the end of the arena that leaves.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from common.errors import OutOfChunks
from services.worker.core.actions import LendChunks, TakeBackChunks
from services.worker.core.elastic import ACTIVATIONS
from services.worker.inbox import ChunksBack, Events


class LendableMemory(Protocol):
    """What of a ChunkLending is needed here."""

    @property
    def arena_bytes(self) -> Tensor:
        """The arena as it is."""
        ...

    def to_arena(self, places: Sequence[int]) -> None:
        """Raises OutOfChunks."""
        ...

    def from_arena(self, places: Sequence[int]) -> None:
        """Raises OutOfChunks."""
        ...

    def to_system(self, places: Sequence[int]) -> None:
        """Give memory away. Raises OutOfChunks."""
        ...

    def from_system(self, places: Sequence[int]) -> None:
        """Raises OutOfChunks."""
        ...


class ChunkLender:
    """Used by the loop's thread, which opened the memory."""

    def __init__(self, memory: LendableMemory, inbox: Events, *, use_scratch: Callable[[Tensor], None]) -> None:
        """`use_scratch`: gives the engine the arena for the steps that are submitted from now on."""
        self._memory, self._inbox, self._use_scratch = memory, inbox, use_scratch

    def carry_out(self, order: LendChunks | TakeBackChunks) -> str:
        """Now, all or nothing. Returns why nothing: the system bears no more mappings; empty: it was done.

        What comes back from the system, or does not, is told by ChunksBack.
        """
        try:
            self._move(order)
        except OutOfChunks as error:
            return str(error)
        return ""

    def _move(self, order: LendChunks | TakeBackChunks) -> None:
        match order:
            case LendChunks(chunks=chunks, to=to):
                if to == ACTIVATIONS:
                    self._memory.to_arena(chunks)
                    self._use_scratch(self._memory.arena_bytes)
                else:
                    self._memory.to_system(chunks)
            case TakeBackChunks(chunks=chunks, owner=owner):
                if owner == ACTIVATIONS:
                    self._memory.from_arena(chunks)
                    self._use_scratch(self._memory.arena_bytes)
                else:
                    self._inbox.put(ChunksBack(chunks, self._refill(chunks)))

    def _refill(self, chunks: Sequence[int]) -> str:
        try:
            self._memory.from_system(chunks)
        except OutOfChunks as error:  # others took it meanwhile
            return str(error)
        return ""
