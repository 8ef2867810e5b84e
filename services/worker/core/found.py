"""Blocks that another process keeps for us, and what of them a sequence waits for."""

from dataclasses import dataclass

from common.ids import PeerId, RequestId
from kvstore.index.ledger import PageIds

PARKED_TIER = "parked"
"""Of blocks that a sequence left in the host buffer when it gave way: its own work, and no reuse."""


@dataclass(frozen=True, slots=True)
class FoundBlocks:
    """A run of blocks that another process keeps for us until `deadline_ms`."""

    call: int
    peer: PeerId
    first_block: int
    tiers: tuple[str, ...]
    """Per block: host, disk, peer or parked."""
    pages: PageIds
    """[blocks, layers] of the holder's shared memory; no rows if the bytes come by message."""
    deadline_ms: float

    @property
    def end_block(self) -> int:
        """One past the last."""
        return self.first_block + len(self.tiers)


@dataclass(frozen=True, slots=True)
class Started:
    """A sequence has its pages."""

    request: RequestId
    cached_blocks: int
    """Leading blocks whose KV is in them already."""
    load: "Load | None"
    """What of the rest is fetched (perhaps nothing), if something was found for it."""


@dataclass(frozen=True, slots=True)
class Load:
    """Found blocks that a sequence waits for: to be copied into `own_pages` [blocks, layers]."""

    request: RequestId
    found: FoundBlocks
    first_block: int
    own_pages: PageIds

    @property
    def n_blocks(self) -> int:
        """Blocks to copy."""
        return len(self.own_pages)

    @property
    def peer_pages(self) -> PageIds:
        """[blocks, layers] of the holder, for the same blocks."""
        first = self.first_block - self.found.first_block
        return self.found.pages[first : first + self.n_blocks]
