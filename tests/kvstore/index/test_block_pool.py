"""Laws of blocks, their owners and their pins, against a plain model."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from common.block_hash import BlockHash
from common.errors import OutOfPages
from common.ids import Owner
from common.policy.eviction import EVICTION_POLICIES, EvictionPolicy
from kvstore.index.block_pool import CACHE, Block, BlockPool
from kvstore.index.ledger import LedgerMisuse, PageState
from tests.kvstore.index.chains import ROOT, block_pool, chain, prompt, straight

A, B = Owner("a"), Owner("b")
PAGES_PER_BLOCK = 2


def publish(pool: BlockPool, owner: Owner, names: list[BlockHash], first: int = 0) -> int:
    """Allocate and publish names[first:]."""
    pages = pool.alloc(owner, len(names) - first, PageState.ACTIVE)
    return pool.publish(owner, names[first:], pages, parent=names[first - 1] if first else ROOT, depth=first)


def cached(pool: BlockPool, names: list[BlockHash]) -> None:
    """Make them cached blocks without pins."""
    publish(pool, Owner("one"), names)
    pool.release(Owner("one"))


def test_pages_of_a_block_are_neighbours_whatever_happened_before() -> None:
    pool, rng = block_pool(40, pages_per_block=3), random.Random(1)
    for number in range(200):
        names = chain(prompt(rng))
        owner = Owner(f"o{number}")
        pages = pool.alloc(owner, len(names), PageState.ACTIVE)
        assert (np.diff(pages, axis=1) == 1).all() and (pages[:, 0] % 3 == 0).all()
        if rng.random() < 0.7:
            pool.publish(owner, names, pages, parent=ROOT, depth=0)
        pool.release(owner)
    pool.check()


def test_what_is_not_published_is_never_found() -> None:
    pool, names = block_pool(8), straight(3)
    pages = pool.alloc(A, 3, PageState.ACTIVE)
    assert pool.match(names) == 0
    pool.publish(A, names[:2], pages[:2], parent=ROOT, depth=0)
    assert pool.match(names) == 2
    with pytest.raises(KeyError, match="is not cached"):
        pool.take(B, names)
    assert not pool.holds(B)
    pool.check()


def test_release_undoes_everything_that_was_not_published() -> None:
    pool, names = block_pool(8), straight(3)
    pages = pool.alloc(A, 5, PageState.RESERVED)
    pool.move(A, PageState.ACTIVE)
    pool.publish(A, names, pages[:3], parent=ROOT, depth=0)
    assert (pool.pins_of(A), len(pool.pages_of(A))) == (tuple(names), 4)
    pool.release(A)
    pool.release(A)  # over is over
    assert (pool.ledger.free_pages, pool.match(names), pool.cache.n_pinned) == (10, 3, 0)
    assert not pool.holds(A)
    pool.check()


def test_the_owner_of_a_duplicate_keeps_its_pages() -> None:
    pool, names = block_pool(8), straight(3)
    cached(pool, names[:2])
    places = [pool.cache.get(name).place.tolist() for name in names[:2]]
    assert publish(pool, A, names) == 1
    assert pool.pins_of(A) == tuple(names), "pins reach back to the root"
    assert len(pool.pages_of(A)) == 2 * PAGES_PER_BLOCK
    assert [pool.cache.get(name).place.tolist() for name in names[:2]] == places
    pool.release(A)
    assert pool.ledger.free_pages == 5 * PAGES_PER_BLOCK
    pool.check()


def test_cached_places_do_not_follow_the_caller_s_array() -> None:
    pool, names = block_pool(4), straight(2)
    pages = pool.alloc(A, 2, PageState.ACTIVE)
    pool.publish(A, names, pages, parent=ROOT, depth=0)
    pages[:] = 0
    pool.check()


def test_what_an_owner_took_outlives_every_allocation() -> None:
    pool, names = block_pool(4), straight(3)
    cached(pool, names)
    taken = pool.take(A, names[:2])
    assert taken.shape == (2, PAGES_PER_BLOCK)
    assert pool.available_pages == 2 * PAGES_PER_BLOCK
    pool.alloc(B, 2, PageState.ACTIVE)
    assert pool.match(names) == 2
    with pytest.raises(OutOfPages, match="0 pages are free and 0 cached blocks can go"):
        pool.alloc(B, 1, PageState.ACTIVE)
    pool.rename(A, Owner("c"))
    pool.release(A)
    assert pool.available_pages == 0
    pool.release(Owner("c"))
    assert pool.available_pages == 2 * PAGES_PER_BLOCK
    pool.check()


def test_names_do_not_collide() -> None:
    pool, names = block_pool(4), straight(1)
    cached(pool, names)
    pool.take(A, names)
    pool.take(B, names)
    with pytest.raises(LedgerMisuse, match="cannot take its name"):
        pool.rename(A, B)
    with pytest.raises(LedgerMisuse, match="for 2 blocks of 2"):
        pool.publish(A, straight(2), np.zeros((2, 1), np.int32), parent=ROOT, depth=0)
    pool.check()


def test_forget_spares_what_is_pinned() -> None:
    pool, names = block_pool(8), straight(4)
    cached(pool, names)
    pool.pin(A, names[1:2])
    assert pool.forget([*names, *names, *straight(1, first_token=9)]) == 3
    assert (pool.match(names), pool.match(names, 1)) == (0, 1)
    pool.check()


def test_withdrawn_blocks_are_out_of_sight_and_their_pages_the_owner_s() -> None:
    pool, names = block_pool(8), straight(4)
    cached(pool, names)
    victims = pool.withdraw(A, 3)
    assert [block.name for block in victims] == names[:0:-1]
    assert pool.match(names) == 1
    assert pool.pages_of(A) == [page for block in victims for page in block.place.tolist()]
    pool.check()
    pool.release(A)
    assert pool.ledger.free_pages == 7 * PAGES_PER_BLOCK
    assert pool.withdraw(A, 5)[0].name == names[0]
    assert pool.withdraw(B, 5) == []
    pool.check()


def test_given_pages_end_with_their_new_owner() -> None:
    pool = block_pool(4)
    pages = pool.alloc(A, 3, PageState.ACTIVE)
    pool.give(A, pages[:2], B, PageState.ACTIVE)
    pool.release(B)
    assert (pool.pages_of(A), pool.ledger.free_pages) == (pages[2].tolist(), 3 * PAGES_PER_BLOCK)
    with pytest.raises(LedgerMisuse):
        pool.give(A, pages[:1], B, PageState.ACTIVE)
    pool.check()


def test_two_tenants_with_the_same_prompt_share_no_block() -> None:
    pool = block_pool(16)
    tokens = list(range(16))
    ours, theirs = chain(tokens, salt="tenant a"), chain(tokens, salt="tenant b")
    assert not set(ours) & set(theirs)
    cached(pool, ours)
    assert pool.match(chain(tokens, salt="tenant a")) == 4
    assert pool.match(theirs) == pool.match(chain(tokens)) == 0
    assert publish(pool, B, theirs) == 4
    places = [set(pool.cache.get(name).place.tolist()) for name in (*ours, *theirs)]
    assert len(set().union(*places)) == 8 * PAGES_PER_BLOCK
    assert pool.forget(ours) == 4
    assert pool.match(theirs) == 4
    pool.check()


@dataclass
class Heard:
    """A listener that keeps what it heard; `here` is what a reader of the events would believe."""

    here: set[BlockHash] = field(default_factory=set)
    used: int = 0

    def on_stored(self, block: Block) -> None:
        assert block.name not in self.here
        self.here.add(block.name)

    def on_used(self, block: Block) -> None:
        assert block.name in self.here
        self.used += 1

    def on_removed(self, block: Block) -> None:
        self.here.remove(block.name)


class World:
    """One pool beside a plain model of it: who pins what, who holds how many own blocks, what may be visible."""

    def __init__(self, seed: int, policy: EvictionPolicy) -> None:
        self.rng, self.pool = random.Random(seed), block_pool(16, policy=policy)
        self.heard = Heard()
        self.pool.listen(self.heard)
        self.pins: dict[Owner, list[BlockHash]] = {}
        self.own: dict[Owner, list[list[int]]] = {}
        self.number, self.blocks = 0, 16

    def step(self) -> None:
        steps = (
            self.begin,
            self.finish,
            self.finish,
            self.release,
            self.release,
            self.forget,
            self.withdraw,
            self.evict,
            self.resize,
        )
        self.rng.choice(steps)()
        self.number += 1

    def begin(self) -> None:
        """As a worker starts a prompt: take what is there, allocate the rest."""
        owner, names = Owner(f"o{self.number}"), chain(prompt(self.rng))
        hits = self.pool.match(names)
        self.pool.take(owner, names[:hits])
        self.pins[owner] = names[:hits]
        wanted = self.rng.randrange(5)
        fits = wanted <= self.blocks_available()
        try:
            self.own[owner] = self.pool.alloc(owner, wanted, PageState.ACTIVE).tolist()
            assert fits
        except OutOfPages:
            assert not fits
            self.own[owner] = []

    def blocks_available(self) -> int:
        """By the plain model: what nobody's own, and no pinned block, holds."""
        pinned = {name for names in self.pins.values() for name in names}
        places = [block for blocks in self.own.values() for block in blocks]
        places += [block.place.tolist() for block in self.pool.cache if block.name in pinned]
        return self.blocks - sum(max(place) < self.blocks * PAGES_PER_BLOCK for place in places)

    def finish(self) -> None:
        """Publish some of what an owner has, after a chain of any depth."""
        if not self.own:
            return
        owner = self.rng.choice(list(self.own))
        names = chain(prompt(self.rng))[: len(self.own[owner])]
        pages = np.array(self.own[owner][: len(names)], np.int32).reshape(-1, PAGES_PER_BLOCK)
        new = [name not in self.heard.here for name in names]
        assert self.pool.publish(owner, names, pages, parent=ROOT, depth=0) == sum(new)
        known = [name for name, fresh in zip(names, new, strict=True) if not fresh]
        self.pins[owner] += known + [name for name, fresh in zip(names, new, strict=True) if fresh]
        for pages_of_block, fresh in zip(pages.tolist(), new, strict=True):
            if fresh:
                self.own[owner].remove(pages_of_block)

    def release(self) -> None:
        if self.own:
            owner = self.rng.choice(list(self.own))
            self.pool.release(owner)
            del self.own[owner], self.pins[owner]
            assert not self.pool.holds(owner)

    def forget(self) -> None:
        self.pool.forget(chain(prompt(self.rng))[-1:])

    def withdraw(self) -> None:
        owner = Owner(f"o{self.number}")
        before = set(self.heard.here)
        victims = self.pool.withdraw(owner, self.rng.randrange(3))
        assert before - self.heard.here == {block.name for block in victims}
        self.own[owner], self.pins[owner] = [block.place.tolist() for block in victims], []
        if self.rng.random() < 0.5:
            self.pool.release(owner)
            del self.own[owner], self.pins[owner]
        else:  # a holding in another state than `finish` works with
            self.pool.move(owner, PageState.ACTIVE)

    def evict(self) -> None:
        pinned = {name for names in self.pins.values() for name in names}
        wanted, loose = self.rng.randrange(4), len(self.heard.here - pinned)
        assert self.pool.evict(wanted) == min(wanted, loose)

    def resize(self) -> None:
        self.blocks = self.rng.choice([16, 16, 24, self.rng.randrange(20)])
        kept = self.pool.resize(self.blocks * PAGES_PER_BLOCK + self.rng.randrange(PAGES_PER_BLOCK))
        held = [page for owner in self.own for page in self.pool.pages_of(owner)] + self.pool.pages_of(CACHE)
        assert kept == max([self.blocks * PAGES_PER_BLOCK - 1, *held]) + 1

    def check(self) -> None:
        pool = self.pool
        pool.check()
        assert {block.name for block in pool.cache} == self.heard.here
        assert {name for names in self.pins.values() for name in names} <= self.heard.here, "a pinned block went"
        assert pool.available_pages == self.blocks_available() * PAGES_PER_BLOCK
        for owner, names in self.pins.items():
            assert pool.pins_of(owner) == tuple(names)
            assert sorted(pool.pages_of(owner)) == sorted(page for block in self.own[owner] for page in block)
        placed = [tuple(block.place.tolist()) for block in pool.cache]
        assert len(pool.pages_of(CACHE)) == PAGES_PER_BLOCK * len(set(placed)) == PAGES_PER_BLOCK * len(placed)


