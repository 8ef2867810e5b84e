"""Sequences that gave way and whose KV is kept in the host buffer, instead of being computed again. Pure.

    take --StoreBlocks--> leaving --on_moved--> parked --(the scheduler begins it)--> claim --the load has ended--> free

Only whole blocks are kept; the last part of one is computed again. While it leaves, its pages and pins belong to an owner
of their own, and the sequence waits: it may not begin. Parked, it waits with `found` set, as for any other process's blocks.
Whatever fails, or does not fit, costs a recomputation.
"""

from dataclasses import dataclass

from common.cost.link_fit import LinkFits
from common.ids import Owner, RequestId
from kvstore.index.ledger import PageIds
from services.worker.core.actions import Action, Moved, StoreBlocks
from services.worker.core.calls import Calls
from services.worker.core.found import PARKED_TIER, FoundBlocks
from services.worker.core.freed import Freed
from services.worker.core.host_buffer import HOST_BUFFER, HostBuffer
from services.worker.core.prefix import PrefixReuse
from services.worker.core.sequence import Sequence


@dataclass(slots=True)
class _Leaving:
    """A copy to the host in progress: the pages of both sides stay."""

    order: StoreBlocks
    sequence: Sequence | None
    """None: it was dropped meanwhile."""


class Parking:
    """Owns the pages in the buffer and the copies that fill them; the sequences are the Scheduler's."""

    def __init__(self, reuse: PrefixReuse, buffer: HostBuffer, calls: Calls) -> None:
        self._reuse, self.buffer, self._calls = reuse, buffer, calls
        self._leaving: dict[int, _Leaving] = {}
        self._call_of: dict[RequestId, int] = {}  # of those that leave or are parked
        self._storing: set[int] = set()
        self._orders: list[Action] = []
        self._rates = LinkFits()
        self.bytes_per_s = self._rate(0.0)
        """At which KV is copied to the host, lately; at first a guess on the safe side."""
        self.parked_total = self.restored_total = self.failures_total = 0
        self.stored_bytes_total = self.fetched_bytes_total = 0

    # -- what is copied by others

    def next_call(self) -> int:
        """A number for a copy."""
        return self._calls.next()

    def order(self, action: Action) -> None:
        """To be carried out before the next step begins."""
        self._orders.append(action)

    def reserve(self, n_blocks: int) -> tuple[int, PageIds]:
        """Host pages [blocks, layers] and the call that keeps them; `admits` was asked."""
        call = self._calls.next()
        return call, self.buffer.alloc(_owner(call), n_blocks)

    def hold(self, call: int, request: RequestId) -> None:
        """The request waits, and may not begin before `put` or `unhold`."""
        self._call_of[request] = call
        self._storing.add(call)

    def put(self, call: int, sequence: Sequence, found: FoundBlocks) -> None:
        """All of it is in the buffer: it is parked."""
        self._storing.discard(call)
        sequence.found = found
        self.parked_total += 1

    def unhold(self, call: int, request: RequestId | None) -> None:
        """What was copied is worthless, or nobody wants it: the host pages are free."""
        self._storing.discard(call)
        self.free(call)
        if request is not None:
            del self._call_of[request]

    # -- out

    def needs_pages(self, sequence: Sequence) -> int:
        """Pages of the buffer that parking it takes; 0: nothing of it is worth keeping."""
        return sequence.computed_tokens // self._reuse.block_tokens * self._reuse.pool.pages_per_block

    def take(self, sequence: Sequence) -> bool:
        """Take all its pages from a sequence that no step computes, and copy them out. False, and nothing, if they do not fit."""
        n_pages = self.needs_pages(sequence)
        if n_pages == 0 or not self.buffer.admits(n_pages):
            return False
        call, n_blocks = self._calls.next(), n_pages // self._reuse.pool.pages_per_block
        own_pages = sequence.table.blocks(0, n_blocks)
        order = StoreBlocks(call, HOST_BUFFER, own_pages, self.buffer.alloc(_owner(call), n_blocks))
        self._reuse.give_up(sequence, to=_owner(call))
        self._leaving[call] = _Leaving(order, sequence)
        self._call_of[sequence.request] = call
        self._orders.append(order)
        return True

    def learn(self, moved: Moved, now_ms: float) -> None:
        """A copy to the host took so long."""
        if moved.ok and moved.n_bytes:
            self._rates.asked(HOST_BUFFER, PARKED_TIER, 0.0, moved.n_bytes, now_ms)
            self._rates.came(HOST_BUFFER, PARKED_TIER, moved.n_bytes, moved.elapsed_ms, now_ms)
            self.bytes_per_s = self._rate(now_ms)

    def on_tick(self, now_ms: float) -> None:
        """Time passed: a slow copy of long ago says less and less."""
        self.bytes_per_s = self._rate(now_ms)

    def _rate(self, now_ms: float) -> float:
        return self._rates.cost(HOST_BUFFER, PARKED_TIER, 0.0, now_ms).bytes_per_s

    def take_orders(self) -> list[Action]:
        """Copies to begin, since the last call."""
        orders, self._orders = self._orders, []
        return orders

    def on_moved(self, call: int, moved: Moved) -> bool:
        """The shell has ended a copy to the host; False if the call is none of these."""
        leaving = self._leaving.pop(call, None)
        if leaving is None:
            return False
        self._reuse.pool.release(_owner(call))
        self.stored_bytes_total += moved.n_bytes
        self.failures_total += not moved.ok
        sequence, host_pages = leaving.sequence, leaving.order.peer_pages
        if not moved.ok or sequence is None:
            self.unhold(call, None if sequence is None else sequence.request)
            return True
        tiers = (PARKED_TIER,) * len(host_pages)
        self.put(call, sequence, FoundBlocks(call, HOST_BUFFER, 0, tiers, host_pages, float("inf")))
        return True

    # -- back

    def claim(self, request: RequestId) -> None:
        """It begins: from now on its host pages are freed by its call alone."""
        del self._call_of[request]

    def free(self, call: int) -> None:
        """The load has ended, or there was nothing to load: its host pages go."""
        self.buffer.free(_owner(call))

    def forget(self, request: RequestId) -> None:
        """A sequence that waits is over. One that is not here is ignored."""
        call = self._call_of.pop(request, None)
        if call in self._leaving:
            self._leaving[call].sequence = None
        elif call is not None and call not in self._storing:
            self.free(call)

    # -- state for others

    def is_leaving(self, request: RequestId) -> bool:
        """Whether its copy has not ended, so that it may not begin."""
        call = self._call_of.get(request)
        return call in self._leaving or call in self._storing

    @property
    def leaving_pages(self) -> int:
        """Pages of the device that come back when copies in progress have ended."""
        freed = Freed(self._reuse.pool)
        for call in self._leaving:
            freed.add(_owner(call))
        return freed.pages

    @property
    def n_open(self) -> int:
        """Copies in progress."""
        return len(self._leaving)

    @property
    def parked_bytes(self) -> int:
        """In the buffer."""
        return self.buffer.used_pages * self.buffer.page_bytes

    def counters(self) -> dict[str, float]:
        """As in reports."""
        return {
            "parked_total": float(self.parked_total),
            "restored_total": float(self.restored_total),
            "parking_failures_total": float(self.failures_total),
            "kv_bytes_total{direction=device_to_buffer}": float(self.stored_bytes_total),
            "kv_bytes_total{direction=buffer_to_device}": float(self.fetched_bytes_total),
        }

    def gauges(self) -> dict[str, float]:
        """As in reports."""
        return {
            "host_buffer_bytes": float(self.buffer.capacity_pages * self.buffer.page_bytes),
            "host_buffer_logical_bytes": float(self.buffer.logical_pages * self.buffer.page_bytes),
            "parked_bytes": float(self.parked_bytes),
            "buffer_bytes_per_s": self.bytes_per_s,
        }

    def check(self, returning: set[int]) -> None:
        """Every host page is kept for somebody who leaves, is parked, or returns (`returning`: calls). Raises RuntimeError."""
        self.buffer.check()
        calls = {*self._leaving, *self._call_of.values(), *returning}
        if stray := set(self.buffer.owners) ^ {_owner(call) for call in calls}:
            raise RuntimeError(f"host pages and those they are kept for do not agree: {sorted(stray)}")


def _owner(call: int) -> Owner:
    """Under which name both sides' pages are kept."""
    return Owner(f"parking/{call}")
