"""What a host hands out, whatever kind of memory it is: a description, descriptors, and what it sees in its scratch."""

import zlib

from common.errors import PeerFailed
from common.ids import PeerId
from kvstore.memory.shareable import PROBE_SLOT_BYTES, PROBE_SLOTS, Shareable
from kvstore.transport.descriptions import ChunksDescription, Description, PoolDescription


class Offering:
    """Used by the share's thread alone. `slot` numbers a connection: its scratch is its own, as far as there is enough."""

    def __init__(self, memory: Shareable) -> None:
        self._memory = memory

    @property
    def needs_mapper(self) -> bool:
        """Whether only guests with a device can map it."""
        return self._memory.kind == "cuda"

    def describe(self, peer: PeerId, slot: int, version: int) -> Description | None:
        """The memory as it is now; None if its pages are not numbered yet."""
        pages = self._memory.pages_in_file
        if pages is None:
            return None
        if self._memory.kind == "cuda":
            return ChunksDescription(
                peer=peer,
                device_uuid=self._memory.device_uuid,
                page_bytes=pages.page_bytes,
                chunk_bytes=pages.chunk_bytes,
                n_chunks=len(pages.chunk_offsets),
                capacity_chunks=max(pages.limit_chunks, len(pages.chunk_offsets)),
                generation=pages.generation,
                low_marks=pages.low_marks,
                scratch_bytes=PROBE_SLOTS * PROBE_SLOT_BYTES,
                probe_offset_bytes=_slot_bytes(slot),
                probe_bytes=PROBE_SLOT_BYTES,
                version=version,
            )
        return PoolDescription(
            peer=peer,
            page_bytes=pages.page_bytes,
            chunk_bytes=pages.chunk_bytes,
            chunk_offsets=pages.chunk_offsets,
            probe_offset_bytes=self._memory.probe_offset_bytes + _slot_bytes(slot),
            probe_bytes=PROBE_SLOT_BYTES,
            version=version,
        )

    def export_first(self) -> list[int]:
        """A new descriptor of the file, or of the scratch, which the caller closes."""
        return self._memory.export_fds(-1)

    def export_chunks(self, first: int, n_chunks: int) -> list[int]:
        """New descriptors of as many of these chunks as there are, which the caller closes. Raises PeerFailed."""
        pages = self._memory.pages_in_file
        if not self.needs_mapper or pages is None or first < 0:
            raise PeerFailed(f"a guest asks for chunks from {first} on, which have no descriptors")
        there = len(pages.chunk_offsets) - first
        return self._memory.export_fds(first, min(n_chunks, there)) if there > 0 else []

    def checksum(self, slot: int, n_bytes: int) -> int:
        """CRC-32 of what lies in a connection's scratch, which is given back. Raises PeerFailed."""
        if not 0 <= n_bytes <= PROBE_SLOT_BYTES:
            raise PeerFailed(f"a probe of {n_bytes} bytes; its scratch has {PROBE_SLOT_BYTES}")
        first_bytes = self._memory.probe_offset_bytes + _slot_bytes(slot)
        seen = self._memory.read_scratch(first_bytes, n_bytes)
        self._memory.discard(first_bytes, PROBE_SLOT_BYTES)
        return zlib.crc32(seen)


def _slot_bytes(slot: int) -> int:
    return slot % PROBE_SLOTS * PROBE_SLOT_BYTES
