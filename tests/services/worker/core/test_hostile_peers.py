"""What peers say may be wrong, late or repeated: it is refused or ignored, never the end of the worker."""

import random

import pytest

from common.errors import ProtocolViolation
from common.ids import PeerId, RequestId
from common.messages.actions import Send
from common.messages.blocks import Declined, Find, Found, Offered, Reserve, Reserved
from common.messages.requests import Generate, Sampling
from tests.support.world import GATEWAY, World
from tests.support.world_process import Process

PROMPT = list(range(10, 60))
PAGES = ((1, 2), (3, 4), (5, 6))


def world(**settings: object) -> World:
    made = World(random.Random(1), prefill_pages=100, decode_pages=400, store_blocks=400, **settings)
    made.greet()
    return made


def asked(made: World, kind: type) -> tuple[Process, PeerId, int]:
    """Run until the prefill worker has asked the KV store; the store has not heard it."""
    prefill, store = made.processes["prefill"], made.store.peer
    for _ in range(3_000):
        for message, _ in made.links.get((prefill.peer, store), ()):
            if isinstance(message, kind):
                return prefill, store, message.call
        made.turn()
    raise AssertionError(f"no {kind.__name__} was sent")


@pytest.mark.parametrize(
    ("n_blocks", "tiers", "pages"),
    [
        (3, ("nvme",) * 3, PAGES),
        (3, ("host",) * 2, PAGES),
        (3, ("host",) * 3, PAGES[:2]),
        (3, ("host",) * 3, ()),
        (3, ("host",) * 3, ((1, 2), (3,), (5, 6))),
        (3, ("host",) * 3, ((1, 2**40), (3, 4), (5, 6))),
        (3, ("host",) * 3, ((1, -2), (3, 4), (5, 6))),
        (99, ("host",) * 99, ((1, 2),) * 99),
        (-1, (), ()),
    ],
)
def test_an_answer_that_fits_no_question_is_refused_and_the_prompt_is_computed(
    n_blocks: int, tiers: tuple[str, ...], pages: tuple[tuple[int, ...], ...]
) -> None:
    made = world()
    made.send("r", PROMPT, 3)
    prefill, store, call = asked(made, Find)
    answer = Found(call=call, n_blocks=n_blocks, tiers=tiers, pages=pages, lease_ms=1_000)
    with pytest.raises(ProtocolViolation):
        prefill.core.on_message(store, answer, made.now_ms)
    made.settle()
    assert made.answers[RequestId("r")].finish == "length"


@pytest.mark.parametrize("pages", [((1,), (2,)), ((1, 2), (2,)), ((2**40, 2),), ((-1, 2),)])
def test_reserved_pages_that_cannot_be_are_refused(pages: tuple[tuple[int, ...], ...]) -> None:
    made = world()
    made.send("r", PROMPT, 3)
    prefill, store, call = asked(made, Reserve)
    with pytest.raises(ProtocolViolation):
        prefill.core.on_message(store, Reserved(call=call, pages=pages), made.now_ms)
    made.settle()


def test_a_repeated_reserved_starts_no_second_copy() -> None:
    made = world()
    made.send("r", PROMPT, 3)
    prefill, store, call = asked(made, Reserve)
    answer = Reserved(call=call, pages=((0, 1),))
    made.perform(prefill, prefill.core.on_message(store, answer, made.now_ms))
    while prefill.moves:
        made.copies.move(prefill)
    assert prefill.core.on_message(store, answer, made.now_ms) == []


def test_only_who_was_asked_is_heard() -> None:
    made = world()
    made.send("r", PROMPT, 3)
    prefill, _, call = asked(made, Find)
    stranger = made.processes["decode"].peer
    prefill.core.on_message(stranger, Found(call=call, n_blocks=3, tiers=("host",) * 3, pages=PAGES), made.now_ms)
    made.settle()
    assert made.answers[RequestId("r")].deltas[0].cached_tokens == 0


def test_an_offer_of_names_that_are_none_is_refused() -> None:
    made = world()
    prefill, decode = made.processes["prefill"], made.processes["decode"]
    with pytest.raises(ProtocolViolation):
        prefill.core.on_message(decode.peer, Offered(call=1, parent=bytes(16), depth=0, blocks=(b"abc",)), 0.0)


@pytest.mark.parametrize("prompt", [[], [5, -1, 7], [5, 2**32, 7], [5, 1_000, 7]])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_prompt_of_what_is_no_token_is_refused(role: str, prompt: list[int]) -> None:
    made = world()
    generate = made.generate("r", prompt, Sampling(max_tokens=3))
    if role == "decode":
        generate = Generate(request=generate.request, prompt=generate.prompt, sampling=generate.sampling, timeout_ms=9)
    made.post(GATEWAY, made.processes[role].peer, generate)
    made.settle()
    failed = made.answers[RequestId("r")].failed
    assert failed is not None and (failed.code, failed.retryable) == ("invalid_request", False)


def test_an_id_that_is_used_again_while_its_first_step_runs_is_refused() -> None:
    made = world(kvstore="off")
    prefill = made.processes["prefill"]
    generate = made.generate("r", PROMPT, Sampling(max_tokens=3))
    made.perform(prefill, prefill.core.on_message(GATEWAY, generate, made.now_ms))
    made.cancel(RequestId("r"))
    made.carry((GATEWAY, prefill.peer))
    actions = prefill.core.on_message(GATEWAY, generate, made.now_ms)
    assert [action.message.code for action in actions] == ["invalid_request"]
    made.settle()


def test_a_worker_that_keeps_nothing_takes_nothing_back() -> None:
    made = world(caching=0)
    prefill, decode = made.processes["prefill"], made.processes["decode"]
    offer = Offered(call=7, parent=bytes(16), depth=0, blocks=(bytes(range(16)),))
    assert prefill.core.on_message(decode.peer, offer, 0.0) == [Send(decode.peer, Declined(call=7))]