@pytest.mark.parametrize("policy", EVICTION_POLICIES.values(), ids=EVICTION_POLICIES.keys())
@pytest.mark.parametrize("seed", range(15))
def test_any_sequence_of_calls_keeps_the_laws(seed: int, policy: type[EvictionPolicy]) -> None:
    world = World(seed, policy())
    for _ in range(300):
        world.step()
        world.check()
    assert world.heard.used and world.pool.evicted_blocks_total
    for owner in list(world.own):
        world.pool.release(owner)
    assert world.pool.available_pages == world.pool.ledger.total_pages
    everything = world.pool.available_pages // PAGES_PER_BLOCK
    with pytest.raises(OutOfPages):
        world.pool.alloc(A, everything + 1, PageState.ACTIVE)
    world.pool.alloc(A, everything, PageState.ACTIVE)
    assert not world.heard.here
    world.pool.check()


def test_shrinking_evicts_what_is_cached_at_the_end_and_nothing_else() -> None:
    pool, names = block_pool(4), [straight(1, first_token) for first_token in range(4)]
    for place, name in enumerate(names):
        publish(pool, Owner(f"o{place}"), name)
        pool.release(Owner(f"o{place}"))
    assert pool.resize(2 * PAGES_PER_BLOCK) == 2 * PAGES_PER_BLOCK
    assert [pool.match(name) for name in names] == [1, 1, 0, 0]
    pool.check()


