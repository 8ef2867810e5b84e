"""Prompts whose KV lies elsewhere: loading what was found, from a KV store or another worker. Pure.

    look up --Found--> settled --take--> (the scheduler starts the sequence) --start--> loading --on_moved--> over

Owns one record per load. It ends when the shell says so (by shared memory) or with its answer or its deadline (by
message). Whatever fails costs a recomputation.
"""

from dataclasses import dataclass

from common.block_hash import BlockHash
from common.ids import PeerId, RequestId
from common.messages.actions import Send
from common.messages.blocks import Find, Found
from services.worker.core.actions import Action, FetchBlocks, FillBlocks, Moved
from services.worker.core.calls import Calls
from services.worker.core.fetch_costs import FetchCosts
from services.worker.core.found import Load
from services.worker.core.lookups import Lookups, release
from services.worker.core.neighbours import BlockLink
from services.worker.core.scheduler import Scheduler
from services.worker.core.wire import require_answer

_PAYLOADS_WITHIN_MS = 5_000.0


@dataclass(slots=True)
class _Loading:
    load: Load
    link: BlockLink
    tier: str
    asked_ms: float
    queued_bytes: int
    """Of the load, not here yet."""
    names: tuple[BlockHash, ...] = ()
    """By message: of all blocks of the load."""
    filled_blocks: int = 0
    """By message: how many of them have come."""

    @property
    def until_ms(self) -> float:
        """When to wait no longer. By shared memory the shell always ends it."""
        return float("inf") if self.link.shared else self.asked_ms + _PAYLOADS_WITHIN_MS


@dataclass(slots=True)
class _Totals:
    """Since the start."""

    store_bytes: int = 0
    peer_bytes: int = 0
    failures: int = 0
    peer_failures: int = 0


