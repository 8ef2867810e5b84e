"""Real workers and a real store hear strangers and lying members while they work: answers stay right, nothing is held, all live on."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from common.ids import PeerId
from common.messages import encode
from common.net.sockets import Exchange
from kvstore.server.core import reads
from services.worker.core import lender, lookups
from tests.hostile.absurd import Absurd
from tests.hostile.liar import SPOKEN, Liar
from tests.parity.caching import Answers
from tests.support.driver import Driver
from tests.support.storm import Watch, require_nothing_held, watching
from tests.support.threads import ThreadCluster, thread_cluster

pytestmark = pytest.mark.system

STORE, PREFILL, DECODE = "kvstore-0", "prefill-0", "decode-0"
N_TOKENS = 8
ROUNDS = 6


@dataclass
class Scene:
    """The processes, their user, and what was said between them."""

    workers: ThreadCluster
    driver: Driver
    watch: Watch
    answers: Answers

    def ask(self, number: int) -> Any:
        prompt = self.answers.prompt(40 + 7 * (number % 3), "real", number % 3)
        way = {"to": PREFILL, "decode": DECODE} if number % 2 else {"to": DECODE, "decode": None}
        return self.driver.send(way["to"], prompt, decode=way["decode"], max_tokens=N_TOKENS), prompt  # type: ignore[arg-type]

    def require_right(self, asked: list[Any]) -> None:
        outcomes = self.driver.finish([request for request, _ in asked], timeout_s=12.0)
        for outcome, (_, prompt) in zip(outcomes, asked, strict=True):
            assert outcome.failed is None, outcome.failed
            assert outcome.tokens == self.answers.to(prompt)[:N_TOKENS]

    def known(self) -> dict[str, list[Any]]:
        """What stands in messages that were said, and who is there."""
        found: dict[str, list[Any]] = {"request": list(self.driver.outcomes), "prompt": [tuple(range(8, 60))]}
        for message in list(self.watch.said)[-60:]:
            for name in message.__struct_fields__:
                found.setdefault(name, []).append(getattr(message, name))
        members = self.workers.members().values()
        found |= {"epoch": [member.incarnation for member in members], "decode": [DECODE, "prefill-9", "decode-9"]}
        return found

    def counter(self, name: str) -> float:
        return sum(report.counters.get(name, 0.0) for report in self.driver.reports.values())

    def require_as_at_the_start(self) -> None:
        """Nothing held, everybody answers, and who serves can still be asked everything."""
        self.driver.until_all_free()
        require_nothing_held(self.driver)
        self.require_right([self.ask(number) for number in range(4)])
        self.driver.until_all_free()
        assert set(self.workers.members()) >= {STORE, PREFILL, DECODE}


@contextmanager
def short_leases() -> Iterator[None]:
    """What a stranger pinned is free again within a second."""
    with ExitStack() as stack:
        for module, name in ((lookups, "_LEASE_MS"), (lender, "_LONGEST_LEASE_MS"), (reads, "MAX_LEASE_MS")):
            stack.enter_context(patch.object(module, name, 1_000))
        yield


@pytest.fixture(scope="module")
def scene(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    answers = Answers(tiny_model("llama"))
    folder = tmp_path_factory.mktemp("loops")
    with short_leases(), thread_cluster(folder) as workers, watching() as watch, Driver([]) as driver:
        driver.add(workers.start("kvstore", STORE, host_memory="4MiB"))
        for name in (DECODE, PREFILL):
            common = {"model": answers.folder, "dtype": "float32", "device_memory": "4MiB", "fetch": "always"}
            driver.add(workers.start(name.partition("-")[0], name, **common))
        driver.until_reported(lambda: len(driver.reports[PREFILL].transports) >= 2, "they are connected")
        yield Scene(workers, driver, watch, answers)


def test_a_stranger_talks_into_real_traffic(scene: Scene) -> None:
    chance = random.Random(1)
    bad_frames = scene.counter("bad_frames_total")
    stranger = Exchange(PeerId("stranger@1"), None)
    peers = [PeerId(f"{one.id}@{one.incarnation:016x}") for one in scene.workers.members().values()]
    for peer, member in zip(peers, scene.workers.members().values(), strict=True):
        stranger.dial(peer, member.endpoint)
    try:
        for number in range(ROUNDS):
            asked = [scene.ask(2 * number), scene.ask(2 * number + 1)]
            absurd = Absurd(chance, scene.known())
            for _ in range(120):
                frames = [encode(absurd.message(SPOKEN)), b"\0" * chance.choice((0, 1, 5000))]
                stranger._send_frames(chance.choice(peers), frames)
                stranger._send_frames(chance.choice(peers), [chance.randbytes(chance.randrange(200))])
            stranger.receive(0)
            scene.require_right(asked)
    finally:
        stranger.close()
    scene.require_as_at_the_start()
    assert scene.counter("bad_frames_total") > bad_frames, "nothing was heard"


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_member_that_lies_about_everything_but_itself_spoils_no_answer_and_leaves_nothing(
    role: str, scene: Scene
) -> None:
    workers, chance = scene.workers, random.Random(role)
    members = workers.members()
    liar = Liar(members[f"{role}-0"], f"{role}-9", chance)
    violations = scene.counter("protocol_violations_total")
    liar.join(workers.registry, members.values())
    try:
        for number in range(ROUNDS):
            asked = [scene.ask(2 * number), scene.ask(2 * number + 1)]
            liar.lie(90, scene.known(), list(scene.watch.said)[-40:])
            liar.babble(20, scene.known())
            liar.hear()
            scene.require_right(asked)
    finally:
        liar.leave(workers.registry)
    assert len(liar.said) > 15 and min(liar.said.values()) > 0
    scene.require_as_at_the_start()
    assert scene.counter("protocol_violations_total") > violations, "nobody noticed"
