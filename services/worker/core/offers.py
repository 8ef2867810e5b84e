"""Answers whose KV this worker has offered to the prefill workers of their prompts (caching level 3). Pure.

Owns one entry per offer until it is declined or `_REMEMBER_MS` have passed: after that nobody will decline it.
"""

from dataclasses import dataclass

from common.block_hash import BlockHash
from common.ids import PeerId
from common.messages.actions import Send
from common.messages.blocks import Offered
from services.worker.core.actions import Action
from services.worker.core.calls import Calls
from services.worker.core.sequence import Sequence

_REMEMBER_MS = 5_000.0


@dataclass(frozen=True, slots=True)
class _Offer:
    peer: PeerId
    names: tuple[BlockHash, ...]
    until_ms: float


class Offers:
    """The decode worker's side of services.worker.core.returns."""

    def __init__(self, calls: Calls, block_tokens: int) -> None:
        self._calls, self.block_tokens = calls, block_tokens
        self._offers: dict[int, _Offer] = {}

    def offer(self, sequence: Sequence, peer: PeerId, now_ms: float) -> list[Action]:
        """Offer the blocks of a finished sequence that lie behind what the prefill worker computed."""
        first = sequence.known_tokens // self.block_tokens
        names = tuple(sequence.hashes[first : sequence.published_blocks])
        if not names:
            return []
        call = self._calls.next()
        self._offers[call] = _Offer(peer, names, now_ms + _REMEMBER_MS)
        parent = sequence.hashes[first - 1] if first else sequence.root
        return [Send(peer, Offered(call=call, parent=parent, depth=first, blocks=names))]

    def on_declined(self, peer: PeerId, call: int) -> tuple[BlockHash, ...]:
        """The blocks that the prefill worker has no room for."""
        offer = self._offers.get(call)
        if offer is None or offer.peer != peer:
            return ()
        return self._offers.pop(call).names

    def on_tick(self, now_ms: float) -> None:
        """Forget offers that were taken, or lost."""
        for call in [call for call, offer in self._offers.items() if now_ms >= offer.until_ms]:
            del self._offers[call]
