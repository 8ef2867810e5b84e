"""Who holds what is missing of a prompt: asked before it starts. Pure.

The places that may hold a prompt's blocks are asked one after the other until one holds all that it was asked for: first
another worker, if a hint names one, then the KV store. The longest run that is worth the copy is kept.

Owns one `_Lookup` per question that waits for its answer, and one `Kept` per prompt that something was found for, until
it starts, is forgotten, or the holder dies. A question ends with its answer, after `_STORE_WITHIN_MS` or
`_WORKER_WITHIN_MS`, or with who was asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from common.block_hash import BlockHash
from common.errors import ProtocolViolation
from common.ids import PeerId, RequestId
from common.messages.actions import Send
from common.messages.blocks import Find, Found, Release
from services.worker.core.actions import Action
from services.worker.core.calls import Calls
from services.worker.core.fetch_costs import FetchCosts, slowest
from services.worker.core.found import FoundBlocks
from services.worker.core.neighbours import BlockLink
from services.worker.core.wire import PEER_TIER, require_answer

_LEASE_MS = 10_000
"""What is left for less than half of this is looked up again."""
_STORE_WITHIN_MS = 2_500.0
"""Longer than a store takes to give up on its disk; a store that is silent for long is dead by then."""
_WORKER_WITHIN_MS = 1_000.0
"""A worker answers from its memory, in milliseconds; the KV store may still be asked after it."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is missing of a prompt."""

    request: RequestId
    prompt_tokens: int
    first_block: int
    """The first that is not here."""


@dataclass(frozen=True, slots=True)
class Question:
    """One place to ask, for a run of blocks from the first that is missing on."""

    link: BlockLink
    names: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """A run that its holder keeps for us."""

    found: FoundBlocks
    link: BlockLink
    tier: str
    """As measured: of its slowest block, where it lies at the holder."""
    names: tuple[BlockHash, ...]


@dataclass(slots=True)
class _Lookup:
    wanted: Wanted
    question: Question
    sent_ms: float
    then: tuple[Question, ...]
    """Whom to ask if the answer is not all that was asked for."""
    best: Kept | None
    """Of the answers so far."""


