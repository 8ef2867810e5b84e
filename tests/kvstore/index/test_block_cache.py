"""Laws of the prefix index and of which block goes next."""

import random

import pytest

from common.block_hash import BlockHash
from common.policy.eviction import EVICTION_POLICIES, CostAware, EvictionPolicy, Lru
from kvstore.index.block_cache import BlockCache
from kvstore.index.ledger import LedgerMisuse
from tests.kvstore.index.chains import ROOT, chain, prompt, straight


def cache_of(*chains: list[BlockHash], policy: EvictionPolicy | None = None) -> BlockCache[int]:
    cache: BlockCache[int] = BlockCache(policy or Lru())
    for names in chains:
        cache.insert(names, range(len(names)), parent=ROOT, depth=0)
    return cache


def evicted(cache: BlockCache[int], n_blocks: int) -> list[BlockHash]:
    return [block.name for block in cache.evict(n_blocks)]


def test_a_run_ends_at_the_first_gap() -> None:
    names = straight(5)
    cache = cache_of(names)
    assert cache.run(names) == 5
    cache.remove(names[3])
    assert (cache.run(names), cache.run(names, 1), cache.run(names, 3), cache.run(names, 4)) == (3, 2, 0, 1)
    assert cache.run(straight(5, first_token=9)) == cache.run([]) == 0


def test_a_block_that_is_here_keeps_its_place() -> None:
    names = straight(4)
    cache = cache_of(names[:2])
    assert cache.insert(names, [10, 11, 12, 13], parent=ROOT, depth=0) == [2, 3]
    assert [(cache.get(name).place, cache.get(name).depth) for name in names] == [(0, 0), (1, 1), (12, 2), (13, 3)]


def test_of_a_chain_the_end_goes_first() -> None:
    names = straight(4)
    cache = cache_of(names)
    assert evicted(cache, 9) == names[::-1]
    assert len(cache) == 0
    cache.check()


def test_least_recently_used_goes_first_and_a_shared_prefix_last() -> None:
    shared = [7] * 8
    a, b = chain([*shared, *[1] * 4]), chain([*shared, *[2] * 4])
    cache = cache_of(a, b)
    cache.use(a)
    assert evicted(cache, 4) == [b[2], a[2], a[1], a[0]]


def test_lookups_are_no_use() -> None:
    a, b = straight(1), straight(1, first_token=9)
    cache = cache_of(a, b)
    cache.run(a)
    cache.get(a[0])
    cache.pin(a)
    cache.unpin(a)
    assert evicted(cache, 1) == a


def test_cost_aware_keeps_what_is_dear_and_lets_it_age() -> None:
    dear, cheap = straight(3), straight(1, first_token=9)
    policy = CostAware(attention_equal_blocks=1.0)
    cache = cache_of(dear, cheap, policy=policy)
    assert evicted(cache, 1) == cheap  # used later, but a block at depth 2 costs three times as much
    for number in range(40):  # nobody uses `dear`; new blocks come and go
        cache.insert(fresh := straight(1, first_token=100 + number), [0], parent=ROOT, depth=0)
        if dear[2] in (gone := evicted(cache, 1)):
            break
        assert gone == fresh
    else:
        pytest.fail("what nobody uses stayed for ever")
    assert 0 < number < 10


def test_pins_count_and_a_pinned_block_stays() -> None:
    names = straight(3)
    cache = cache_of(names)
    cache.pin(names[2:])
    cache.pin(names[2:])
    assert (cache.n_pinned, cache.n_evictable) == (1, 2)
    cache.unpin(names[2:])
    assert evicted(cache, 9) == [names[1], names[0]]  # no leaf is free: the one used longest ago of the others
    with pytest.raises(LedgerMisuse, match="has 1 pins"):
        cache.remove(names[2])
    cache.unpin(names[2:])
    with pytest.raises(LedgerMisuse, match="is not pinned"):
        cache.unpin(names[2:])
    assert evicted(cache, 9) == [names[2]]
    with pytest.raises(KeyError):
        cache.pin(names)
    cache.check()


