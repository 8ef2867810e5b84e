"""Workers that drain, by a gateway's word or by SIGTERM: everybody is answered, nothing is lost, and they end in time."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.messages.liveness import Drain
from tests.faults.traffic import DECODE, N_TOKENS, PREFILL, PROMPT_TOKENS
from tests.parity.caching import Answers
from tests.support.driver import Driver
from tests.support.processes import Cluster, cluster

pytestmark = pytest.mark.system


@pytest.fixture
def system(tiny_model: Callable[[str], Path], tmp_path: Path) -> Iterator[tuple[Cluster, Driver, Answers]]:
    answers = Answers(tiny_model("llama"))
    with cluster(tmp_path) as processes:
        common = {"model": answers.folder, "dtype": "float32"}
        processes.start("decode", DECODE, device_memory="2MiB", **common)
        processes.start("prefill", PREFILL, device_memory="4MiB", **common)
        processes.await_members(DECODE, PREFILL)
        with Driver([processes.members()[name] for name in (DECODE, PREFILL)]) as driver:
            driver.until_reported(lambda: len(driver.reports[PREFILL].transports) == 1, "they are connected")
            yield processes, driver, answers


def test_a_worker_told_to_drain_lives_refuses_and_serves_again(system: tuple[Cluster, Driver, Answers]) -> None:
    _, driver, answers = system
    prompt = answers.prompt(PROMPT_TOKENS, "word")
    for on in (True, False):
        assert driver.tell(PREFILL, Drain(on=on))
        driver.until_reported(lambda on=on: driver.reports[PREFILL].draining == on, "the worker says so")
        outcome = driver.finish([driver.send(PREFILL, prompt, decode=DECODE, max_tokens=N_TOKENS)])[0]
        if on:
            assert outcome.failed is not None
            assert (outcome.failed.code, outcome.failed.retryable) == ("no_worker", True)
        else:
            assert outcome.tokens == answers.to(prompt)[:N_TOKENS]
    driver.until_all_free()


def test_a_decode_worker_that_ends_answers_what_it_has_and_lets_nobody_wait(
    system: tuple[Cluster, Driver, Answers],
) -> None:
    """Far more prompts than it has room for wait for it at the prefill worker."""
    processes, driver, answers = system
    prompts = [answers.prompt(PROMPT_TOKENS, "end", number) for number in range(40)]
    requests = [driver.send(PREFILL, prompt, decode=DECODE, max_tokens=150) for prompt in prompts]
    driver.until(lambda: any(driver.outcomes[request].tokens for request in requests), "one is being answered")
    processes.processes[DECODE].terminate()
    outcomes = driver.finish(requests, timeout_s=15.0)
    finished = [outcome for outcome in outcomes if outcome.failed is None]
    assert finished and len(finished) < len(outcomes)
    assert all(len(outcome.tokens) == 150 for outcome in finished)
    failures = [outcome.failed for outcome in outcomes if outcome.failed is not None]
    assert all(failed.retryable for failed in failures), failures
    assert processes.processes[DECODE].wait(timeout=15) == 0
    driver.remove(DECODE)
    driver.until_all_free()
