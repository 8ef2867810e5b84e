"""A whole system for benchmarks that look at it as a client does: HTTP in, usage and /metrics out."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.support.clients import ready, until
from tests.support.processes import cluster

START_S = 300.0
SETTLE_S = 20.0
"""Reports come twice a second; by then every counter has told."""
_REQUEST_S = 3_600.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer."""

    ttft_ms: float
    """Sending the request to its first tokens."""
    tokens: list[int]
    prompt_tokens: int
    cached_tokens: int

    @property
    def prefilled_tokens(self) -> int:
        """Prompt tokens that were computed, by what the answer says itself."""
        return self.prompt_tokens - self.cached_tokens


class Serving:
    """The public side of a running system."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = httpx.Client(base_url=url, timeout=_REQUEST_S)

    def ask(self, prompt: Sequence[int], max_tokens: int) -> Answer:
        """Stream one greedy answer of exactly `max_tokens` tokens. Raises SystemExit if it does not come whole."""
        body = {
            "model": "m",
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        tokens: list[int] = []
        usage: Mapping[str, object] = {}
        first_s: float | None = None
        began_s = time.perf_counter()
        with self._client.stream("POST", "/v1/completions", json=body) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                first_s = time.perf_counter() if first_s is None else first_s
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise SystemExit(f"the answer broke off: {event['error']}")
                for choice in event["choices"]:
                    tokens += choice["token_ids"]
                usage = event.get("usage") or usage
        if first_s is None or len(tokens) != max_tokens or not usage:
            raise SystemExit(f"{response.status_code}: {len(tokens)} of {max_tokens} tokens, usage {usage}")
        details = usage["prompt_tokens_details"]
        assert isinstance(details, dict)
        prompt_tokens = int(str(usage["prompt_tokens"]))
        return Answer((first_s - began_s) * 1e3, tokens, prompt_tokens, int(details["cached_tokens"]))

    def total(self, name: str, **labels: str) -> float:
        """Sum of all series of /metrics with that name and at least these labels; 0 if nobody reports it."""
        text = self._client.get("/metrics").raise_for_status().text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def await_total(self, name: str, expected: float, **labels: str) -> float:
        """Wait until `total` is `expected`, or has had its time to become so; what it is then."""
        deadline_s = time.monotonic() + SETTLE_S
        while (found := self.total(name, **labels)) < expected and time.monotonic() < deadline_s:
            time.sleep(0.05)
        return found

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


@contextmanager
def serving(
    folder: Path, model: Path, workers: Mapping[str, Mapping[str, object]], store: Mapping[str, object] | None = None
) -> Iterator[Serving]:
    """Gateway, one worker per role of `workers` with its flags, and a KV store if `store` has flags for one."""
    folder.mkdir(parents=True, exist_ok=True)
    with cluster(folder) as processes:
        if store is not None:
            processes.start("kvstore", "kvstore-0", model=model, run_dir=folder, **store)
        for role, flags in workers.items():
            kvstore = "off" if store is None else "auto"
            processes.start(role, f"{role}-0", model=model, served_model_name="m", kvstore=kvstore, **flags)
        processes.start("gateway", "gateway-0", model=model, served_model_name="m", port=0)
        names = [f"{role}-0" for role in workers] + (["kvstore-0"] if store is not None else [])
        processes.await_members("gateway-0", *names, timeout_s=START_S)
        one = Serving(processes.members()["gateway-0"].endpoint)
        try:
            until(lambda: ready(one.url), "ready", timeout_s=START_S)
            for name in names:
                until(lambda name=name: one.total("penstock_worker_up", worker=name) == 1, f"{name} ready")  # type: ignore[misc]
            yield one
        finally:
            one.close()
