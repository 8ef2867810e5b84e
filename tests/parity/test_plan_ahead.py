"""Tokens stay transformers' own when every worker plans a step while the one before it runs."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.driver import Driver
from tests.support.reference import Reference
from tests.support.threads import thread_cluster

pytestmark = pytest.mark.system

N_TOKENS = 100
WAYS = {"apart": ("prefill-0", "decode-0"), "mixed": ("scarce", None)}
SCARCE = {"apart": "decode-0", "mixed": "scarce"}


@dataclass
class Served:
    """Workers that plan ahead on little memory, one that does not on plenty, and what transformers says."""

    driver: Driver
    prompts: list[list[int]]
    expected: list[list[int]]

    def ahead(self, worker: str) -> float:
        return self.driver.reports[worker].counters["steps_planned_ahead_total"]

    def preempted(self, worker: str) -> float:
        return self.driver.reports[worker].counters["preemptions_total"]


@pytest.fixture(scope="module")
def served(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tiny_model("llama")
    reference, rng = Reference(folder), random.Random(6)
    vocab = reference.model.config.vocab_size
    prompts = [[rng.randrange(8, vocab) for _ in range(rng.randrange(120, 200))] for _ in range(24)]
    expected = [reference.generate(prompt, N_TOKENS) for prompt in prompts]
    with thread_cluster(tmp_path_factory.mktemp("logs")) as processes:
        common = {"model": folder, "dtype": "float32", "max_step_tokens": 128, "caching": 0}
        for role, name in (("decode", "decode-0"), ("prefill", "prefill-0"), ("mixed", "scarce")):
            processes.start(role, name, device_memory="2MiB", plan_ahead="on", **common)
        processes.start("mixed", "plenty", device_memory="64MiB", plan_ahead="off", **common)
        names = ("decode-0", "prefill-0", "scarce", "plenty")
        processes.await_members(*names)
        with Driver([processes.members()[name] for name in names]) as driver:
            driver.until_reported(lambda: len(driver.reports["prefill-0"].transports) == 1, "they are connected")
            yield Served(driver, prompts, expected)


@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_are_transformers_own_though_pages_run_out(served: Served, way: str) -> None:
    driver, (to, decode) = served.driver, WAYS[way]
    requests = [driver.send(to, prompt, decode=decode, max_tokens=N_TOKENS) for prompt in served.prompts]
    for outcome, tokens in zip(driver.finish(requests), served.expected, strict=True):
        assert outcome.failed is None
        assert (outcome.tokens, outcome.finish) == (tokens, "length")
    driver.until_all_free()
    assert served.ahead(SCARCE[way]) > 0 and served.preempted(SCARCE[way]) > 0


@pytest.mark.parametrize("way", WAYS)
def test_stop_tokens_and_limits_end_an_answer_where_they_must(served: Served, way: str) -> None:
    driver, (to, decode) = served.driver, WAYS[way]
    ends = [(number * 7) % (N_TOKENS - 1) + 1 for number in range(len(served.prompts))]
    requests = []
    for number, (prompt, tokens, end) in enumerate(zip(served.prompts, served.expected, ends, strict=True)):
        limits = {"max_tokens": end} if number % 2 else {"max_tokens": N_TOKENS, "stop_token_ids": (tokens[end - 1],)}
        requests.append(driver.send(to, prompt, decode=decode, **limits))
    outcomes = driver.finish(requests)
    for number, (outcome, tokens, end) in enumerate(zip(outcomes, served.expected, ends, strict=True)):
        assert outcome.failed is None
        stopped = tokens[: end if number % 2 else tokens.index(tokens[end - 1]) + 1]
        assert (outcome.tokens, outcome.finish) == (stopped, "length" if number % 2 else "stop")
    driver.until_all_free()


@pytest.mark.parametrize("way", WAYS)
def test_drawn_tokens_are_those_of_a_worker_that_plans_step_by_step(served: Served, way: str) -> None:
    driver, (to, decode) = served.driver, WAYS[way]
    drawn = []
    for where, answers in ((to, decode), ("plenty", None)):
        requests = [
            driver.send(where, prompt, decode=answers, max_tokens=40, temperature=0.8, top_p=0.95, seed=number)
            for number, prompt in enumerate(served.prompts[:12])
        ]
        drawn.append([outcome.tokens for outcome in driver.finish(requests)])
    assert drawn[0] == drawn[1]
    assert served.ahead("plenty") == 0
    driver.until_all_free()


@pytest.mark.parametrize("way", WAYS)
def test_who_is_cancelled_disturbs_nobody_and_leaves_nothing_behind(served: Served, way: str) -> None:
    driver, (to, decode) = served.driver, WAYS[way]
    requests = [driver.send(to, prompt, decode=decode, max_tokens=N_TOKENS) for prompt in served.prompts]
    driver.until(lambda: sum(len(driver.outcomes[request].tokens) for request in requests) > 60, "some tokens came")
    for request in requests[::3]:
        driver.cancel(request, *(worker for worker in (to, decode) if worker is not None))
    kept = [number for number in range(len(requests)) if number % 3]
    for number, outcome in zip(kept, driver.finish([requests[number] for number in kept]), strict=True):
        assert outcome.failed is None and outcome.tokens == served.expected[number]
    driver.until_all_free()
