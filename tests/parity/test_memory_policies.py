"""Greedy tokens are transformers' own under every pair of memory policies, mixed and apart, with too little memory."""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.worker.model.make import make_model
from tests.support.driver import Driver, Outcome
from tests.support.reference import Reference
from tests.support.threads import ThreadCluster, thread_cluster

pytestmark = pytest.mark.system

N_TOKENS = 20
DEVICE_MEMORY, WITH_SCRATCH = "5MiB", "10MiB"
"""640 tokens of the deep model: two of the longer prompts, while a dozen are asked for at once. The second has room for the
least scratch of a step too."""
CHOICES: Mapping[str, Sequence[object]] = {
    "kv_layout": ("paged", "virtual"),
    "elastic": ("off", "static", "kv", "full"),
    "layer_offload": ("off", "auto", 3, 8),
    "admission": ("fcfs", "slo"),
    "host_buffer": ("0MiB", "2MiB", "64MiB"),
    "caching": (0, 1, 3),
    "plan_ahead": ("off", "on"),
    "max_step_tokens": (64, 512),
    "transport": ("shm", "tcp"),
    "spare_memory": ("keep", "release"),
}

NEEDS_BUFFER = {("layer_offload", "auto"), ("layer_offload", 3), ("layer_offload", 8), ("elastic", "full")}

Flags = dict[str, object]


def allowed(row: Flags) -> bool:
    """Whether a worker starts with these."""
    return row.get("host_buffer") != "0MiB" or not NEEDS_BUFFER & set(row.items())


def all_pairs(choices: Mapping[str, Sequence[object]], seed: int) -> list[Flags]:
    """Rows in which every two values of two flags meet that may; each row is the best of many drawn at random."""
    rng = random.Random(seed)
    names = list(choices)
    pairs = (((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in choices[a] for y in choices[b])
    left = {pair for pair in pairs if allowed(dict(pair))}
    rows: list[Flags] = []
    while left:
        (a, x), (b, y) = min(left, key=repr)
        drawn = [{**{n: rng.choice(choices[n]) for n in names}, a: x, b: y} for _ in range(400)]
        row = max(
            filter(allowed, drawn), key=lambda one: sum(pair in left for pair in itertools.combinations(one.items(), 2))
        )
        left -= set(itertools.combinations(row.items(), 2))
        rows.append(row)
    return rows


ROWS = all_pairs(CHOICES, seed=0)
NAMES = ["-".join(str(value) for value in row.values()) for row in ROWS]


@dataclass
class Asked:
    """Prompts that share beginnings, and what transformers answers."""

    model: Path
    prompts: list[list[int]]
    expected: list[list[int]]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    model = make_model("deep", tmp_path_factory.mktemp("models") / "deep", family="llama")
    reference, rng = Reference(model), random.Random(7)
    vocab = reference.model.config.vocab_size

    def some(count: int) -> list[int]:
        return [rng.randrange(8, vocab) for _ in range(count)]

    shared = some(150)
    prompts = [shared[: rng.randrange(30, 150)] + some(rng.randrange(1, 120)) for _ in range(8)]
    prompts += [some(length) for length in (1, 64, 400, 430)]
    return Asked(model, prompts, [reference.generate(prompt, N_TOKENS) for prompt in prompts])


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[ThreadCluster]:
    with thread_cluster(tmp_path) as started:
        yield started


def ask_all(driver: Driver, asked: Asked, to: str, decode: str | None) -> list[Outcome]:
    requests = [driver.send(to, prompt, decode=decode, max_tokens=N_TOKENS) for prompt in asked.prompts]
    return driver.finish(requests, timeout_s=60.0)


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_every_pair_of_policies_gives_transformers_tokens(workers: ThreadCluster, asked: Asked, row: Flags) -> None:
    device_memory = DEVICE_MEMORY if row["elastic"] == "off" else WITH_SCRATCH
    flags = {
        "model": asked.model,
        "dtype": "float32",
        "max_context_tokens": 1024,
        "device_memory": device_memory,
        **row,
    }
    members = [workers.start("mixed", "mixed-0", **flags)]
    members += [workers.start(role, f"{role}-0", **flags) for role in ("decode", "prefill")]
    with Driver(members) as driver:
        driver.until_reported(lambda: len(driver.reports["prefill-0"].transports) == 1, "they are connected")
        for to, decode in (("mixed-0", None), ("prefill-0", "decode-0")):
            for _ in range(2):  # the second time with whatever the first has left
                for outcome, tokens in zip(ask_all(driver, asked, to, decode), asked.expected, strict=True):
                    assert outcome.failed is None
                    assert outcome.tokens == tokens
        driver.until_all_free()