class Lookups:
    """Asks, weighs the answers, and keeps what was found until the prompt starts."""

    def __init__(self, calls: Calls, costs: FetchCosts, layers: int) -> None:
        self._calls, self._costs, self._layers = calls, costs, layers
        self._lookups: dict[int, _Lookup] = {}
        self._looking: dict[RequestId, int] = {}  # -> its call in `_lookups`
        self._found: dict[RequestId, Kept] = {}
        self.hints_total = 0
        self.hints_wrong_total = 0
        """Of holders that were not connected, did not answer, or held less than was said."""

    def look_up(self, wanted: Wanted, questions: Sequence[Question], now_ms: float) -> list[Action]:
        """Ask, in this order, whoever could be worth it. `settled` tells when it is known."""
        return self._ask(wanted, tuple(questions), None, now_ms)

    def count_hint(self, *, reachable: bool) -> None:
        """A hint named a holder."""
        self.hints_total += 1
        self.hints_wrong_total += not reachable

    def _ask(self, wanted: Wanted, questions: tuple[Question, ...], best: Kept | None, now_ms: float) -> list[Action]:
        """Ask the first that could be worth it; if there is none, `best` it is."""
        for place, question in enumerate(questions):
            blocks = _blocks(wanted, len(question.names))
            longer = best is None or blocks.stop > best.found.end_block
            if longer and self._costs.may_pay(question.link, wanted.prompt_tokens, blocks, now_ms):
                call = self._calls.next()
                self._looking[wanted.request] = call
                self._lookups[call] = _Lookup(wanted, question, now_ms, questions[place + 1 :], best)
                return [Send(question.link.peer, Find(call=call, blocks=question.names, lease_ms=_LEASE_MS))]
        if best is not None:
            self._found[wanted.request] = best
        return []

    def settled(self, request: RequestId) -> bool:
        """Whether nothing is being looked up for the request."""
        return request not in self._looking

    def is_stale(self, request: RequestId, now_ms: float) -> bool:
        """Whether what was found may be gone before it could be read: `forget` it, and look it up again."""
        kept = self._found.get(request)
        return kept is not None and now_ms > kept.found.deadline_ms - _LEASE_MS / 2

    def take(self, request: RequestId) -> FoundBlocks | None:
        """What was found, for the request's start; it comes back with `start`."""
        kept = self._found.get(request)
        return None if kept is None else kept.found

    def keeps(self, call: int) -> bool:
        """Whether what was found under this call waits for its prompt to start, or for a better answer."""
        best = [lookup.best for lookup in self._lookups.values() if lookup.best is not None]
        return any(kept.found.call == call for kept in (*self._found.values(), *best))

    def claim(self, request: RequestId) -> Kept | None:
        """What was found, for a prompt that has started: from now on the caller releases it. None: its holder died."""
        return self._found.pop(request, None)

    def forget(self, request: RequestId) -> list[Action]:
        """The request will not start, or starts without."""
        kept = self._found.pop(request, None)
        if request in self._looking:
            kept = self._end_lookup(self._looking[request]).best  # a late answer is released when it comes
        return [] if kept is None else [release(kept.found)]

    def on_found(self, peer: PeerId, message: Found, now_ms: float) -> list[Action] | None:
        """An answer; None if the call is not ours. Raises ProtocolViolation for one that fits no question."""
        lookup = self._lookups.get(message.call)
        if lookup is None or lookup.question.link.peer != peer:
            return None
        self._end_lookup(message.call)
        whole = message.n_blocks == len(lookup.question.names)
        self.hints_wrong_total += not whole and not lookup.question.link.is_store
        try:
            kept = self._weigh(lookup, message, now_ms)
        except ProtocolViolation:
            self._ask(lookup.wanted, (), lookup.best, now_ms)
            raise
        actions: list[Action] = []
        if kept is None:
            actions += [Send(peer, Release(call=message.call))] if message.n_blocks else []
        elif lookup.best is not None and lookup.best.found.end_block >= kept.found.end_block:
            actions.append(release(kept.found))
        else:
            actions += [] if lookup.best is None else [release(lookup.best.found)]
            lookup.best = kept
        left = () if whole and kept is not None and lookup.best is kept else lookup.then
        return actions + self._ask(lookup.wanted, left, lookup.best, now_ms)

    def _weigh(self, lookup: _Lookup, message: Found, now_ms: float) -> Kept | None:
        """What was found, if it is worth the copy."""
        wanted, link, names = lookup.wanted, lookup.question.link, lookup.question.names
        pages = require_answer(message, len(names), by_pages=True, layers=self._layers)
        deadline_ms = lookup.sent_ms + message.lease_ms
        if message.n_blocks == 0 or now_ms > deadline_ms - _LEASE_MS * 0.6:  # stale at once: looked up for ever
            return None
        tier = slowest(message.tiers) if link.is_store else "device"
        self._costs.answered(link, tier, now_ms - lookup.sent_ms, now_ms)
        if not self._costs.pays(link, tier, wanted.prompt_tokens, _blocks(wanted, message.n_blocks), now_ms):
            return None
        tiers = message.tiers if link.is_store else (PEER_TIER,) * message.n_blocks
        pages = pages if link.shared else pages[:0]
        found = FoundBlocks(message.call, link.peer, wanted.first_block, tiers, pages, deadline_ms)
        return Kept(found, link, tier, names)

    def _end_lookup(self, call: int) -> _Lookup:
        lookup = self._lookups.pop(call)
        del self._looking[lookup.wanted.request]
        return lookup

    def on_tick(self, now_ms: float) -> list[Action]:
        """Wait no longer for what is late."""
        actions: list[Action] = []
        for call, lookup in list(self._lookups.items()):
            patience_ms = _STORE_WITHIN_MS if lookup.question.link.is_store else _WORKER_WITHIN_MS
            if now_ms - lookup.sent_ms >= patience_ms:
                actions += self._ask_others(call, now_ms)
        return actions

    def _ask_others(self, call: int, now_ms: float) -> list[Action]:
        """No answer will come, or none that is waited for."""
        lookup = self._end_lookup(call)
        self.hints_wrong_total += not lookup.question.link.is_store
        return self._ask(lookup.wanted, lookup.then, lookup.best, now_ms)

    def on_peer_dead(self, peer: PeerId, now_ms: float) -> list[Action]:
        """A holder is gone: what it kept for prompts that have not started is no use."""
        actions: list[Action] = []
        for call, lookup in list(self._lookups.items()):
            if lookup.best is not None and lookup.best.link.peer == peer:
                lookup.best = None
            lookup.then = tuple(question for question in lookup.then if question.link.peer != peer)
            if lookup.question.link.peer == peer:
                actions += self._ask_others(call, now_ms)
        for request in [request for request, kept in self._found.items() if kept.link.peer == peer]:
            del self._found[request]
        return actions

    @property
    def n_open(self) -> int:
        """Questions without an answer, and finds that nobody has used."""
        return len(self._lookups) + len(self._found)


def _blocks(wanted: Wanted, n_blocks: int) -> range:
    return range(wanted.first_block, wanted.first_block + n_blocks)


def release(found: FoundBlocks) -> Send:
    """The holder need not keep it any more."""
    return Send(found.peer, Release(call=found.call))
