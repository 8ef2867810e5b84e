"""How blocks go out: Find, lease, Release; and back from disk into host memory on the way. Pure.

A found run stays pinned until Release or its lease's end, whichever comes first, and no sooner for a reader that fell
silent: it may still be reading, and what it reads within its lease must be what it asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from common.block_hash import HASH_BYTES, BlockHash
from common.errors import OutOfPages, ProtocolViolation
from common.ids import Owner, PeerId
from common.messages.blocks import BlockName, Find, Found
from kvstore.index.block_pool import BlockPool
from kvstore.index.ledger import PageIds, PageState
from kvstore.server.core.actions import Action, Pages, ReadDisk, Reply
from kvstore.server.core.disk_tier import DiskTier
from kvstore.server.core.names import MAX_CALL_BLOCKS
from kvstore.server.core.tally import Tally

MAX_LEASE_MS = 30_000
DISK_WITHIN_MS = 2_000.0
"""A Find waits so long for blocks on disk; then it is answered with what is there."""
REPLY_LIMIT_BYTES = 64 * 2**20
"""An answer with payloads waits in memory outside the budget until it is sent; longer runs take several calls."""

Key = tuple[PeerId, int]


@dataclass(slots=True)
class _Lease:
    """What one Find pinned. Leaves by Release, or when its time is over."""

    find: Find
    found: Found
    owner: Owner
    began_ms: float
    until_ms: float


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A Find that waits for the disk. Leaves with its last block, a bad file, its deadline, Release, or the peer."""

    find: Find
    owner: Owner
    began_ms: float
    loading: set[BlockHash]
    from_disk: frozenset[BlockHash]


@dataclass(frozen=True, slots=True)
class _Load:
    """A block on its way from disk; ends with `on_disk_read`, always."""

    block: BlockName
    owner: Owner
    pages: PageIds
    waiting: list[Key]


