"""Readers later than their lease, writers that outlast a cancel, workers that come back under their own name: forced, not awaited."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from common.ids import RequestId
from common.messages.handover import Grant, Stopped
from kvstore.server.core import reads
from kvstore.transport import faulty
from services.worker.core import lender, lookups
from tests.parity.caching import Answers
from tests.support.driver import Driver
from tests.support.storm import Watch, checked_pages, require_nothing_held, watching
from tests.support.threads import ThreadCluster, thread_cluster

pytestmark = pytest.mark.system

STORE, DECODE, FIRST, SECOND = "kvstore-0", "decode-0", "prefill-0", "prefill-1"
HALF_TOKENS = 1900
"""Of the 4096 that 2 MiB of the tiny model hold, the least there can be."""
READ_LEASE_MS, WRITE_LEASE_MS = 50, 500
TRIES = 8
"""A reader that the machine keeps from beginning within its lease does not read at all."""


@dataclass
class Pair:
    """A decode worker and what hands over to it."""

    workers: ThreadCluster
    driver: Driver
    watch: Watch
    answers: Answers
    go_on: threading.Event
    """Copies that are late end."""
    n_tokens: int = 8
    flags: dict[str, object] = field(default_factory=dict)

    def start(self, name: str, **flags: object) -> None:
        role = name.partition("-")[0]
        common = {"model": self.answers.folder, "dtype": "float32", "device_memory": "2MiB", "fetch": "always"}
        given = {"host_memory": "2MiB"} if role == "kvstore" else {**common, "kvstore": "off", **self.flags}
        self.driver.add(self.workers.start(role, name, verify_kv=True, **{**given, **flags}))

    def until_reached(self, *ways: tuple[str, str]) -> None:
        """Wait until the first of each pair can move KV to the second's present incarnation."""

        def reached(name: str, peer: str) -> bool:
            wanted = f"{peer}@{self.workers.members()[peer].incarnation:016x}"
            return any(way.peer == wanted for way in self.driver.reports[name].transports)

        self.driver.until_reported(lambda: all(reached(*way) for way in ways), f"{ways} are connected")

    def send(self, to: str, prompt: list[int], **more: object) -> RequestId:
        return self.driver.send(to, prompt, decode=DECODE, max_tokens=self.n_tokens, **more)  # type: ignore[arg-type]

    def require_right(self, request: RequestId, prompt: list[int]) -> None:
        """Answered, with transformers' tokens."""
        (outcome,) = self.driver.finish([request], timeout_s=60.0)
        assert outcome.failed is None, outcome.failed
        assert outcome.tokens == self.answers.to(prompt)[: self.n_tokens]

    def is_late(self, name: str, point: str) -> bool:
        """Whether a copy of this worker is being delayed."""
        series = f"faults_injected_total{{point={point},kind=delay}}"
        return name in self.driver.reports and self.driver.reports[name].counters.get(series, 0) > 0

    def until_late(self, name: str, point: str) -> None:
        self.driver.until_reported(lambda: self.is_late(name, point), f"a copy of {name} is late")

    def send_until_late(self, prompts: list[list[int]], fetch: object) -> tuple[RequestId, list[int]]:
        """Ask the first worker for one after the other, until it copies what it fetches, and is late."""
        driver = self.driver
        for prompt in prompts:
            request = self.send(FIRST, prompt, fetch=fetch)
            driver.until_reported(
                lambda asked=request: self.is_late(FIRST, "fetch") or driver.outcomes[asked].done,  # type: ignore[misc]
                "it reads, or computes",
            )
            if self.is_late(FIRST, "fetch"):
                return request, prompt
        raise AssertionError(f"{len(prompts)} times nothing was read within {READ_LEASE_MS} ms")

    def settle(self) -> None:
        self.driver.until_all_free()
        require_nothing_held(self.driver)
        assert checked_pages(self.driver) > 0


@pytest.fixture(scope="module")
def answers(tiny_model: Callable[[str], Path]) -> Answers:
    return Answers(tiny_model("llama"))


