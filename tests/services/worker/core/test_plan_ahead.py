"""Laws of planning the next step while one is in flight: the tokens stay the same, and so does who gets what."""

import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from common.block_hash import BlockHash
from common.ids import RequestId
from common.kv_layout import KvLayout
from common.messages.requests import Sampling
from common.policy.batching import DecodeFirst
from common.policy.eviction import Lru
from kvstore.index.block_pool import BlockPool
from kvstore.index.ledger import Ledger
from services.worker.core.outputs import finish_of
from services.worker.core.plan import StepPlan, StepResult
from services.worker.core.prefix import Keep, PrefixReuse
from services.worker.core.scheduler import Scheduler
from services.worker.core.sequence import NewPrompt
from tests.support.fake_engine import answer
from tests.support.world_memory import Memory, MemoryEngine

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=8, dtype="float32", block_tokens=4)
ROOT = BlockHash(bytes(16))
CONTEXT_TOKENS = 60
ENGINE = MemoryEngine(layers=2, block_tokens=4)


@dataclass
class Rig:
    """A scheduler, and an engine that computes in order and is heard of later. It tells a wrong page by a wrong token."""

    pages: int = 60
    max_running: int = 8
    max_step_tokens: int = 16
    keep: Keep = Keep.NOTHING
    ahead: bool = True
    plans: deque[StepPlan] = field(default_factory=deque)
    """Submitted to the engine, not computed."""
    results: deque[StepResult] = field(default_factory=deque)
    finished: dict[str, list[int]] = field(default_factory=dict)
    most_in_flight: int = 0
    surplus_rows: int = 0

    def __post_init__(self) -> None:
        self.pool = BlockPool(Ledger(self.pages), LAYOUT.layers, Lru())
        reuse, policy = PrefixReuse(self.pool, self.keep, LAYOUT.block_tokens), DecodeFirst(self.max_step_tokens, 4)
        self.target = Scheduler(reuse, LAYOUT, policy, max_running=self.max_running, context_tokens=CONTEXT_TOKENS)
        self.memory = Memory(LAYOUT.block_tokens)

    def submit(self, name: str, tokens: list[int], **sampling: object) -> RequestId:
        settings = Sampling(**{"max_tokens": 8, **sampling})  # type: ignore[arg-type]  # a test's keywords
        request = RequestId(name)
        self.target.submit(NewPrompt(request=request, tokens=tuple(tokens), sampling=settings, root=ROOT))
        return request

    def plan(self) -> StepPlan | None:
        plan = self.target.plan()
        if plan is None and self.ahead:
            plan = self.target.plan_ahead()
        if plan is not None:
            assert len(plan.segments) <= self.max_running
            self.plans.append(plan)
            self.most_in_flight = max(self.most_in_flight, len(self.plans) + len(self.results))
        return plan

    def compute(self) -> None:
        plan, wrong = self.plans.popleft(), set[str]()
        for layer in range(LAYOUT.layers):
            ENGINE.layer(plan, layer, self.memory, wrong)
        self.results.append(ENGINE.finish(plan, self.memory, wrong))

    def hear(self) -> None:
        step, result = self.target.step, self.results.popleft()
        assert step is not None
        self.surplus_rows += sum(self.target.sequences.get(segment.request) is None for segment in step.segments)
        for new in self.target.complete(result):
            if finish_of(new.sequence) is not None:
                self.finished[new.sequence.request] = new.sequence.tokens[new.sequence.prompt_tokens :]
                self.target.drop(new.sequence.request)

    def turn(self) -> None:
        """One step computed and heard of, the next ones planned as early as they may be."""
        while self.plan() is not None:
            pass
        self.compute()
        self.hear()

    def run(self) -> None:
        while not self.target.idle:
            self.turn()


def prompt(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(3, 900) for _ in range(tokens)]


def settled(rig: Rig) -> None:
    rig.pool.check()
    assert rig.pool.available_pages == rig.pages and rig.target.idle


# -- what follows what


def test_the_step_that_follows_computes_the_token_that_is_being_drawn() -> None:
    rig = Rig()
    rig.submit("r", [5, 6, 7, 8, 9])
    first, second = rig.plan(), rig.plan()
    assert first is not None and second is not None
    (segment,) = second.segments
    assert (segment.pending, segment.start, segment.count, segment.sample) == (True, 5, 1, True)
    assert not first.segments[0].pending
    assert segment.output_position == 1
    rig.run()
    assert rig.finished["r"] == answer([5, 6, 7, 8, 9], 8)
    settled(rig)


