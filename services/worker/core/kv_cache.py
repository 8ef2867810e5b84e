"""Everything a worker does with finished KV blocks beside computing with them: look up, load, spill, lend, give back. Pure.

Each part owns its own exchanges; this routes messages, moved blocks, time and deaths to them, and adds their counts up.
"""

from dataclasses import dataclass

from common.block_hash import BlockHash
from common.cost.link_cost import LinkCost
from common.ids import PeerId, RequestId
from common.messages import AnyMessage
from common.messages.actions import Send
from common.messages.blocks import Declined, Find, Found, Offered, Release, Reserved, Stored
from common.messages.liveness import SHARED_KINDS
from kvstore.index.block_pool import BlockPool
from kvstore.index.event_log import EventLog
from services.worker.core.actions import Action, Moved
from services.worker.core.callers import Callers
from services.worker.core.fetch_costs import FetchCosts
from services.worker.core.found import FoundBlocks, Load
from services.worker.core.host_buffer import HOST_BUFFER
from services.worker.core.lender import Lender
from services.worker.core.lookups import Question, Wanted
from services.worker.core.neighbours import BlockLink, Neighbours
from services.worker.core.offers import Offers
from services.worker.core.prefetch import Prefetch
from services.worker.core.prefix import ReuseTotals
from services.worker.core.restoring import Restoring
from services.worker.core.returns import Returns
from services.worker.core.sequence import Sequence
from services.worker.core.spill import Spiller
from services.worker.core.waiting import WaitingPrompt
from services.worker.core.wire import block_names

_MINE = Found | Reserved | Stored | Find | Release | Offered | Declined


@dataclass(frozen=True, slots=True)
class CacheParts:
    """What a KvCache is made of; each part owns its own state."""

    pool: BlockPool
    events: EventLog
    prefetch: Prefetch
    spiller: Spiller
    lender: Lender
    returns: Returns
    offers: Offers
    costs: FetchCosts
    restoring: Restoring


