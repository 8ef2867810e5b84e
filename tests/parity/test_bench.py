"""What the load generator sends and hears over many turns is a conversation: transformers, asked the same, answers the same."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from loadgen.drive.bodies import BodyForm, OutgoingRequest
from loadgen.drive.client import Due, StreamingClient
from loadgen.drive.connection import parse_server
from loadgen.drive.history import Answer
from loadgen.drive.runner import Run, RunPlan
from loadgen.results.records import Outcome, RequestRecord
from loadgen.workload.plan import Conversation, Turn
from tests.support.clients import ready, until
from tests.support.processes import cluster
from tests.support.reference import Reference

pytestmark = pytest.mark.system

FORM = BodyForm(endpoint="completions", model="m")
TURNS, CONVERSATIONS, N_TOKENS = 4, 3, 12


class Listening(StreamingClient):
    """Keeps every prompt with the token ids that answered it."""

    def __init__(self, url: str) -> None:
        super().__init__(parse_server(url), FORM.path, {"x-penstock-explain": "1"}, 120.0)
        self.heard: list[tuple[list[int], list[int]]] = []

    async def send(self, request: OutgoingRequest, due: Due) -> tuple[RequestRecord, Answer | None]:
        prompt = msgspec.json.decode(request.body)["prompt"]
        record, answer = await super().send(request, due)
        if answer is not None:
            self.heard.append((prompt, list(answer.token_ids or ())))
        return record, answer


def conversations() -> Sequence[Conversation]:
    """They share an opening, and each ends with a turn that nobody needs the answer of."""
    return [
        Conversation(
            index=index,
            opening=tuple(range(20, 60)),
            turns=tuple(
                Turn(added=tuple(range(100 + 7 * index + turn, 110 + 7 * index + turn)), output_tokens=N_TOKENS)
                for turn in range(TURNS + 1)
            ),
        )
        for index in range(CONVERSATIONS)
    ]


def test_conversations_of_many_turns_are_answered_with_transformers_tokens(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    with cluster(tmp_path) as processes:
        common = {"model": folder, "served_model_name": "m"}
        processes.start("decode", "decode-0", device_memory="64MiB", dtype="float32", **common)
        processes.start("prefill", "prefill-0", device_memory="64MiB", dtype="float32", **common)
        processes.start("gateway", "gateway-0", port=0, **common)
        processes.await_members("decode-0", "prefill-0", "gateway-0")
        url = processes.members()["gateway-0"].endpoint
        until(lambda: ready(url, "decode-0", "prefill-0"), "ready")

        async def talk() -> tuple[Listening, list[RequestRecord]]:
            client = Listening(url)
            plan = RunPlan(run_id="t", form=FORM, concurrency=CONVERSATIONS)
            run = Run(client, plan, conversations(), lambda record: None)
            await run.drive(client.now_s())
            client.close()
            return client, run.records

        client, records = asyncio.run(talk())
    assert [record.outcome for record in records] == [Outcome.OK] * CONVERSATIONS * (TURNS + 1)
    assert sum(record.cached_tokens or 0 for record in records) > 0
    assert len(client.heard) == CONVERSATIONS * TURNS
    reference = Reference(folder)
    for prompt, tokens in client.heard:
        assert tokens == reference.generate(prompt, N_TOKENS)