def test_no_third_step_is_planned_before_the_first_has_ended() -> None:
    rig = Rig()
    rig.submit("r", [5, 6, 7])
    assert rig.plan() is not None and rig.plan() is not None
    assert rig.plan() is None
    rig.compute()
    assert rig.plan() is None
    rig.hear()
    assert rig.plan() is not None


def test_steps_end_in_the_order_in_which_they_began() -> None:
    rig = Rig()
    rig.submit("r", [5, 6, 7])
    rig.plan(), rig.plan()
    with pytest.raises(ValueError, match="step 2 finished, but 1"):
        rig.target.complete(StepResult(2, (), 1.0))
    assert rig.target.step is rig.plans[0]


@pytest.mark.parametrize(("max_tokens", "follow"), [(1, False), (2, True)])
def test_who_is_certain_to_end_with_the_pending_token_is_not_planned(max_tokens: int, follow: bool) -> None:
    rig = Rig()
    rig.submit("r", [5, 6, 7], max_tokens=max_tokens)
    rig.plan()
    assert (rig.plan() is not None) is follow


@pytest.mark.parametrize(("tokens", "follow"), [(CONTEXT_TOKENS - 1, False), (CONTEXT_TOKENS - 2, True)])
def test_nothing_is_computed_behind_the_end_of_the_context(tokens: int, follow: bool) -> None:
    rig = Rig(max_step_tokens=64)
    rig.submit("r", prompt(random.Random(1), tokens), max_tokens=100)
    rig.plan()
    assert (rig.plan() is not None) is follow


def test_a_stop_token_is_noticed_one_step_late_and_its_row_is_thrown_away() -> None:
    rig = Rig()
    right = answer([5, 6, 7], 3)
    rig.submit("r", [5, 6, 7], stop_token_ids=(right[-1],))
    rig.submit("other", [9, 9, 9], max_tokens=6)
    rig.run()
    assert rig.finished == {"r": right, "other": answer([9, 9, 9], 6)}
    assert rig.surplus_rows == 1
    settled(rig)


def test_pages_of_a_stopped_sequence_stay_until_the_step_that_follows_has_ended() -> None:
    rig = Rig()
    rig.submit("r", [5, 6, 7], stop_token_ids=(answer([5, 6, 7], 1)[0],))
    rig.plan(), rig.plan()
    rig.compute()
    rig.hear()
    assert "r" in rig.finished and rig.pool.available_pages < rig.pages and not rig.target.idle
    rig.compute()
    rig.hear()
    settled(rig)


def test_a_sequence_dropped_while_two_steps_compute_it_keeps_its_pages_until_both_have_ended() -> None:
    rig = Rig()
    request = rig.submit("r", [5, 6, 7])
    rig.plan(), rig.plan()
    rig.target.drop(request)
    rig.compute()
    rig.hear()
    assert rig.pool.available_pages < rig.pages
    rig.compute()
    rig.hear()
    settled(rig)


def test_chunks_of_a_long_prompt_follow_each_other() -> None:
    rig = Rig(max_step_tokens=16)
    tokens = prompt(random.Random(2), 41)
    rig.submit("r", tokens)
    spans = []
    while "r" not in rig.finished:
        while (plan := rig.plan()) is not None:
            spans += [(one.start, one.count, one.pending) for one in plan.segments]
        rig.compute()
        rig.hear()
    assert spans[:5] == [(0, 16, False), (16, 16, False), (32, 9, False), (41, 1, True), (42, 1, True)]
    assert rig.finished["r"] == answer(tokens, 8)


def test_who_arrives_while_a_step_runs_joins_the_one_planned_after_it() -> None:
    rig = Rig()
    rig.submit("old", [5, 6, 7])
    rig.plan()
    rig.submit("new", [7, 8])
    plan = rig.plan()
    assert plan is not None and [segment.request for segment in plan.segments] == ["old", "new"]
    assert [segment.pending for segment in plan.segments] == [True, False]


def test_who_waits_for_room_gets_it_though_steps_follow_each_other_without_a_pause() -> None:
    rig = Rig(max_running=2)
    rig.submit("long", [5, 6, 7], max_tokens=50)
    rig.submit("short", [6, 7, 8], max_tokens=3)
    rig.submit("waiting", [7, 8, 9], max_tokens=3)
    while "waiting" not in rig.finished:
        rig.turn()
    assert "long" not in rig.finished


def test_what_is_set_back_between_two_steps_is_computed_again() -> None:
    rig = Rig()
    request = rig.submit("r", [5, 6, 7, 8, 9])
    rig.plan(), rig.plan()
    rig.target.spoil(request)
    rig.run()
    assert rig.finished["r"] == answer([5, 6, 7, 8, 9], 8)
    settled(rig)


