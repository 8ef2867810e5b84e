"""Greedy tokens equal transformers' own at every caching level, in every transfer mode, wherever the KV is found."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.parity.caching import BLOCK, DECODE, STORE, Answers, Rig, rig

pytestmark = pytest.mark.system

MODES = ("layer", "request", "aggregated")
LONG = 100
"""Tokens: six blocks and a bit."""
BLOCK_BYTES = 8192


@pytest.fixture(scope="module")
def answers(tiny_model: Callable[[str], Path]) -> Answers:
    return Answers(tiny_model("llama"))


@pytest.fixture(scope="module", params=range(4), ids=lambda level: f"level{level}")
def served(request: pytest.FixtureRequest, answers: Answers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    workers = {f"prefill-{mode}": {"transfer": mode} for mode in MODES}
    with rig(tmp_path_factory.mktemp("level"), answers, request.param, workers) as started:
        yield started


@pytest.fixture(params=MODES)
def worker(request: pytest.FixtureRequest) -> str:
    return f"prefill-{request.param}"


def reused(rig: Rig, tokens: int) -> int:
    """Tokens that a repeated run of so many can save: whole blocks, at any level that keeps prompts."""
    return tokens // BLOCK * BLOCK if rig.level else 0


def test_a_cold_prompt_is_computed_whole(served: Rig, worker: str) -> None:
    assert served.ask(worker, served.answers.prompt(LONG, "cold", worker)).cached_tokens == 0


def test_a_repeated_prompt_computes_its_last_block_only(served: Rig, worker: str) -> None:
    prompt = served.answers.prompt(LONG, "full", worker)
    served.ask_and_save(worker, prompt)
    sent = served.counter(worker, "kv_bytes_total{direction=prefill_to_decode}")
    before = served.hits(worker)
    assert served.ask(worker, prompt).cached_tokens == reused(served, LONG)
    assert served.gained(worker, before) == ({"device": 96} if served.level else {})
    sent = served.counter(worker, "kv_bytes_total{direction=prefill_to_decode}") - sent
    assert sent == BLOCK_BYTES * (1 if served.level >= 2 else 7), "what the decode worker has is not sent again"


def test_another_tail_computes_the_tail(served: Rig, worker: str) -> None:
    prompt = served.answers.prompt(LONG, "partial", worker)
    served.ask_and_save(worker, prompt)
    other = prompt[:70] + served.answers.prompt(90, "tail", worker)
    assert served.ask(worker, other).cached_tokens == reused(served, 70)


def test_a_second_turn_reuses_prompt_and_answer(served: Rig, worker: str) -> None:
    prompt = served.answers.prompt(LONG, "turn", worker)
    tokens = served.ask_and_save(worker, prompt)
    following = prompt + tokens + served.answers.prompt(30, "more", worker)
    before = served.hits(worker)
    outcome = served.ask(worker, following)
    known = LONG + len(tokens) - 1  # the last token of an answer is drawn, never computed
    assert outcome.cached_tokens == reused(served, LONG if served.level < 2 else known)
    expected = [{}, {"device": 96}, {"device": 96, "host": 32}, {"device": 128}]
    assert served.gained(worker, before) == expected[served.level]


def test_what_the_worker_displaced_comes_from_host_memory(served: Rig, worker: str) -> None:
    prompt = served.answers.prompt(LONG, "host", worker)
    served.ask_and_save(worker, prompt)
    if served.level:
        served.churn(worker, "a")
    before = served.hits(worker)
    assert served.ask(worker, prompt).cached_tokens == reused(served, LONG)
    assert served.gained(worker, before) == ({"host": 96} if served.level else {})


def test_what_host_memory_displaced_comes_from_disk(served: Rig, worker: str) -> None:
    prompt = served.answers.prompt(LONG, "disk", worker)
    served.ask_and_save(worker, prompt)
    if served.level:
        served.churn(worker, "a", "b")
    before = served.hits(worker)
    assert served.ask(worker, prompt).cached_tokens == reused(served, LONG)
    assert served.gained(worker, before) == ({"disk": 96} if served.level else {})


def test_less_than_a_block_is_never_cached(served: Rig, worker: str) -> None:
    prompt = served.answers.prompt(BLOCK - 1, "short", worker)
    for _ in range(2):
        assert served.ask(worker, prompt).cached_tokens == 0


def test_of_whole_blocks_the_last_is_computed_again(served: Rig, worker: str) -> None:
    prompt = served.answers.prompt(4 * BLOCK, "whole", worker)
    served.ask_and_save(worker, prompt)
    assert served.ask(worker, prompt).cached_tokens == reused(served, 3 * BLOCK)


def test_a_seeded_draw_is_the_same_cold_and_cached(served: Rig, worker: str) -> None:
    prompt = served.answers.prompt(LONG, "seeded", worker)
    drawn = {"check": False, "temperature": 0.9, "seed": 5, "top_p": 0.95}
    first, second = (served.ask(worker, prompt, **drawn) for _ in range(2))
    assert first.tokens == second.tokens
    assert (first.cached_tokens, second.cached_tokens) == (0, reused(served, LONG))


def test_different_salts_share_nothing(served: Rig, worker: str) -> None:
    prompt = served.answers.prompt(LONG, "salt", worker)
    cached = [served.ask(worker, prompt, cache_salt=salt).cached_tokens for salt in ("", "a", "b", "a")]
    assert cached == [0, 0, 0, reused(served, LONG)]


def test_counters_agree_with_what_the_answers_told(served: Rig, worker: str) -> None:
    """Of all requests before this one."""
    served.driver.refresh()
    cached = served.cached.get(worker, 0)
    assert sum(served.hits(worker).values()) == cached
    assert served.counter(worker, "missed_tokens_total") == served.asked.get(worker, 0) - cached
    modes = [name for name in served.driver.reports[worker].counters if name.startswith("kv_copies_total")]
    assert modes in ([], [f"kv_copies_total{{mode={worker.removeprefix('prefill-')}}}"])
    for name in (worker, DECODE, STORE):
        assert served.counter(name, "load_failures_total") == 0
        assert served.counter(name, "spill_lost_blocks_total") == 0
