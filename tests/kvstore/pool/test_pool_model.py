"""Any sequence of calls on two pools, beside a plain dict model, with every byte compared after every call."""

import random
from itertools import product

import pytest

from common.block_hash import BlockHash
from common.errors import OutOfPages
from kvstore import Address, Lease, Medium, MemPool
from tests.kvstore.pool.builders import LAYOUT, BreakingCopy, CopyFailed, HandClock, fill, holds, names_of, pool

SALTS = ("", "x")
OWNERS = ("r1", "r2", "r3")
PROMPTS = [[kind for kind in kinds for _ in range(LAYOUT.block_tokens)] for kinds in product((0, 1), repeat=4)]


class World:
    """Two pools, and for each what a plain dict says must be so."""

    def __init__(self, seed: int) -> None:
        self.rng, self.clock, self.number = random.Random(seed), HandClock(), 0
        self.copies = BreakingCopy()
        self.pools = [pool(10, 6, instance=name, clock=self.clock, copy=self.copies) for name in ("a", "b")]
        self.private: dict[Address, tuple[str, bytes]] = {}
        self.visible: dict[Address, BlockHash] = {}
        self.leases: list[tuple[MemPool, Lease]] = []
        self.failures = 0

    def some(self) -> tuple[MemPool, MemPool, list[int], str]:
        prompt = self.rng.choice(PROMPTS)[: self.rng.randrange(5) * LAYOUT.block_tokens]
        one, other = self.rng.sample(self.pools, 2)
        return one, other, prompt, self.rng.choice(SALTS)

    def step(self) -> None:
        self.number += 1
        self.copies.done, self.copies.fails_at = 0, self.rng.choice((None, None, self.rng.randrange(4)))
        calls = (
            *(self.insert, self.insert, self.swap_out, self.swap_in, self.transfer, self.send, self.send),
            *(self.alloc, self.free, self.pin, self.unpin, self.abort, self.delete, self.wait),
        )
        before = (dict(self.private), dict(self.visible))
        try:
            self.rng.choice(calls)()
        except (OutOfPages, CopyFailed):
            self.failures += 1
            assert self.private == before[0], "a call that failed left something behind"

    def alloc(self) -> list[Address]:
        one, medium, owner = self.rng.choice(self.pools), self.rng.choice(list(Medium)), self.rng.choice(OWNERS)
        n_blocks = self.rng.randrange(1, 5)
        fits = n_blocks <= self.room(one, medium)
        try:
            addresses = one.alloc_mem(n_blocks, medium, owner)
            assert fits
        except OutOfPages:
            assert not fits
            raise
        self.hold(one, addresses, owner)
        return addresses

    def hold(self, one: MemPool, addresses: list[Address], owner: str) -> None:
        for address in addresses:
            assert address not in self.private
            self.private[address] = (owner, f"{self.number} {address}".encode())
        fill(one, addresses, [self.private[address][1] for address in addresses])

    def room(self, one: MemPool, medium: Medium) -> int:
        taken = [a for a in self.private if (a.instance, a.medium) == (one.instance, medium)]
        leased = {
            address
            for where, lease in self.leases
            for address in lease.addresses
            if where is one and address.medium is medium and lease.ends_ms > self.clock.time_ms
        }
        return {Medium.DEVICE: 10, Medium.HOST: 6}[medium] - len(taken) - len(leased)

    def free(self) -> None:
        one = self.rng.choice(self.pools)
        mine = [address for address in self.private if address.instance == one.instance]
        freed = self.rng.sample(mine, self.rng.randrange(len(mine) + 1))
        one.free_mem(freed)
        for address in freed:
            del self.private[address]

    def insert(self) -> None:
        one, _, prompt, salt = self.some()
        names, medium = names_of(prompt, salt), self.rng.choice(list(Medium))
        addresses = one.alloc_mem(len(names), medium, "inserter")
        fill(one, addresses, names)
        seen = self.now_visible(one)
        result = one.insert(prompt, addresses, salt)
        assert result.n_new_blocks == sum(name not in seen.values() for name in names)
        assert holds(one, result.addresses, names)

    def swap_out(self) -> None:
        one, wanted = self.rng.choice(self.pools), self.rng.randrange(6)
        one.expire()
        pinned = {a for where, lease in self.leases if where is one for a in lease.addresses if self.alive(lease)}
        loose = [a for a in self.now_visible(one) if a.medium is Medium.DEVICE and a not in pinned]
        room = self.room(one, Medium.HOST)
        assert len(one.swap_out(wanted)) == min(wanted, len(loose), room)

    def swap_in(self) -> None:
        one, _, prompt, salt = self.some()
        match = one.match(prompt, salt)
        back = one.swap_in(match.addresses)
        assert one.match(prompt, salt).addresses[: len(back)] == back
        assert holds(one, back, match.names)
        assert all(address.medium is Medium.DEVICE for address in back)

    def transfer(self) -> None:
        one, other, prompt, salt = self.some()
        match, owner = one.match(prompt, salt), self.rng.choice((None, *OWNERS))
        arrived = one.transfer(other, match.addresses, owner=owner, medium=self.rng.choice(list(Medium)))
        assert holds(other, arrived, match.names)
        self.hold(other, list(arrived), owner or one.instance)

    def send(self) -> None:
        one, other, prompt, salt = self.some()
        match = one.match(prompt, salt)
        prompt, seen = prompt[: match.n_blocks * LAYOUT.block_tokens], other.match(prompt, salt).n_blocks
        self.copies.during = [lambda: self.half_seen(other, prompt, salt, seen)]
        try:
            medium = self.rng.choice(list(Medium))
            result = one.transfer_with_insert(other, prompt, match.addresses, salt=salt, medium=medium)
        finally:
            self.copies.during = []
        assert other.match(prompt, salt).addresses == result.addresses
        assert holds(other, result.addresses, match.names)

    def half_seen(self, other: MemPool, prompt: list[int], salt: str, seen: int) -> None:
        """While bytes travel, nothing more is found than before; less only if eviction made room."""
        match = other.match(prompt, salt)
        assert match.n_blocks <= seen
        assert holds(other, match.addresses, match.names)

    def pin(self) -> None:
        one, _, prompt, salt = self.some()
        match = one.match(prompt, salt)
        lease = one.pin(match, self.rng.choice(OWNERS), ttl_ms=self.rng.randrange(1, 50))
        assert lease.addresses == match.addresses
        self.leases.append((one, lease))

    def unpin(self) -> None:
        if self.leases:
            one, lease = self.leases.pop(self.rng.randrange(len(self.leases)))
            alive = self.alive(lease)
            assert one.unpin(lease) or not alive

    def alive(self, lease: Lease) -> bool:
        return lease.ends_ms > self.clock.time_ms

    def abort(self) -> None:
        one, owner = self.rng.choice(self.pools), self.rng.choice((*OWNERS, "a", "b"))
        its = [a for a, (holder, _) in self.private.items() if a.instance == one.instance and holder == owner]
        assert one.abort(owner) == len(its)
        self.private = {address: held for address, held in self.private.items() if address not in its}
        self.leases = [(where, lease) for where, lease in self.leases if where is not one or lease.owner != owner]

    def delete(self) -> None:
        one, _, prompt, salt = self.some()
        before = set(self.now_visible(one).values())
        n_dropped = one.delete(prompt, salt)
        gone = before - set(self.now_visible(one).values())
        assert len(gone) == n_dropped
        assert gone <= set(names_of(prompt, salt))

    def wait(self) -> None:
        self.clock.time_ms += self.rng.randrange(20)

    def now_visible(self, one: MemPool) -> dict[Address, BlockHash]:
        return {a: name for tier in one._media.tiers.values() for name, a in tier.where.items()}

    def check(self) -> None:
        for one in self.pools:
            one.expire()
            one.check()
            visible = self.now_visible(one)
            assert not set(visible) & set(self.private)
            assert holds(one, list(visible), list(visible.values()))
            mine = {a: held for a, (_, held) in self.private.items() if a.instance == one.instance}
            assert holds(one, list(mine), list(mine.values()))
            for medium in Medium:
                assert one.available_blocks(medium) == self.room(one, medium)
            for prompt, salt in product(self.rng.sample(PROMPTS, 2), SALTS):
                names, known = names_of(prompt, salt), set(visible.values())
                run = next((at for at, name in enumerate(names) if name not in known), len(names))
                match = one.match(prompt, salt)
                assert match.n_blocks == run
                assert [visible[address] for address in match.addresses] == names[:run]
        for one, lease in self.leases:
            if self.alive(lease):
                seen = self.now_visible(one)
                assert [seen[address] for address in lease.addresses] == list(lease.names)


@pytest.mark.parametrize("seed", range(5))
def test_two_pools_do_what_a_plain_dict_says(seed: int) -> None:
    world = World(seed)
    for _ in range(250):
        world.step()
        world.check()
    assert world.failures
    for one in world.pools:
        for owner in (*OWNERS, "a", "b"):
            one.abort(owner)
        world.private.clear()
        one.check()
        assert (one.available_blocks(Medium.DEVICE), one.available_blocks(Medium.HOST)) == (10, 6)
