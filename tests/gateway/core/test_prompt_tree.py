"""Laws of the global prompt tree."""

import random
from collections.abc import Mapping, Sequence
from hashlib import blake2b

import pytest

from common.block_hash import HASH_BYTES, BlockHash
from common.ids import PeerId
from common.messages.cache_events import CacheBatch, CacheEvent, CacheSnapshot
from common.policy.holdings import Held
from gateway.core.prompt_tree import (
    EXPECTED_MS,
    EXPECTED_UNFED_MS,
    SILENT_MS,
    TTL_MS,
    Checked,
    Gone,
    News,
    PromptTree,
)

A, B, STORE = PeerId("a@1"), PeerId("b@1"), PeerId("store@1")


def name(chain: int, block: int) -> BlockHash:
    return BlockHash(blake2b(bytes([chain, block >> 8, block & 255]), digest_size=HASH_BYTES).digest())


def chain(number: int, n_blocks: int) -> list[BlockHash]:
    return [name(number, block) for block in range(n_blocks)]


def stored(peer: PeerId, first: int, names: Sequence[bytes], tier: str = "device") -> CacheBatch:
    return batch(peer, first, "stored", names, tier)


def removed(peer: PeerId, first: int, names: Sequence[bytes], tier: str = "device") -> CacheBatch:
    return batch(peer, first, "removed", names, tier)


def batch(peer: PeerId, first: int, kind: str, names: Sequence[bytes], tier: str) -> CacheBatch:
    events = tuple(CacheEvent(first + at, kind, one, tier=tier) for at, one in enumerate(names))
    return CacheBatch(peer, first, first + len(names) - 1, events)


def snapshot(peer: PeerId, number: int, names: Sequence[bytes], tier: str = "device") -> CacheSnapshot:
    return CacheSnapshot(peer, number, [((tier,), names[at : at + 300]) for at in range(0, len(names), 300)])


def fed(tree: PromptTree, *news: News, now_ms: float = 0.0) -> set[PeerId]:
    """Everybody who needs a resync after the news."""
    for one in news:
        tree.put(one)
    wanted: set[PeerId] = set()
    while not tree.idle:
        wanted |= tree.apply_some(1_000_000, now_ms)
    tree.check()
    return wanted


def tree_with(*news: News, now_ms: float = 0.0) -> PromptTree:
    tree = PromptTree()
    assert fed(tree, *news, now_ms=now_ms) == set()
    return tree


def swept(tree: PromptTree) -> None:
    while tree.sweep(1000):
        pass
    tree.check()


def test_a_worker_holds_the_leading_blocks_that_it_told_of() -> None:
    names = chain(1, 10)
    tree = tree_with(snapshot(A, 0, []), stored(A, 1, names[:7]), snapshot(B, 3, names[:3]))
    match = tree.match(names)
    assert match.blocks == 10
    assert [match.device_run(peer) for peer in (A, B, STORE)] == [7, 3, 0]
    assert match.held(A, None) == Held(7)
    assert tree.match(chain(2, 10)).held(A, None) == Held(0)
    assert tree.match([]).held(A, None) == Held(0)
    assert tree.match(names[:1]).held(B, None) == Held(1)


def test_blocks_that_are_gone_do_not_count() -> None:
    names = chain(1, 10)
    tree = tree_with(snapshot(A, 0, []), stored(A, 1, names), removed(A, 11, names[:3:-1]))
    assert tree.match(names).held(A, None) == Held(4)


def test_a_store_continues_a_worker_and_each_block_counts_to_its_best_tier() -> None:
    names = chain(1, 12)
    rest = [(("disk", "host"), names[2:8]), (("disk",), names[8:10])]
    tree = tree_with(snapshot(A, 4, names[:4]), CacheSnapshot(STORE, 8, rest))
    match = tree.match(names)
    assert match.held(A, STORE) == Held(4, 4, 2)
    assert match.held(A, None) == Held(4)
    assert match.held(B, STORE) == Held(0)  # the first block is only on A
    assert match.device_run(STORE) == 0
    fed(tree, stored(A, 5, names[6:8]))
    assert tree.match(names).held(A, STORE) == Held(6, 2, 2)


def test_a_gap_asks_for_a_resync_once_and_what_came_is_used_meanwhile() -> None:
    names = chain(1, 10)
    tree = tree_with(snapshot(A, 0, []), stored(A, 1, names[:2]))
    assert fed(tree, stored(A, 4, names[2:5])) == {A}
    assert tree.match(names).device_run(A) == 5
    assert fed(tree, stored(A, 7, names[5:6])) == set()
    assert tree.gaps_total == 1


