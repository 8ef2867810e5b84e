"""HTTP clients for tests of a whole system: streams read in threads, and the questions every test asks."""

import json
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx


class Stream:
    """One streamed /v1/completions request of token ids, read in a thread of its own."""

    def __init__(
        self,
        url: str,
        prompt: list[int],
        max_tokens: int,
        *,
        leave_after: int | None = None,
        headers: Mapping[str, str] | None = None,
        cache_salt: str | None = None,
    ) -> None:
        """`leave_after`: disconnect once that many tokens have come; 0 leaves before the first."""
        self._headers, self._cache_salt = dict(headers or {}), cache_salt
        self.url, self.prompt, self.max_tokens, self.leave_after = url, prompt, max_tokens, leave_after
        self.tokens: list[int] = []
        self.error: dict[str, Any] | None = None
        self.finish: str | None = None
        self.broken = False
        """The connection broke off without a last word."""
        self.left = False
        self.answered_s: float | None = None
        """When the last word was there, on time.monotonic."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._ask()
        except httpx.HTTPError:
            self.broken = True
        finally:
            self.answered_s = time.monotonic()

    def _ask(self) -> None:
        body: dict[str, Any] = {
            "model": "m",
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        if self._cache_salt is not None:
            body["cache_salt"] = self._cache_salt
        with httpx.Client(timeout=60, headers=self._headers) as client:
            with client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
                if response.status_code != 200:
                    self.error = json.loads(response.read())["error"]
                    return
                if self.leave_after == 0:
                    self.left = True
                    return
                self._read(response)

    def _read(self, response: httpx.Response) -> None:
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                self.error = event["error"]
                return
            for choice in event["choices"]:
                self.tokens += choice.get("token_ids") or []
                self.finish = choice.get("finish_reason") or self.finish
            if self.leave_after is not None and len(self.tokens) >= self.leave_after:
                self.left = True
                return

    @property
    def answered(self) -> bool:
        return self.finish is not None or self.error is not None or self.broken or self.left

    def wait(self, timeout_s: float) -> None:
        self._thread.join(timeout=timeout_s)
        assert not self._thread.is_alive(), f"no answer within {timeout_s} s after {len(self.tokens)} tokens"


def until(condition: Callable[[], bool], what: str, *, timeout_s: float = 30.0) -> None:
    """Poll until the condition holds; a named failure after the deadline."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(0.02)


def ready(url: str, *names: str) -> bool:
    """The gateway serves, the named workers are ready, and every prefill worker of them reaches every decode worker.

    Without names a decode worker may be all there is, which computes prompts as well.
    """
    try:
        if httpx.get(f"{url}/ready", timeout=5).status_code != 200:
            return False
        workers = status(url)
    except httpx.HTTPError:
        return False
    if any(name not in workers or workers[name]["state"] != "ready" for name in names):
        return False
    decode = {name for name in names if workers[name]["role"] == "decode"}
    prefill = [workers[name] for name in names if workers[name]["role"] == "prefill"]
    return all(decode <= {link["peer"].partition("@")[0] for link in one["transports"]} for one in prefill)


def status(url: str) -> dict[str, dict[str, Any]]:
    """Workers by id."""
    return {w["id"]: w for w in httpx.get(f"{url}/status", timeout=10).json()["workers"]}


def all_free(url: str, *names: str) -> bool:
    """Every named worker's pages are free or only cached, and nothing is queued or pinned."""
    workers = status(url)
    return all(
        name in workers
        and workers[name]["reported"]
        and workers[name]["pages"]["free"] + workers[name]["pages"]["cached"] == workers[name]["pages"]["total"] > 0
        and not workers[name]["gauges"]["pinned_blocks"]
        and not any(workers[name]["queue"][k] for k in ("waiting", "running", "handing_over"))
        for name in names
    )


def random_prompt(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(8, 1500) for _ in range(tokens)]
