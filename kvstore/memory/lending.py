"""Chunks of page memory that serve something else for a while: the arena of activations, or nobody.

A chunk always comes back to its own place, so a page is the same memory for ever, here and in every process that maps it.
Which chunks may go, the block pool has decided (`LentChunks`); this moves their memory.

    home <-> arena     unmapped here, mapped there: no memory is taken or given back
    home <-> system    unmapped everywhere, and the system has the memory meanwhile
"""

import threading
from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from common.errors import OutOfChunks
from kvstore.memory.arena import ActivationArena
from kvstore.memory.backend import VmMisuse
from kvstore.memory.chunks import ChunkPool
from kvstore.memory.page_pool import PagePool
from kvstore.memory.undo import undo


def _nobody_shows_them(pages: Collection[int]) -> None:
    """Where no other mapping of pages exists."""


class ChunkLending:
    """Owns which chunk lies where while it is not at home. Used by one thread, the one that resizes the pages too; the back
    end is others' as well, so it is used under the lock.

    The caller guarantees that nobody reads or writes the pages of what it lends, kernels that were started included.
    """

    def __init__(
        self,
        pages: PagePool,
        chunks: ChunkPool,
        lock: threading.Lock,
        *,
        forget_pages: Callable[[Collection[int]], None] = _nobody_shows_them,
        owner: str = "kv",
    ) -> None:
        """`lock` guards the back end, and is held while it is used. `owner`: whose the pages' chunks are.

        `forget_pages(pages)`: unmap these pages wherever else they are shown, now; called without the lock.
        """
        self._pages, self._chunks, self._lock = pages, chunks, lock
        self._forget_pages, self._owner = forget_pages, owner
        self._arena = ActivationArena(chunks.backend, chunks.chunk_bytes, len(pages.chunks))
        self._in_arena: list[int] = []
        self._at_system: set[int] = set()

    @property
    def arena_bytes(self) -> Tensor:
        """The arena as it is, uint8; its beginning stays where it is as long as the arena is."""
        with self._lock:
            return self._arena.bytes

    @property
    def released_bytes(self) -> int:
        """What the system has."""
        return len(self._at_system) * self._chunks.chunk_bytes

    def to_arena(self, places: Sequence[int]) -> None:
        """Chunks that are at home are the arena's end from now on, in this order. All or none: raises OutOfChunks."""
        with self._lock:
            lifted = self._pages.memory.lift(places)
            try:
                self._arena.grow(lifted)
            except OutOfChunks:
                with undo(self._chunks.backend):
                    self._pages.memory.lay(places)
                raise
            self._in_arena += places

    def from_arena(self, places: Sequence[int]) -> None:
        """These, the arena's last, are pages of zeros again. Raises VmMisuse for others; OutOfChunks, nothing changed."""
        kept = len(self._in_arena) - len(places)
        if kept < 0 or sorted(self._in_arena[kept:]) != sorted(places):
            raise VmMisuse(f"the arena ends with chunks {self._in_arena[-len(places) :]}, not {list(places)}")
        with self._lock:
            self._pages.memory.keep_for_undoing(self._in_arena[kept:])
            leaving = self._arena.shrink(len(places))
            try:
                self._pages.memory.lay(places)
            except OutOfChunks:
                with undo(self._chunks.backend):
                    self._arena.grow(leaving)
                raise
            del self._in_arena[kept:]
        for place in places:
            self._pages.clear(place)

    def to_system(self, places: Sequence[int]) -> None:
        """Give the memory of chunks that are at home back to the system: all or none. Raises OutOfChunks if the system bears
        too few mappings to divide them; VmMisuse where the memory could not come back."""
        if not self._chunks.can_vacate:
            raise VmMisuse(f"memory of {type(self._chunks.backend).__name__} cannot go and come back as the same chunk")
        pages_per_chunk = self._chunks.chunk_bytes // self._pages.layout.page_bytes
        whole = (range(place * pages_per_chunk, (place + 1) * pages_per_chunk) for place in places)
        self._forget_pages([page for run in whole for page in run])
        with self._lock:
            self._chunks.vacate(self._owner, self._pages.memory.lift(places))
            self._at_system.update(places)

    def from_system(self, places: Sequence[int]) -> None:
        """These are pages of zeros again: all of them, or OutOfChunks and none. Raises VmMisuse for others."""
        if not self._at_system.issuperset(places):
            raise VmMisuse(f"chunks {list(places)} are not all with the system, which has {sorted(self._at_system)}")
        with self._lock:
            held = self._pages.chunks
            chunks = [held[place] for place in places]
            self._pages.memory.keep_for_undoing(places)
            self._chunks.refill(self._owner, chunks)
            try:
                self._pages.memory.lay(places)
            except OutOfChunks:
                self._chunks.vacate(self._owner, chunks)
                raise
            self._at_system.difference_update(places)

    def close(self) -> None:
        """Give the arena's addresses back; the pages can be closed after that, wherever their chunks were."""
        with self._lock:
            self._arena.close()
            self._in_arena.clear()
