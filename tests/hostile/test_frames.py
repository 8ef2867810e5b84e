"""Peers that say what nobody should: cores refuse or ignore it, keep their laws, and are free when those peers are gone."""

import random
from typing import Any

import pytest

from common.errors import ProtocolViolation
from common.ids import PeerId
from common.messages import decode
from tests.hostile.absurd import Absurd
from tests.kvstore.server import builders as store_builders
from tests.support.world import GATEWAY, World
from tests.support.world_process import MODEL

PROMPT = list(range(10, 60))
STRANGER = PeerId("stranger@1")


def known(made: World) -> dict[str, list[Any]]:
    """What stands in messages that are on their way."""
    found: dict[str, list[Any]] = {"model": [MODEL], "prompt": [tuple(PROMPT)], "gateway": [GATEWAY]}
    for messages in made.links.values():
        for message, _ in messages:
            for name in message.__struct_fields__:
                found.setdefault(name, []).append(getattr(message, name))
    found["epoch"] = [process.core._mine.incarnation for process in made.processes.values()]
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_that_serves_survives_what_its_peers_should_not_say(role: str, seed: int) -> None:
    chance = random.Random(seed)
    made = World(random.Random(seed), prefill_pages=100, decode_pages=400, store_blocks=100)
    made.greet()
    process = made.processes[role]
    liars = [STRANGER, PeerId("")]
    for number in range(6):
        made.send(f"r{number}", PROMPT[: chance.randrange(1, 50)], 3)
        for _ in range(40):
            made.turn()
        absurd = Absurd(chance, known(made))
        for _ in range(60):
            message = absurd.message()
            try:
                process.core.on_message(chance.choice(liars), message, made.now_ms)
            except ProtocolViolation:
                continue
            process.core.check()
    made.settle()
    process.core.check()
    assert all(answer.finish is not None or answer.failed is not None for answer in made.answers.values())


@pytest.mark.parametrize("seed", range(12))
def test_a_kv_store_survives_what_its_peers_should_not_say(seed: int) -> None:
    chance = random.Random(seed)
    core = store_builders.core(6, disk_blocks=6)
    peers = [store_builders.PEER, store_builders.OTHER, STRANGER]
    names = {"name": [store_builders.name(n) for n in range(1, 9)], "blocks": [store_builders.chain(1, 4)]}
    absurd = Absurd(chance, {**names, "model": [store_builders.identity()], "call": [1, 2, 3]})
    now_ms = 0.0
    for _ in range(400):
        now_ms += 10
        message = absurd.message()
        lengths = [chance.choice((0, 1, store_builders.BLOCK_BYTES, 2**40)) for _ in range(chance.choice((0, 1, 3, 4)))]
        try:
            core.on_message(chance.choice(peers), message, lengths, now_ms)
        except ProtocolViolation:
            continue
    core.check()
    for peer in peers:
        core.on_peer_dead(peer)
    core.on_tick(now_ms + 1e9)
    core.check()
    counts = core.report(1, now_ms).pages
    assert counts.free + counts.cached + counts.granted + counts.reserved + counts.active == counts.total


@pytest.mark.long
def test_damaged_frames_are_messages_or_violations() -> None:
    absurd, outcomes = Absurd(random.Random(3), {}), [0, 0]
    for _ in range(5_000):
        try:
            decode(absurd.frame())
            outcomes[0] += 1
        except ProtocolViolation:
            outcomes[1] += 1
    assert min(outcomes) > 500


def test_depth_is_a_violation_and_no_crash() -> None:
    for inner in (b"\x91" * 100_000, b"\x81\xa1x" * 100_000):
        with pytest.raises(ProtocolViolation):
            decode(b"\x82\xa4type\xa4Ping\xa1x" + inner + b"\x01")