def test_an_unreadable_or_incomplete_batch_is_a_gap() -> None:
    names = chain(1, 4)
    for lost in (CacheBatch(A, 1, 2, ()), CacheBatch(A, 1, 2, stored(A, 1, names[:1]).events)):
        assert fed(tree_with(snapshot(A, 0, [])), lost) == {A}


def test_events_lost_with_nothing_after_them_ask_for_a_resync_once() -> None:
    tree = tree_with(snapshot(A, 3, chain(1, 3)))
    assert fed(tree, Checked({A: 3, B: None})) == set()
    assert fed(tree, Checked({A: 5, B: None})) == {A}
    assert fed(tree, Checked({A: 5, B: None})) == set()
    assert tree.gaps_total == 1


def test_a_holder_without_a_snapshot_is_asked_for_and_its_events_wait() -> None:
    names = chain(1, 3)
    tree = tree_with(stored(A, 1, names))
    assert tree.match(names).device_run(A) == 0
    assert fed(tree, Checked({A: 3})) == {A}
    assert fed(tree, snapshot(A, 3, names), stored(A, 2, names[1:]), Checked({A: 3})) == set()
    assert tree.match(names).device_run(A) == 3


def test_a_resync_drops_what_is_gone_and_brings_what_was_missed() -> None:
    names = chain(1, 10)
    tree = tree_with(snapshot(A, 10, names))
    fed(tree, snapshot(A, 20, names[:4]))
    assert tree.match(names).device_run(A) == 4
    fed(tree, stored(A, 21, names[4:6]), snapshot(A, 30, names))
    assert tree.match(names).device_run(A) == 10
    assert tree.resyncs_total == 3


def test_a_snapshot_shows_only_when_it_is_complete_and_the_old_one_until_then() -> None:
    names = chain(1, 3000)
    tree = tree_with(snapshot(A, 3, names[:30]))
    tree.put(snapshot(A, 5, names))
    tree.put(removed(A, 6, names[2999:]))
    seen = []
    while not tree.idle:
        tree.apply_some(500, 0.0)
        seen.append(tree.match(names[:1000]).device_run(A))
    assert set(seen[:5]) == {30}
    assert seen[-1] == 1000
    assert len(seen) >= 6
    assert tree.match(names).device_run(A) == 2999


def test_a_repeated_or_old_batch_changes_nothing() -> None:
    names = chain(1, 10)
    tree = tree_with(snapshot(A, 5, names[:5]))
    later = [removed(A, 6, names[4:5]), stored(A, 7, names[4:8])]
    fed(tree, *later)
    before = tree.match(names).held(A, None)
    assert fed(tree, *later, stored(A, 1, names), removed(A, 1, names[:6])) == set()
    assert tree.match(names).held(A, None) == before == Held(8)
    assert tree.repeats_total == 4
    assert fed(tree, stored(A, 9, names[6:10])) == set()  # half of it is old
    assert tree.number(A) == 12


def test_a_lost_worker_counts_nowhere_at_once_and_the_others_stay() -> None:
    names = chain(1, 10)
    tree = tree_with(snapshot(A, 10, names), snapshot(B, 10, names[:4]))
    tree.forget(A)
    tree.check()
    match = tree.match(names)
    assert (match.held(A, None), match.device_run(A), match.device_run(B)) == (Held(0), 0, 4)
    fed(tree, Gone(B), Gone(STORE))
    assert tree.match(names).held(B, None) == Held(0)
    assert tree.holders == 0
    swept(tree)
    assert tree.blocks == 0


def test_a_worker_forgotten_while_its_snapshot_loads_does_not_come_back() -> None:
    names = chain(1, 2000)
    tree = PromptTree()
    tree.put(snapshot(A, 2000, names))
    tree.apply_some(500, 0.0)
    tree.forget(A)
    fed(tree)
    assert tree.match(names).device_run(A) == 0
    assert tree.holders == 0
    swept(tree)
    assert tree.blocks == 0


def test_a_sweep_looks_at_no_more_than_it_may_and_frees_everything_in_the_end() -> None:
    tree = tree_with(*(snapshot(A, number, chain(number, 200)) for number in range(1, 20)))
    seen = []
    while looked := tree.sweep(300):
        seen.append(looked)
        tree.check()
    assert max(seen) <= 300
    assert tree.blocks == 200
    assert tree.sweep(300) == 0


