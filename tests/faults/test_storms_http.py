"""Clients that hang up at any moment, on a real gateway before real workers: nobody is left with anything of theirs."""

import random
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.gateway.cluster import cluster
from tests.support.clients import ready, until
from tests.support.driver import Driver
from tests.support.reference import Reference
from tests.support.storm import checked_pages, require_nothing_held
from tests.support.threads import thread_cluster

pytestmark = pytest.mark.system

CLIENTS, EACH, N_TOKENS = 8, 12, 12
LONGEST_MS = 250
WORKERS = ("decode-0", "prefill-0", "prefill-1")


class Client(threading.Thread):
    """Asks again and again; hangs up when its patience, of chance, is over."""

    def __init__(self, url: str, seed: int, asked: list[tuple[list[int], list[int]]]) -> None:
        super().__init__(daemon=True)
        self._url, self._rng, self._asked = url, random.Random(seed), asked
        self.answered = self.left = 0
        self.wrong: list[object] = []
        self.start()

    def run(self) -> None:
        for _ in range(EACH):
            prompt, expected = self._rng.choice(self._asked)
            body = {"model": "m", "prompt": prompt, "max_tokens": N_TOKENS, "temperature": 0, "ignore_eos": True}
            more = {"return_token_ids": True, "stream": self._rng.random() < 0.3}
            patience_s = self._rng.choice((self._rng.uniform(0.001, LONGEST_MS / 1000), 60.0))
            try:
                answer = httpx.post(
                    f"{self._url}/v1/completions", json={**body, **more}, timeout=patience_s, verify=False
                )
            except httpx.TimeoutException:
                self.left += 1
                continue
            self.answered += 1
            if answer.status_code != 200 or (
                not more["stream"] and answer.json()["choices"][0]["token_ids"] != expected
            ):
                self.wrong.append(answer.text)


def test_clients_that_hang_up_at_any_moment_leave_nothing_behind(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model, rng = tiny_model("llama"), random.Random(5)
    reference, shared = Reference(model), [rng.randrange(8, 1500) for _ in range(64)]
    prompts = [shared[: rng.choice((0, 48, 64))] + [rng.randrange(8, 1500) for _ in range(80)] for _ in range(8)]
    asked = [(prompt, reference.generate(prompt, N_TOKENS)) for prompt in prompts]
    with thread_cluster(tmp_path) as workers:
        flags = {"model": model, "served_model_name": "m", "dtype": "float32", "device_memory": "2MiB"}
        members = [
            workers.start(name.partition("-")[0], name, kvstore="off", verify_kv=True, **flags) for name in WORKERS
        ]
        names = {"cluster": "test", "served_model_name": "m", "max_waiting": 100}
        with cluster(workers.redis_url, model, workers=False, **names) as up, Driver(members) as driver:
            until(lambda: ready(up.url, *WORKERS), "the system is ready")
            clients = [Client(up.url, seed, asked) for seed in range(CLIENTS)]
            driver.until(lambda: not any(client.is_alive() for client in clients), "every client is done")
            assert [client.wrong for client in clients] == [[]] * CLIENTS
            assert sum(client.left for client in clients) > 10 < sum(client.answered for client in clients)
            driver.until_all_free()
            require_nothing_held(driver)
            assert checked_pages(driver) > 0
