"""Greedy tokens equal transformers' own when KV comes from another worker's device pool, and when it should have and does not."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.parity.caching import DEVICE_MEMORY, N_TOKENS, Answers
from tests.support.driver import Driver, Outcome
from tests.support.processes import Cluster, cluster

pytestmark = pytest.mark.system

LONG, BLOCKS, TRIES = 100, 6, 3
BLOCK_BYTES = 8192
NAMES = ("decode-0", "decode-1", "prefill-0", "prefill-1", "prefill-tcp", "mixed-0", "mixed-1")
ROWS = {
    "prefill from prefill by shm": ("prefill-0", "prefill-1"),
    "prefill from prefill by tcp": ("prefill-tcp", "prefill-1"),
    "prefill from who uses tcp itself": ("prefill-1", "prefill-tcp"),
    "prefill from decode by shm": ("prefill-0", "decode-0"),
    "prefill from decode by tcp": ("prefill-tcp", "decode-0"),
    "mixed from mixed": ("mixed-0", "mixed-1"),
    "decode from prefill by message": ("decode-1", "prefill-1"),
}


@dataclass
class Workers:
    driver: Driver
    answers: Answers
    processes: Cluster

    def ask(self, worker: str, prompt: list[int], *, check: bool = True, **more: object) -> Outcome:
        """One request, answered rightly."""
        decode = "decode-0" if worker.startswith("prefill") else None
        request = self.driver.send(worker, prompt, decode=decode, **{"max_tokens": N_TOKENS, **more})
        outcome = self.driver.finish([request])[0]
        assert outcome.failed is None, outcome.failed
        assert not check or outcome.tokens == self.answers.to(prompt)
        self.driver.until_all_free()
        return outcome

    def held_by(self, holder: str, prompt: list[int]) -> None:
        """Have the prompt computed, so that this worker holds it."""
        self.ask("prefill-1" if holder == "decode-0" else holder, prompt)

    def fetched(self, to: str, holder: str, *name: object) -> tuple[list[int], dict[str, float], Outcome]:
        """A prompt of that name that one held and the other asked it for, the counters before, and the answer.

        Tried again with another prompt where the holder took a second to answer: then it is computed, and rightly so.
        """
        for attempt in range(TRIES):
            prompt = self.answers.prompt(LONG, *name, attempt)
            self.held_by(holder, prompt)
            before, sent_s = dict(self.counters(to)), time.monotonic()
            outcome = self.ask(to, prompt, fetch=self.driver.hint(holder, BLOCKS))
            if not gained(self.counters(to), before, "fetch_hints_wrong_total"):
                break
            assert time.monotonic() - sent_s >= 1.0, "the holder answered, and had nothing"
        return prompt, before, outcome

    def churn(self, worker: str) -> None:
        """Displace everything from a prefill worker's memory."""
        for number in range(5):
            self.ask(worker, self.answers.prompt(1020, "churn", worker, number), check=False, max_tokens=1)

    def counters(self, worker: str) -> dict[str, float]:
        self.driver.refresh()
        return self.driver.reports[worker].counters


def gained(after: dict[str, float], before: dict[str, float], name: str) -> float:
    return after.get(name, 0.0) - before.get(name, 0.0)


