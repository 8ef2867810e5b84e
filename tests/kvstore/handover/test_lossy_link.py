"""Whatever the link, the copies and the processes do, pages are given back exactly once and nobody waits for ever."""

import random
from collections import Counter

import pytest

from common.ids import TransferId
from common.policy.transfer import Granularity
from kvstore.index.ledger import PageState
from tests.kvstore.handover.world import P, World


def run(seed: int, transport: str) -> World:
    rng = random.Random(seed)
    world = World(rng, loss=rng.choice([0.0, 0.1, 0.4]), repeat=rng.choice([0.0, 0.3]))
    for number in range(rng.randrange(1, 6)):
        n_blocks = rng.randrange(1, 7)
        mode = rng.choice(list(Granularity))
        world.start(f"t{number}", n_blocks, rng.randrange(n_blocks + 1), transport, mode)
    for _ in range(rng.randrange(200)):
        world.step()
        chance = rng.random()
        victim = rng.choice(list(world.jobs))
        if chance < 0.01:
            world.perform_receiver(world.receiver.stop(victim, "cancelled", world.now_ms))
        elif chance < 0.02:
            if world.sender_alive:
                world.perform_sender(world.sender.cancel(victim, "cancelled", world.now_ms))
        elif chance < 0.022 and world.sender_alive and world.receiver_alive:
            world.kill_sender()
        elif chance < 0.024 and world.sender_alive and world.receiver_alive:
            world.kill_receiver()
    world.drain()
    return world


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("seed", range(120))
def test_every_page_has_exactly_one_end(seed: int, transport: str) -> None:
    world = run(seed, transport)
    if world.receiver_alive:
        ended = Counter([*world.delivered, *world.target_releases])
        assert ended == dict.fromkeys(world.opened, 1), "each grant is delivered or released, once"
        assert not list(world.ledger.owners(PageState.GRANTED))
        assert not list(world.ledger.owners(PageState.QUARANTINED))
        assert max(Counter(world.receiver_gave_up).values(), default=0) <= 1
        assert not set(world.receiver_gave_up) & set(world.delivered)
    if world.sender_alive:
        assert [job.source_releases for job in world.jobs.values()] == [1] * len(world.jobs)
        assert all(len(job.ends) <= 1 for job in world.jobs.values()), "one answer per request"
        handed_over = {name for name, job in world.jobs.items() if job.ends == ["handed over"]}
        if world.receiver_alive:
            assert handed_over <= set(world.delivered)


@pytest.mark.parametrize("seed", range(40))
def test_mappings_that_come_and_go_do_not_disturb_tcp(seed: int) -> None:
    world = World(random.Random(seed), copy_failure=0.0)
    world.sender = type(world.sender)(3, commit_wait_ms=55_000)
    world.start("t", 6, 0, "tcp")
    for number in range(40):
        world.step()
        if number % 8 == seed % 8:
            world.perform_receiver(world.receiver.on_peer_dead(P, world.now_ms))
    world.drain()
    assert world.delivered == [TransferId("t")]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("seed", range(40))
def test_a_link_that_loses_a_third_of_all_messages_still_hands_over(seed: int, transport: str) -> None:
    world = World(random.Random(seed), loss=0.33, repeat=0.2, copy_failure=0.0)
    world.sender = type(world.sender)(3, commit_wait_ms=55_000)
    world.start("t", 6, seed % 7, transport, list(Granularity)[seed % 3])
    world.drain()
    assert world.delivered == [TransferId("t")]
    assert world.jobs[TransferId("t")].ends == ["handed over"]
