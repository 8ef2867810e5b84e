"""Prompts whose KV may lie in the KV store: looking it up before they start, and loading what is there. Pure.

    look_up --Found--> settled --take--> (the scheduler starts the sequence) --start--> loading --on_moved--> over

Owns one record per exchange. A lookup ends with its answer, after `_ANSWER_WITHIN_MS`, or with the store; a load ends when
the shell says so (by shared memory) or with its answer or its deadline (by message). Whatever fails costs a recomputation.
"""

from dataclasses import dataclass

from common.block_hash import BlockHash
from common.ids import PeerId, RequestId
from common.messages.actions import Send
from common.messages.blocks import Find, Found, Release
from common.policy.prefetch import FetchFromBlocks
from services.worker.core.actions import Action, FetchBlocks, FillBlocks, Moved
from services.worker.core.calls import Calls
from services.worker.core.found import FoundBlocks, Load
from services.worker.core.neighbours import StoreLink
from services.worker.core.scheduler import Scheduler
from services.worker.core.wire import require_answer

_LEASE_MS = 10_000
_ANSWER_WITHIN_MS = 2_500.0
"""Longer than a store takes to give up on its disk; a store that is silent for long is dead by then."""
_PAYLOADS_WITHIN_MS = 5_000.0


@dataclass(frozen=True, slots=True)
class _Lookup:
    request: RequestId
    store: StoreLink
    first_block: int
    names: tuple[BlockHash, ...]
    sent_ms: float


@dataclass(slots=True)
class _Loading:
    load: Load
    store: StoreLink
    until_ms: float | None
    """By message: when to wait no longer. By shared memory the shell always ends it."""
    names: tuple[BlockHash, ...] = ()
    """By message: of all blocks of the load."""
    filled_blocks: int = 0
    """By message: how many of them have come."""