def test_a_bit_that_dies_during_a_sweep_is_swept_too_and_never_shows() -> None:
    names, others = chain(1, 1000), chain(2, 1000)
    tree = tree_with(snapshot(A, 1, names), snapshot(B, 1, names))
    tree.forget(A)
    tree.sweep(500)
    tree.forget(B)
    fed(tree, snapshot(PeerId("c@1"), 1, others))
    assert tree.match(names).device_run(PeerId("c@1")) == 0
    swept(tree)
    assert tree.blocks == 1000
    for life in range(100):  # bits are used again, and names that carried them do not show
        peer = PeerId(f"d@{life}")
        fed(tree, snapshot(peer, 1, names[:life]))
        assert tree.match(names).device_run(peer) == life
        assert tree.match(others).device_run(peer) == 0
        tree.forget(peer)
        tree.sweep(700)
    swept(tree)
    assert tree.blocks == 1000


def test_a_routed_prompt_counts_for_a_few_seconds_and_is_never_fetchable() -> None:
    names = chain(1, 20)
    tree = tree_with(snapshot(A, 5, names[:5]), Checked({A: 5}))
    tree.on_tick(0.0)
    tree.expect(A, names, 0.0)
    match = tree.match([*names, *chain(2, 3)])
    assert (match.held(A, None), match.device_run(A), match.held(B, None)) == (Held(20), 5, Held(0))
    tree.on_tick(EXPECTED_MS)
    assert tree.match(names).held(A, None) == Held(20)
    fed(tree, Checked({A: 5}), now_ms=2 * EXPECTED_MS)
    tree.on_tick(2 * EXPECTED_MS)
    assert tree.match(names).held(A, None) == Held(5)


def test_expectations_live_longer_while_nobody_confirms_anything() -> None:
    names = chain(1, 20)
    tree = PromptTree()
    tree.on_tick(0.0)
    tree.expect(A, names, 0.0)
    for now_ms in (EXPECTED_MS, 3 * EXPECTED_MS, EXPECTED_UNFED_MS):
        tree.on_tick(now_ms)
        assert tree.match(names).held(A, None) == Held(20)
    tree.on_tick(2 * EXPECTED_UNFED_MS)
    assert tree.match(names).held(A, None) == Held(0)
    tree.check()


def test_expectations_end_with_their_worker_and_stay_through_a_resync() -> None:
    names = chain(1, 20)
    tree = tree_with(snapshot(A, 5, names[:5]))
    tree.expect(A, names, 0.0)
    fed(tree, snapshot(A, 9, names[:7]))
    assert (tree.match(names).held(A, None), tree.match(names).device_run(A)) == (Held(20), 7)
    tree.forget(A)
    assert tree.match(names).held(A, None) == Held(0)


@pytest.mark.parametrize("turns", range(4))
def test_expectations_of_a_lost_worker_never_become_another_s(turns: int) -> None:
    names, tree = chain(1, 20), PromptTree()
    tree.on_tick(0.0)
    tree.expect(A, names, 0.0)
    tree.forget(A)
    for turn in range(1, turns + 1):
        tree.on_tick(turn * EXPECTED_UNFED_MS)
    tree.expect(B, chain(2, 2), 0.0)
    fed(tree, snapshot(STORE, 1, chain(3, 2)))
    assert (tree.match(names).held(B, None), tree.match(names).device_run(STORE)) == (Held(0), 0)


def test_a_holder_of_whom_nothing_is_heard_leaves_after_the_time_to_live() -> None:
    names = chain(1, 5)
    tree = tree_with(snapshot(A, 5, names), snapshot(B, 5, names), Checked({A: 5, B: 5}))
    fed(tree, Checked({A: 5, B: None}), now_ms=TTL_MS / 2)
    tree.on_tick(TTL_MS)
    assert tree.match(names).device_run(B) == 5
    tree.on_tick(TTL_MS + 1)
    assert (tree.match(names).device_run(A), tree.match(names).device_run(B)) == (5, 0)
    assert tree.expired_total == 1
    assert fed(tree, Checked({A: 5, B: 5}), now_ms=TTL_MS + 2) == {B}


def test_a_tree_is_synced_when_it_is_fed_and_lacks_no_snapshot() -> None:
    tree = PromptTree()
    assert not tree.synced(0.0)
    assert fed(tree, Checked({A: 0})) == {A}
    assert not tree.synced(0.0)
    fed(tree, snapshot(A, 0, []))
    assert tree.synced(0.0)
    assert tree.synced(SILENT_MS)
    assert not tree.synced(SILENT_MS + 1)