class Prefetch:
    """Loads what was found; tells the scheduler when a load is worthless and when it has ended."""

    def __init__(self, scheduler: Scheduler, lookups: Lookups, calls: Calls, costs: FetchCosts, layers: int) -> None:
        self._scheduler, self._calls, self._costs, self._layers = scheduler, calls, costs, layers
        self.lookups = lookups
        """Before a prompt starts."""
        self._loads: dict[int, _Loading] = {}
        self._failed: list[RequestId] = []
        self._filled: list[Load] = []
        self._totals = _Totals()

    # -- loading

    def start(self, load: Load, now_ms: float) -> list[Action]:
        """The sequence has its pages: fetch what it needs of the found blocks."""
        found, kept = load.found, self.lookups.claim(load.request)
        if load.n_blocks == 0:
            return [] if kept is None else [release(found)]
        if kept is None:  # the holder died meanwhile
            self._fail(load.request)
            self._scheduler.loaded(load.request)
            return []
        link, n_bytes = kept.link, load.n_blocks * kept.link.block_bytes
        self._costs.asked(link, kept.tier, n_bytes, now_ms)
        loading = _Loading(load, link, kept.tier, now_ms, n_bytes)
        if link.shared:
            self._loads[found.call] = loading
            return [
                FetchBlocks(found.call, found.peer, load.own_pages, load.peer_pages, found.deadline_ms, by_layer=True)
            ]
        first = load.first_block - found.first_block
        loading.names = kept.names[first : first + load.n_blocks]
        return self._ask_for_bytes(loading, now_ms)

    def _ask_for_bytes(self, loading: _Loading, now_ms: float) -> list[Action]:
        """One answer holds only so many bytes: a long run takes several."""
        call, loading.asked_ms = self._calls.next(), now_ms
        self._loads[call] = loading
        names = loading.names[loading.filled_blocks :]
        return [Send(loading.link.peer, Find(call=call, blocks=names, lease_ms=0, payloads=True))]

    def on_found(self, peer: PeerId, message: Found, now_ms: float) -> list[Action] | None:
        """An answer; None if the call is not ours. Raises ProtocolViolation for one that fits no question."""
        loading = self._loads.get(message.call)
        if loading is not None and loading.link.peer == peer:
            return self._on_payloads(message.call, loading, message, now_ms)
        return self.lookups.on_found(peer, message, now_ms)

    def load(self, call: int) -> Load | None:
        """A load that has not ended."""
        loading = self._loads.get(call)
        return None if loading is None else loading.load

    def on_layer_failed(self, call: int) -> None:
        """A layer of a load is worthless; the rest of it may still come."""
        loading = self._loads.get(call)
        if loading is not None:
            self._scheduler.spoil(loading.load.request)

    def on_moved(self, call: int, moved: Moved, now_ms: float) -> list[Action] | None:
        """The shell has ended a load; None if the call is not ours."""
        loading = self._loads.get(call)
        if loading is None:
            return None
        self._count_bytes(loading.link, moved.n_bytes)
        if moved.ok:
            loading.queued_bytes -= moved.n_bytes
            self._costs.came(loading.link, loading.tier, moved.n_bytes, moved.elapsed_ms, now_ms)
        return self._end(call, now_ms, ok=moved.ok)

    def _on_payloads(self, call: int, loading: _Loading, message: Found, now_ms: float) -> list[Action]:
        own_pages, first = loading.load.own_pages, loading.filled_blocks
        require_answer(message, len(own_pages) - first, by_pages=loading.link.shared, layers=self._layers)
        if loading.link.shared or message.pages:
            return []  # no answer to what was asked
        if message.n_blocks == 0:
            return self._end(call, now_ms, ok=False)
        loading.filled_blocks += message.n_blocks
        n_bytes = message.n_blocks * loading.link.block_bytes
        self._count_bytes(loading.link, n_bytes)
        loading.queued_bytes -= n_bytes
        self._costs.arrived(loading.link, loading.tier, n_bytes, loading.asked_ms, now_ms)
        fill = FillBlocks(own_pages[first : loading.filled_blocks])
        if loading.filled_blocks < len(own_pages):
            del self._loads[call]
            return [fill, *self._ask_for_bytes(loading, now_ms)]
        self._filled.append(loading.load)
        return [fill, *self._end(call, now_ms, ok=True)]

    def _count_bytes(self, link: BlockLink, n_bytes: int) -> None:
        if link.is_store:
            self._totals.store_bytes += n_bytes
        else:
            self._totals.peer_bytes += n_bytes

    def _end(self, call: int, now_ms: float, *, ok: bool) -> list[Action]:
        loading = self._loads.pop(call)
        self._costs.ended(loading.link, loading.tier, loading.queued_bytes, now_ms, ok=ok)
        request = loading.load.request
        if not ok:
            self._fail(request)
            self._totals.peer_failures += not loading.link.is_store
        self._scheduler.loaded(request)
        return [release(loading.load.found)]

    def _fail(self, request: RequestId) -> None:
        self._totals.failures += 1
        self._failed.append(request)
        self._scheduler.spoil(request)

    def take_failed(self) -> list[RequestId]:
        """Requests whose load failed since the last call; they are computed anew unless somebody ends them."""
        failed, self._failed = self._failed, []
        return failed

    def take_filled(self) -> list[Load]:
        """Loads whose bytes came by message since the last call: all their layers at once."""
        filled, self._filled = self._filled, []
        return filled

    # -- time and death

    def on_tick(self, now_ms: float) -> list[Action]:
        """Wait no longer for what is late."""
        late = [call for call, loading in self._loads.items() if now_ms >= loading.until_ms]
        asked = self.lookups.on_tick(now_ms)
        return asked + [action for call in late for action in self._end(call, now_ms, ok=False)]

    def on_peer_dead(self, peer: PeerId, now_ms: float) -> list[Action]:
        """A holder is gone."""
        late = [c for c, loading in self._loads.items() if loading.link.peer == peer and not loading.link.shared]
        for call in late:
            self._end(call, now_ms, ok=False)
        return self.lookups.on_peer_dead(peer, now_ms)

    # -- state for others

    def until_ms(self, call: int) -> float | None:
        """When a load will have ended at the latest; None if the call is none of them."""
        loading = self._loads.get(call)
        if loading is None:
            return None
        return loading.load.found.deadline_ms if loading.link.shared else loading.until_ms

    def open_loads(self, now_ms: float) -> list[str]:
        """Loads that have not ended, for people."""
        return [
            f"call {call}: {one.load.n_blocks} blocks from {one.link.peer} ({one.tier}) for {one.load.request}, "
            f"asked for {now_ms - one.asked_ms:.0f} ms ago"
            for call, one in self._loads.items()
        ]

    @property
    def counters(self) -> dict[str, float]:
        """As in reports."""
        totals = self._totals
        return {
            "kv_bytes_total{direction=host_to_device}": float(totals.store_bytes),
            "kv_bytes_total{direction=peer_to_device}": float(totals.peer_bytes),
            "load_failures_total": float(totals.failures),
            "peer_load_failures_total": float(totals.peer_failures),
            "fetch_hints_total": float(self.lookups.hints_total),
            "fetch_hints_wrong_total": float(self.lookups.hints_wrong_total),
        }

    @property
    def n_open(self) -> int:
        """Exchanges that have not ended."""
        return self.lookups.n_open + len(self._loads)