def test_a_pool_shrinks_to_what_is_held_and_further_once_it_is_released() -> None:
    pool, names = block_pool(8), straight(3)
    pool.alloc(A, 3, PageState.ACTIVE)
    publish(pool, B, names)
    wanted = 2 * PAGES_PER_BLOCK
    assert pool.resize(wanted) == 6 * PAGES_PER_BLOCK
    assert (pool.match(names), pool.available_pages) == (3, 0)
    with pytest.raises(OutOfPages):
        pool.alloc(Owner("c"), 1, PageState.ACTIVE)
    pool.release(B)
    pool.check()
    assert (pool.match(names), pool.resize(wanted)) == (0, 3 * PAGES_PER_BLOCK)
    pool.release(A)
    assert (pool.resize(wanted), pool.available_pages) == (wanted, wanted)
    pool.check()


def test_a_shrink_that_is_taken_back_has_all_pages_again() -> None:
    pool = block_pool(8)
    held = pool.alloc(A, 6, PageState.ACTIVE)
    pool.resize(2 * PAGES_PER_BLOCK)
    assert pool.resize(8 * PAGES_PER_BLOCK) == 8 * PAGES_PER_BLOCK
    assert pool.available_pages == 2 * PAGES_PER_BLOCK
    assert pool.pages_of(A) == held.reshape(-1).tolist()
    pool.release(A)
    assert pool.available_pages == 8 * PAGES_PER_BLOCK
    pool.check()


def test_pages_of_a_block_are_neighbours_after_any_resizing() -> None:
    pool, rng = block_pool(8, pages_per_block=3), random.Random(3)
    for n_pages in (25, 14, 30, 7, 40):
        pool.resize(n_pages)
        owners = [Owner(f"o{n_pages}-{number}") for number in range(n_pages // 3)]
        for owner in owners:
            (block,) = pool.alloc(owner, 1, PageState.ACTIVE).tolist()
            assert block == [block[0], block[0] + 1, block[0] + 2]
        for owner in rng.sample(owners, len(owners)):
            pool.release(owner)


@pytest.mark.parametrize("damage", ["pins", "places"])
def test_check_finds_every_kind_of_damage(damage: str) -> None:
    pool, names = block_pool(8), straight(3)
    publish(pool, A, names)
    if damage == "pins":
        pool._pins[B] = names[:1]
    else:
        pool.cache.get(names[0]).place[:] = 9
    with pytest.raises(LedgerMisuse, match=r"pins do not add up|the ledger lists"):
        pool.check()
