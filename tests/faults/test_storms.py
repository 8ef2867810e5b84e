"""Aborts at every phase of requests on workers with little memory, under every memory policy: nothing lies, nothing leaks."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.storm import PHASES, Asked, Mix, make_asked
from tests.support.storm_rig import DECODE, POLICIES, PREFILLS, Flags, Rig, storm_rig

pytestmark = pytest.mark.system

ROWS: dict[str, Flags] = {
    "virtual, aggregated": {**POLICIES["virtual"], **POLICIES["spare memory"], **POLICIES["aggregated"], "caching": 2},
    "elastic, by layers": {**POLICIES["elastic"], **POLICIES["layer offload"], **POLICIES["layer by layer"]},
    "offload, slo, tcp": {**POLICIES["layer offload of all"], **POLICIES["slo"], **POLICIES["tcp"], "caching": 0},
    "host buffer, ahead": {**POLICIES["host buffer"], **POLICIES["planned ahead"], **POLICIES["write-back"]},
    "whole requests": {**POLICIES["whole requests"], **POLICIES["spare memory"], "caching": 1},
}
"""Every policy is on in one of them; `python -m benchmarks abort_storm` has each alone, and a thousand aborts."""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return make_asked(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def plain(asked: Asked, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with storm_rig(tmp_path_factory.mktemp("plain"), asked, {}) as rig:
        yield rig


def test_aborts_in_every_phase_leave_right_answers_and_nothing_held(plain: Rig) -> None:
    tally = plain.storm(seed=1).run(60)
    assert {phase for phase, aborts in tally.aborted.items() if aborts} >= {*PHASES, "deadline"}
    assert tally.finished > 20 and tally.cached > 0
    assert tally.checked_pages > 0


@pytest.mark.parametrize("row", ROWS)
def test_aborts_under_every_memory_policy_leave_right_answers_and_nothing_held(
    row: str, asked: Asked, tmp_path: Path
) -> None:
    with storm_rig(tmp_path, asked, ROWS[row]) as rig:
        tally = rig.storm(seed=2).run(30)
        assert tally.finished > 0 and tally.checked_pages > 0


def test_two_hundred_timeouts_exactly_at_the_end_of_the_prompts_leave_nothing(plain: Rig) -> None:
    """As a router would: many at once, both sides told when the prompt's KV is complete or about to be."""
    mix = Mix(("handover", "answer", "commit"), cancel_share=1.0, deadline_share=0.0, at_once=50)
    assert plain.storm(seed=3).run(200, mix).finished < 100


def test_clients_that_leave_at_every_millisecond_of_a_hand_over_leave_nothing(plain: Rig) -> None:
    driver, asked = plain.driver, plain.asked
    for wait_ms in range(40):
        prompt = asked.prompts[wait_ms % len(asked.prompts)]
        request = driver.send(PREFILLS[wait_ms % 2], prompt, decode=DECODE, max_tokens=12)
        driver.pump(wait_ms / 1000)
        driver.cancel(
            request, *((PREFILLS[wait_ms % 2], DECODE) if wait_ms % 4 < 2 else (DECODE, PREFILLS[wait_ms % 2]))
        )
    driver.until_all_free()


def test_two_prefill_workers_fill_one_small_decode_worker_and_all_is_answered(plain: Rig) -> None:
    """Together the prompts are four times what it can hold, and all grow."""
    driver, asked = plain.driver, plain.asked
    numbers = [number for number in range(len(asked.prompts)) for _ in range(2)]
    requests = [
        driver.send(PREFILLS[place % 2], asked.prompts[number], decode=DECODE, max_tokens=12)
        for place, number in enumerate(numbers)
    ]
    for outcome, number in zip(driver.finish(requests, timeout_s=60.0), numbers, strict=True):
        assert outcome.failed is None
        assert outcome.tokens == asked.expected[number]
    driver.until_all_free()
