"""A gateway in a thread, between a real Redis and fake workers."""

import asyncio
import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai

from common.ids import PeerId
from common.messages.requests import Cancel, Generate
from gateway.process import Gateway
from gateway.settings import GatewaySettings
from tests.gateway.fake_worker import PATIENCE_S, FakeWorker, tokens
from tests.gateway.model import NAME, identity

T = TypeVar("T")


@dataclass
class Cluster:
    """One gateway, one prefill and one decode worker."""

    url: str
    gateway: Gateway
    redis: str
    name: str
    prefill: FakeWorker
    decode: FakeWorker
    workers: list[FakeWorker]
    stopped: threading.Event = field(default_factory=threading.Event)
    """Set when the gateway has ended."""
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8))

    def client(self, **options: Any) -> openai.OpenAI:
        """The official client, without retries that would hide errors."""
        plain = httpx.Client(verify=False, timeout=PATIENCE_S)  # reading certificates costs more than a test
        defaults = {"base_url": f"{self.url}/v1", "api_key": "any", "max_retries": 0, "http_client": plain}
        return openai.OpenAI(**{**defaults, **options})

    def http(self, **options: Any) -> httpx.Client:
        """A client that sends whatever it is told."""
        return httpx.Client(base_url=self.url, verify=False, timeout=PATIENCE_S, **options)

    def accept(self) -> tuple[PeerId, Generate]:
        """The next request that reaches the prefill worker."""
        return self.prefill.hear(Generate)

    def answer(self, new: tuple[int, ...], finish: str | None = "length") -> None:
        """From now on, answer every request with these tokens, one message per token."""

        def on_generate(gateway: PeerId, generate: Generate) -> None:
            for position, token in enumerate(new):
                last = position == len(new) - 1
                self.decode.say(gateway, tokens(generate.request, position, (token,), finish if last else None))

        self.prefill.on_generate = on_generate

    def in_background(self, call: Callable[[], T]) -> "Future[T]":
        """Run a blocking client call while the test plays the workers."""
        return self._threads.submit(call)

    def forget_script(self) -> None:
        """Workers hear requests but do not answer by themselves; what they heard before is gone."""
        for worker in (self.prefill, self.decode):
            worker.on_generate = None
            worker.forget()

    def cancelled(self) -> set[str]:
        """Requests of which both workers have heard that they are cancelled; waits for one each."""
        heard = {worker.hear(Cancel)[1].request for worker in (self.prefill, self.decode)}
        return {str(request) for request in heard}

    def check_idle(self) -> None:
        """Nothing is held for any request. Runs in the gateway's own thread."""

        async def check() -> None:
            self.gateway.switchboard.check()
            assert self.gateway.switchboard.open_requests == 0

        asyncio.run_coroutine_threadsafe(check(), self.loop).result(timeout=PATIENCE_S)


@contextlib.contextmanager
def cluster(redis: str, model: Path, *, workers: bool = True, **settings: Any) -> Iterator[Cluster]:
    """Started, ready (unless without workers), and stopped and checked at the end."""
    name = secrets.token_hex(4)
    prefill = FakeWorker("prefill-0", "prefill", identity())
    decode = FakeWorker("decode-0", "decode", identity())
    both = [prefill, decode]
    if workers:
        for worker in both:
            worker.join(redis, name)
    chosen = {
        "served_model_name": NAME,
        "model": str(model),
        "redis": redis,
        "cluster": name,
        "port": 0,
        "drain_s": 1.0,
        "local_prefill_tokens": 0,  # short prompts too go to the prefill worker
        "attempts": 1,  # what is tried again has tests of its own
        "max_waiting": 0,
        "prefill_fallback": "deny",
    }
    gateway = Gateway(GatewaySettings(**{**chosen, **settings}))
    one = Cluster(gateway.member.endpoint, gateway, redis, name, prefill, decode, both)

    def run() -> None:
        one.loop.run_until_complete(gateway.run())
        one.stopped.set()

    thread = threading.Thread(target=run, name="gateway", daemon=True)
    thread.start()
    try:
        if workers:
            assert all(worker.pinged.wait(PATIENCE_S) for worker in both)
        yield one
        if not one.stopped.is_set():
            one.check_idle()
    finally:
        gateway.ask_to_stop()
        thread.join(PATIENCE_S)
        one.loop.close()
        one._threads.shutdown(wait=True)
        for worker in one.workers:
            worker.stop()
        assert not thread.is_alive()
