"""The law of conservation: whatever happens, workers and keys are charged with just what is in flight, after every step."""

import random
from dataclasses import dataclass, field

import pytest

from common.errors import ServingError
from common.ids import PeerId, RequestId
from common.messages.actions import Send
from common.messages.liveness import Ping, QueueCounts, Welcome
from common.messages.requests import Cancel, Generate, TokenDelta, Tokens
from common.policy.routing import Router
from gateway.core.actions import Action, Deliver, End
from gateway.core.dispatch import Dispatch
from gateway.core.inflight import Parts
from gateway.core.keys import KeyTerms
from gateway.core.prompt_tree import PromptTree
from gateway.core.recovery import RetryTerms
from gateway.core.terms import Terms
from tests.gateway.core.builders import (
    PLAIN,
    TIMEOUT_MS,
    dispatch,
    failed,
    generates,
    member,
    order,
    parts,
    peer,
    report,
)

NAMES = ("prefill-0", "prefill-1", "decode-0", "decode-1", "mixed-0")
KEYS = {"few": KeyTerms(name="few", max_inflight=3), "slow": KeyTerms(name="slow", requests_per_minute=200)}
CODES = ("busy", "peer_failed", "internal", "no_worker", "out_of_pages")
PHASES = ("prefill", "grant", "transfer", "decode")


@dataclass
class Walk:
    """A gateway between clients and workers that do anything."""

    core: Dispatch
    rng: random.Random
    now_ms: float = 0.0
    lives: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NAMES, 1))
    pinged: dict[PeerId, int] = field(default_factory=lambda: {peer(name): 1 for name in NAMES})
    wires: list[str] = field(default_factory=lambda: ["r0"])
    known: set[str] = field(default_factory=set)
    ended: list[str] = field(default_factory=list)

    def step(self) -> None:
        self.now_ms += self.rng.choice([0.0, 5.0, 50.0])
        what = self.rng.choice((*[self.submit] * 2, *[self.speak] * 4, self.fail, self.cancel, self.tick, self.restart))
        self.note(what())
        self.core.check()

    def note(self, actions: list[Action]) -> None:
        """Does what a shell does; one Generate in ten cannot be sent."""
        for action in actions:
            if isinstance(action, End) or (isinstance(action, Deliver) and action.delta.finish is not None):
                self.ended.append(action.request)
            if isinstance(action, Send) and isinstance(action.message, Ping):
                self.pinged[action.to] = action.message.sequence
        for to, generate in generates(actions):
            self.wires.append(generate.request)
            if self.rng.random() < 0.1:
                self.note(self.core.on_unsent(to, generate, self.now_ms))

    def submit(self) -> list[Action]:
        names = [f"r{len(self.known) + n}" for n in range(self.rng.choice([1, 1, 3]))]
        changes = {"key": self.rng.choice(["", "few", "slow"]), "priority": self.rng.randrange(3)}
        rule = self.rng.choice([None, None, "worker=decode-1"])
        orders = [order(name, self.rng.choice([4, 40]), decode_rule=rule, **changes) for name in names]
        try:
            actions = self.core.submit(orders, self.now_ms)
        except ServingError:
            return []  # refused: it holds nothing
        self.known.update(names)
        return actions

    def somebody(self) -> tuple[PeerId, RequestId]:
        name = self.rng.choice(NAMES)
        return peer(name, self.lives[name]), RequestId(self.rng.choice(self.wires[-6:]))

    def speak(self) -> list[Action]:
        sender, wire = self.somebody()
        finish = self.rng.choice([None, None, None, "length"])
        new = TokenDelta(wire, self.rng.randrange(3), (7,) * self.rng.randrange(3), finish)
        return self.core.on_message(sender, Tokens(deltas=(new,)), self.now_ms)

    def fail(self) -> list[Action]:
        sender, wire = self.somebody()
        code = self.rng.choice(CODES)
        said = failed(wire, code, retryable=code != "out_of_pages", phase=self.rng.choice(PHASES))
        return self.core.on_message(sender, said, self.now_ms)

    def cancel(self) -> list[Action]:
        there = sorted(self.known - set(self.ended))
        if not there:
            return []
        name = self.rng.choice(there)
        self.ended.append(name)
        return self.core.cancel(RequestId(name), self.now_ms)

    def tick(self) -> list[Action]:
        for name, life in self.lives.items():
            queue = QueueCounts(work_ms=self.rng.choice([0.0, 70.0]), waiting=1)
            sequence = self.pinged[peer(name, life)]
            self.core.on_message(peer(name, life), report(name, sequence, queue=queue), self.now_ms)
        return self.core.on_tick(self.now_ms)

    def restart(self) -> list[Action]:
        if self.rng.random() < 0.7:
            return []
        name = self.rng.choice(NAMES)
        self.lives[name] += 1
        actions = self.core.on_members([member(n, life) for n, life in self.lives.items()], self.now_ms)
        life = self.lives[name]
        return actions + self.core.on_message(peer(name, life), Welcome(member=member(name, life)), self.now_ms)


