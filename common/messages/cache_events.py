"""What happens to the cached blocks of one holder, in order and numbered: metadata for whoever routes. Never KV."""

import msgspec


class CacheEvent(msgspec.Struct, frozen=True, array_like=True):
    """One change. Numbers of one incarnation rise by one; a gap means that events were lost: read the snapshot."""

    number: int
    kind: str
    """`stored` (visible in `tier` from now on), `removed` (not in `tier` any more)."""
    name: bytes
    """Hash of the block."""
    parent: bytes = b""
    """`stored`: hash of the block before it, or the root."""
    depth: int = 0
    """`stored`: blocks before it."""
    tier: str = "device"
    """`device`, `host` or `disk`. A block that changes its tier is stored in one and removed from the other."""