@pytest.fixture
def pair(answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """What is late is so until the test says, not for some time: whatever the machine does, the race is run."""
    go_on, begin = threading.Event(), faulty._begin
    monkeypatch.setattr(faulty, "_begin", lambda struck, _, what: begin(struck, lambda _: wait(go_on), what))
    with thread_cluster(tmp_path) as workers, watching() as watch, Driver([]) as driver:
        try:
            yield Pair(workers, driver, watch, answers, go_on)
        finally:
            go_on.set()


def wait(go_on: threading.Event) -> None:
    assert go_on.wait(60.0), "the test never let the copy go on"


def late(point: str, *more: str) -> dict[str, object]:
    """Flags of a worker whose copies are late."""
    return {"debug_faults": True, "faults": " ".join([f"{point}:delay ms=2000", *more])}


@pytest.mark.parametrize("holder", [STORE, SECOND])
def test_what_is_read_after_the_lease_has_ended_and_the_pages_are_others_is_not_used(
    holder: str, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((lookups, "_LEASE_MS"), (lender, "_LONGEST_LEASE_MS"), (reads, "MAX_LEASE_MS")):
        monkeypatch.setattr(module, name, READ_LEASE_MS)
    pair.flags = {"kvstore": "auto" if holder == STORE else "off"}
    for name in (STORE,) * (holder == STORE) + (DECODE, SECOND):
        pair.start(name)
    pair.start(FIRST, **late("fetch"))
    pair.until_reached((FIRST, DECODE), (SECOND, DECODE), (FIRST, holder), *[(SECOND, STORE)] * (holder == STORE))
    driver, prompts = pair.driver, [pair.answers.prompt(204, "lent", holder, number) for number in range(TRIES)]
    for prompt in prompts:
        pair.require_right(pair.send(SECOND, prompt), prompt)
    driver.until_all_free()
    request, prompt = pair.send_until_late(prompts[::-1], None if holder == STORE else driver.hint(SECOND, 12))
    evicted = driver.reports[holder].counters.get("evicted_blocks_total", 0)
    for number in range(3):  # twice what the holder can keep
        other = pair.answers.prompt(1900, "churn", number)
        driver.finish([driver.send(SECOND, other, decode=DECODE, max_tokens=1)])
    driver.until_reported(
        lambda: driver.reports[holder].counters.get("evicted_blocks_total", 0) > evicted, "what was lent was pushed out"
    )
    pair.go_on.set()
    pair.require_right(request, prompt)
    assert driver.outcomes[request].cached_tokens == 0
    driver.until_reported(
        lambda: driver.reports[FIRST].counters["load_failures_total"] >= 1, "the late copy has ended, in vain"
    )
    pair.settle()


def test_pages_that_a_late_writer_may_write_are_given_to_nobody_before_it_has_stopped(pair: Pair) -> None:
    pair.start(DECODE)
    pair.start(FIRST, transport="shm", **late("transfer", "times=1"))
    pair.start(SECOND, transport="shm")
    pair.until_reached((FIRST, DECODE), (SECOND, DECODE))
    driver = pair.driver
    driver, prompt = pair.driver, pair.answers.prompt(HALF_TOKENS, "late")
    old = pair.send(FIRST, prompt)
    pair.until_late(FIRST, "transfer")
    driver.cancel(old, DECODE)
    driver.until_reported(lambda: driver.reports[DECODE].pages.quarantined > 0, "its pages are in quarantine")
    wanted = [pair.answers.prompt(HALF_TOKENS, "wants", number) for number in range(3)]
    requests = [pair.send(SECOND, one) for one in wanted]
    driver.until(lambda: pages_before_stopped(pair.watch)[0] > 0, "somebody was granted pages meanwhile")
    pair.go_on.set()
    driver.cancel(old, FIRST)
    for request, one in zip(requests, wanted, strict=True):
        pair.require_right(request, one)
    pair.settle()
    _, stopped = pages_before_stopped(pair.watch)
    assert stopped, "the writer never said that it had stopped"


def pages_before_stopped(watch: Watch) -> tuple[int, bool]:
    """Grants while the first one's pages were in quarantine, none of which shared a page with it; whether that ended."""
    grants = [(place, one) for place, one in enumerate(watch.said) if isinstance(one, Grant)]
    (_, first), *others = grants
    ends = [n for n, one in enumerate(watch.said) if isinstance(one, Stopped) and one.transfer == first.transfer]
    held = {page for row in first.pages for page in row}
    during = [one for place, one in others if not ends or place < ends[0]]
    for one in during:
        assert held.isdisjoint(page for row in one.pages for page in row), "a page in quarantine was given away"
    return len(during), bool(ends)


def test_a_retry_is_answered_rightly_while_the_attempt_before_it_is_still_ending(pair: Pair) -> None:
    """The lease of the first attempt ends, its renewals lost, while its writer is late; the second has its name, at another worker."""
    pair.start(DECODE, lease_ms=WRITE_LEASE_MS)
    pair.start(FIRST, transport="shm", **late("transfer", "times=1; renew:drop"))
    pair.until_reached((FIRST, DECODE))
    driver, prompt = pair.driver, pair.answers.prompt(204, "again")
    first = pair.send(FIRST, prompt)
    (outcome,) = driver.finish([first])
    assert outcome.failed is not None and outcome.failed.retryable
    assert outcome.failed.code == "peer_failed" and outcome.failed.phase in {
        "transfer",
        "prefill",
    }  # who is heard first
    driver.refresh()
    assert driver.reports[DECODE].pages.quarantined > 0, "the first attempt is still ending"
    pair.start("mixed-0")
    second = driver.send("mixed-0", prompt, max_tokens=pair.n_tokens, request=first)
    third = driver.send(DECODE, prompt, max_tokens=pair.n_tokens)
    pair.require_right(second, prompt)
    pair.require_right(third, prompt)
    pair.go_on.set()
    driver.until_all_free()
    require_nothing_held(driver)


@pytest.mark.parametrize("again", [FIRST, DECODE])
def test_a_worker_that_comes_back_under_its_name_inside_a_lease_finds_nothing_of_its_former_life(
    again: str, pair: Pair
) -> None:
    flags = {FIRST: {"transport": "shm"}, DECODE: {}}
    pair.start(DECODE)
    pair.start(FIRST, transport="shm", **late("transfer", "times=1"))
    pair.until_reached((FIRST, DECODE))
    driver, prompt = pair.driver, pair.answers.prompt(HALF_TOKENS, "life", again)
    old = pair.send(FIRST, prompt)
    pair.until_late(FIRST, "transfer")
    driver.remove(again)
    pair.workers.tell_to_stop(again)
    if again == FIRST:
        pair.go_on.set()  # it ends when its copy has
    pair.workers.stop(again)
    pair.start(again, **flags[again])
    driver.cancel(old, FIRST, DECODE)
    pair.go_on.set()
    pair.until_reached((FIRST, DECODE))
    wanted = [pair.answers.prompt(HALF_TOKENS, "next life", again, number) for number in range(2)]
    for request, one in [(pair.send(FIRST, one), one) for one in wanted]:
        pair.require_right(request, one)
    pair.settle()


def test_a_transfer_of_nothing_is_a_transfer_like_any_other(pair: Pair) -> None:
    """Whole blocks exactly, all of them on the decode side already: alone, many at once, and cancelled."""
    pair.start(DECODE, caching=2)
    pair.start(FIRST, caching=2)
    pair.until_reached((FIRST, DECODE))
    driver = pair.driver
    for tokens in (160, 161, 16):
        prompt = pair.answers.prompt(tokens, "nothing", tokens)
        for _ in range(2):
            pair.require_right(pair.send(FIRST, prompt), prompt)
        requests = [pair.send(FIRST, prompt) for _ in range(12)]
        for request in requests[::3]:
            driver.cancel(request, FIRST, DECODE)
        for request in {*requests} - {*requests[::3]}:
            pair.require_right(request, prompt)
        driver.until_all_free()
    granted = [sum(map(len, one.pages)) for one in pair.watch.said if isinstance(one, Grant)]
    assert granted.count(0) >= 8, granted
    require_nothing_held(driver)
