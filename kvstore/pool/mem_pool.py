"""The memory pool of one instance: blocks of KV on device and host, found by their tokens. MemServe's nine calls.

    alloc_mem free_mem        private blocks of an owner, to be filled with `write`
    insert match delete       private blocks become visible under their tokens; look them up; drop them
    swap_out swap_in          between device and host
    transfer                  to another pool
    transfer_with_insert      the same, and visible there once all bytes have arrived

and what makes them safe: `pin`, `unpin` and `expire` (leases), `abort` (roll back an owner), `check` (conservation).
A call that fails changes nothing: what it had allocated, pinned or moved is undone before it raises. One thread uses a pool.
Source: MemServe (arXiv 2406.17565), sections 3 and 4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from common.clock import Clock, MonotonicClock
from common.errors import ConfigError
from common.ids import Owner
from common.kv_layout import KvLayout
from common.messages.liveness import ModelIdentity, difference
from common.policy.eviction import EvictionPolicy, Lru
from kvstore.index.ledger import LedgerMisuse
from kvstore.pool.addresses import Address, InsertResult, Lease, Match, Medium, WrongAddress
from kvstore.pool.checks import CheckedCopy
from kvstore.pool.leases import LeaseTable
from kvstore.pool.media import Media, require_one_each
from kvstore.pool.swap import move_to_device, move_to_host
from kvstore.pool.tier import Bytes, Tier
from kvstore.pool.transfer import BlockCopy, copy_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """What may differ from pool to pool."""

    model: str = ""
    """What KV depends on beside tokens and layout, such as a fingerprint of the weights. Pools that differ share nothing."""
    policy: EvictionPolicy = field(default_factory=Lru)
    """Which visible block goes first."""
    clock: Clock = field(default_factory=MonotonicClock)
    """Of the leases."""
    copy: BlockCopy = copy_blocks
    """Moves bytes out of this pool's blocks, to its own other medium or to another pool."""
    verify: bool = False
    """Compare every block that is copied out of this pool with what it was when it became visible; else KvCorrupt is raised."""
    peers: Mapping[str, "MemPool"] = field(default_factory=dict)
    """Instance id -> pool, for `transfer` by id. The caller's: it may add and remove pools any time."""


