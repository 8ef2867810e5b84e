"""A cancel at every moment of a hand-over, to either side first or to both at once: right tokens or none, nothing held."""

import random
from collections import deque
from collections.abc import Sequence

import pytest

from common.ids import RequestId
from common.messages.handover import Grant
from common.messages.requests import Cancel
from tests.support.fake_engine import answer
from tests.support.world import GATEWAY, World

R, OTHER = RequestId("r"), RequestId("other")
PAGES = 24
"""Two layers: room for one of the requests and not for both."""
ORDERS: dict[str, Sequence[str]] = {
    "prefill first": ("prefill", "decode"),
    "decode first": ("decode", "prefill"),
    "decode alone": ("decode",),
    "prefill alone": ("prefill",),
}


def start(seed: int, transport: str) -> World:
    """Two prefill workers want the same pages: what one writes too late, the other has written before it."""
    world = World(
        random.Random(seed), prefill_pages=2 * PAGES, decode_pages=PAGES, transport=transport, more=("prefill-1",)
    )
    world.greet()
    prompts = random.Random(seed)
    world.send("r", [prompts.randrange(3, 900) for _ in range(28)], 4)
    return world


def want_pages(world: World) -> None:
    """Another request comes, by another way, which needs pages that the first one has."""
    prompt = [world.rng.randrange(3, 900) for _ in range(30)]
    world.send("other", prompt, 6, to="prefill-1")


def cancel(world: World, order: Sequence[str]) -> None:
    """Heard at once by the first, before anything that is under way to it; by the others when it is their turn."""
    world.answers[R].cancelled = True
    first, *others = (world.processes[name] for name in order)
    world.perform(first, first.core.on_message(GATEWAY, Cancel(request=R), world.now_ms))
    for process in others:
        world.post(GATEWAY, process.peer, Cancel(request=R))


def write_late(world: World) -> None:
    """Copies of the cancelled request that are under way end only when the other one is being answered, or nothing else moves."""
    copies = world.processes["prefill"].copies
    late = list(copies)
    copies.clear()
    while not world.answers[OTHER].tokens and world.turn():
        continue
    copies.extendleft(reversed(late))


def require_right(world: World) -> None:
    """The other request was answered as if nothing had been, and every page is back."""
    seen = world.answers[OTHER]
    assert (seen.finish, seen.tokens) == ("length", answer(seen.prompt, 6))
    tokens = world.answers[R].tokens
    assert tokens == answer(world.answers[R].prompt, 4)[: len(tokens)]
    for process in world.processes.values():
        process.core.check()
        counts = process.ledger.counts()
        assert process.core.pool.available_pages == process.ledger.total_pages, counts
        assert counts.quarantined == counts.granted == 0


@pytest.mark.long
@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_cancel_races_every_message_of_a_hand_over(order: str, transport: str) -> None:
    """The moment moves on, until the request is over before it comes; the orders share the moments among them."""
    moment = list(ORDERS).index(order) // 2
    while True:
        world = start(0, transport)
        for _ in range(moment):
            world.turn()
        if world.answers[R].done:
            break
        want_pages(world)
        cancel(world, ORDERS[order])
        write_late(world)
        world.settle()
        require_right(world)
        moment += 2
    assert moment > 20, "the request was not followed through all of its phases"


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_cancel_and_a_grant_that_arrive_in_the_same_round(transport: str) -> None:
    """The prefill worker finds both in its mailbox, in either order, before it does anything else."""
    for grant_first in (True, False):
        world = start(1, transport)
        prefill, decode = world.processes["prefill"], world.processes["decode"]
        link = world.links.setdefault((decode.peer, prefill.peer), deque())
        while not any(isinstance(message, Grant) for message, _ in link):
            assert world.turn()
        messages = [(decode.peer, message) for message, _ in link]
        link.clear()
        want_pages(world)
        world.answers[R].cancelled = True
        messages.insert(len(messages) if grant_first else 0, (GATEWAY, Cancel(request=R)))
        for sender, message in messages:
            world.perform(prefill, prefill.core.on_message(sender, message, world.now_ms))
        world.post(GATEWAY, decode.peer, Cancel(request=R))
        world.settle()
        require_right(world)
