"""What is cached where, as a routing policy sees it. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from common.block_hash import BlockHash
from common.ids import PeerId


@dataclass(frozen=True, slots=True)
class Held:
    """Leading blocks of a prompt that a worker could reuse, by where they lie. They add up: none is counted twice."""

    device: int
    """On the worker itself, or expected there."""
    host: int = 0
    """In its KV store's memory, and not on the worker."""
    disk: int = 0
    """On its KV store's disk only."""


NOTHING_HELD = Held(0)


class Holdings(Protocol):
    """One prompt against everything that is known to be cached. Advice: a worker's own match is final."""

    def held(self, worker: PeerId, store: PeerId | None) -> Held:
        """What `worker` could reuse, where `store` is the KV store it reads from. Counts prompts just routed there."""
        ...

    def device_run(self, peer: PeerId) -> int:
        """Leading blocks in the peer's own device pool: what others could fetch from it."""
        ...


class NoHoldings:
    """Nothing is known, so nothing is taken for cached."""

    def held(self, worker: PeerId, store: PeerId | None) -> Held:
        """Nothing."""
        return NOTHING_HELD

    def device_run(self, peer: PeerId) -> int:
        """Nothing."""
        return 0


class HoldingsIndex(Protocol):
    """Where holdings are looked up."""

    def match(self, names: Sequence[BlockHash]) -> Holdings:
        """Of a prompt whose blocks have these names."""
        ...
