"""Messages that move finished KV blocks between those who hold them: KV stores and workers.

by shared memory, towards a KV store:
    worker -> store    Reserve   give me pages for these blocks; I will write them myself
    store  -> worker   Reserved  these pages are yours until Publish, or until the kernel reports your death
    worker -> store    Publish   they are written: make the blocks visible (or: I gave up, take the pages back)
    store  -> worker   Stored    that is done
over tcp, towards a KV store:
    worker -> store    Put       one payload frame per block follows; answered by Stored
from any holder (a KV store, or a worker's own cache):
    worker -> holder   Find      which leading run of these blocks do you hold? keep it for `lease_ms`
    holder -> worker   Found     this much; pages to read by shared memory, or one payload frame per block
    worker -> holder   Release   I have read it, or do not want it
level-3 caching, between the two workers of a request:
    decode -> prefill  Offered   I hold the KV of this answer: Find it here if you have room
    prefill -> decode  Declined  I have no room

A block is named by its hash (common.block_hash), so repeats and late messages are harmless. `call` is the asker's own
number for one exchange. A reader counts `lease_ms` from when it *sent* Find: a read that ends before that is good, because
the holder's lease began later; what was read after it is thrown away. A writer has no such limit: pages it was given stay
its own until it answers or the kernel reports its death.
"""

import msgspec

from common.messages.base import Message


class BlockName(msgspec.Struct, frozen=True, array_like=True):
    """A block and its place in its chain."""

    name: bytes
    """Its hash, 16 bytes."""
    parent: bytes
    """Hash of the block before it; of a first block: the root."""
    depth: int
    """Blocks before it."""


class Reserve(Message, frozen=True, kw_only=True):
    """Asks a KV store for pages to write these blocks into."""

    call: int
    blocks: tuple[BlockName, ...]


class Reserved(Message, frozen=True, kw_only=True):
    """Pages to write into, block by block in the order asked for."""

    call: int
    pages: tuple[tuple[int, ...], ...]
    """[block][layer] pages of the store's shared pool; empty for a block that is there already, or has no room."""
    text: str = ""
    """Why nothing was reserved at all; empty if something was, or nothing was needed."""


class Publish(Message, frozen=True, kw_only=True):
    """The reserved pages of `call` are written, or never will be. No write of mine is in flight any more."""

    call: int
    ok: bool
    checksums: tuple[tuple[int, ...], ...] = ()
    """[block that has pages][layer] crc32 of each page as the writer has it; empty: not made."""


class Put(Message, frozen=True, kw_only=True):
    """Keep these blocks; one payload frame per block follows, layer 0 first."""

    call: int
    blocks: tuple[BlockName, ...]
    checksums: tuple[tuple[int, ...], ...] = ()
    """[block][layer] crc32 of each page; empty: not made."""


class Stored(Message, frozen=True, kw_only=True):
    """The answer to Publish and Put."""

    call: int
    n_blocks: int
    """How many of the call's blocks the store holds now."""
    text: str = ""
    """Why a Put was refused; empty if it was not."""


class Find(Message, frozen=True, kw_only=True):
    """Asks for the leading run of these blocks that the holder has."""

    call: int
    blocks: tuple[bytes, ...]
    lease_ms: int
    """How long the asker wants them kept; the holder may give less."""
    payloads: bool = False
    """False: tell the pages, the asker reads them by shared memory. True: send the bytes."""


class Found(Message, frozen=True, kw_only=True):
    """The leading run. `payloads` was False: pinned under `call` until Release or the lease's end. True: bytes follow."""

    call: int
    n_blocks: int
    pages: tuple[tuple[int, ...], ...] = ()
    """[block][layer] pages of the holder's shared pool; empty if bytes follow."""
    tiers: tuple[str, ...] = ()
    """Per block where it was: `device`, `host` or `disk`."""
    lease_ms: int = 0
    more: bool = False
    """The run goes on, but one answer would become too large: ask again from the first block that is missing."""
    checksums: tuple[tuple[int, ...], ...] = ()
    """[block][layer] crc32 of each page as the holder knows it; empty: not made."""


class Release(Message, frozen=True, kw_only=True):
    """The asker is done with what was Found under `call`. Idempotent; needs no answer."""

    call: int
    corrupt: tuple[bytes, ...] = ()
    """Blocks of the call that came otherwise than their checksums say: the holder should look at its own copy."""


class Offered(Message, frozen=True, kw_only=True):
    """A decode worker holds a run of blocks whose prefix the receiver computed."""

    call: int
    parent: bytes
    depth: int
    """Blocks before the first."""
    blocks: tuple[bytes, ...]


class Declined(Message, frozen=True, kw_only=True):
    """The receiver of Offered `call` has no room, or lacks what comes before."""

    call: int
