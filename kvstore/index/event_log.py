"""Numbers what happens to the cached blocks of one pool, for whoever routes by it. Pure."""

from common.messages.cache_events import CacheEvent
from kvstore.index.block_pool import Block


class EventLog:
    """A PoolListener. Owns the events since the last `take`; its shell takes them every few milliseconds."""

    def __init__(self, tier: str) -> None:
        """`tier`: device, host or disk."""
        self._tier = tier
        self._events: list[CacheEvent] = []
        self.last_number = 0
        """Of the newest event ever made; the first is 1."""

    def on_stored(self, block: Block) -> None:
        """A block became visible."""
        self._add("stored", block.name, block.parent, block.depth)

    def on_used(self, block: Block) -> None:
        """Reading changes nothing that others must know."""

    def on_removed(self, block: Block) -> None:
        """A block is not visible any more."""
        self._add("removed", block.name)

    def _add(self, kind: str, name: bytes, parent: bytes = b"", depth: int = 0) -> None:
        self.last_number += 1
        self._events.append(CacheEvent(self.last_number, kind, name, parent, depth, self._tier))

    def take(self) -> list[CacheEvent]:
        """The events since the last call, in order."""
        taken, self._events = self._events, []
        return taken
