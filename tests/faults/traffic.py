"""Requests without a pause, whose prompts fit the KV store's memory but not a worker's, and a look inside between two moments."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from common.ids import RequestId
from common.messages.liveness import Report
from tests.support.clients import random_prompt
from tests.support.driver import Driver
from tests.support.processes import Cluster, cluster
from tests.support.reference import Reference

STORE, PREFILL, DECODE = "kvstore-0", "prefill-0", "decode-0"
N_TOKENS = 6
DEVICE_MEMORY = "2MiB"
"""256 blocks of the tiny model."""
PROMPT_TOKENS = 219
"""13 whole blocks; 14 with the answer."""
_PROMPTS = 24
_AT_ONCE = 4
_LOOKS = 2000
_LESS_THAN_DRAINING_S = 15.0


@dataclass
class Traffic:
    """Keeps some requests under way; every answer is compared with what transformers says."""

    driver: Driver
    prompts: list[list[int]]
    expected: list[list[int]]
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    open: dict[RequestId, int | None] = field(default_factory=dict)
    """Request -> its prompt, if that is one of `prompts`."""
    answered: int = 0
    cached_tokens: int = 0
    asked_tokens: int = 0

    def step(self, *, more: bool = True) -> None:
        """Take answers in; start new requests in their place."""
        self.driver.pump(0.002)
        for request in [request for request in self.open if self.driver.outcomes[request].done]:
            outcome, number = self.driver.outcomes[request], self.open.pop(request)
            assert outcome.failed is None, outcome.failed
            assert number is None or outcome.tokens == self.expected[number]
            self.answered += 1
            self.cached_tokens += outcome.cached_tokens or 0
            self.asked_tokens += PROMPT_TOKENS
        while more and len(self.open) < _AT_ONCE:
            self.start(self.rng.randrange(len(self.prompts)))

    def start(self, number: int) -> None:
        request = self.driver.send(PREFILL, self.prompts[number], decode=DECODE, max_tokens=N_TOKENS)
        self.open[request] = number

    def start_new(self) -> None:
        """A prompt that nobody has seen, for the sake of the KV that it makes."""
        prompt = random_prompt(self.rng, PROMPT_TOKENS)
        self.open[self.driver.send(PREFILL, prompt, decode=DECODE, max_tokens=N_TOKENS)] = None

    def run(self, requests: int) -> None:
        """Until so many more are answered."""
        goal = self.answered + requests
        self.until(lambda: self.answered >= goal, f"{requests} more answers")

    def until(self, condition: Callable[[], bool], what: str, *, more: bool = True) -> None:
        def stepped() -> bool:
            self.step(more=more)
            return condition()

        self.driver.until(stepped, what)

    def finish(self) -> None:
        """Answer what is under way, and see that nothing is held afterwards."""
        self.until(lambda: not self.open, "everything is answered", more=False)
        self.driver.until_all_free()

    def abandon(self) -> None:
        """A worker was killed: its requests may have failed, as they should. What they left behind is another matter."""
        self.open.clear()

    def cached(self, number: int) -> int:
        """Ask alone; the cached tokens of the answer."""
        self.finish()
        self.start(number)
        (request,) = self.open
        self.finish()
        cached = self.driver.outcomes[request].cached_tokens
        assert cached is not None
        return cached


def many_prompts(rng: random.Random) -> list[list[int]]:
    """Prompts without a block in common: 336 blocks with their answers, more than a worker can keep."""
    return [random_prompt(rng, PROMPT_TOKENS) for _ in range(_PROMPTS)]


@contextmanager
def serving(
    folder: Path, model: Path, prompts: Sequence[Sequence[int]] | None = None, **store: object
) -> Iterator[tuple[Cluster, Traffic]]:
    """One worker of each role with little memory, a KV store, traffic that can begin."""
    with cluster(folder) as processes:
        for name in (STORE, DECODE, PREFILL):
            start(processes, name, model, **(store if name == STORE else {}))
        reference, asked = Reference(model), [*map(list, prompts or many_prompts(random.Random(7)))]
        expected = [reference.generate(prompt, N_TOKENS) for prompt in asked]
        processes.await_members(STORE, DECODE, PREFILL)
        with Driver([processes.members()[name] for name in (STORE, DECODE, PREFILL)]) as driver:
            until_connected(processes, driver)
            yield processes, Traffic(driver, asked, expected)
        for name in (PREFILL, DECODE, STORE):  # a worker ends when nothing is under way, and checks its books first
            assert processes.stop(name, timeout_s=_LESS_THAN_DRAINING_S) == 0, processes.log(name)[-2000:]


def start(processes: Cluster, name: str, model: Path, **flags: object) -> None:
    role = name.partition("-")[0]
    if role == "kvstore":
        processes.start(role, name, **{"host_memory": "32MiB", **flags})
    else:
        processes.start(role, name, model=model, dtype="float32", device_memory=DEVICE_MEMORY, fetch="always", **flags)


def restart(processes: Cluster, driver: Driver, name: str, model: Path, **flags: object) -> None:
    """Start what was killed or stopped, and wait until everybody works with it."""
    before = processes.members()
    start(processes, name, model, **flags)
    processes.await_members(name, besides=before)
    driver.add(processes.members()[name])
    until_connected(processes, driver)


def until_connected(processes: Cluster, driver: Driver) -> None:
    """Wait until both workers have a channel to the store that is there now, and one to the other."""

    def connected() -> bool:
        members = processes.members()
        peers = {name: f"{name}@{members[name].incarnation:016x}" for name in (STORE, DECODE) if name in members}
        ways = {n: {t.peer for t in driver.reports[n].transports} for n in (PREFILL, DECODE) if n in driver.reports}
        return len(peers) == 2 and ways == {PREFILL: set(peers.values()), DECODE: {peers[STORE]}}

    driver.until_reported(connected, "everybody is connected")


def catch(processes: Cluster, traffic: Traffic, paused: str, seen: str, condition: Callable[[Report], bool]) -> None:
    """Stop `paused` at one moment after another, until the report of `seen` shows that it was a moment to catch it in."""
    with Driver([processes.members()[seen]], name="looker") as looker:
        for look in range(_LOOKS):
            if look % 4 == 0 and len(traffic.open) < _AT_ONCE:
                traffic.start_new()
            for _ in range(1 + look % 3):
                traffic.step(more=look % 4 != 3)
            processes.pause(paused)
            looker.refresh()
            if condition(looker.reports[seen]):
                return
            processes.resume(paused)
    raise AssertionError(f"{paused} was never caught in {_LOOKS} looks")


def pages_in(report: Report, *states: str) -> int:
    """Pages in any of these states."""
    return sum(getattr(report.pages, state) for state in states)


def blocks_of(folder: Path) -> Sequence[Path]:
    """Block files of a store's disk."""
    return sorted(folder.glob("??/*.kv"))
