"""Greedy tokens equal transformers' own under every routing rule, over two workers of each role and a gateway.

Prompts share documents and belong to sessions, so that rules differ in where they go; the prompt tree is lied to, so that
some of what it promises is not there.
"""

import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import redis

from common.block_hash import hash_blocks, root_hash
from common.ids import peer_id
from common.messages.cache_events import CacheEvent
from common.net.cache_events import EVENTS_FIELD, FIRST_FIELD, LAST_FIELD, PEER_FIELD, blocks_key, events_key
from common.policy.routing_rules import RULES
from tests.support.clients import ready, until
from tests.support.processes import Cluster, cluster
from tests.support.reference import Reference

pytestmark = pytest.mark.system

N_TOKENS = 8
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
_DOCUMENT_TOKENS, _QUESTION_TOKENS = 100, 20


@dataclass
class System:
    """The processes, their gateway, and what transformers answers."""

    processes: Cluster
    url: str
    prompts: list[list[int]]
    expected: list[list[int]]

    def ask(self, prompt: list[int], **headers: str) -> tuple[list[int], dict[str, Any], int]:
        """Tokens, the explanation, cached tokens."""
        body = {
            "model": "m",
            "prompt": prompt,
            "max_tokens": N_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        asked = {"x-penstock-explain": "1", **{name.replace("_", "-"): value for name, value in headers.items()}}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, headers=asked, timeout=60)
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]["prompt_tokens_details"]
        told = json.loads(answer.headers["x-penstock-explain"])
        return answer.json()["choices"][0]["token_ids"], told, usage["cached_tokens"]


@pytest.fixture(scope="module")
def system(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    model, rng = tiny_model("llama"), random.Random(4)
    reference = Reference(model)
    vocab_tokens = reference.model.config.vocab_size
    documents = [[rng.randrange(8, vocab_tokens) for _ in range(_DOCUMENT_TOKENS)] for _ in range(4)]
    prompts = [
        rng.choice(documents) + [rng.randrange(8, vocab_tokens) for _ in range(_QUESTION_TOKENS)] for _ in range(24)
    ]
    expected = [reference.generate(prompt, N_TOKENS) for prompt in prompts]
    with cluster(tmp_path_factory.mktemp("logs")) as processes:
        for name in WORKERS:
            role = name.partition("-")[0]
            processes.start(
                role, name, model=model, served_model_name="m", dtype="float32", device_memory="8MiB", kvstore="off"
            )
        processes.start("gateway", "gateway-0", model=model, served_model_name="m", port=0)
        processes.await_members(*WORKERS, "gateway-0")
        url = processes.members()["gateway-0"].endpoint
        until(lambda: ready(url, *WORKERS), "every prefill worker has its channels", timeout_s=60.0)
        yield System(processes, url, prompts, expected)


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_does_not_show_in_the_tokens(system: System, rule: str) -> None:
    rules = {"x_penstock_route_prefill": rule, "x_penstock_route_decode": rule}
    with ThreadPoolExecutor(6) as threads:
        answers = list(
            threads.map(lambda n: system.ask(system.prompts[n], x_session_id=f"s{n % 5}", **rules), range(24))
        )
    for (tokens, told, _), expected in zip(answers, system.expected, strict=True):
        assert tokens == expected
        assert (told["prefill"]["rule"], told["decode"]["rule"]) == (rule, rule)


def test_a_prompt_that_a_decode_worker_knows_is_computed_there(system: System) -> None:
    prompt, expected = system.prompts[0], system.expected[0]
    for _ in range(20):  # the first one brings all of it to decode-1; the gateway hears of it some time later
        tokens, told, cached = system.ask(prompt, x_penstock_route_decode="worker=decode-1")
        assert tokens == expected
        if told["local"]:
            break
    assert (told["local"], told["answers"]) == ("few-uncached", "decode-1")
    assert cached >= len(prompt) - 16


def test_hits_that_are_not_there_cost_time_but_no_token(system: System) -> None:
    """The stream says that prefill-1 and decode-1 hold prompts that nobody has ever computed."""
    members, heard, planted = system.processes.members(), _heard_events(system), 0
    reference_prompts = [prompt[::-1] for prompt in system.prompts[:4]]
    model = members["prefill-1"].model
    assert model is not None
    client = redis.Redis.from_url(system.processes.redis_url)
    for name in ("prefill-1", "decode-1"):
        peer = peer_id(members[name].id, members[name].incarnation)
        number = int(client.hget(blocks_key("test", peer), "number") or 0)  # type: ignore[arg-type]  # a sync client
        names = [n for prompt in reference_prompts for n in hash_blocks(prompt, root_hash(model), model.block_tokens)]
        events = [CacheEvent(number + 1 + n, "stored", name_) for n, name_ in enumerate(names)]
        planted += len(events)
        client.xadd(
            events_key("test", "m"),
            {
                PEER_FIELD: peer,
                FIRST_FIELD: events[0].number,
                LAST_FIELD: events[-1].number,
                EVENTS_FIELD: msgspec.msgpack.encode(tuple(events)),
            },
        )
    client.close()
    until(lambda: _heard_events(system) >= heard + planted, "the lie is heard")
    expected = Reference(Path(str(members["prefill-1"].model_path)))
    wrong = 0
    for prompt in reference_prompts:
        tokens, told, cached = system.ask(prompt, x_penstock_route_prefill="longest-prefix")
        assert tokens == expected.generate(prompt, N_TOKENS)
        wrong += told["prefill"]["candidates"][0]["hit_tokens"] > cached
    assert wrong >= 1, "the planted hits were not used"  # the others may have been found out by then


def _heard_events(system: System) -> float:
    return float(httpx.get(f"{system.url}/status").json()["gateway"]["prompt_tree"]["tree_events_total"])
