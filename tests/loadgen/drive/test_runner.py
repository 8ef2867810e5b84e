import asyncio
import contextlib
from collections.abc import Iterable
from typing import Any

import pytest

from loadgen.drive.bodies import BodyForm
from loadgen.drive.client import StreamingClient
from loadgen.drive.connection import Server, parse_server
from loadgen.drive.runner import Run, RunPlan
from loadgen.results.records import Outcome
from loadgen.workload.plan import Conversation
from tests.loadgen.fake_server import DONE, Answer, FakeServer, Script, fake_server, steady, text_chunk, usage_chunk
from tests.loadgen.plans import talk, turn

FORM = BodyForm(endpoint="completions", model="fake")


def run(
    script: Script, conversations: Iterable[Conversation], concurrency: int | None = None, **plan: Any
) -> tuple[Run, FakeServer]:
    """Drive a scripted server to the end."""

    async def drive() -> tuple[Run, FakeServer]:
        async with fake_server(script) as fake:
            client = StreamingClient(parse_server(fake.url), FORM.path, {}, 30)
            form = RunPlan(run_id="t", form=FORM, concurrency=concurrency, **plan)
            made = Run(client, form, conversations, lambda record: None)
            await made.drive(client.now_s())
            client.close()
            return made, fake

    return asyncio.run(drive())


def counting(number: int, body: dict[str, Any]) -> Answer:
    """Answers with the number of the request as its only token."""
    return Answer((text_chunk("x", [1000 + number]), usage_chunk(len(body["prompt"]), 1), DONE))


def test_each_turn_carries_the_real_answers_before_it() -> None:
    turns = (turn((1,)), turn((2,)), turn((3,)))
    made, fake = run(counting, [talk(7, turns, opening=(9,))], 1)
    assert [seen.body["prompt"] for seen in fake.seen] == [[9, 1], [9, 1, 1000, 2], [9, 1, 1000, 2, 1001, 3]]
    assert [(record.conversation, record.turn, record.asked_input_tokens) for record in made.records] == [
        (7, 0, 2),
        (7, 1, 4),
        (7, 2, 6),
    ]
    assert [record.request_id for record in made.records] == ["t-7-0", "t-7-1", "t-7-2"]


def test_answers_are_left_out_where_the_conversation_says_so() -> None:
    _, fake = run(counting, [talk(0, (turn((1,)), turn((2,))), keeps_answers=False)], 1)
    assert [seen.body["prompt"] for seen in fake.seen] == [[1], [1, 2]]


def test_a_turn_is_not_sent_before_the_answer_it_follows_even_if_it_is_due() -> None:
    made, fake = run(counting, [talk(0, (turn((1,), at_s=0.0), turn((2,), at_s=0.0)))])
    assert [seen.body["prompt"] for seen in fake.seen] == [[1], [1, 1000, 2]]
    first, second = made.records
    assert second.planned_s >= first.end_s  # it was due when it could be sent, and is not called late
    assert second.waited_s >= first.end_s and second.arrived_s == pytest.approx(0.0, abs=0.2)
    assert first.waited_s == 0.0


def test_a_conversation_whose_turn_fails_ends_and_says_how_much_is_missing() -> None:
    def broken(number: int, body: dict[str, Any]) -> Answer:
        return counting(number, body) if number != 1 else Answer(status=503)

    made, fake = run(broken, [talk(0, 4), talk(1, 1)], 1)
    assert [record.outcome for record in made.records] == [Outcome.OK, Outcome.REJECTED, Outcome.OK]
    assert (len(fake.seen), made.turns_not_sent) == (3, 2)


def test_answers_without_token_ids_are_replaced_and_counted() -> None:
    answer = Answer((text_chunk("x"), text_chunk("y"), usage_chunk(2, 2), DONE))
    made, fake = run(lambda number, body: answer, [talk(0, 2)], 1)
    assert [len(seen.body["prompt"]) for seen in fake.seen] == [2, 6]
    assert made.answers_replaced == 1


def test_a_closed_loop_never_has_more_than_its_number_under_way() -> None:
    made, fake = run(steady(), [talk(index) for index in range(20)], 3)
    assert sorted(record.index for record in made.records) == list(range(20))
    assert fake.connections <= 3
    assert all(record.outcome is Outcome.OK for record in made.records)


