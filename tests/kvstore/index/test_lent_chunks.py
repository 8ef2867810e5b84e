"""Laws of chunks that a pool lends: whole chunks, never at an owner's cost, and all of it comes back."""

import random

import numpy as np
import pytest

from common.block_hash import BlockHash
from common.errors import OutOfPages
from common.ids import Owner
from common.policy.eviction import Lru
from kvstore.index.block_pool import CACHE, BlockPool
from kvstore.index.ledger import Ledger, LedgerMisuse, PageIds, PageState
from tests.kvstore.index.chains import ROOT, block_pool, chain, prompt, straight

A, ARENA, SYSTEM = Owner("a"), Owner("activations"), Owner("system")


def cached(pool: BlockPool, names: list[BlockHash], name: str = "one") -> PageIds:
    """Make them cached blocks without pins; returns their pages."""
    pages = pool.alloc(Owner(name), len(names), PageState.ACTIVE)
    pool.publish(Owner(name), names, pages, parent=ROOT, depth=0)
    pool.release(Owner(name))
    return pages


def test_free_chunks_go_before_any_cached_block_and_the_first_never() -> None:
    pool, names = block_pool(8, pages_per_block=2), straight(3)
    cached(pool, names)  # pages 0 to 5
    assert set(pool.lent.lend(2, 4, ARENA)) == {2, 3}
    assert (pool.match(names), pool.lent.lendable(4)) == (3, 1)
    assert pool.lent.lend(1, 4, ARENA) == [1]
    assert pool.match(names) == 2
    with pytest.raises(OutOfPages, match="0 are free or only cached"):
        pool.lent.lend(1, 4, ARENA)
    pool.check()


def test_of_cached_blocks_the_fewest_and_then_the_coldest_go() -> None:
    pool = block_pool(8, pages_per_block=2)
    pool.alloc(A, 2, PageState.ACTIVE)  # chunk 0 of four pages
    first, second, third = straight(2, 7), straight(2, 8), straight(1, 9)
    for name, names in (("first", first), ("second", second), ("third", third)):
        cached(pool, names, name)
    pool.take(Owner("b"), first)
    pool.release(Owner("b"))
    assert pool.lent.lend(1, 4, ARENA) == [3], "one block is in the way"
    assert pool.lent.lend(1, 4, ARENA) == [2], "of two with two blocks, the colder"
    assert (pool.match(first), pool.match(second), pool.match(third)) == (2, 0, 0)
    pool.check()


def test_what_is_held_for_a_lent_neighbour_goes_before_a_new_block() -> None:
    pool = block_pool(4, pages_per_block=4)
    for number in range(4):
        pool.alloc(Owner(f"o{number}"), 1, PageState.ACTIVE)
    pool.release(Owner("o2"))
    assert pool.lent.lend(1, 1, ARENA) == [11]
    pool.release(Owner("o3"))
    assert (pool.lent.lend(1, 1, ARENA), pool.available_pages) == ([10], 4)
    pool.check()


def test_nobody_s_pages_and_no_pinned_block_are_lent() -> None:
    pool, names = block_pool(6, pages_per_block=2), straight(2)
    cached(pool, names)
    pool.pin(A, names)
    held = pool.alloc(A, 4, PageState.RESERVED)
    assert pool.lent.lendable(4) == 0
    with pytest.raises(OutOfPages):
        pool.lent.lend(1, 4, ARENA)
    assert (pool.pages_of(A), pool.match(names)) == (held.reshape(-1).tolist(), 2)
    pool.check()


def test_that_there_is_none_is_known_until_something_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, names = block_pool(6, pages_per_block=2), straight(2)
    pool.publish(A, names, pool.alloc(A, 2, PageState.ACTIVE), parent=ROOT, depth=0)
    held = pool.alloc(Owner("b"), 4, PageState.ACTIVE)
    looked, real = 0, pool.lent._open

    def counted(block_of: np.ndarray) -> np.ndarray:
        nonlocal looked
        looked += 1
        return real(block_of)

    monkeypatch.setattr(pool.lent, "_open", counted)
    assert [pool.lent.lendable(4) for _ in range(3)] == [0, 0, 0] and looked == 1
    pool.ledger.free_some(Owner("b"), held[:2].reshape(-1))  # pages 4 to 7
    assert pool.lent.lendable(4) == 1
    assert pool.lent.lend(1, 4, ARENA) == [1]
    assert pool.lent.lendable(4) == 0
    pool.lent.take_back(ARENA, [1])
    assert pool.lent.lendable(4) == 1
    pool.alloc(Owner("c"), 2, PageState.ACTIVE)
    assert pool.lent.lendable(4) == 0
    pool.release(Owner("c"))
    pool.release(Owner("b"))
    pool.lent.lend(2, 4, ARENA)
    assert pool.lent.lendable(4) == 0
    pool.release(A)
    assert pool.lent.lendable(4) == 0, "the first chunk is never lent"
    pool.check()