# -- what waits


@pytest.mark.parametrize("max_tokens", [1, 9])
@pytest.mark.parametrize("sampling", [{"logprobs": 0}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.5}])
def test_nothing_follows_a_step_with_a_token_that_the_host_must_choose(
    sampling: dict[str, object], max_tokens: int
) -> None:
    rig = Rig()
    rig.submit("r", [5, 6, 7], max_tokens=max_tokens, **sampling)
    rig.submit("other", [5, 6, 7])
    assert rig.plan() is not None
    assert rig.plan() is None


def test_a_step_with_a_token_that_the_host_must_choose_follows_none() -> None:
    rig = Rig()
    rig.submit("r", [5, 6, 7])
    rig.plan()
    rig.submit("chosen", [5, 6, 7], logprobs=0)
    assert rig.plan() is None
    rig.run()
    assert set(rig.finished) == {"r", "chosen"}


def test_nothing_follows_or_is_followed_by_a_step_that_the_shell_hears_layer_by_layer() -> None:
    rig = Rig()
    streamed = NewPrompt(
        request=RequestId("s"), tokens=(5, 6), sampling=Sampling(max_tokens=9), root=ROOT, streamed=True
    )
    rig.submit("r", [5, 6, 7])
    rig.plan()
    rig.target.submit(streamed)
    assert rig.plan() is None
    rig.compute()
    rig.hear()
    assert rig.plan() is not None
    assert rig.plan() is None


def test_nobody_gives_way_for_a_step_that_is_planned_ahead() -> None:
    rig = Rig(pages=10)  # five blocks of four tokens: when both have nine tokens, a sixth is missing
    for name in ("old", "young"):
        rig.submit(name, [5, 6, 7, 8, 9, 10, 11], max_tokens=6)
    preempted_by = []
    while not rig.target.idle:
        for _ in range(2):
            before, running = rig.target.preemptions_total, rig.target.step
            rig.plan()
            preempted_by += [running] if rig.target.preemptions_total > before else []
        rig.compute()
        rig.hear()
    assert preempted_by == [None]  # once, with no step in flight
    assert rig.finished == dict.fromkeys(("old", "young"), answer([5, 6, 7, 8, 9, 10, 11], 6))
    settled(rig)


# -- whatever happens


@pytest.mark.parametrize(
    ("seed", "ahead"), [*((seed, True) for seed in range(24)), *((seed, False) for seed in range(4))]
)
def test_whatever_happens_the_tokens_are_those_of_the_prompt_and_every_page_comes_back(seed: int, ahead: bool) -> None:
    rng = random.Random(seed)
    rig = Rig(
        pages=rng.randrange(12, 70, 2),
        max_running=rng.randrange(1, 7),
        max_step_tokens=rng.randrange(6, 40),
        keep=rng.choice(list(Keep)),
        ahead=ahead,
    )
    shared, right, number = prompt(rng, 12), dict[str, list[int]](), 0
    while number < 24 or not rig.target.idle:
        kind = rng.choice(["arrive", "plan", "plan", "compute", "compute", "hear", "hear", "unusual"])
        if kind == "arrive" and number < 24:
            number += 1
            tokens = shared[: rng.choice([0, 0, 4, 12])] + prompt(rng, rng.randrange(1, 16))
            expected = answer(tokens, max_tokens := rng.randrange(1, 14))
            stop = rng.choice([(), (), (rng.choice(expected),)])
            if LAYOUT.pages_at_most(len(tokens), max_tokens) <= rig.pages:
                host = {"logprobs": 0} if rng.random() < 0.1 else {}
                request = rig.submit(f"r{number}", tokens, max_tokens=max_tokens, stop_token_ids=stop, **host)
                right[request] = expected[: expected.index(stop[0]) + 1] if stop else expected
        elif kind == "plan":
            rig.plan()
        elif kind == "compute" and rig.plans:
            rig.compute()
        elif kind == "hear" and rig.results:
            rig.hear()
        elif kind == "unusual" and rng.random() < 0.1 and (here := [r for r in right if rig.target.sequences.get(r)]):
            request = rng.choice(here)
            if rng.random() < 0.5:
                rig.target.drop(request)
                del right[request]
            elif rig.target.sequences[request].table.n_blocks:
                rig.target.spoil(request)
            rig.pool.check()
    assert rig.finished == right
    assert rig.most_in_flight <= (2 if ahead else 1)
    settled(rig)
