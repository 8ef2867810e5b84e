"""An answer that the client does not take: it ends at its deadline, everywhere."""

import asyncio
import secrets
from pathlib import Path

import pytest
from starlette.types import Message

from common.clock import MonotonicClock
from common.ids import RequestId
from common.messages.requests import Failed, Sampling, Timings, TokenDelta
from gateway.account import Account
from gateway.answer import Choice
from gateway.chunks import CompletionWriter, Heading
from gateway.core.failure import WorkerFailed
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
    order = Order(request=RequestId(secrets.token_hex(8)), prompt=ids("x"), sampling=Sampling(max_tokens=9), model=NAME)
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


FIRST = TokenDelta(RequestId("r"), 0, ids("a"), cached_tokens=0, timings=Timings(compute_ms=2.0))


@pytest.mark.parametrize(
    ("delta", "told"),
    [
        (
            TokenDelta(RequestId("r"), 1, ids("b"), timings=Timings(decode_queue_ms=3.0, first_step_ms=4.0)),
            {"decode_queue": 3.0, "first_step": 4.0},
        ),
        (TokenDelta(RequestId("r"), 1, ids("b"), cached_tokens=0, timings=Timings(compute_ms=900.0)), {}),  # a replay
    ],
)
def test_only_the_second_token_after_a_hand_over_says_how_long_that_took(
    up: Cluster, model: Path, delta: TokenDelta, told: dict[str, float]
) -> None:
    plan, metrics = plan_of(model, stream=True, timeout_ms=300), GatewayMetrics()
    reply = Reply(plan, up.gateway.switchboard, metrics, MonotonicClock())
    reply._pieces([(0, FIRST), (0, delta)])
    assert plan.account.timeline.second_token_ms() == told
    assert sum(metrics.phases["decode_queue"]._counts) == len(told) // 2


@pytest.mark.parametrize(("index", "kept"), [(0, True), (1, False)])
def test_only_the_first_choices_failure_is_the_first_choices_time(
    up: Cluster, model: Path, index: int, kept: bool
) -> None:
    timings = Timings(compute_ms=5.0)
    failed = Failed(request=RequestId("r"), code="stuck", phase="prefill", text="", retryable=True, timings=timings)
    plan = plan_of(model, stream=True, timeout_ms=300)
    reply = Reply(plan, up.gateway.switchboard, GatewayMetrics(), MonotonicClock())
    reply._pieces([(index, WorkerFailed(failed, text="no"))])
    assert plan.account.failed_timings == (timings if kept else None)