@pytest.mark.parametrize("seed", range(80))
def test_every_request_ends_exactly_once_and_nothing_is_charged_for_anything_else(seed: int) -> None:
    rng = random.Random(seed)
    core = dispatch(
        *NAMES,
        max_open=rng.choice([3, 100]),
        max_waiting=rng.choice([0, 2, 9]),
        retry=RetryTerms(attempts=rng.choice([1, 3]), wait_ms=500.0),
        router=rng.choice([PLAIN, Router()]),
        tree=PromptTree(),
        keys=KEYS,
        seed=seed,
    )
    walk = Walk(core, rng)
    for _ in range(120):
        walk.step()
    walk.now_ms += TIMEOUT_MS
    walk.note(core.on_tick(walk.now_ms))
    assert sorted(walk.ended) == sorted(walk.known)
    assert core.open_requests == 0
    core.check()


def test_what_nobody_needs_any_more_is_cancelled_and_what_is_over_is_not() -> None:
    """A worker that speaks of a request that the gateway gave up is told again; one that has finished it is not."""
    core = dispatch("mixed-0")
    for finish, told in ((None, [Cancel(request=RequestId("gone"))]), ("length", [])):
        new = TokenDelta(RequestId("gone"), 0, (7,), finish)
        actions = core.on_message(peer("mixed-0"), Tokens(deltas=(new,)), 0.0)
        assert [action.message for action in actions] == told


def test_an_entry_worker_is_free_of_a_request_at_its_first_token_and_the_decode_worker_is_not() -> None:
    core = dispatch("prefill-0", "decode-0")

    def charged() -> dict[str, int]:
        return {state.member.id: state.charged_requests for state in core.workers(0.0)}

    (action,) = core.submit([order()], 0.0)
    assert isinstance(action.message, Generate)
    assert charged() == {"prefill-0": 1, "decode-0": 1}
    core.on_message(peer("decode-0"), Tokens(deltas=(TokenDelta(RequestId("r"), 0, (7,)),)), 0.0)
    assert charged() == {"prefill-0": 0, "decode-0": 1}
    core.check()


def seen(*names: str) -> tuple[Dispatch, Parts]:
    """A gateway and what it is made of."""
    made = parts()
    core = Dispatch(made, Terms(timeout_ms=TIMEOUT_MS, max_open=9, retry=RetryTerms()), fallback=False)
    core.on_members([member(name) for name in names], 0.0)
    for name in names:
        core.on_message(peer(name), Welcome(member=member(name)), 0.0)
    return core, made


def test_a_request_that_was_handed_over_counts_once_when_its_worker_reports_it() -> None:
    core, made = seen("prefill-0", "decode-0")
    core.submit([order()], 0.0)

    def requests() -> dict[str, int]:
        return {view.id: view.requests for view in made.roster.views(600.0)}

    assert requests() == {"prefill-0": 1, "decode-0": 1}
    core.on_message(peer("decode-0"), Tokens(deltas=(TokenDelta(RequestId("r"), 0, (7,)),)), 1.0)
    core.on_tick(600.0)  # Ping 2
    core.on_message(peer("decode-0"), report("decode-0", 2, queue=QueueCounts(running=1)), 600.0)
    assert requests() == {"prefill-0": 0, "decode-0": 1}


def test_a_replay_takes_the_room_of_prompt_and_answer() -> None:
    core, made = seen("mixed-0")
    core.submit([order(prompt_tokens=4)], 0.0)
    assert made.roster.views(0.0)[0].kv_tokens == 4
    core.on_message(peer("mixed-0"), Tokens(deltas=(TokenDelta(RequestId("r"), 0, (7, 7, 7)),)), 0.0)
    core.on_message(peer("mixed-0"), failed(), 0.0)
    assert made.roster.views(0.0)[0].kv_tokens == 0
    core.on_tick(100.0)
    assert made.roster.views(100.0)[0].kv_tokens == 7
