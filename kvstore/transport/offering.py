"""What a host hands out, whatever kind of memory it is: a description, descriptors, and what it sees in its scratch."""

import os
import zlib
from typing import Protocol

from common.errors import PeerFailed
from common.ids import PeerId
from kvstore.memory.shareable import PROBE_SLOT_BYTES, PROBE_SLOTS, Shareable
from kvstore.transport.descriptions import ChunksDescription, Description, PoolDescription


class ShareableChunks(Protocol):
    """Page memory in chunks with a descriptor each. Its owner may change it; the share's thread reads it."""

    @property
    def device_uuid(self) -> str:
        """Of the device that the memory lies on."""
        ...

    @property
    def page_bytes(self) -> int:
        """Length of a page."""
        ...

    @property
    def chunk_bytes(self) -> int:
        """Length of a chunk: whole pages."""
        ...

    @property
    def n_chunks(self) -> int:
        """Chunks that hold pages now, in page order."""
        ...

    @property
    def capacity_chunks(self) -> int:
        """Chunks that there can ever be."""
        ...

    @property
    def scratch_bytes(self) -> int:
        """Length of the scratch, where peers prove that they share this memory."""
        ...

    def export_chunk_fds(self, first: int, n_chunks: int) -> list[int]:
        """New descriptors of chunks, which the caller closes. Raises IndexError for chunks that are not there."""
        ...

    def export_scratch_fd(self) -> int:
        """A new descriptor of the scratch, which the caller closes."""
        ...

    def read_scratch(self, offset_bytes: int, n_bytes: int) -> bytes:
        """What the scratch holds now."""
        ...


class Offering(Protocol):
    """Used by the share's thread alone. `slot` numbers a connection: its scratch is its own, as far as there is enough."""

    @property
    def needs_mapper(self) -> bool:
        """Whether only guests with a device can map it."""
        ...

    def describe(self, peer: PeerId, slot: int, version: int) -> Description | None:
        """The memory as it is now; None if its pages are not numbered yet."""
        ...

    def export_first(self) -> int:
        """A new descriptor of the file, or of the scratch, which the caller closes."""
        ...

    def export_chunks(self, first: int, n_chunks: int) -> list[int]:
        """New descriptors of as many of these chunks as there are, which the caller closes. Raises PeerFailed."""
        ...

    def checksum(self, slot: int, n_bytes: int) -> int:
        """CRC-32 of what lies in a connection's scratch, which is given back. Raises PeerFailed."""
        ...


class FileOffering:
    """Offering of memory in one file."""

    needs_mapper = False

    def __init__(self, memory: Shareable) -> None:
        self._memory = memory

    def describe(self, peer: PeerId, slot: int, version: int) -> PoolDescription | None:
        """Where the pages lie in the file now."""
        pages = self._memory.pages_in_file
        if pages is None:
            return None
        return PoolDescription(
            peer=peer,
            page_bytes=pages.page_bytes,
            chunk_bytes=pages.chunk_bytes,
            chunk_offsets=pages.chunk_offsets,
            probe_offset_bytes=self._slot_bytes(slot),
            probe_bytes=PROBE_SLOT_BYTES,
            version=version,
        )

    def export_first(self) -> int:
        """Of the file."""
        return os.dup(self._memory.export_fd())

    def export_chunks(self, first: int, n_chunks: int) -> list[int]:
        """None of them has a descriptor. Raises PeerFailed."""
        raise PeerFailed("a guest asks for chunks of a file that it has")

    def checksum(self, slot: int, n_bytes: int) -> int:
        """CRC-32 of the scratch, which is given back to the system. Raises PeerFailed."""
        if not 0 <= n_bytes <= PROBE_SLOT_BYTES:
            raise PeerFailed(f"a probe of {n_bytes} bytes; its scratch has {PROBE_SLOT_BYTES}")
        seen = os.pread(self._memory.export_fd(), n_bytes, self._slot_bytes(slot))
        self._memory.discard(self._slot_bytes(slot), PROBE_SLOT_BYTES)
        return zlib.crc32(seen)

    def _slot_bytes(self, slot: int) -> int:
        return self._memory.probe_offset_bytes + slot % PROBE_SLOTS * PROBE_SLOT_BYTES


class ChunksOffering:
    """Offering of memory in chunks."""

    needs_mapper = True
    _SLOTS = 16

    def __init__(self, memory: ShareableChunks) -> None:
        self._memory = memory
        self._slot_length_bytes = memory.scratch_bytes // self._SLOTS

    def describe(self, peer: PeerId, slot: int, version: int) -> ChunksDescription:
        """How many chunks there are now."""
        memory = self._memory
        return ChunksDescription(
            peer=peer,
            device_uuid=memory.device_uuid,
            page_bytes=memory.page_bytes,
            chunk_bytes=memory.chunk_bytes,
            n_chunks=memory.n_chunks,
            capacity_chunks=memory.capacity_chunks,
            scratch_bytes=memory.scratch_bytes,
            probe_offset_bytes=self._slot_bytes(slot),
            probe_bytes=self._slot_length_bytes,
            version=version,
        )

    def export_first(self) -> int:
        """Of the scratch."""
        return self._memory.export_scratch_fd()

    def export_chunks(self, first: int, n_chunks: int) -> list[int]:
        """As many as there are, none beyond the last. Raises PeerFailed for numbers below 0."""
        if first < 0:
            raise PeerFailed(f"chunks from {first} on were asked for")
        try:
            return self._memory.export_chunk_fds(first, max(0, min(n_chunks, self._memory.n_chunks - first)))
        except IndexError:
            return []  # the pool shrank between counting and exporting; the guest will hear of it

    def checksum(self, slot: int, n_bytes: int) -> int:
        """CRC-32 of the scratch. Raises PeerFailed."""
        if not 0 <= n_bytes <= self._slot_length_bytes:
            raise PeerFailed(f"a probe of {n_bytes} bytes; its scratch has {self._slot_length_bytes}")
        return zlib.crc32(self._memory.read_scratch(self._slot_bytes(slot), n_bytes))

    def _slot_bytes(self, slot: int) -> int:
        return slot % self._SLOTS * self._slot_length_bytes


def offering_of(memory: Shareable | ShareableChunks) -> Offering:
    """Whichever fits the memory."""
    return FileOffering(memory) if hasattr(memory, "pages_in_file") else ChunksOffering(memory)
