"""What the caching rows share: a cluster of one caching level with a prefill worker per transfer mode, and its questions."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.driver import Driver, Outcome
from tests.support.reference import Reference
from tests.support.threads import thread_cluster

BLOCK = 16
N_TOKENS = 40
STORE = "kvstore-0"
DECODE = "decode-0"
DEVICE_MEMORY = "2MiB"
"""256 blocks of the tiny model."""
HOST_MEMORY = "4MiB"
"""512 blocks."""
_CHURN_TOKENS, _CHURN_PROMPTS = 1020, 5
"""Together 315 blocks: more than a worker's memory, less than the store's; twice that is more than the store's."""


class Answers:
    """What transformers answers, computed once per prompt."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._reference = folder, Reference(folder)
        self._known: dict[tuple[int, ...], list[int]] = {}

    @property
    def vocab_tokens(self) -> int:
        return int(self._reference.model.config.vocab_size)

    def to(self, prompt: Sequence[int]) -> list[int]:
        key = tuple(prompt)
        if key not in self._known:
            self._known[key] = self._reference.generate(prompt, N_TOKENS)
        return self._known[key]

    def prompt(self, tokens: int, *name: object) -> list[int]:
        """A prompt that shares no block with one of another name."""
        rng = random.Random(repr(name))
        return [rng.randrange(8, self.vocab_tokens) for _ in range(tokens)]


@dataclass
class Rig:
    """The processes of one caching level."""

    level: int
    driver: Driver
    answers: Answers
    cached: dict[str, int] = field(default_factory=dict)
    """Worker -> cached tokens that its answers have told of."""
    asked: dict[str, int] = field(default_factory=dict)
    """Worker -> prompt tokens."""

    def ask(self, worker: str, prompt: Sequence[int], *, check: bool = True, **more: object) -> Outcome:
        """One request, answered rightly, and everything that follows from it done."""
        return self.ask_all(worker, [prompt], check=check, **more)[0]

    def ask_all(
        self, worker: str, prompts: Sequence[Sequence[int]], *, check: bool = True, **more: object
    ) -> list[Outcome]:
        """As `ask`, with all requests under way at once."""
        decode = None if worker.startswith("mixed") else DECODE
        expected = [self.answers.to(prompt) if check else None for prompt in prompts]
        settings = {"max_tokens": N_TOKENS, **more}
        requests = [self.driver.send(worker, prompt, decode=decode, **settings) for prompt in prompts]
        outcomes = self.driver.finish(requests)
        for outcome, prompt, tokens in zip(outcomes, prompts, expected, strict=True):
            assert outcome.failed is None
            assert tokens is None or outcome.tokens == tokens
            assert outcome.cached_tokens is not None
            self.cached[worker] = self.cached.get(worker, 0) + outcome.cached_tokens
            self.asked[worker] = self.asked.get(worker, 0) + len(prompt)
        self.driver.until_all_free()
        return outcomes

    def ask_and_save(self, worker: str, prompt: Sequence[int]) -> list[int]:
        """Ask for the first time; returns the answer when its KV is wherever this level puts it."""
        returned, spilled = self.counter(worker, "returned_blocks_total"), self.in_store()
        tokens = self.ask(worker, prompt).tokens
        known_blocks = (len(prompt) + len(tokens) - 1) // BLOCK
        missing = known_blocks - len(prompt) // BLOCK
        if self.level == 3 and not worker.startswith("mixed"):
            self.until(
                lambda: self.counter(worker, "returned_blocks_total") >= returned + missing, "the answer's KV is back"
            )
        if self.level:
            saved = known_blocks if self.level >= 2 else len(prompt) // BLOCK
            self.until(lambda: self.in_store() >= spilled + saved, "the store has the prompt")
            self.until(lambda: self.gauge(STORE, "waiting_disk_writes") == 0, "the disk has what it shall have")
        return tokens

    def churn(self, worker: str, *rounds: str) -> None:
        """Displace everything from the worker's own memory; two rounds displace it from the store's memory too."""
        for name in rounds:
            for number in range(_CHURN_PROMPTS):
                self.ask(worker, self.answers.prompt(_CHURN_TOKENS, "churn", name, number), check=False, max_tokens=1)

    def in_store(self) -> int:
        """Blocks that the store has ever taken in."""
        if not self.level:
            return 0
        return int(self.gauge(STORE, "blocks{tier=disk}"))

    def until(self, condition, what: str) -> None:
        self.driver.until_reported(condition, what)

    def counter(self, worker: str, name: str) -> float:
        return self.driver.reports[worker].counters.get(name, 0.0)

    def gauge(self, worker: str, name: str) -> float:
        return self.driver.reports[worker].gauges.get(name, 0.0)

    def hits(self, worker: str) -> dict[str, int]:
        """Tier -> tokens reused from it, where there are any."""
        tiers = ("device", "host", "disk")
        totals = {tier: int(self.counter(worker, f"hit_tokens_total{{tier={tier}}}")) for tier in tiers}
        return {tier: tokens for tier, tokens in totals.items() if tokens}

    def gained(self, worker: str, before: dict[str, int]) -> dict[str, int]:
        """Hits since `before`."""
        now = self.hits(worker)
        return {tier: now[tier] - before.get(tier, 0) for tier in now if now[tier] > before.get(tier, 0)}


def _n_ways(name: str, workers: dict[str, dict[str, str]], level: int) -> int:
    """Prefill workers dial the decode worker; who keeps anything dials the store and those of its own role."""
    role = name.partition("-")[0]
    others = sum(other.startswith(role) for other in workers) - 1
    return (role == "prefill") + (1 + others if level else 0)


@contextmanager
def rig(folder: Path, answers: Answers, level: int, workers: dict[str, dict[str, str]], **decode: str) -> Iterator[Rig]:
    """A decode worker, a KV store with a disk, and prefill or mixed workers, each with flags of its own."""
    with thread_cluster(folder) as processes:
        common = {"model": answers.folder, "dtype": "float32", "caching": level, "fetch": "always"}
        processes.start("kvstore", STORE, host_memory=HOST_MEMORY, disk=folder / "disk", disk_size="64MiB")
        processes.start("decode", DECODE, **{"device_memory": "64MiB", **common, **decode})
        for name, flags in workers.items():
            processes.start(name.partition("-")[0], name, **{"device_memory": DEVICE_MEMORY, **common, **flags})
        names = (STORE, DECODE, *workers)
        processes.await_members(*names)
        with Driver([processes.members()[name] for name in names]) as driver:
            decode_saves = level >= 2 and decode.get("kvstore") != "off"
            wanted = {name: _n_ways(name, workers, level) for name in workers} | {DECODE: int(decode_saves)}
            driver.until_reported(
                lambda: all(len(driver.reports[name].transports) == count for name, count in wanted.items()),
                "all are connected",
            )
            yield Rig(level, driver, answers)
