"""An answer cut after any token and ended by another worker has the tokens of the answer that was never cut."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.parity.caching import Answers
from tests.parity.prompts import CHUNK_TOKENS
from tests.support.driver import Driver
from tests.support.threads import thread_cluster

pytestmark = pytest.mark.system

N_TOKENS = 24
PROMPT_TOKENS = 2 * CHUNK_TOKENS - 9
WAYS = {"apart": ("prefill-0", "decode-0"), "local": ("decode-0", None), "mixed": ("mixed-0", None)}
DRAWN = {
    "greedy": {},
    "seeded": {
        "temperature": 0.9,
        "top_p": 0.95,
        "seed": 11,
        "frequency_penalty": 0.6,
        "presence_penalty": 0.4,
        "repetition_penalty": 1.2,
    },
}


@pytest.fixture(scope="module")
def answers(tiny_model: Callable[[str], Path]) -> Answers:
    return Answers(tiny_model("llama"))


@pytest.fixture(scope="module")
def driver(answers: Answers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    with thread_cluster(tmp_path_factory.mktemp("logs")) as processes:
        common = {
            "model": answers.folder,
            "dtype": "float32",
            "device_memory": "64MiB",
            "max_step_tokens": CHUNK_TOKENS,
        }
        names = ("decode-0", "prefill-0", "mixed-0")
        for name in names:
            processes.start(name.partition("-")[0], name, **common)
        processes.await_members(*names)
        with Driver([processes.members()[name] for name in names]) as started:
            started.until_reported(lambda: len(started.reports["prefill-0"].transports) == 1, "they are connected")
            yield started


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "cached"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("drawn", DRAWN)
def test_cut_after_any_token_the_answer_is_the_same(
    driver: Driver, answers: Answers, drawn: str, way: str, cold: bool
) -> None:
    prompt = answers.prompt(PROMPT_TOKENS, "replay", drawn)
    sampling = {"max_tokens": N_TOKENS, **DRAWN[drawn]}
    to, decode = WAYS[way]
    whole = driver.finish([driver.send("prefill-0", prompt, decode="decode-0", **sampling)])[0].tokens
    if drawn == "greedy":
        assert whole == answers.to(prompt)[:N_TOKENS]
    else:
        assert len(set(whole)) < len(whole) or whole != answers.to(prompt)[:N_TOKENS], "it is drawn"
    requests = [
        driver.send(
            to,
            prompt,
            decode=decode,
            emitted=whole[:cut],
            cache_salt=f"{way} {drawn} {cut}" if cold else "",
            **sampling,
        )
        for cut in range(N_TOKENS)
    ]
    for cut, outcome in enumerate(driver.finish(requests)):
        assert outcome.failed is None
        assert (outcome.tokens, outcome.finish) == (whole, "length"), f"cut after {cut} tokens"
    driver.until_all_free()


@pytest.mark.parametrize("way", WAYS)
def test_more_emitted_tokens_than_asked_for_are_refused(driver: Driver, answers: Answers, way: str) -> None:
    to, decode = WAYS[way]
    prompt = answers.prompt(PROMPT_TOKENS, "refused")
    outcome = driver.finish([driver.send(to, prompt, decode=decode, emitted=[9] * 4, max_tokens=4)])[0]
    assert outcome.failed is not None
    assert (outcome.failed.code, outcome.failed.retryable) == ("invalid_request", False)
