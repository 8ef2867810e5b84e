"""An answer that the client does not take: it ends at its deadline, everywhere."""

import asyncio
from pathlib import Path

import pytest
from starlette.types import Message

from common.clock import MonotonicClock
from common.ids import RequestId
from common.messages.requests import Sampling
from gateway.account import Account
from gateway.answer import Choice
from gateway.chunks import CompletionWriter, Heading
from gateway.core.order import Order
from gateway.metrics import GatewayMetrics
from gateway.model_files import read_model_files
from gateway.reply import Plan, Reply
from gateway.tokens import Tokens
from tests.gateway.cluster import Cluster
from tests.gateway.fake_worker import PATIENCE_S, tokens
from tests.gateway.model import NAME, ids


def plan_of(model: Path, *, stream: bool, timeout_ms: float) -> Plan:
    known = Tokens(read_model_files(str(model)))
    heading = Heading(id="c", created_unix_s=0, model=NAME, include_usage=False, token_ids=False, top_logprobs=None)
    order = Order(request=RequestId("unread"), prompt=ids("x"), sampling=Sampling(max_tokens=9), model=NAME)
    return Plan(
        orders=[order],
        choices=[Choice(0, known, (), ())],
        prompt_tokens=1,
        choices_per_prompt=1,
        writer=CompletionWriter(heading, known, 1),
        stream=stream,
        include_usage=False,
        explain=False,
        account=Account("unread", "/v1/completions", MonotonicClock().now_ms(), 0),
        timeout_ms=timeout_ms,
    )


class Client:
    """Stays connected, and takes the first `reads` messages of its answer."""

    def __init__(self, reads: int) -> None:
        self.took: list[Message] = []
        self._reads = reads

    async def receive(self) -> Message:
        await asyncio.Event().wait()
        raise AssertionError("never set")

    async def send(self, message: Message) -> None:
        if len(self.took) == self._reads:
            await asyncio.Event().wait()
        self.took.append(message)


@pytest.mark.parametrize("reads", [0, 1])
def test_a_stream_that_nobody_reads_ends_at_the_deadline_and_cancels_both_workers(
    up: Cluster, model: Path, reads: int
) -> None:
    client, metrics = Client(reads), GatewayMetrics()
    reply = Reply(plan_of(model, stream=True, timeout_ms=300), up.gateway.switchboard, metrics, MonotonicClock())
    running = asyncio.run_coroutine_threadsafe(reply({}, client.receive, client.send), up.loop)
    gateway, generate = up.accept()
    up.decode.say(gateway, tokens(generate.request, 0, ids("a")))
    running.result(PATIENCE_S)
    assert up.cancelled() == {generate.request}
    assert len(client.took) == reads
    assert metrics.clients_left_total == 1


def test_a_whole_answer_that_nobody_reads_ends_at_the_deadline(up: Cluster, model: Path) -> None:
    client, metrics = Client(reads=1), GatewayMetrics()
    reply = Reply(plan_of(model, stream=False, timeout_ms=300), up.gateway.switchboard, metrics, MonotonicClock())
    running = asyncio.run_coroutine_threadsafe(reply({}, client.receive, client.send), up.loop)
    gateway, generate = up.accept()
    up.decode.say(gateway, tokens(generate.request, 0, ids("a"), "length"))
    running.result(PATIENCE_S)
    assert metrics.clients_left_total == 1


def test_a_client_that_reads_gets_what_comes_after_the_deadline(up: Cluster, model: Path) -> None:
    client, metrics = Client(reads=99), GatewayMetrics()
    reply = Reply(plan_of(model, stream=True, timeout_ms=0), up.gateway.switchboard, metrics, MonotonicClock())
    running = asyncio.run_coroutine_threadsafe(reply({}, client.receive, client.send), up.loop)
    gateway, generate = up.accept()
    up.decode.say(gateway, tokens(generate.request, 0, ids("a"), "length"))
    running.result(PATIENCE_S)
    assert client.took[-1]["more_body"] is False
    assert metrics.clients_left_total == 0
