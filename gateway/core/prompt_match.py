"""How much of one prompt each worker holds, from the few places along it where the set of holders changes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from common.ids import PeerId
from common.policy.holdings import Held

EXPECTED = "expected"
"""The tier of blocks that a prompt under way is about to leave on a worker's device."""


_NOBODY: Mapping[str, int] = MappingProxyType({})


@dataclass(slots=True)
class Holder:
    """One life of a worker or KV store, as the tree knows it."""

    bits: dict[str, int] = field(default_factory=dict)
    """Tier -> the bit that its blocks carry; `expected` too."""
    number: int = 0
    """Of the newest event that counts."""
    told: bool = False
    """The feed has spoken of it; else only prompts were routed there."""
    synced: bool = False
    """A snapshot was loaded."""
    signed_ms: float = 0.0
    """When the feed or the router last spoke of it."""


class Segment(NamedTuple):
    """A part of a prompt with the same holders all along."""

    end: int
    """First block after it."""
    mask: int


@dataclass(frozen=True, slots=True)
class Match:
    """One prompt against the tree. To be asked at once: it does not follow later changes."""

    blocks: int
    """Length of the prompt."""
    _segments: Sequence[Segment]
    _holders: Mapping[PeerId, Holder]

    def held(self, worker: PeerId, store: PeerId | None) -> Held:
        """What the worker and, for what it lacks, its KV store hold together, up to the first block that neither has.

        A block counts to the best tier that has it, also where the worker goes on after a piece of its store's.
        """
        mine, others = self._bits(worker), self._bits(store)
        device_bits = mine.get("device", 0) | mine.get(EXPECTED, 0)
        host_bit, disk_bit = others.get("host", 0), others.get("disk", 0)
        at = device = host = disk = 0
        for end, mask in self._segments:
            if mask & device_bits:
                device += end - at
            elif mask & host_bit:
                host += end - at
            elif mask & disk_bit:
                disk += end - at
            else:
                break
            at = end
        return Held(device, host, disk)

    def device_run(self, peer: PeerId) -> int:
        """Leading blocks known to be on that peer's device: what another worker could fetch from it."""
        bit, run = self._bits(peer).get("device", 0), 0
        for end, mask in self._segments:
            if not mask & bit:
                break
            run = end
        return run

    def _bits(self, peer: PeerId | None) -> Mapping[str, int]:
        holder = None if peer is None else self._holders.get(peer)
        return _NOBODY if holder is None else holder.bits


def segments(names: Sequence[bytes], mask_of: Callable[[bytes], int]) -> list[Segment]:
    """Where the mask changes along `names`, up to the first block that nobody holds. Looks at few of the names.

    By bisection: two places with the same mask are taken to have it all along between them. That is so where holders give up
    blocks from the end of a prompt. Where one lost a block in between, its hit is told too high: advice that the worker's own
    match corrects.
    """
    if not names:
        return []
    at, mask = 0, mask_of(names[0])
    found: list[Segment] = []
    ahead = [(len(names) - 1, mask_of(names[-1]))] if mask else []
    while ahead and mask:
        end, end_mask = ahead[-1]
        if end_mask == mask:
            at = end
            ahead.pop()
        elif end - at == 1:
            found.append(Segment(end, mask))
            at, mask = end, end_mask
            ahead.pop()
        else:
            middle = (at + end) // 2
            ahead.append((middle, mask_of(names[middle])))
    if mask:
        found.append(Segment(len(names), mask))
    return found