def test_a_cap_holds_back_what_is_due_and_tells_for_how_long() -> None:
    made, fake = run(steady(), [talk(index, (turn(at_s=0.0),)) for index in range(20)], max_in_flight=2)
    assert fake.connections <= 2
    assert len(made.records) == 20
    held = [record for record in made.records if record.held_s > 0]
    assert len(held) >= 10
    assert all(record.sent_s - record.planned_s >= record.held_s for record in held)


def test_nothing_new_is_sent_after_the_end() -> None:
    made, fake = run(steady(), [talk(index) for index in range(20)], 2, stop_after_s=0.0)
    assert (made.records, fake.seen) == ([], [])


@pytest.mark.parametrize(
    "conversation",
    [
        talk(0, (turn(at_s=0.0), turn(think_s=3600.0), turn())),
        talk(0, (turn(at_s=0.0), turn(at_s=3600.0), turn())),
    ],
)
def test_a_run_ends_at_its_end_and_not_when_somebody_has_thought(conversation: Conversation) -> None:
    made, fake = run(steady(), [conversation, talk(1, (turn(at_s=3600.0),))], stop_after_s=0.3)
    assert (len(fake.seen), made.turns_not_sent) == (1, 3)


def test_what_a_cap_holds_back_beyond_the_end_is_not_sent() -> None:
    def slow(number: int, body: dict[str, Any]) -> Answer:
        return Answer(ending="cut") if number else Answer(ending="hang")

    async def drive() -> Run:
        async with fake_server(slow) as fake:
            client = StreamingClient(parse_server(fake.url), FORM.path, {}, 0.4)
            requests = [talk(index, (turn(at_s=0.0),)) for index in range(4)]
            made = Run(
                client, RunPlan(run_id="t", form=FORM, max_in_flight=1, stop_after_s=0.2), requests, lambda r: None
            )
            await made.drive(client.now_s())
            assert len(fake.seen) == 1
            return made

    assert asyncio.run(drive()).turns_not_sent == 3


def test_a_server_that_is_gone_is_not_asked_as_fast_as_it_refuses() -> None:
    async def drive() -> Run:
        client = StreamingClient(Server("127.0.0.1", 1, False, ""), FORM.path, {}, 5)
        plan = RunPlan(run_id="t", form=FORM, concurrency=2, stop_after_s=0.4)
        made = Run(client, plan, (talk(index) for index in range(10_000)), lambda record: None)
        await made.drive(client.now_s())
        return made

    records = asyncio.run(drive()).records
    assert {record.outcome for record in records} == {Outcome.CONNECT}
    assert len(records) == 2


def test_several_processes_never_use_the_same_number() -> None:
    made, _ = run(steady(), [talk(index) for index in range(3)], 1, first_index=1, index_step=4)
    assert [record.index for record in made.records] == [1, 5, 9]


def test_an_open_loop_sends_on_while_nobody_answers() -> None:
    async def drive() -> FakeServer:
        all_sent = asyncio.Event()

        def hang(number: int, body: dict[str, Any]) -> Answer:
            if number == 4:
                all_sent.set()
            return Answer(ending="hang")

        async with fake_server(hang) as fake:
            client = StreamingClient(parse_server(fake.url), FORM.path, {}, 60)
            requests = [talk(index, (turn(at_s=index / 100),)) for index in range(5)]
            made = Run(client, RunPlan(run_id="t", form=FORM), requests, lambda record: None)
            sending = asyncio.create_task(made.drive(client.now_s()))
            await asyncio.wait_for(all_sent.wait(), 30)
            assert made.records == []
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sending
            for seen in fake.seen:
                await asyncio.wait_for(seen.left.wait(), 30)  # an interrupted run leaves no connection behind
            return fake

    assert len(asyncio.run(drive()).seen) == 5


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_bodies_ask_for_a_stream_with_usage_and_token_ids(endpoint: str) -> None:
    form = BodyForm(endpoint=endpoint, model="m", extra={"temperature": 1.5})
    body = form.body({"prompt": [1]}, turn()).decode()
    for part in (
        '"stream":true',
        '"include_usage":true',
        '"return_token_ids":true',
        '"ignore_eos":true',
        '"max_tokens":4',
    ):
        assert part in body
    assert '"temperature":1.5' in body
    plain = BodyForm(endpoint=endpoint, model="m", ignore_eos=False, token_ids=False).body({"prompt": [1]}, turn())
    assert b"ignore_eos" not in plain
    assert b"return_token_ids" not in plain
