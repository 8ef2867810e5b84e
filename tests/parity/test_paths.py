"""Greedy tokens equal transformers' own, for every family, however prefill and decode are spread over processes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.parity.prompts import CHUNK_TOKENS, twenty
from tests.support.driver import Driver
from tests.support.processes import cluster
from tests.support.reference import Reference
from tests.support.threads import thread_cluster

pytestmark = pytest.mark.system

N_TOKENS = 24
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3")
PATHS = {"shm": ("prefill-shm", "decode-0"), "tcp": ("prefill-tcp", "decode-0"), "mixed": ("mixed-0", None)}


@pytest.fixture(scope="module", params=FAMILIES)
def served(
    request: pytest.FixtureRequest, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Driver, list[list[int]], list[list[int]]]]:
    folder = tiny_model(request.param)
    start = cluster if request.param == "llama" else thread_cluster  # one family as it is deployed, the others sooner
    with start(tmp_path_factory.mktemp("logs")) as processes:
        common = {"model": folder, "dtype": "float32", "device_memory": "64MiB", "max_step_tokens": CHUNK_TOKENS}
        processes.start("decode", "decode-0", **common)
        processes.start("prefill", "prefill-shm", transport="shm", **common)
        processes.start("prefill", "prefill-tcp", transport="tcp", **common)
        processes.start("mixed", "mixed-0", **common)
        reference = Reference(folder)
        prompts = twenty(reference.model.config.vocab_size)
        expected = [reference.generate(prompt, N_TOKENS) for prompt in prompts]
        names = ("decode-0", "prefill-shm", "prefill-tcp", "mixed-0")
        processes.await_members(*names)
        with Driver([processes.members()[name] for name in names]) as driver:
            driver.until(
                lambda: (
                    all(driver.reports[n].transports for n in ("prefill-shm", "prefill-tcp") if n in driver.reports)
                    and len(driver.reports) == len(names)
                ),
                "both prefill workers probed their way to the decode worker",
            )
            yield driver, prompts, expected


@pytest.mark.parametrize("path", PATHS)
def test_one_request_at_a_time_gives_transformers_tokens(served, path: str) -> None:
    driver, prompts, expected = served
    to, decode = PATHS[path]
    for prompt, tokens in zip(prompts[:6], expected[:6], strict=True):
        outcome = driver.finish([driver.send(to, prompt, decode=decode, max_tokens=N_TOKENS)])[0]
        assert outcome.failed is None
        assert outcome.tokens == tokens
        assert outcome.finish == "length"
    driver.until_all_free()


@pytest.mark.parametrize("path", PATHS)
def test_twenty_requests_at_once_give_transformers_tokens(served, path: str) -> None:
    driver, prompts, expected = served
    to, decode = PATHS[path]
    requests = [driver.send(to, prompt, decode=decode, max_tokens=N_TOKENS) for prompt in prompts]
    for outcome, tokens in zip(driver.finish(requests), expected, strict=True):
        assert outcome.failed is None
        assert outcome.tokens == tokens
    driver.until_all_free()


def test_the_transports_are_the_ones_asked_for(served) -> None:
    driver, _, _ = served
    kinds = {name: {t.kind for t in driver.reports[name].transports} for name in ("prefill-shm", "prefill-tcp")}
    assert kinds == {"prefill-shm": {"shm"}, "prefill-tcp": {"tcp"}}


def test_mixed_and_apart_give_the_same_logprobs(served) -> None:
    driver, prompts, _ = served
    for prompt in prompts[3:8]:
        requests = [
            driver.send(to, prompt, decode=decode, max_tokens=N_TOKENS, logprobs=3) for to, decode in PATHS.values()
        ]
        outcomes = driver.finish(requests)
        first = outcomes[0]
        assert len(first.logprobs) == N_TOKENS
        for other in outcomes[1:]:
            for mine, theirs in zip(first.logprobs, other.logprobs, strict=True):
                assert mine.token == theirs.token
                assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
                assert [p for _, p in mine.top] == pytest.approx([p for _, p in theirs.top], abs=1e-4)