class KvCache:
    """The cache as the two cores see it."""

    def __init__(
        self, parts: CacheParts, neighbours: Neighbours, callers: Callers, *, use_store: bool, fetches: bool = True
    ) -> None:
        """`fetches`: whether this worker keeps anything, and so may take blocks that other workers hold."""
        self._pool, self._neighbours, self._callers = parts.pool, neighbours, callers
        self._lookups = parts.prefetch.lookups
        self._costs, self._fetches = parts.costs, fetches
        self._prefetch, self._spiller, self._lender = parts.prefetch, parts.spiller, parts.lender
        self._restoring = parts.restoring
        self._returns, self._offers, self._use_store = parts.returns, parts.offers, use_store
        self._block_tokens = parts.offers.block_tokens
        self.events = parts.events

    # -- prompts

    def look_up(self, prompt: WaitingPrompt, now_ms: float, *, hinted: bool = True) -> list[Action]:
        """Ask for what of its blocks is missing here: the worker that is said to hold them, then the KV store.

        `ready` tells when it is known. `hinted`: whether to believe the hint.
        """
        here = self._pool.match(prompt.names)
        if here == len(prompt.names):
            return []
        questions = list[Question]()
        hint, store = prompt.message.fetch if hinted else None, self._neighbours.store() if self._use_store else None
        if hint is not None and hint.n_blocks > here and self._fetches:
            holder = self._link_to(hint.holder)
            self._lookups.count_hint(reachable=holder is not None)
            if holder is not None:
                questions.append(Question(holder, tuple(prompt.names[here : hint.n_blocks])))
        if store is not None:
            questions.append(Question(store, tuple(prompt.names[here:])))
        wanted = Wanted(prompt.message.request, len(prompt.tokens), here)
        return self._lookups.look_up(wanted, questions, now_ms)

    def _link_to(self, holder: PeerId) -> BlockLink | None:
        """The way to another worker's blocks. Who dialled us is asked by message; KV stores are not for hints."""
        link = self._neighbours.link(holder)
        if link is not None:
            return None if link.is_store else link
        if self._callers.role(holder) not in ("prefill", "decode", "mixed"):
            return None
        return BlockLink(holder, False, self._neighbours.block_bytes, is_store=False)

    def ready(self, request: RequestId, names: list[BlockHash]) -> bool:
        """Whether the request may start: nothing is being looked up for it, and its next block is not on its way here."""
        here = self._pool.match(names)
        on_its_way = here < len(names) and self._returns.awaits(names[here])
        return not on_its_way and self._lookups.settled(request)

    def make_room(self, names: list[BlockHash], tokens: int, now_ms: float) -> tuple[bool, list[Action]]:
        """Whether a prompt may take its pages now, or must wait until what it displaces is saved (write-back)."""
        store = self._neighbours.store() if self._use_store else None
        n_blocks = -(-tokens // self._block_tokens) - self._pool.match(names)
        return self._spiller.make_room(n_blocks, store, now_ms), self.pump(now_ms)

    @property
    def prefetch(self) -> Prefetch:
        """For what became of loads."""
        return self._prefetch

    def take(self, request: RequestId) -> FoundBlocks | None:
        """What was found for a request that starts now; it comes back with `start`."""
        return self._lookups.take(request)

    def forget(self, request: RequestId) -> list[Action]:
        """The request is over."""
        return self._lookups.forget(request)

    def start(self, load: Load, now_ms: float) -> list[Action]:
        """Begin what a sequence that has just started waits for."""
        if load.found.peer == HOST_BUFFER:
            return self._restoring.start(load)
        return self._prefetch.start(load, now_ms)

    def refresh(self, prompt: WaitingPrompt, now_ms: float) -> list[Action]:
        """Look a prompt up again whose find has grown old while it waited.

        Only in the KV store: two workers whose prompts wait for pages that the other one's prompt has pinned would wait
        for ever.
        """
        request = prompt.message.request
        if not self._lookups.is_stale(request, now_ms):
            return []
        return self._lookups.forget(request) + self.look_up(prompt, now_ms, hinted=False)

    def load(self, call: int) -> Load | None:
        """A load that has not ended."""
        return self._prefetch.load(call)

    # -- answers

    def offer(self, sequence: Sequence, peer: PeerId, now_ms: float) -> list[Action]:
        """A request that `peer` handed over has finished: offer it the answer's KV."""
        return self._offers.offer(sequence, peer, now_ms)

    # -- events

    @staticmethod
    def concerns(message: AnyMessage) -> bool:
        """Whether `on_message` is for this message."""
        return isinstance(message, _MINE)

    def on_message(self, peer: PeerId, message: AnyMessage, wanted_pages: int, now_ms: float) -> list[Action]:
        """A message about blocks. `wanted_pages`: what waiting prompts need of the pool.

        Answers to calls that were given up are ignored, but for giving back what they pin.
        """
        match message:
            case Find():
                return self._lender.on_find(peer, message, now_ms)
            case Release(call=call, corrupt=corrupt):
                self._lender.on_release(peer, call)
                self._pool.forget(block_names(corrupt))  # what others hold stays: nobody says yet who is wrong
            case Found():
                return self._on_found(peer, message, now_ms)
            case Reserved():
                answer = self._spiller.on_reserved(peer, message, now_ms)
                return self.pump(now_ms) if answer is None else answer + self.pump(now_ms)
            case Stored():
                self._spiller.on_stored_there(peer, message)
                return self.pump(now_ms)
            case Offered():
                spare = self._pool.available_pages - wanted_pages
                shared = self._neighbours.transport(peer) in SHARED_KINDS
                return self._returns.on_offered(peer, message, shared=shared, spare_pages=spare, now_ms=now_ms)
            case Declined(call=call):
                self._spiller.enqueue([n for n in self._offers.on_declined(peer, call) if n in self._pool.cache])
        return []

    def _on_found(self, peer: PeerId, message: Found, now_ms: float) -> list[Action]:
        for part in (self._prefetch.on_found(peer, message, now_ms), self._returns.on_found(peer, message)):
            if part is not None:
                return part
        in_use = self._prefetch.uses(message.call) or self._returns.uses(message.call)  # heard before, and not read yet
        return [Send(peer, Release(call=message.call))] if message.pages and not in_use else []

    def on_layer_failed(self, call: int) -> None:
        """A layer of a fetch is worthless."""
        self._prefetch.on_layer_failed(call)
        self._restoring.on_layer_failed(call)

    def on_moved(self, call: int, moved: Moved, now_ms: float) -> list[Action]:
        """The shell has ended a FetchBlocks or StoreBlocks."""
        if self._restoring.on_moved(call, moved, now_ms):
            return []
        for part in (self._prefetch, self._spiller, self._returns):
            done = part.on_moved(call, moved, now_ms)
            if done is not None:
                return done + self.pump(now_ms)
        return []

    def pump(self, now_ms: float) -> list[Action]:
        """Spill the next batch if there is one."""
        return self._spiller.pump(self._neighbours.store() if self._use_store else None, now_ms)

    def on_tick(self, now_ms: float) -> list[Action]:
        """Leases and deadlines."""
        self._lender.on_tick(now_ms)
        self._returns.on_tick(now_ms)
        self._offers.on_tick(now_ms)
        self._restoring.parking.on_tick(now_ms)
        spilled = self._spiller.on_tick(now_ms, lambda peer: self._neighbours.link(peer) is not None)
        return self._prefetch.on_tick(now_ms) + spilled + self.pump(now_ms)

    def on_reader_gone(self, peer: PeerId) -> None:
        """A peer maps our memory no more: what was lent to it is free."""
        self._lender.on_reader_gone(peer)

    def on_peer_lost(self, peer: PeerId, now_ms: float) -> list[Action]:
        """A peer of any role is not connected any more: we ask nothing of it. What was lent to it stays."""
        self._returns.on_peer_dead(peer)
        self._spiller.on_peer_dead(peer)
        self._costs.forget(peer)
        return self._prefetch.on_peer_dead(peer, now_ms)

    # -- state for others

    def asks_for(self, request: RequestId) -> bool:
        """Whether somebody is being asked for its blocks."""
        return not self._lookups.settled(request)

    def load_until_ms(self, call: int) -> float | None:
        """When a load will have ended at the latest, by its own rule; None if it has none."""
        return self._prefetch.until_ms(call)

    @property
    def lent_until_ms(self) -> float | None:
        """When the last of what is lent comes back at the latest; None: nothing is lent."""
        return self._lender.until_ms

    def open_exchanges(self, now_ms: float) -> dict[str, object]:
        """What has begun with other processes and not ended, for people."""
        return {
            "loads": self._prefetch.open_loads(now_ms),
            "leases": self._lender.open_leases(now_ms),
            "lookups": self._lookups.n_open,
            "spills": self._spiller.n_open,
            "returns": self._returns.n_open,
            "parking": self._restoring.n_open,
        }

    def counters(self, totals: ReuseTotals) -> dict[str, float]:
        """As in reports; bytes of hand-overs are counted by the prefill core."""
        hits = {f"hit_tokens_total{{tier={tier}}}": float(tokens) for tier, tokens in totals.hit_tokens.items()}
        return {
            **hits,
            "missed_tokens_total": float(totals.missed_tokens),
            "evicted_blocks_total": float(self._pool.evicted_blocks_total),
            "spilled_blocks_total": float(self._spiller.spilled_blocks_total),
            "spill_lost_blocks_total": float(self._spiller.lost_blocks_total),
            "returned_blocks_total": float(self._returns.returned_blocks_total),
            "declined_blocks_total": float(self._returns.declined_blocks_total),
            **self._prefetch.counters,
            **self._restoring.counters(),
            "kv_bytes_total{direction=device_to_host}": float(self._spiller.spilled_bytes_total),
            "kv_bytes_total{direction=decode_to_prefill}": float(self._returns.returned_bytes_total),
        }

    def gauges(self, now_ms: float) -> dict[str, float]:
        """As in reports."""
        return {
            "cached_blocks": float(len(self._pool.cache)),
            "pinned_blocks": float(self._pool.cache.n_pinned),
            "leases": float(self._lender.n_leases),
            "open_spills": float(self._spiller.n_open),
            "oldest_pin_ms": self._lender.oldest_ms(now_ms),
            **self._restoring.parking.gauges(),
        }

    def links(self, now_ms: float) -> tuple[LinkCost, ...]:
        """As in reports."""
        return self._costs.links(now_ms)

    @property
    def idle(self) -> bool:
        """No exchange is under way; cached blocks are no work."""
        exchanges = (self._prefetch.n_open, self._spiller.n_open, self._returns.n_open, self._restoring.n_open)
        return not (any(exchanges) or self._lender.n_leases)

    def check(self) -> None:
        """Conservation laws. Raises RuntimeError with the numbers."""
        self._pool.check()
        self._restoring.check()
