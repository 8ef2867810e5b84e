"""What happens to the cached blocks of one holder, in order and numbered: metadata for whoever routes. Never KV."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec

from common.block_hash import HASH_BYTES
from common.ids import PeerId

TIERS = ("device", "disk", "host")
"""Every tier there is, sorted."""
Tiers = tuple[str, ...]
"""Where one block lies, sorted; never empty for a block that is cached."""


class CacheEvent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One change. Numbers of one incarnation rise by one; a gap means that events were lost: read the snapshot."""

    number: int
    kind: str
    """`stored` (visible in `tier` from now on), `removed` (not in `tier` any more)."""
    name: Annotated[bytes, msgspec.Meta(min_length=HASH_BYTES, max_length=HASH_BYTES)]
    """Hash of the block."""
    parent: bytes = b""
    """`stored`: hash of the block before it, or the root."""
    depth: int = 0
    """`stored`: blocks before it."""
    tier: str = "device"
    """`device`, `host` or `disk`. A block that changes its tier is stored in one and removed from the other."""


@dataclass(frozen=True, slots=True)
class CacheBatch:
    """Consecutive events of one incarnation, as they were read."""

    peer: PeerId
    first: int
    last: int
    events: tuple[CacheEvent, ...]
    """Numbered first .. last; empty if they could not be read, which is a gap."""


@dataclass(frozen=True, slots=True)
class CacheSnapshot:
    """Everything that one incarnation caches, true up to the event `number`."""

    peer: PeerId
    number: int
    parts: Sequence[tuple[Tiers, Sequence[bytes]]]
    """Hashes of blocks that lie in just these tiers, in small pieces that can be taken, and freed, one after the other."""