class MemPool:
    """Owns the blocks of both media and all leases. An owner is any string, such as a request id.

    A private block leaves by `free_mem`, `insert` or `abort`; a visible one by eviction (when `alloc_mem` or another call needs
    room), `delete` or a swap; a pin by `unpin`, by the end of its lease or by `abort`.
    """

    def __init__(
        self, instance: str, layout: KvLayout, device: Bytes, host: Bytes, options: PoolOptions | None = None
    ) -> None:
        """`device`, `host`: uint8 [pages, page_bytes], contiguous; they stay the caller's. Raises ValueError for others."""
        options = options or PoolOptions()
        self.instance, self.layout, self._options = instance, layout, options
        tiers = (
            Tier(instance, medium, layout, rows, options.policy, keep_sums=options.verify)
            for medium, rows in ((Medium.DEVICE, device), (Medium.HOST, host))
        )
        self._media = Media(instance, _identity(layout, options.model), *tiers)
        self._leases, self.checks = LeaseTable(), CheckedCopy(options.copy, verify=options.verify)

    @classmethod
    def open(
        cls,
        layout: KvLayout,
        device_bytes: int,
        host_bytes: int,
        *,
        instance: str = "local",
        options: PoolOptions | None = None,
    ) -> "MemPool":
        """A pool over ordinary memory of its own. Raises ConfigError if `device_bytes` holds no block."""
        block_bytes = layout.layers * layout.page_bytes
        n_pages = [n_bytes // block_bytes * layout.layers for n_bytes in (device_bytes, host_bytes)]
        if n_pages[0] <= 0 or n_pages[1] < 0:
            raise ConfigError(f"device {device_bytes} and host {host_bytes} bytes: a block is {block_bytes} bytes")
        device, host = (np.zeros((count, layout.page_bytes), np.uint8) for count in n_pages)
        return cls(instance, layout, device, host, options)

    # -- memory

    def available_blocks(self, medium: Medium) -> int:
        """Blocks that `alloc_mem` can give: free ones, and visible ones without pins."""
        self.expire()
        return self._media.tiers[medium].available_blocks

    def alloc_mem(self, n_blocks: int, medium: Medium, owner: str) -> list[Address]:
        """Private blocks, of undefined bytes, for `owner`. Evicts if it must. All or nothing: raises OutOfPages."""
        _require_count(n_blocks)
        self.expire()
        return self._media.tiers[medium].alloc(_user(owner), n_blocks)

    def free_mem(self, addresses: Sequence[Address]) -> None:
        """Free private blocks. Raises WrongAddress, with nothing freed, if one is not private or named twice."""
        self._media.require_private(addresses)
        with self._media.call() as call:
            self._media.hand_over(addresses, call)

    def write(self, address: Address, layer: int, page: bytes | bytearray | memoryview | Bytes) -> None:
        """Fill one layer of a private block: `page_bytes` bytes, [block_tokens, 2, kv_heads, head_dim].

        Raises WrongAddress for a block that is visible (it must not change) or free, ValueError for another layer or length.
        """
        tier, layers = self._media.tier(address), self.layout.layers
        tier.holder_of(address.block)
        given = np.frombuffer(page, np.uint8)
        if not 0 <= layer < layers or given.size != self.layout.page_bytes:
            raise ValueError(
                f"{given.size} bytes for layer {layer}; a block has {layers} layers of {self.layout.page_bytes} bytes"
            )
        tier.memory[address.block].reshape(layers, -1)[layer] = given

    def read(self, address: Address) -> Bytes:
        """View [layers, page_bytes], read-only, of a private or visible block; good until the block goes: pin it.

        Raises WrongAddress for a block that is free.
        """
        tier = self._media.tier(address)
        if address.block not in tier.names:
            tier.holder_of(address.block)
        view: Bytes = tier.memory[address.block].reshape(self.layout.layers, -1)
        view.flags.writeable = False
        return view

    # -- index

    def insert(self, tokens: Sequence[int], addresses: Sequence[Address], salt: str = "") -> InsertResult:
        """Retire blocks: the i-th address becomes visible as the i-th whole block of `tokens` (0 .. 2^32 - 1).

        All private blocks given are used up, whoever's they were: what was visible already keeps its block, and the copy
        offered is free. A new block on the device replaces an unpinned one on the host. Visible blocks may be named too,
        each in its own place. Raises WrongAddress, or ValueError unless there is one address per whole block.
        """
        self.expire()
        root, names = self._media.chain(tokens, salt)
        self._media.require_offered(names, addresses)
        with self._media.call() as call:
            n_new = self._media.publish(call, root, names, addresses)
        return InsertResult(n_new, self._media.run(names))

    def match(self, tokens: Sequence[int], salt: str = "") -> Match:
        """The longest visible run of whole blocks from the start of `tokens`, in any medium. Changes and pins nothing."""
        _, names = self._media.chain(tokens, salt)
        addresses = self._media.run(names)
        return Match(tuple(names[: len(addresses)]), addresses)

    def delete(self, tokens: Sequence[int], salt: str = "") -> int:
        """Drop the blocks of `tokens`, last first, up to one that others continue or that is pinned; returns how many."""
        self.expire()
        return self._media.drop(self._media.chain(tokens, salt)[1])

    # -- swap

    def swap_out(self, n_blocks: int) -> tuple[Address, ...]:
        """Move up to `n_blocks` visible blocks, coldest first, from device to host; returns where they lie now.

        Fewer if the others are pinned or the host has no room; the host evicts to make room. A failed copy moves nothing.
        """
        _require_count(n_blocks)
        self.expire()
        with self.checks.call(), self._media.call() as call:
            return move_to_host(self._media, call, n_blocks, self.checks)

    def swap_in(self, addresses: Sequence[Address]) -> tuple[Address, ...]:
        """Move visible blocks from host to device; returns where each lies on the device. One that is there already stays.

        A pinned host block stays on the host too. Raises WrongAddress for a block that is not visible (any more), OutOfPages
        if the device has no room; the device evicts to make room. A failed copy moves nothing.
        """
        self.expire()
        names = [self._media.visible_name(address) for address in addresses]
        with self.checks.call(), self._media.call() as call:
            return move_to_device(self._media, call, names, self.checks)

    # -- transfer

    def transfer(
        self,
        to: "MemPool | str",
        source: Sequence[Address],
        target: Sequence[Address] = (),
        *,
        owner: str | None = None,
        medium: Medium = Medium.DEVICE,
    ) -> tuple[Address, ...]:
        """Copy private or visible blocks to private blocks of `to`; returns those.

        Without `target` the receiver allocates in `medium`, for `owner` or else under the sender's instance id, so that its
        `abort(id)` frees what a dead sender left. With `target` the blocks keep their owner. Raises WrongAddress, OutOfPages,
        or ValueError if models or lengths differ; then the receiver has nothing new, but a given `target` may be overwritten.
        """
        receiver = self._peer(to)
        if target:
            require_one_each(source, target)
            receiver.require_private(target)
        with self.checks.call(), self._media.reading(source), receiver.call() as call:
            targets = target or receiver.tiers[medium].alloc(call, len(source))
            self._media.send(source, receiver, targets, self.checks)
            if not target:
                receiver.hand_over(targets, _user(self.instance if owner is None else owner))
            return tuple(targets)

    def transfer_with_insert(
        self,
        to: "MemPool | str",
        tokens: Sequence[int],
        source: Sequence[Address],
        target: Sequence[Address] = (),
        *,
        salt: str = "",
        medium: Medium = Medium.DEVICE,
    ) -> InsertResult:
        """Copy the whole blocks of `tokens` to `to`, then make them visible there: no `match` ever sees half of it.

        Without `target` only blocks that the receiver lacks are copied; it allocates in `medium`. With `target`, private
        blocks of the receiver, it is `transfer` and then `insert`. Raises as these do; nothing is visible then.
        """
        receiver = self._peer(to)
        root, names = receiver.chain(tokens, salt)
        require_one_each(names, source)
        if target:
            receiver.require_private(target)
        with self.checks.call(), self._media.reading(source), receiver.call() as call:
            missing = list(range(len(names))) if target else receiver.pin_known(call, names)
            targets = target or receiver.tiers[medium].alloc(call, len(missing))
            self._media.send([source[at] for at in missing], receiver, targets, self.checks)
            offered = dict(zip(missing, targets, strict=True))
            addresses = [offered.get(at) or receiver.where(name) for at, name in enumerate(names)]
            n_new = receiver.publish(call, root, names, addresses)
        return InsertResult(n_new, receiver.run(names))

    def _peer(self, to: "MemPool | str") -> Media:
        pool = self._options.peers.get(to) if isinstance(to, str) else to
        if pool is None:
            raise WrongAddress(f"no pool {to!r} is known to {self.instance!r}")
        apart = difference(self._media.identity, pool._media.identity)
        if apart:
            raise ValueError(f"KV of {self.instance!r} is of no use to {pool.instance!r}: {apart}")
        self.expire()
        pool.expire()
        return pool._media

    # -- safety

    def pin(self, match: Match, owner: str, ttl_ms: float) -> Lease:
        """Keep what `match` found, and count it as used, until `unpin`, `abort(owner)` or the end of `ttl_ms`.

        The lease covers the run that is still there, shorter than the match if blocks went since: look at its `names`.
        """
        if not ttl_ms > 0:
            raise ValueError(f"a lease of {ttl_ms} ms")
        self.expire()
        addresses = self._media.run(match.names)
        names, ends_ms = match.names[: len(addresses)], self._options.clock.now_ms() + ttl_ms
        lease = self._leases.add(lambda number: Lease(number, owner, names, addresses, ends_ms))
        for medium, tier in self._media.tiers.items():
            here = [name for name, address in zip(names, addresses, strict=True) if address.medium is medium]
            if here:
                tier.pool.take(_lessee(lease), here)
        return lease

    def unpin(self, lease: Lease) -> bool:
        """End a lease; False if it was over already, by its time too."""
        kept = self._leases.drop(lease.number)
        if kept is not None:
            self._media.release(_lessee(kept))
        return kept is not None and kept.ends_ms > self._options.clock.now_ms()

    def expire(self) -> int:
        """End the leases whose time is up; returns how many. Every call that needs room does this by itself."""
        due = self._leases.due(self._options.clock.now_ms())
        for lease in due:
            self.unpin(lease)
        return len(due)

    def abort(self, owner: str) -> int:
        """Roll back all that `owner` has: private blocks are free, leases end. Returns how many blocks were private."""
        for lease in self._leases.of(owner):
            self.unpin(lease)
        return self._media.release(_user(owner))

    def check(self) -> None:
        """Raise LedgerMisuse with the numbers unless in each medium free + private + visible == all, every block is where
        the maps say, and exactly what leases name is pinned. O(blocks).
        """
        leased = {(address.medium, address.block) for lease in self._leases.all() for address in lease.addresses}
        for medium, tier in self._media.tiers.items():
            tier.check()
            n_leased = sum(at is medium for at, _ in leased)
            if n_leased != tier.pool.cache.n_pinned:
                raise LedgerMisuse(f"{medium.value}: {tier.pool.cache.n_pinned} blocks pinned, {n_leased} leased")


def _identity(layout: KvLayout, model: str) -> ModelIdentity:
    return ModelIdentity(
        name=model,
        fingerprint=model,
        architecture="",
        dtype=layout.dtype,
        layers=layout.layers,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        block_tokens=layout.block_tokens,
        vocab_tokens=0,
        context_tokens=0,
    )


def _user(owner: str) -> Owner:
    """Apart from the owners that the pool makes for its own calls and leases."""
    return Owner(f"owner:{owner}")


def _lessee(lease: Lease) -> Owner:
    return Owner(f"lease:{lease.number}")


def _require_count(n_blocks: int) -> None:
    if n_blocks < 0:
        raise ValueError(f"{n_blocks} blocks asked for")
