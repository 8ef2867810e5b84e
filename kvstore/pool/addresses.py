"""What the calls of a MemPool take and return."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from common.block_hash import BlockHash


class Medium(StrEnum):
    """Kind of memory."""

    DEVICE = "device"
    HOST = "host"


class Address(NamedTuple):
    """Where one block lies. Source: MemServe (arXiv 2406.17565), section 4: instance, medium, block number.

    The fourth part is ours: memory is used again, and an address must not come to mean what somebody else keeps there.
    """

    instance: str
    medium: Medium
    block: int
    epoch: int
    """How often this block had been given out when the address was made."""


class WrongAddress(ValueError):
    """An address that this call cannot use: of another pool, free, published, or somebody else's. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class Match:
    """The longest cached run from the start of a prompt. Advice, until `pin`: it may be evicted or moved any time."""

    names: tuple[BlockHash, ...]
    addresses: tuple[Address, ...]
    """One per block of 16 tokens, first block first; media may be mixed."""

    @property
    def n_blocks(self) -> int:
        """Blocks found."""
        return len(self.names)


@dataclass(frozen=True, slots=True)
class InsertResult:
    """What became visible."""

    n_new_blocks: int
    """Blocks that nobody could find before. The others were there already, and the copies offered are free."""
    addresses: tuple[Address, ...]
    """Where each block of the tokens lies now, first block first."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Blocks that stay where they are until `unpin`, or until the lease ends."""

    number: int
    owner: str
    names: tuple[BlockHash, ...]
    addresses: tuple[Address, ...]
    """Not moved, evicted or changed while the lease lasts."""
    ends_ms: float
    """On the pool's clock."""