def test_a_block_that_comes_and_goes_leaves_nothing_behind() -> None:
    cache = cache_of(straight(1))
    for _ in range(5000):
        cache.insert(names := straight(2, first_token=9), [0, 1], parent=ROOT, depth=0)
        for name in names[::-1]:
            cache.remove(name)
    assert len(cache._queue) < 200
    assert len(cache._children) == 1
    cache.check()


@pytest.mark.parametrize("damage", ["pins", "children", "queue"])
def test_check_finds_every_kind_of_damage(damage: str) -> None:
    cache = cache_of(straight(3))
    match damage:
        case "pins":
            cache.n_pinned += 1
        case "children":
            cache._children[ROOT] = 2
        case _:
            cache._queue.clear()
    with pytest.raises(LedgerMisuse, match="block cache"):
        cache.check()


def coldest_leaves(
    uses: dict[BlockHash, int], parents: dict[BlockHash, BlockHash], pins: dict[BlockHash, int]
) -> list[BlockHash]:
    """Plain model of LRU: unpinned blocks without cached children, longest unused first."""
    with_children = {parents[name] for name in uses}
    leaves = [name for name in uses if name not in with_children and not pins.get(name)]
    return sorted(leaves, key=lambda name: uses[name])


@pytest.mark.parametrize("seed", range(20))
def test_lru_is_what_a_sorted_list_of_leaves_says(seed: int) -> None:
    rng, cache = random.Random(seed), BlockCache[int](Lru())
    uses: dict[BlockHash, int] = {}
    parents: dict[BlockHash, BlockHash] = {}
    pins: dict[BlockHash, int] = {}
    clock = 0
    for _ in range(300):
        names, choice = chain(prompt(rng)), rng.random()
        here = names[: cache.run(names)]
        if choice < 0.4:
            cache.insert(names, range(len(names)), parent=ROOT, depth=0)
            used = names
        elif choice < 0.55:
            cache.use(here)
            used = here
        elif choice < 0.65:
            cache.pin(here)
            for name in here:
                pins[name] = pins.get(name, 0) + 1
            used = []
        elif choice < 0.8:
            held = [name for name, count in pins.items() if count]
            cache.unpin(some := rng.sample(held, rng.randrange(len(held) + 1)))
            for name in some:
                pins[name] -= 1
            used = []
        elif choice < 0.9:
            loose = [name for name in uses if not pins.get(name)]
            for name in rng.sample(loose, min(2, len(loose))):
                cache.remove(name)
                del uses[name]
            used = []
        else:
            for victim in (block.name for block in cache.evict(rng.randrange(4))):
                leaves = coldest_leaves(uses, parents, pins)
                assert not pins.get(victim)
                assert victim == leaves[0] if leaves else victim in uses
                del uses[victim]
            used = []
        for parent, name in zip([ROOT, *used], used, strict=False):
            parents[name] = parent
        for name in reversed(used):
            clock += 1
            uses[name] = clock
        cache.check()
        assert {block.name for block in cache} == set(uses)
        assert cache.n_evictable == sum(not pins.get(name) for name in uses)
    assert len(uses) > 3


@pytest.mark.parametrize("policy", EVICTION_POLICIES.values(), ids=EVICTION_POLICIES.keys())
@pytest.mark.parametrize("seed", range(10))
def test_no_policy_takes_a_parent_before_its_child(seed: int, policy: type[EvictionPolicy]) -> None:
    rng, cache = random.Random(seed), BlockCache[int](policy())
    for _ in range(30):
        names = chain(prompt(rng, max_blocks=8))
        cache.insert(names, range(len(names)), parent=ROOT, depth=0)
        for victim in cache.evict(rng.randrange(5)):
            assert not cache.has_child(victim.name)
    n_blocks = len(cache)
    assert len(cache.evict(1000)) == n_blocks
    cache.check()
