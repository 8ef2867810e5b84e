"""Greedy tokens equal transformers' own with caching over tcp, on mixed workers, under every spill policy, when preempted."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.parity.caching import DECODE, DEVICE_MEMORY, STORE, Answers, Rig, rig

pytestmark = pytest.mark.system

LONG = 100
TCP, MIXED, BACK, SELECTIVE = "prefill-tcp", "mixed-0", "prefill-back", "prefill-selective"
WORKERS = {
    TCP: {"transport": "tcp", "transfer": "auto"},
    MIXED: {},
    BACK: {"spill": "write-back", "eviction": "cost-aware", "transfer": "auto"},
    SELECTIVE: {"spill": "selective"},
}


@pytest.fixture(scope="module")
def served(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    answers = Answers(tiny_model("llama"))
    with rig(
        tmp_path_factory.mktemp("paths"), answers, 3, WORKERS, device_memory=DEVICE_MEMORY, kvstore="off"
    ) as started:
        yield started


def test_the_transports_are_the_ones_asked_for(served: Rig) -> None:
    kinds = {name: {t.kind for t in served.driver.reports[name].transports} for name in WORKERS}
    assert kinds == {TCP: {"tcp"}, MIXED: {"shm"}, BACK: {"shm"}, SELECTIVE: {"shm"}}


@pytest.mark.parametrize("worker", WORKERS)
def test_a_repeated_prompt_and_a_second_turn_hit_the_workers_own_memory(served: Rig, worker: str) -> None:
    prompt = served.answers.prompt(LONG, "turn", worker)
    tokens = served.ask_and_save(worker, prompt) if worker in (TCP, MIXED) else served.ask(worker, prompt).tokens
    if worker in (BACK, SELECTIVE):
        served.until(lambda: served.gauge(worker, "cached_blocks") >= 8, "the answer's KV is back")
    before = served.hits(worker)
    assert served.ask(worker, prompt).cached_tokens == 96
    following = prompt + tokens + served.answers.prompt(30, "more", worker)
    assert served.ask(worker, following).cached_tokens == 128
    assert served.gained(worker, before) == {"device": 96 + 128}


@pytest.mark.parametrize("worker", [TCP, MIXED])
@pytest.mark.parametrize(("tier", "rounds"), [("host", "a"), ("disk", "ab")])
def test_what_was_displaced_comes_back(served: Rig, worker: str, tier: str, rounds: str) -> None:
    prompt = served.answers.prompt(LONG, tier, worker)
    served.ask_and_save(worker, prompt)
    served.churn(worker, *rounds)
    before = served.hits(worker)
    assert served.ask(worker, prompt).cached_tokens == 96
    assert served.gained(worker, before) == {tier: 96}


def test_write_back_saves_what_it_displaces(served: Rig) -> None:
    prompt = served.answers.prompt(LONG, "host", BACK)
    served.ask(BACK, prompt)
    served.churn(BACK, "back")
    before = served.hits(BACK)
    assert served.ask(BACK, prompt).cached_tokens == 96
    assert served.gained(BACK, before) == {"host": 96}


def test_selective_saves_what_was_used_twice(served: Rig) -> None:
    once, twice = (served.answers.prompt(LONG, name, SELECTIVE) for name in ("once", "twice"))
    served.driver.refresh()
    saved = served.counter(SELECTIVE, "spilled_blocks_total")
    for prompt in (once, twice):
        served.ask(SELECTIVE, prompt)
    assert served.counter(SELECTIVE, "spilled_blocks_total") == saved
    served.ask(SELECTIVE, twice)
    served.until(lambda: served.counter(SELECTIVE, "spilled_blocks_total") == saved + 6, "what was used twice is saved")
    served.churn(SELECTIVE, "selective")
    before = served.hits(SELECTIVE)
    assert served.ask(SELECTIVE, twice).cached_tokens == 96
    assert served.gained(SELECTIVE, before) == {"host": 96}
    assert served.ask(SELECTIVE, once).cached_tokens == 0


@pytest.mark.parametrize("worker", [TCP, MIXED])
def test_preempted_requests_get_the_same_tokens(served: Rig, worker: str) -> None:
    starved = worker if worker == MIXED else DECODE
    served.driver.refresh()
    before = served.counter(starved, "preemptions_total")
    common = served.answers.prompt(48, "common")
    prompts = [common + served.answers.prompt(150, "many", number) for number in range(24)]
    served.ask_all(worker, prompts)
    again = served.ask_all(worker, prompts)
    assert served.counter(starved, "preemptions_total") > before, f"{starved} had room for all"
    assert all(outcome.cached_tokens for outcome in again)


@pytest.mark.parametrize("worker", WORKERS)
def test_counters_agree_with_what_the_answers_told(served: Rig, worker: str) -> None:
    """Of all requests before this one."""
    served.driver.refresh()
    cached = served.cached.get(worker, 0)
    assert sum(served.hits(worker).values()) == cached
    assert served.counter(worker, "missed_tokens_total") == served.asked.get(worker, 0) - cached
    for name in (worker, DECODE, STORE):
        assert served.counter(name, "load_failures_total") == 0
        assert served.counter(name, "spill_lost_blocks_total") == 0