class Reads:
    """Owns leases, waiting Finds and loads from disk."""

    def __init__(self, pool: BlockPool, disk: DiskTier, tally: Tally, *, block_bytes: int, block_tokens: int) -> None:
        self._pool, self._disk, self._tally = pool, disk, tally
        self._block_bytes, self._block_tokens = block_bytes, block_tokens
        self._reply_blocks = max(1, REPLY_LIMIT_BYTES // block_bytes)
        self._leases: dict[Key, _Lease] = {}
        self._waiting: dict[Key, _Waiting] = {}
        self._loads: dict[BlockHash, _Load] = {}
        self._condemned: dict[BlockHash, None] = {}
        """Blocks whose pages are wrong: found by nobody, and dropped as soon as nobody has pinned them."""

    @property
    def idle(self) -> bool:
        """No lease stands, and nobody waits for the disk."""
        return not (self._leases or self._waiting)

    @property
    def oldest_ms(self) -> float | None:
        """When the oldest lease or waiting Find began."""
        began = [lease.began_ms for lease in self._leases.values()]
        return min([*began, *(waiting.began_ms for waiting in self._waiting.values())], default=None)

    def described(self, now_ms: float) -> list[str]:
        """Leases and waiting Finds, for people."""
        leases = [
            f"{peer} call {call}: {one.found.n_blocks} blocks leased for {now_ms - one.began_ms:.0f} ms"
            for (peer, call), one in self._leases.items()
        ]
        return leases + [
            f"{peer} call {call}: waits for {len(one.loading)} blocks on disk for {now_ms - one.began_ms:.0f} ms"
            for (peer, call), one in self._waiting.items()
        ]

    def find(self, peer: PeerId, find: Find, now_ms: float) -> list[Action]:
        """Answer, or read from disk first. A repeated call is answered alike. Raises ProtocolViolation."""
        key = (peer, find.call)
        lease, waiting = self._leases.get(key), self._waiting.get(key)
        known = lease or waiting
        if known is not None and known.find != find:
            raise ProtocolViolation(f"{peer} asks for other blocks under its call {find.call}")
        if lease is not None:
            lease.until_ms = now_ms + lease.found.lease_ms
            return [Reply(peer, lease.found)]
        if waiting is not None:
            return []
        if len(find.blocks) > MAX_CALL_BLOCKS or any(len(name) != HASH_BYTES for name in find.blocks):
            raise ProtocolViolation(f"{peer} asks for {len(find.blocks)} blocks, or by names that are none")
        loads = self._load(key, find, now_ms)
        return [self._answer(key, find, frozenset(), now_ms)] if loads is None else loads

    def _wanted(self, find: Find) -> list[BlockHash]:
        """What one answer may hold."""
        limit = self._reply_blocks if find.payloads else len(find.blocks)
        wanted = [BlockHash(name) for name in find.blocks[:limit]]
        wrong = [place for place, name in enumerate(wanted) if name in self._condemned] if self._condemned else []
        return wanted[: wrong[0]] if wrong else wanted

    def _load(self, key: Key, find: Find, now_ms: float) -> list[Action] | None:
        """Begin to read the run's blocks that are on disk only; None if there is nothing to wait for, or no room."""
        run: list[BlockHash] = []
        for name in self._wanted(find):
            if name not in self._pool.cache and name not in self._disk:
                break
            run.append(name)
        absent = list(dict.fromkeys(name for name in run if name not in self._pool.cache))
        if not absent:
            return None
        owner = Owner(f"wait:{key[0]}:{key[1]}")
        self._pool.take(owner, [name for name in run if name in self._pool.cache])
        loading, actions = set[BlockHash](), list[Action]()
        for name in absent:
            if name not in self._loads and not self._begin_load(name, actions):
                break
            self._loads[name].waiting.append(key)
            loading.add(name)
        if not loading:
            self._pool.release(owner)
            return None
        self._waiting[key] = _Waiting(find, owner, now_ms, loading, frozenset(absent))
        return actions

    def _begin_load(self, name: BlockHash, actions: list[Action]) -> bool:
        owner = Owner(f"load:{name.hex()}")
        try:
            pages = self._pool.alloc(owner, 1, PageState.RESERVED)
        except OutOfPages:
            return False
        block = self._disk.begin_read(name)
        self._loads[name] = _Load(block, owner, pages, [])
        actions.append(ReadDisk(block, tuple(pages[0].tolist())))
        return True

    def on_disk_read(self, name: BlockHash, *, ok: bool, now_ms: float) -> list[Action]:
        """A ReadDisk has ended. Not ok: the file was bad, late or gone, and is deleted."""
        load = self._loads.pop(name)
        self._disk.end_read(name, ok=ok)
        if ok:
            parent, depth = BlockHash(load.block.parent), load.block.depth
            self._pool.publish(load.owner, [name], load.pages, parent=parent, depth=depth)
        actions: list[Action] = []
        for key in load.waiting:
            waiting = self._waiting.get(key)
            if waiting is None or name not in waiting.loading:
                continue
            waiting.loading.discard(name)
            if ok:
                self._pool.take(waiting.owner, [name])
            if not ok or not waiting.loading:
                actions.append(self._end_wait(key, now_ms))
        self._pool.release(load.owner)
        return actions

    def _end_wait(self, key: Key, now_ms: float) -> Action:
        waiting = self._waiting.pop(key)
        answer = self._answer(key, waiting.find, waiting.from_disk, now_ms)
        self._pool.release(waiting.owner)
        return answer

    def _answer(self, key: Key, find: Find, from_disk: frozenset[BlockHash], now_ms: float) -> Reply:
        """Found, with the run that is in host memory now."""
        wanted = self._wanted(find)
        names = wanted[: self._pool.match(wanted)]
        rest = [BlockHash(name) for name in find.blocks[len(names) : len(names) + 1]]
        more = find.payloads and len(names) == len(wanted) and any(self._holds(name) for name in rest)
        tiers = tuple("disk" if name in from_disk else "host" for name in names)
        for tier in ("host", "disk"):
            self._tally.add(f"hit_tokens_total{{tier={tier}}}", tiers.count(tier) * self._block_tokens)
        if not more:  # else the rest will be asked for again
            self._tally.add("missed_tokens_total", (len(find.blocks) - len(names)) * self._block_tokens)
        owner = Owner(f"find:{key[0]}:{key[1]}")
        pages = tuple(tuple(row) for row in self._pool.take(owner, names).tolist()) if names else ()
        found = Found(call=find.call, n_blocks=len(names), tiers=tiers, more=more)
        if find.payloads:
            self._tally.add("kv_sent_bytes_total", len(names) * self._block_bytes)
        if find.payloads or not names:
            self._pool.release(owner)  # the shell sends the bytes before anything can change them
            return Reply(key[0], found, pages)
        return Reply(key[0], self._lease(key, find, found, pages, now_ms))

    def _lease(self, key: Key, find: Find, found: Found, pages: tuple[Pages, ...], now_ms: float) -> Found:
        lease_ms = min(max(find.lease_ms, 0), MAX_LEASE_MS)
        found = Found(call=found.call, n_blocks=found.n_blocks, pages=pages, tiers=found.tiers, lease_ms=lease_ms)
        owner = Owner(f"find:{key[0]}:{key[1]}")
        self._leases[key] = _Lease(find, found, owner, now_ms, now_ms + lease_ms)
        return found

    def _holds(self, name: BlockHash) -> bool:
        return name in self._pool.cache or name in self._disk

    def release(self, peer: PeerId, call: int) -> None:
        """The asker needs nothing of this call any more. Unknown calls are ignored."""
        for owner in self._dropped((peer, call)):
            self._pool.release(owner)

    def condemn(self, names: Sequence[BlockHash]) -> None:
        """The pages of these cached blocks are not what was stored. A good file of one on disk may be read again."""
        self._condemned.update(dict.fromkeys(names))
        self._tally.add("corrupt_blocks_total", len(names))
        self._drop_condemned()

    def _drop_condemned(self) -> None:
        self._pool.forget(list(self._condemned))
        self._condemned = {name: None for name in self._condemned if name in self._pool.cache}

    def on_tick(self, now_ms: float) -> list[Action]:
        """End leases and waits whose time is over."""
        for key in [key for key, lease in self._leases.items() if now_ms >= lease.until_ms]:
            self._pool.release(self._leases.pop(key).owner)
        self._drop_condemned()
        late = [key for key, waiting in self._waiting.items() if now_ms - waiting.began_ms >= DISK_WITHIN_MS]
        return [self._end_wait(key, now_ms) for key in late]

    def on_peer_dead(self, peer: PeerId) -> None:
        """Nobody reads what it asked for."""
        for key in [key for key in (*self._leases, *self._waiting) if key[0] == peer]:
            self.release(*key)

    def _dropped(self, key: Key) -> Sequence[Owner]:
        known = (self._leases.pop(key, None), self._waiting.pop(key, None))
        return [record.owner for record in known if record is not None]

    def check(self) -> None:
        """Raise AssertionError if a Find waits for a block that nobody loads."""
        for key, waiting in self._waiting.items():
            lost = [name.hex() for name in waiting.loading if name not in self._loads]
            assert waiting.loading and not lost, f"call {key} waits for blocks that nobody reads: {lost}"
