"""What every eviction policy promises to the cache, and what each is for."""

import random

import pytest

from common.policy.eviction import EVICTION_POLICIES, CostAware, EvictionPolicy, Lru


@pytest.mark.parametrize("policy", EVICTION_POLICIES.values(), ids=EVICTION_POLICIES.keys())
def test_the_score_of_a_block_never_falls(policy: type[EvictionPolicy]) -> None:
    rng, one = random.Random(0), policy()
    for _ in range(200):
        depth, use, floor = rng.randrange(5000), rng.randrange(10**6), rng.random() * 10**6
        before = one.score(use, floor, depth)
        assert one.score(use + rng.randrange(10), floor + rng.random(), depth) >= before
        assert one.score(use, floor, depth) == before


def test_lru_sees_only_the_use() -> None:
    assert Lru().score(7, 3.0, 100) == Lru().score(7, 0.0, 0) < Lru().score(8, 0.0, 0)


def test_cost_grows_with_depth_as_attention_does() -> None:
    policy = CostAware(attention_equal_blocks=64.0)
    assert policy.score(1, 10.0, 0) == 11.0
    assert policy.score(1, 10.0, 64) == 12.0
    assert policy.score(1, 10.0, 640) == 21.0


def test_what_is_cheap_but_new_outlives_what_is_dear_and_old() -> None:
    policy = CostAware(attention_equal_blocks=64.0)
    assert policy.score(2, floor=20.0, depth=0) > policy.score(1, floor=0.0, depth=640)
