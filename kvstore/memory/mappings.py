"""Accounting of mappings, without memory: the rules that every VmBackend enforces."""

import bisect
from collections.abc import Sequence

from common.errors import OutOfChunks
from kvstore.memory.backend import Chunk, Range, VmBackend, VmMisuse


class MappingTable:
    """Owns which chunks exist and where each is mapped. Checks first, changes after."""

    def __init__(self, granularity_bytes: int) -> None:
        self._granularity_bytes = granularity_bytes
        self._ranges: dict[Range, dict[int, Chunk]] = {}
        self._starts: dict[Range, list[int]] = {}  # the offsets of each range, ascending
        self._times_mapped: dict[Chunk, int] = {}
        self.live = 0
        """Mappings that exist."""
        self._begun_pieces = 0

    @property
    def ranges(self) -> list[Range]:
        """Reserved ranges, oldest first."""
        return list(self._ranges)

    @property
    def chunks(self) -> list[Chunk]:
        """Chunks that exist, oldest first."""
        return list(self._times_mapped)

    @property
    def pieces(self) -> int:
        """Areas that the ranges fall into for a kernel that merges neighbours: each run of chunks that are neighbours
        in their file is one, and so is each stretch without memory. At most one too many for each range."""
        return self._begun_pieces + len(self._ranges)

    def require_aligned(self, what: str, n_bytes: int) -> None:
        """Raise VmMisuse unless `n_bytes` is a multiple of the granularity."""
        if n_bytes < 0 or n_bytes % self._granularity_bytes:
            raise VmMisuse(f"{what} is {n_bytes} bytes, not a multiple of {self._granularity_bytes}")

    def add_range(self, where: Range) -> None:
        """A range was reserved."""
        self._ranges[where] = {}
        self._starts[where] = []

    def drop_range(self, where: Range) -> None:
        """A range is about to be given back."""
        if self._at(where):
            raise VmMisuse(f"range {where.address:#x} still has {len(self._at(where))} chunks mapped")
        del self._ranges[where], self._starts[where]

    def add_chunk(self, chunk: Chunk) -> None:
        """A chunk was created."""
        self._times_mapped[chunk] = 0

    def drop_chunk(self, chunk: Chunk) -> None:
        """A chunk is about to be released."""
        if chunk not in self._times_mapped:
            raise VmMisuse(f"{chunk} does not exist or was released before")
        if self._times_mapped[chunk]:
            raise VmMisuse(f"{chunk} is still mapped {self._times_mapped[chunk]} times")
        del self._times_mapped[chunk]

    def mapped(self, where: Range) -> dict[int, Chunk]:
        """The chunks of a range by offset, in no order."""
        return self._at(where)

    def add_run(self, where: Range, offset_bytes: int, chunks: Sequence[Chunk]) -> None:
        """Chunks are about to be mapped one behind the other: all of them, or VmMisuse and none."""
        at_bytes = offset_bytes
        for place, chunk in enumerate(chunks):
            try:
                self._add(where, at_bytes, chunk)
            except VmMisuse:
                self.remove_run(where, offset_bytes, place)
                raise
            at_bytes += chunk.length_bytes

    def run(self, where: Range, offset_bytes: int, n_chunks: int) -> list[Chunk]:
        """`n_chunks` chunks that lie one behind the other from there on, or VmMisuse."""
        mapped, found, at_bytes = self._at(where), list[Chunk](), offset_bytes
        for _ in range(n_chunks):
            chunk = mapped.get(at_bytes)
            if chunk is None:
                raise VmMisuse(f"nothing is mapped at offset {at_bytes} of range {where.address:#x}")
            found.append(chunk)
            at_bytes += chunk.length_bytes
        return found

    def remove_run(self, where: Range, offset_bytes: int, n_chunks: int) -> list[Chunk]:
        """`n_chunks` chunks that lie one behind the other were unmapped, or are about to be: all, or VmMisuse and none."""
        found = self.run(where, offset_bytes, n_chunks)
        if not found:
            return found
        mapped, starts = self._at(where), self._starts[where]
        first = bisect.bisect_left(starts, offset_bytes)
        end = first + n_chunks
        self._begun_pieces -= sum(_pieces_begun(mapped, starts, place) for place in range(first, end + 1))
        for start in starts[first:end]:
            self._times_mapped[mapped.pop(start)] -= 1
        del starts[first:end]
        self._begun_pieces += _pieces_begun(mapped, starts, first)
        self.live -= n_chunks
        return found

    def _add(self, where: Range, offset_bytes: int, chunk: Chunk) -> None:
        self.require_aligned("offset", offset_bytes)
        mapped, end_bytes = self._at(where), offset_bytes + chunk.length_bytes
        if chunk not in self._times_mapped:
            raise VmMisuse(f"{chunk} does not exist or was released before")
        if end_bytes > where.length_bytes:
            raise VmMisuse(f"mapping ends at {end_bytes}, behind the range's {where.length_bytes} bytes")
        starts = self._starts[where]
        place = bisect.bisect_right(starts, offset_bytes)
        if place < len(starts) and starts[place] < end_bytes:
            raise VmMisuse(f"mapping up to {end_bytes} overlaps the chunk mapped at {starts[place]}")
        if place and (before := starts[place - 1]) + mapped[before].length_bytes > offset_bytes:
            raise VmMisuse(f"offset {offset_bytes} overlaps the chunk mapped at {before}")
        self._begun_pieces -= _pieces_begun(mapped, starts, place)
        starts.insert(place, offset_bytes)
        mapped[offset_bytes] = chunk
        self._begun_pieces += _pieces_begun(mapped, starts, place) + _pieces_begun(mapped, starts, place + 1)
        self._times_mapped[chunk] += 1
        self.live += 1

    def _at(self, where: Range) -> dict[int, Chunk]:
        try:
            return self._ranges[where]
        except KeyError:
            raise VmMisuse(f"range {where.address:#x} is not reserved") from None