def test_a_chunk_whose_pages_all_stay_with_a_neighbour_can_be_lent_again() -> None:
    pool = block_pool(3, pages_per_block=4)
    pool.lent.lend(11, 1, ARENA)
    assert pool.lent.lendable(1) == 0
    pool.lent.take_back(ARENA, [5])
    assert pool.lent.lendable(1) == 1


def test_lent_pages_are_not_available_and_come_back_whole() -> None:
    pool = block_pool(8, pages_per_block=3)
    chunks = pool.lent.lend(2, 4, ARENA)
    lent = pool.ledger.counts().lent
    assert lent >= 8
    assert lent % 3 == 0
    assert pool.available_pages == 24 - lent == pool.ledger.free_pages
    with pytest.raises(OutOfPages):
        pool.alloc(A, pool.available_pages // 3 + 1, PageState.ACTIVE)
    assert pool.lent.take_back(ARENA, chunks) == lent
    assert (pool.available_pages, pool.ledger.counts().lent) == (24, 0)
    pool.check()


def test_a_block_between_two_borrowers_is_free_only_when_both_are_through() -> None:
    pool = BlockPool(Ledger(9), 3, Lru())
    assert (pool.lent.lend(1, 4, ARENA), pool.lent.lend(1, 4, SYSTEM)) == ([2], [1])  # pages 4 to 8: blocks 1 and 2
    assert pool.lent.take_back(ARENA, [2]) == 0, "page 8 is in a block that reaches into chunk 1"
    pool.check()
    assert pool.lent.take_back(SYSTEM, [1]) == 6
    assert pool.available_pages == 9
    pool.check()


def test_only_the_borrower_gives_back_and_once() -> None:
    pool = block_pool(8)
    (chunk,) = pool.lent.lend(1, 4, ARENA)
    for owner, chunks in ((SYSTEM, [chunk]), (ARENA, [chunk, chunk]), (ARENA, [0])):
        with pytest.raises(LedgerMisuse, match="are not all lent to"):
            pool.lent.take_back(owner, chunks)
    pool.lent.take_back(ARENA, [chunk])
    pool.check()


def test_a_pool_keeps_its_size_while_anything_is_lent() -> None:
    pool = block_pool(8)
    chunks = pool.lent.lend(1, 4, ARENA)
    with pytest.raises(LedgerMisuse, match="keeps its size"):
        pool.resize(4)
    pool.lent.take_back(ARENA, chunks)
    assert pool.resize(4) == 4


def test_what_is_lent_for_good_is_not_usable() -> None:
    pool = block_pool(8, pages_per_block=2)
    pool.lent.lend(1, 4, ARENA, lasting=True)
    pool.lent.lend(1, 4, ARENA)
    assert pool.usable_pages == 12


@pytest.mark.parametrize("damage", ["missing", "astray"])
def test_check_finds_lent_pages_that_are_not(damage: str) -> None:
    pool = block_pool(8)
    (chunk,) = pool.lent.lend(1, 4, ARENA)
    if damage == "missing":
        pool.ledger.free_some(ARENA, np.array([4 * chunk], np.int32))
    else:
        pool.ledger.claim(ARENA, np.array([0], np.int32), PageState.LENT)
    with pytest.raises(LedgerMisuse, match="do not agree"):
        pool.check()


class World:
    """One pool beside plain dicts: which pages each owner holds, which chunks each borrower has."""

    def __init__(self, seed: int, pages_per_block: int, chunk_pages: int) -> None:
        self.rng, self.pages_per_block, self.chunk_pages = random.Random(seed), pages_per_block, chunk_pages
        self.pool = block_pool(12, pages_per_block)
        self.own: dict[Owner, set[int]] = {}
        self.lent: dict[int, Owner] = {}
        self.number = self.n_lent = self.n_refused = 0

    def step(self) -> None:
        self.number += 1
        self.rng.choice((self.begin, self.begin, self.release, self.evict, self.lend, self.lend, self.take_back))()

    def begin(self) -> None:
        """Take what is cached, allocate the rest, publish all of it."""
        owner, names = Owner(f"o{self.number}"), chain(prompt(self.rng, 4))
        hits = self.pool.match(names)
        self.pool.take(owner, names[:hits])
        self.own[owner] = set()
        try:
            pages = self.pool.alloc(owner, len(names) - hits, PageState.ACTIVE)
        except OutOfPages:
            return
        parent = names[hits - 1] if hits else ROOT
        if self.rng.random() < 0.7 and self.pool.publish(owner, names[hits:], pages, parent=parent, depth=hits):
            return
        self.own[owner] = set(self.pool.pages_of(owner))

    def release(self) -> None:
        if self.own:
            owner = self.rng.choice(list(self.own))
            self.pool.release(owner)
            del self.own[owner]

    def evict(self) -> None:
        self.pool.evict(self.rng.randrange(3))

    def lendable(self) -> set[int]:
        """By the plain model: chunks in which nobody has a page and no block is pinned."""
        kept = set().union(*self.own.values())
        kept |= {page for block in self.pool.cache if block.pins for page in block.place.tolist()}
        end = -(-self.pool.ledger.total_pages // self.chunk_pages)
        return {chunk for chunk in range(1, end) if chunk not in self.lent and not kept & self.pages([chunk])}

    def pages(self, chunks: list[int]) -> set[int]:
        whole = {page for chunk in chunks for page in range(chunk * self.chunk_pages, (chunk + 1) * self.chunk_pages)}
        return {page for page in whole if page < self.pool.ledger.total_pages}

    def lend(self) -> None:
        wanted, able, to = self.rng.randrange(1, 4), self.lendable(), self.rng.choice([ARENA, SYSTEM])
        assert self.pool.lent.lendable(self.chunk_pages) == len(able)
        try:
            chunks = self.pool.lent.lend(wanted, self.chunk_pages, to)
        except OutOfPages:
            assert len(able) < wanted
            self.n_refused += 1
            return
        assert len(set(chunks)) == wanted
        assert set(chunks) <= able
        self.lent.update(dict.fromkeys(chunks, to))
        self.n_lent += 1

    def take_back(self) -> None:
        if self.lent:
            to = self.rng.choice(list(self.lent.values()))
            mine = [chunk for chunk, owner in self.lent.items() if owner == to]
            chunks = self.rng.sample(mine, self.rng.randrange(1, len(mine) + 1))
            free = self.pool.ledger.free_pages
            assert self.pool.lent.take_back(to, chunks) == self.pool.ledger.free_pages - free
            for chunk in chunks:
                del self.lent[chunk]

    def check(self) -> None:
        pool, ppb = self.pool, self.pages_per_block
        pool.check()
        blocks = {page // ppb for page in self.pages(list(self.lent))}
        assert pool.ledger.counts().lent == len(blocks) * ppb
        pages = set(pool.pages_of(CACHE)).union(*self.own.values())
        assert not pages & {block * ppb + layer for block in blocks for layer in range(ppb)}
        for owner in self.own:
            assert set(pool.pages_of(owner)) == self.own[owner]
        assert all((block.place % ppb == np.arange(ppb)).all() for block in pool.cache), "blocks lie whole"


@pytest.mark.parametrize(("pages_per_block", "chunk_pages"), [(2, 4), (3, 4), (4, 1), (1, 5)])
@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_calls_keeps_the_laws(seed: int, pages_per_block: int, chunk_pages: int) -> None:
    world = World(seed, pages_per_block, chunk_pages)
    for _ in range(150):
        world.step()
        world.check()
    assert world.n_lent
    assert world.n_refused
    for owner in list(world.own):
        world.pool.release(owner)
    for to in set(world.lent.values()):
        world.pool.lent.take_back(to, world.pool.lent.of(to))
    assert world.pool.available_pages == world.pool.ledger.total_pages
    world.pool.check()