class Prefetch:
    """Looks up and loads; tells the scheduler when a load is worthless and when it has ended."""

    def __init__(self, scheduler: Scheduler, calls: Calls, policy: FetchFromBlocks, layers: int) -> None:
        self._scheduler, self._calls, self._policy, self._layers = scheduler, calls, policy, layers
        self._lookups: dict[int, _Lookup] = {}
        self._looking: dict[RequestId, int] = {}  # -> its call in `_lookups`
        self._found: dict[RequestId, tuple[FoundBlocks, _Lookup]] = {}
        self._loads: dict[int, _Loading] = {}
        self._failed: list[RequestId] = []
        self._filled: list[Load] = []
        self.failures_total = 0
        self.loaded_bytes_total = 0

    # -- looking up

    def look_up(
        self, request: RequestId, store: StoreLink, names: list[BlockHash], first_block: int, now_ms: float
    ) -> list[Action]:
        """Ask for a run of blocks that is missing here, if it could be worth it. `settled` tells when it is known."""
        if not self._policy.worth(len(names)):
            return []
        call = self._calls.next()
        self._looking[request] = call
        self._lookups[call] = _Lookup(request, store, first_block, tuple(names), now_ms)
        return [Send(store.peer, Find(call=call, blocks=tuple(names), lease_ms=_LEASE_MS))]

    def settled(self, request: RequestId) -> bool:
        """Whether nothing is being looked up for the request."""
        return request not in self._looking

    def is_stale(self, request: RequestId, now_ms: float) -> bool:
        """Whether what was found may be gone before it could be read: `forget` it, and look it up again."""
        entry = self._found.get(request)
        return entry is not None and now_ms > entry[0].deadline_ms - _LEASE_MS / 2

    def take(self, request: RequestId) -> FoundBlocks | None:
        """What was found, for the request's start; it comes back with `start`."""
        entry = self._found.get(request)
        return None if entry is None else entry[0]

    def forget(self, request: RequestId) -> list[Action]:
        """The request will not start, or starts without."""
        if request in self._looking:
            self._end_lookup(self._looking[request])  # a late answer is released when it comes
        entry = self._found.pop(request, None)
        return [] if entry is None else [_release(entry[0])]

    def on_found(self, peer: PeerId, message: Found, now_ms: float) -> list[Action] | None:
        """An answer; None if the call is not ours. Raises ProtocolViolation for one that fits no question."""
        loading = self._loads.get(message.call)
        if loading is not None and loading.store.peer == peer:
            return self._on_payloads(message.call, loading, message)
        lookup = self._lookups.get(message.call)
        if lookup is None or lookup.store.peer != peer:
            return None
        self._end_lookup(message.call)
        pages = require_answer(message, len(lookup.names), by_pages=True, layers=self._layers)
        if not self._policy.worth(message.n_blocks):
            return [Send(peer, Release(call=message.call))] if message.n_blocks else []
        if not lookup.store.shared:
            pages = pages[:0]
        deadline_ms = lookup.sent_ms + message.lease_ms
        found = FoundBlocks(message.call, peer, lookup.first_block, message.tiers, pages, deadline_ms)
        self._found[lookup.request] = found, lookup
        return []

    def _end_lookup(self, call: int) -> None:
        del self._looking[self._lookups.pop(call).request]

    # -- loading

    def start(self, load: Load, now_ms: float) -> list[Action]:
        """The sequence has its pages: fetch what it needs of the found blocks."""
        found, entry = load.found, self._found.pop(load.request, None)
        if load.n_blocks == 0:
            return [_release(found)]
        if entry is None:  # the store died meanwhile
            self._fail(load.request)
            self._scheduler.loaded(load.request)
            return []
        lookup = entry[1]
        if lookup.store.shared:
            self._loads[found.call] = _Loading(load, lookup.store, None)
            return [
                FetchBlocks(found.call, found.peer, load.own_pages, load.peer_pages, found.deadline_ms, by_layer=True)
            ]
        first = load.first_block - lookup.first_block
        names = lookup.names[first : first + load.n_blocks]
        return self._ask_for_bytes(_Loading(load, lookup.store, now_ms + _PAYLOADS_WITHIN_MS, names))

    def _ask_for_bytes(self, loading: _Loading) -> list[Action]:
        """One answer holds only so many bytes: a long run takes several."""
        call = self._calls.next()
        self._loads[call] = loading
        names = loading.names[loading.filled_blocks :]
        return [Send(loading.store.peer, Find(call=call, blocks=names, lease_ms=0, payloads=True))]

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
        if call not in self._loads:
            return None
        self.loaded_bytes_total += moved.n_bytes
        return self._end(call, ok=moved.ok)

    def _on_payloads(self, call: int, loading: _Loading, message: Found) -> list[Action]:
        own_pages, first = loading.load.own_pages, loading.filled_blocks
        require_answer(message, len(own_pages) - first, by_pages=loading.store.shared, layers=self._layers)
        if loading.store.shared or message.pages:
            return []  # no answer to what was asked
        if message.n_blocks == 0:
            return self._end(call, ok=False)
        loading.filled_blocks += message.n_blocks
        self.loaded_bytes_total += message.n_blocks * loading.store.block_bytes
        fill = FillBlocks(own_pages[first : loading.filled_blocks])
        if loading.filled_blocks < len(own_pages):
            del self._loads[call]
            return [fill, *self._ask_for_bytes(loading)]
        self._filled.append(loading.load)
        return [fill, *self._end(call, ok=True)]

    def _end(self, call: int, *, ok: bool) -> list[Action]:
        loading = self._loads.pop(call)
        request = loading.load.request
        if not ok:
            self._fail(request)
        self._scheduler.loaded(request)
        return [_release(loading.load.found)]

    def _fail(self, request: RequestId) -> None:
        self.failures_total += 1
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
        for call in [c for c, lookup in self._lookups.items() if now_ms - lookup.sent_ms >= _ANSWER_WITHIN_MS]:
            self._end_lookup(call)
        late = [c for c, loading in self._loads.items() if loading.until_ms is not None and now_ms >= loading.until_ms]
        return [action for call in late for action in self._end(call, ok=False)]

    def on_peer_dead(self, peer: PeerId) -> None:
        """The store is gone: what it kept for prompts that have not started is no use."""
        for call in [call for call, lookup in self._lookups.items() if lookup.store.peer == peer]:
            self._end_lookup(call)
        for request in [request for request, (found, _) in self._found.items() if found.peer == peer]:
            del self._found[request]
        late = [c for c, loading in self._loads.items() if loading.store.peer == peer and loading.until_ms is not None]
        for call in late:
            self._end(call, ok=False)

    @property
    def n_open(self) -> int:
        """Exchanges that have not ended."""
        return len(self._lookups) + len(self._found) + len(self._loads)


def _release(found: FoundBlocks) -> Send:
    return Send(found.peer, Release(call=found.call))