def _pieces_begun(mapped: dict[int, Chunk], starts: list[int], place: int) -> int:
    """Areas that begin with the chunk at `place`, the hole before it among them; 0 behind the last chunk."""
    if place >= len(starts):
        return 0
    start = starts[place]
    if place == 0:
        return 1 + (start > 0)
    before = mapped[starts[place - 1]]
    if starts[place - 1] + before.length_bytes < start:
        return 2
    return int(before.offset_bytes + before.length_bytes != mapped[start].offset_bytes)


def stretches(chunks: Sequence[Chunk]) -> list[tuple[int, int]]:
    """(offset, length) in the file of each longest run of neighbours, in the order given."""
    found: list[tuple[int, int]] = []
    for chunk in chunks:
        if found and sum(found[-1]) == chunk.offset_bytes:
            found[-1] = (found[-1][0], found[-1][1] + chunk.length_bytes)
        else:
            found.append((chunk.offset_bytes, chunk.length_bytes))
    return found


def create_each(backend: VmBackend, length_bytes: int, n_chunks: int) -> list[Chunk]:
    """`create_run` of a back end whose chunks cost the same one by one."""
    fresh: list[Chunk] = []
    try:
        for _ in range(n_chunks):
            fresh.append(backend.create(length_bytes))
    except OutOfChunks:
        for chunk in fresh:
            backend.release(chunk)
        raise
    return fresh


def require_mappings(backend: VmBackend, n_chunks: int) -> None:
    """Raise OutOfChunks, with the numbers, if so many more mappings are above what the back end bears."""
    live, most = backend.live_mappings, backend.max_mappings
    if live + n_chunks > most:
        raise OutOfChunks(
            f"{n_chunks} more mappings asked for; {live} are live, and {most} are borne: use larger chunks"
        )
