"""The one place that physical memory comes from: chunks of equal length under a hard budget."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from common.errors import OutOfChunks
from common.units import format_bytes
from kvstore.memory.backend import Chunk, VmBackend, VmMisuse


@runtime_checkable
class Refillable(Protocol):
    """A back end whose chunks can lose their memory and get other memory in its place, as the same chunks."""

    def vacate(self, chunk: Chunk) -> None:
        """Give its memory back to the system. Raises VmMisuse while it is mapped."""
        ...

    def refill(self, chunk: Chunk) -> None:
        """Memory of zeros. Raises OutOfChunks."""
        ...


class ChunkPool:
    """Owns every chunk that exists; each belongs to one named owner (a virtual tensor) until it is freed.

    Law: budget_chunks == used_chunks + free_chunks, and the owners' chunks are all different.
    """

    def __init__(self, backend: VmBackend, budget_bytes: int, chunk_bytes: int) -> None:
        """`budget_bytes` is rounded down to whole chunks."""
        self._backend = backend
        self._chunk_bytes = chunk_bytes
        self._budget_chunks = budget_bytes // chunk_bytes
        self._owned: dict[str, dict[Chunk, None]] = {}
        self._used_chunks = 0

    @property
    def backend(self) -> VmBackend:
        """Where the chunks come from, and where they are mapped."""
        return self._backend

    @property
    def chunk_bytes(self) -> int:
        """Length of each chunk."""
        return self._chunk_bytes

    @property
    def budget_chunks(self) -> int:
        """Chunks that may exist."""
        return self._budget_chunks

    @property
    def used_chunks(self) -> int:
        """Chunks that exist."""
        return self._used_chunks

    @property
    def free_chunks(self) -> int:
        """Chunks that may still be allocated."""
        return self._budget_chunks - self._used_chunks

    def set_budget(self, budget_chunks: int) -> None:
        """Allow more chunks, or fewer, but no fewer than exist: else VmMisuse."""
        if budget_chunks < self._used_chunks:
            raise VmMisuse(f"a budget of {budget_chunks} chunks, of which {self._used_chunks} exist: {self._counts()}")
        self._budget_chunks = budget_chunks

    def alloc(self, owner: str, n_chunks: int) -> list[Chunk]:
        """All of them or none: raises OutOfChunks and changes nothing if the budget or the system has fewer."""
        if n_chunks < 0:
            raise VmMisuse(f"cannot allocate {n_chunks} chunks")
        if n_chunks > self.free_chunks:
            raise OutOfChunks(
                f"{owner} needs {n_chunks} chunks of {format_bytes(self._chunk_bytes)}; "
                f"{self.free_chunks} of {self._budget_chunks} are free"
            )
        fresh = self._backend.create_run(self._chunk_bytes, n_chunks)
        self._owned.setdefault(owner, {}).update(dict.fromkeys(fresh))
        self._used_chunks += n_chunks
        return fresh

    def free(self, owner: str, chunks: Sequence[Chunk]) -> None:
        """Give chunks back to the system. Only the owner may, once, and unmapped; else VmMisuse."""
        owned = self._owned.get(owner, {})
        for chunk in chunks:
            if chunk not in owned:
                raise VmMisuse(f"{chunk} does not belong to {owner!r}, or was freed before")
            self._backend.release(chunk)
            del owned[chunk]
            self._used_chunks -= 1
        if not owned:
            self._owned.pop(owner, None)

    @property
    def can_vacate(self) -> bool:
        """Whether memory can go to the system and come back as the same chunk, which peers need not map anew."""
        return isinstance(self._backend, Refillable)

    def vacate(self, owner: str, chunks: Sequence[Chunk]) -> None:
        """Give the memory of an owner's chunks, mapped nowhere, back to the system; they stay the owner's, and count.

        Raises VmMisuse unless `can_vacate`.
        """
        backend = self._refillable(owner, chunks)
        for chunk in chunks:
            backend.vacate(chunk)

    def refill(self, owner: str, chunks: Sequence[Chunk]) -> None:
        """Vacated chunks have memory of zeros again: all of them, or OutOfChunks and none."""
        backend, filled = self._refillable(owner, chunks), list[Chunk]()
        try:
            for chunk in chunks:
                backend.refill(chunk)
                filled.append(chunk)
        except OutOfChunks:
            for chunk in filled:
                backend.vacate(chunk)
            raise

    def _refillable(self, owner: str, chunks: Sequence[Chunk]) -> Refillable:
        if not isinstance(self._backend, Refillable):
            raise VmMisuse(f"memory of {type(self._backend).__name__} cannot go and come back as the same chunk")
        if strangers := [chunk for chunk in chunks if chunk not in self._owned.get(owner, {})]:
            raise VmMisuse(f"{strangers} do not belong to {owner!r}")
        return self._backend

    def close(self) -> None:
        """Close the back end. Raises VmMisuse while any chunk is in use."""
        if self._used_chunks:
            raise VmMisuse(f"{self._used_chunks} chunks are still in use: {self._counts()}")
        self._backend.close()

    def _counts(self) -> dict[str, int]:
        return {owner: len(chunks) for owner, chunks in self._owned.items()}

    def check(self) -> None:
        """Raise VmMisuse with the full table if the conservation law is broken."""
        counts = self._counts()
        distinct = len({chunk for chunks in self._owned.values() for chunk in chunks})
        if not sum(counts.values()) == distinct == self._used_chunks <= self._budget_chunks:
            raise VmMisuse(
                f"chunks do not add up: owners {counts}, {distinct} distinct, {self._used_chunks} used, "
                f"{self._budget_chunks} budget"
            )