@pytest.fixture(scope="module")
def workers(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    answers = Answers(tiny_model("llama"))
    with cluster(tmp_path_factory.mktemp("logs")) as processes:
        common = {"model": answers.folder, "dtype": "float32", "caching": 2, "fetch": "always"}
        for name in NAMES:
            memory = "64MiB" if name.startswith("decode") else DEVICE_MEMORY
            transport = "tcp" if name == "prefill-tcp" else "auto"
            processes.start(name.partition("-")[0], name, device_memory=memory, transport=transport, **common)
        processes.await_members(*NAMES)
        with Driver([processes.members()[name] for name in NAMES]) as driver:
            wanted = {"prefill": 4, "mixed": 1, "decode": 0}
            driver.until_reported(
                lambda: all(len(driver.reports[n].transports) == wanted[n.partition("-")[0]] for n in NAMES),
                "all are connected",
            )
            yield Workers(driver, answers, processes)


def test_the_transports_are_the_ones_asked_for(workers: Workers) -> None:
    kinds = {n: {t.kind for t in workers.driver.reports[n].transports} for n in ("prefill-0", "prefill-tcp", "mixed-0")}
    assert kinds == {"prefill-0": {"shm"}, "prefill-tcp": {"tcp"}, "mixed-0": {"shm"}}


@pytest.mark.parametrize("row", ROWS)
def test_what_another_worker_holds_is_not_computed_again(workers: Workers, row: str) -> None:
    to, holder = ROWS[row]
    prompt, before, outcome = workers.fetched(to, holder, "held", row)
    assert outcome.cached_tokens == BLOCKS * 16
    after = workers.counters(to)
    assert gained(after, before, "hit_tokens_total{tier=peer}") == BLOCKS * 16
    assert gained(after, before, "kv_bytes_total{direction=peer_to_device}") == BLOCKS * BLOCK_BYTES
    assert gained(after, before, "fetch_hints_wrong_total") == gained(after, before, "load_failures_total") == 0
    links = {link.peer.partition("@")[0]: link for link in workers.driver.reports[to].links}
    assert links[holder].bytes_per_s > 0 and links[holder].queued_bytes == 0
    assert workers.ask(to, prompt).cached_tokens == BLOCKS * 16, "it is kept here now"


@pytest.mark.parametrize("to", ["prefill-0", "prefill-tcp"])
def test_what_the_holder_displaced_is_computed(workers: Workers, to: str) -> None:
    prompt = workers.answers.prompt(LONG, "displaced", to)
    workers.held_by("prefill-1", prompt)
    workers.churn("prefill-1")
    before = dict(workers.counters(to))
    assert workers.ask(to, prompt, fetch=workers.driver.hint("prefill-1", BLOCKS)).cached_tokens == 0
    assert gained(workers.counters(to), before, "fetch_hints_wrong_total") == 1


def test_of_a_hint_that_promises_too_much_what_is_there_is_used(workers: Workers) -> None:
    for attempt in range(TRIES):
        prompt, sent_s = workers.answers.prompt(LONG, "less", attempt), time.monotonic()
        workers.held_by("prefill-1", prompt[:50])
        cached = workers.ask("prefill-0", prompt, fetch=workers.driver.hint("prefill-1", 99)).cached_tokens
        if cached or time.monotonic() - sent_s < 1.0:
            break
    assert cached == 48


def test_a_hint_may_name_anybody(workers: Workers) -> None:
    for holder in NAMES:
        prompt = workers.answers.prompt(LONG, "nobody", holder)
        assert workers.ask("prefill-0", prompt, fetch=workers.driver.hint(holder, BLOCKS)).cached_tokens == 0


def test_many_fetches_at_once_both_ways_give_the_right_tokens(workers: Workers) -> None:
    """Two prefill workers read each other while both compute."""
    for attempt in range(TRIES):
        cached, wrong = many_fetches(workers, attempt)
        assert cached.count(0) == wrong and cached.count(BLOCKS * 16) == len(cached) - wrong
        if not wrong:
            break
    assert not wrong, "no holder is late each time"


def many_fetches(workers: Workers, *name: object) -> tuple[list[int | None], int]:
    """Tokens that each request did not compute, and how many holders were not waited for."""
    pairs = (("prefill-0", "prefill-1"), ("prefill-1", "prefill-0"))
    prompts = {
        holder: [workers.answers.prompt(LONG, "many", holder, *name, n) for n in range(8)] for _, holder in pairs
    }
    for worker, mine in prompts.items():
        for prompt in mine:
            workers.ask(worker, prompt, max_tokens=1, check=False)
    before = {reader: dict(workers.counters(reader)) for reader, _ in pairs}
    requests = {}
    for reader, holder in pairs:
        for prompt in prompts[holder]:
            hint = workers.driver.hint(holder, BLOCKS)
            sent = workers.driver.send(reader, prompt, decode="decode-0", max_tokens=N_TOKENS, fetch=hint)
            requests[sent] = prompt
    cached: list[int | None] = []
    for outcome, prompt in zip(workers.driver.finish(list(requests)), requests.values(), strict=True):
        assert outcome.failed is None and outcome.tokens == workers.answers.to(prompt)
        cached.append(outcome.cached_tokens)
    workers.driver.until_all_free()
    wrong = sum(gained(workers.counters(reader), before[reader], "fetch_hints_wrong_total") for reader, _ in pairs)
    return cached, int(wrong)


def linked(workers: Workers, one: str, other: str) -> bool:
    """Whether `one` has a way to `other`, by its last report."""
    report = workers.driver.reports.get(one)
    return report is not None and other in {t.peer.partition("@")[0] for t in report.transports}


def test_workers_that_lost_sight_of_each_other_find_each_other_again(workers: Workers) -> None:
    """Each has a connection to the other, and takes the end of either for a death."""
    driver = workers.driver
    workers.processes.pause("prefill-1")
    driver.until(lambda: not linked(workers, "prefill-0", "prefill-1"), "its silence is noticed")
    workers.processes.resume("prefill-1")
    driver.until_reported(
        lambda: linked(workers, "prefill-0", "prefill-1") and linked(workers, "prefill-1", "prefill-0"),
        "both are connected again",
    )
    *_, outcome = workers.fetched("prefill-0", "prefill-1", "paused")
    assert outcome.cached_tokens == BLOCKS * 16


def test_a_holder_that_is_killed_while_it_is_read_harms_nobody(workers: Workers) -> None:
    """The last test: prefill-1 is gone after it."""
    prompts = [workers.answers.prompt(LONG, "killed", number) for number in range(12)]
    for prompt in prompts:
        workers.ask("prefill-1", prompt, max_tokens=1, check=False)
    hint = workers.driver.hint("prefill-1", BLOCKS)
    requests = [
        workers.driver.send(to, prompt, decode="decode-0", max_tokens=N_TOKENS, fetch=hint)
        for number, prompt in enumerate(prompts)
        for to in (("prefill-0", "prefill-tcp")[number % 2],)
    ]
    workers.driver.until(lambda: any(workers.driver.outcomes[r].tokens for r in requests), "one is being answered")
    workers.processes.kill("prefill-1")
    workers.driver.remove("prefill-1")
    for outcome, prompt in zip(workers.driver.finish(requests), prompts, strict=True):
        assert outcome.failed is None and outcome.tokens == workers.answers.to(prompt)
    workers.driver.until_all_free()