def test_the_lag_is_what_was_told_and_does_not_count_yet() -> None:
    tree = tree_with(snapshot(A, 5, []), snapshot(B, 9, []))
    assert tree.lag_events({A: 8, B: 9, STORE: None}) == 3
    assert tree.lag_events({A: 1, STORE: 2}) == 2


def test_work_is_done_in_slices_and_in_order() -> None:
    names = chain(1, 100)
    tree = tree_with(snapshot(A, 0, []))
    for at in range(0, 100, 10):
        tree.put(stored(A, 1 + at, names[at : at + 10]))
    backlogs = []
    while not tree.idle:
        tree.apply_some(25, 0.0)
        backlogs.append(tree.backlog_events)
    assert backlogs == [70, 40, 10, 0]
    assert tree.events_total == 100


class Model:
    """What the tree should say: a set of names per holder and tier."""

    def __init__(self) -> None:
        self.sets: dict[tuple[PeerId, str], set[bytes]] = {}

    def has(self, peer: PeerId, tier: str, one: bytes) -> bool:
        return one in self.sets.get((peer, tier), set())

    def held(self, names: Sequence[bytes], worker: PeerId, store: PeerId) -> Held:
        counts = {"device": 0, "host": 0, "disk": 0}
        for one in names:
            for tier, peer in (("device", worker), ("host", store), ("disk", store)):
                if self.has(peer, tier, one):
                    counts[tier] += 1
                    break
            else:
                break
        return Held(**counts)


PEERS = [(PeerId("a@1"), ("device",)), (PeerId("b@1"), ("device",)), (PeerId("s@1"), ("host", "disk"))]


@pytest.mark.parametrize("seed", range(40))
def test_under_any_order_of_news_the_tree_says_what_plain_sets_say(seed: int) -> None:
    """Holders are closed under prefixes, as eviction from the leaves keeps them. Some batches are lost, some come twice."""
    rng, tree, model = random.Random(seed), PromptTree(), Model()
    chains = [chain(number, 40) for number in range(3)]
    depth: dict[tuple[PeerId, str, int], int] = {}
    number = {peer: 0 for peer, _ in PEERS}
    asked = {peer for peer, _ in PEERS}
    past: list[CacheBatch] = []
    for step in range(200):
        peer, tiers = rng.choice(PEERS)
        tier, which = rng.choice(tiers), rng.randrange(3)
        old, new = depth.get((peer, tier, which), 0), rng.randrange(41)
        names, held = chains[which], model.sets.setdefault((peer, tier), set())
        depth[peer, tier, which] = new
        if new != old:
            changed = names[old:new] if new > old else names[new:old][::-1]
            make = stored if new > old else removed
            past.append(make(peer, number[peer] + 1, changed, tier))
            number[peer] += len(changed)
            (held.update if new > old else held.difference_update)(changed)
            if rng.random() > 0.1:
                tree.put(past[-1])
        if past and rng.random() < 0.2:
            tree.put(rng.choice(past[-5:]) if rng.random() < 0.5 else past[-1])
        asked |= tree.apply_some(rng.choice([1, 20, 300]), float(step))
        tree.sweep(rng.choice([0, 10, 100]))
        if rng.random() < 0.1:
            asked |= settle(tree, number)
            for one in sorted(asked):
                tree.put(_whole(model, one, number[one]))
            asked = settle(tree, number)
            assert asked == set()
            for names in chains:
                for worker in (PEERS[0][0], PEERS[1][0]):
                    assert tree.match(names).held(worker, PEERS[2][0]) == model.held(names, worker, PEERS[2][0])
    for peer, _ in PEERS:
        tree.forget(peer)
    swept(tree)
    assert tree.blocks == 0


def settle(tree: PromptTree, number: Mapping[PeerId, int]) -> set[PeerId]:
    """Apply all there is, then say what numbers there should be."""
    return fed(tree, Checked(dict(number)))


def _whole(model: Model, peer: PeerId, number: int) -> CacheSnapshot:
    tiers: dict[bytes, list[str]] = {}
    for (holder, tier), names in sorted(model.sets.items()):
        if holder == peer:
            for one in sorted(names):
                tiers.setdefault(one, []).append(tier)
    return CacheSnapshot(peer, number, [(tuple(sorted(found)), [one]) for one, found in tiers.items()])
