"""Fetch a run if that takes no longer than computing what it saves."""

import pytest

from common.cost.link_cost import LinkCost
from common.cost.step_cost import UNKNOWN_COST, StepCost
from common.policy.prefetch import Run, fetch_pays

COST = StepCost(1.0, 0.01, 0.0, 0.1, 0.0, chunk_tokens=512, n_samples=9)
"""A block of 16 tokens costs 0.16 ms beside the steps."""


def run(n_blocks: int, *, prompt: int = 400, cached: int = 0) -> Run:
    return Run(prompt_tokens=prompt, cached_tokens=cached, n_blocks=n_blocks, block_tokens=16, block_bytes=1_000)


def link(bytes_per_s: float, delay_ms: float = 0.5, queued_bytes: int = 0) -> LinkCost:
    return LinkCost("p", "host", bytes_per_s, delay_ms, queued_bytes)


@pytest.mark.parametrize("cost", [None, UNKNOWN_COST])
def test_without_a_fitted_cost_two_blocks_are_fetched_and_one_is_not(cost: StepCost | None) -> None:
    slow = link(1.0)
    assert [fetch_pays(run(n), slow, cost) for n in (0, 1, 2)] == [False, False, True]


def test_a_run_is_fetched_exactly_if_that_is_no_slower_than_computing_it() -> None:
    for n_blocks in range(1, 25):
        for rate in (1e6, 3e6, 6e6, 6.25e6, 1e7, 1e9):
            fetch_ms, saved_ms = 0.5 + n_blocks * 1_000 / rate * 1e3, n_blocks * 0.16
            assert fetch_pays(run(n_blocks), link(rate), COST) == (fetch_ms <= saved_ms + 1e-12), (n_blocks, rate)


def test_a_delay_that_was_waited_for_already_does_not_count() -> None:
    assert not fetch_pays(run(10), link(1e7, delay_ms=5.0), COST)
    assert fetch_pays(run(10), link(1e7, delay_ms=5.0), COST, waited=True)


def test_what_is_queued_on_the_link_counts() -> None:
    assert fetch_pays(run(10), link(1e8), COST)
    assert not fetch_pays(run(10), link(1e8, queued_bytes=1_000_000), COST)


def test_the_last_token_is_computed_however_much_comes() -> None:
    """All 25 blocks of 400 tokens save 399 tokens, not 400, and the same single step is run."""
    assert run(25).saved_ms(COST) == pytest.approx(3.99)


def test_long_prompts_pay_more_for_the_same_blocks() -> None:
    cost = StepCost(1.0, 0.01, 1e-3, 0.1, 0.0, chunk_tokens=512, n_samples=9)
    assert run(4, cached=320).saved_ms(cost) > run(4).saved_ms(cost)
