"""What a host tells of its page memory, and what a guest must be able to do with memory that it has mapped.

Knows neither torch nor numpy: a KV store shares memory too.
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from common.errors import PeerFailed
from common.ids import PeerId


class PoolDescription(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Where pages lie in a shared file, told with its descriptor. A pool that changes is described anew."""

    peer: PeerId
    """Whose memory this is; carries the incarnation."""
    page_bytes: int
    chunk_bytes: int
    chunk_offsets: tuple[int, ...]
    """Where each chunk begins, in page order; all multiples of `page_bytes`."""
    probe_offset_bytes: int
    probe_bytes: int
    """Scratch for the probe of this connection."""
    version: int = 0
    """Rises with every change of the pool."""

    @property
    def n_pages(self) -> int:
        """Pages that can be written."""
        return len(self.chunk_offsets) * (self.chunk_bytes // self.page_bytes)


class ChunksDescription(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Pages in chunks of device memory, each with a descriptor of its own; the one of the scratch comes with this.

    The guest maps chunk i at i * chunk_bytes of one range, so page p begins at p * page_bytes.
    """

    peer: PeerId
    """Whose memory this is; carries the incarnation."""
    device_uuid: str
    page_bytes: int
    chunk_bytes: int
    n_chunks: int
    capacity_chunks: int
    """As many as the pool can ever have: addresses to reserve."""
    generation: int = 0
    """Grows whenever chunks left: then others may have come back in their places."""
    low_marks: tuple[tuple[int, int], ...] = ()
    """(generation, chunks that were left when it began), both rising: see `kept_chunks`."""
    scratch_bytes: int
    """Length of the scratch, which belongs to no page."""
    probe_offset_bytes: int
    """In the scratch."""
    probe_bytes: int
    """Scratch for the probe of this connection."""
    version: int = 0
    """Rises with every change of the pool."""

    @property
    def n_pages(self) -> int:
        """Pages that can be written."""
        return self.n_chunks * (self.chunk_bytes // self.page_bytes)

    def kept_chunks(self, generation: int) -> int:
        """How many of the first chunks are those that an earlier description, of `generation`, told of.

        What shrank and grew between the two, possibly several times, may have been told as this one change.
        """
        return min([self.n_chunks, *(chunks for began, chunks in self.low_marks if began > generation)])


Description = PoolDescription | ChunksDescription


def require_consistent(description: ChunksDescription) -> None:
    """Raise PeerFailed for numbers that contradict each other."""
    whole = description.page_bytes > 0 and description.chunk_bytes > 0
    whole = whole and description.chunk_bytes % description.page_bytes == 0
    inside = 0 <= description.n_chunks <= description.capacity_chunks
    inside = inside and all(0 <= chunks <= description.capacity_chunks for _, chunks in description.low_marks)
    last_probe_bytes = description.scratch_bytes - description.probe_bytes
    probe_inside = description.probe_bytes >= 0 and 0 <= description.probe_offset_bytes <= last_probe_bytes
    if not (whole and inside and probe_inside):
        raise PeerFailed(
            f"{description.peer} describes {description.n_chunks} of {description.capacity_chunks} chunks of "
            f"{description.chunk_bytes} bytes, pages of {description.page_bytes}, and a probe at "
            f"{description.probe_offset_bytes} of {description.scratch_bytes}, which do not fit each other"
        )


class MappedPages(Protocol):
    """A peer's page memory in this process, of whatever kind, from `Share.connect` to `close`. Any thread may call.

    The peer's death does not touch the mapping: the memory stays while anybody maps it.
    """

    gib_per_s: float
    """As measured by the probe."""

    @property
    def kind(self) -> str:
        """`shm` or `cuda_ipc`: what a channel that writes there is called."""
        ...

    @property
    def description(self) -> Description:
        """What the peer said of its memory, last."""
        ...

    @property
    def closed(self) -> bool:
        """Whether it is unmapped, or about to be."""
        ...

    @property
    def missing_chunks(self) -> int:
        """Chunks that are described and whose descriptors have not come yet; those before them are mapped."""
        ...

    def add_chunks(self, fds: Sequence[int]) -> None:
        """Map the next chunks; the caller closes `fds`. Raises PeerFailed."""
        ...

    def redescribe(self, description: Description) -> None:
        """The pool has changed: unmap what it has no more, after the uses in progress. Raises PeerFailed."""
        ...

    def write_probe(self, pattern: bytes) -> None:
        """Write into this connection's scratch; the bytes are there on return. Raises PeerFailed once closed."""
        ...

    def measure_gib_per_s(self) -> float:
        """How fast whole pages can be moved. Raises PeerFailed once closed."""
        ...

    def close(self) -> None:
        """Unmap, after the uses in progress. Nothing is written through this object afterwards."""
        ...
