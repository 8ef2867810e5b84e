"""Cached blocks that other workers are reading. Pure.

Owns one lease per (peer, call) that found something, until Release, the lease's end, or the news that the peer maps our
memory no more; no sooner for a reader that fell silent: it may still be reading, and what it reads within its lease must
be what it asked for. What is lent is pinned in the pool, so its pages stay what they are.
"""

from dataclasses import dataclass

from common.block_hash import BlockHash
from common.ids import Owner, PeerId
from common.messages.actions import Send
from common.messages.blocks import Find, Found
from kvstore.index.block_pool import BlockPool
from services.worker.core.actions import Action, SendBlocks
from services.worker.core.wire import block_names

_LONGEST_LEASE_MS = 10_000
_ANSWER_LIMIT_BYTES = 16 * 2**20
"""Payloads wait in memory until they are sent."""


@dataclass(frozen=True, slots=True)
class _Lease:
    owner: Owner
    since_ms: float
    until_ms: float


class Lender:
    """Answers Find from this worker's own cache."""

    def __init__(self, pool: BlockPool, block_bytes: int) -> None:
        self._pool, self._block_bytes = pool, block_bytes
        self._leases: dict[tuple[PeerId, int], _Lease] = {}
        self.sent_bytes_total = 0

    def on_find(self, peer: PeerId, message: Find, now_ms: float) -> list[Action]:
        """Pin what is here and say where it lies, or send it."""
        names = block_names(message.blocks)
        run = names[: self._pool.match(names)]
        if message.payloads:
            return self._send(peer, message, run)
        self.on_release(peer, message.call)  # a repeat begins anew
        lease_ms = min(message.lease_ms, _LONGEST_LEASE_MS)
        found = Found(call=message.call, n_blocks=len(run), lease_ms=lease_ms)
        if not run:
            return [Send(peer, found)]
        owner = Owner(f"lent/{peer}/{message.call}")
        pages = self._pool.take(owner, run)
        self._leases[peer, message.call] = _Lease(owner, now_ms, now_ms + lease_ms)
        rows = tuple(tuple(row) for row in pages.tolist())
        tiers = ("device",) * len(run)
        found = Found(call=message.call, n_blocks=len(run), pages=rows, tiers=tiers, lease_ms=lease_ms)
        return [Send(peer, found)]

    def _send(self, peer: PeerId, message: Find, run: list[BlockHash]) -> list[Action]:
        """The bytes are gathered before anything else happens, so nothing needs to stay pinned."""
        fits = run[: max(1, _ANSWER_LIMIT_BYTES // self._block_bytes)]
        owner = Owner(f"sent/{peer}/{message.call}")
        pages = self._pool.take(owner, fits)
        self._pool.release(owner)
        self.sent_bytes_total += len(fits) * self._block_bytes
        found = Found(call=message.call, n_blocks=len(fits), tiers=("device",) * len(fits), more=len(run) > len(fits))
        return [SendBlocks(peer, found, pages)]

    def on_release(self, peer: PeerId, call: int) -> None:
        """The peer is done. Unknown calls are ignored: the lease may have ended."""
        lease = self._leases.pop((peer, call), None)
        if lease is not None:
            self._pool.release(lease.owner)

    def on_reader_gone(self, peer: PeerId) -> None:
        """The kernel says that the peer reads no more."""
        for holder, call in [key for key in self._leases if key[0] == peer]:
            self.on_release(holder, call)

    def on_tick(self, now_ms: float) -> None:
        """End leases whose time is up: their readers know that it is, and throw away what they read later."""
        for peer, call in [key for key, lease in self._leases.items() if now_ms >= lease.until_ms]:
            self.on_release(peer, call)

    def oldest_ms(self, now_ms: float) -> float:
        """Age of the oldest lease; 0 without any."""
        return max((now_ms - lease.since_ms for lease in self._leases.values()), default=0.0)

    @property
    def until_ms(self) -> float | None:
        """When the last lease ends; None without any."""
        return max((lease.until_ms for lease in self._leases.values()), default=None)

    def open_leases(self, now_ms: float) -> list[str]:
        """Leases that stand, for people."""
        return [
            f"{peer} call {call}: for {now_ms - lease.since_ms:.0f} ms, ends in {lease.until_ms - now_ms:.0f} ms"
            for (peer, call), lease in self._leases.items()
        ]

    @property
    def n_leases(self) -> int:
        """Leases that stand."""
        return len(self._leases)
