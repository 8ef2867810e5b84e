"""Laws of the scheduler: who runs, who gives way, and that every page comes back."""

import random

import pytest

from common.block_hash import BlockHash
from common.ids import RequestId
from common.kv_layout import KvLayout
from common.messages.requests import Sampling
from common.policy.batching import DecodeFirst
from common.policy.eviction import Lru
from kvstore.index.block_pool import BlockPool
from kvstore.index.ledger import Ledger
from services.worker.core.prefix import Keep, PrefixReuse
from services.worker.core.scheduler import Scheduler
from services.worker.core.sequence import NewPrompt
from tests.support.fake_engine import FakeEngine, answer

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=8, dtype="float32", block_tokens=4)
ROOT = BlockHash(bytes(16))
ENGINE = FakeEngine(layers=2, block_tokens=4)


def scheduler(
    pages: int = 40, *, max_running: int = 8, max_step_tokens: int = 16, keep: Keep = Keep.NOTHING
) -> tuple[Scheduler, Ledger]:
    ledger = Ledger(pages)
    reuse = PrefixReuse(BlockPool(ledger, LAYOUT.layers, Lru()), keep, LAYOUT.block_tokens)
    policy = DecodeFirst(max_step_tokens, 4)
    return Scheduler(reuse, LAYOUT, policy, max_running=max_running, context_tokens=1_000), ledger


def submit(target: Scheduler, name: str, prompt: int, max_tokens: int = 4) -> RequestId:
    request = RequestId(name)
    tokens = tuple(range(1, prompt + 1))
    target.submit(NewPrompt(request=request, tokens=tokens, sampling=Sampling(max_tokens=max_tokens), root=ROOT))
    return request


def run(target: Scheduler, finished: dict[str, list[int]], *, steps: int = 10_000) -> None:
    """Step until nothing is left to do; a sequence ends after max_tokens."""
    for _ in range(steps):
        plan = target.plan()
        if plan is None:
            return
        for new in target.complete(ENGINE.step(plan, None)):
            if new.sequence.generated_tokens == new.sequence.sampling.max_tokens:
                finished[new.sequence.request] = new.sequence.tokens[new.sequence.prompt_tokens :]
                target.drop(new.sequence.request)
    raise AssertionError("still working after the step limit")


def test_a_prompt_advances_though_no_step_has_room_for_a_whole_block() -> None:
    target, _ = scheduler(pages=200, max_step_tokens=3)
    submit(target, "long", 30)
    submit(target, "short", 1, max_tokens=40)
    finished: dict[str, list[int]] = {}
    run(target, finished, steps=60)
    assert {"long", "short"} == set(finished)
    assert finished["long"] == answer(tuple(range(1, 31)), 4)


def test_decoding_sequences_get_a_token_in_every_step_while_a_long_prompt_is_chunked() -> None:
    target, _ = scheduler(pages=200)
    submit(target, "short", 3, max_tokens=50)
    target.complete(ENGINE.step(target.plan(), None))
    submit(target, "long", 60)
    for _ in range(4):
        plan = target.plan()
        assert plan.segments[0].request == "short" and plan.segments[0].count == 1
        assert plan.segments[1].request == "long" and plan.segments[1].count > 1
        assert plan.n_tokens <= 16
        target.complete(ENGINE.step(plan, None))


def test_unfinished_chunks_end_at_block_borders() -> None:
    target, _ = scheduler(pages=200)
    submit(target, "a", 2, max_tokens=50)
    target.complete(ENGINE.step(target.plan(), None))
    submit(target, "long", 61)
    ends = []
    while (plan := target.plan()) and len(ends) < 6:
        ends += [s.start + s.count for s in plan.segments if s.request == "long" and not s.sample]
        target.complete(ENGINE.step(plan, None))
    assert ends and all(end % 4 == 0 for end in ends)


def test_the_youngest_gives_way_when_pages_run_out_and_nobody_loses_a_token() -> None:
    target, ledger = scheduler(pages=20)  # ten blocks of four tokens over both layers
    finished: dict[str, list[int]] = {}
    for name in ("old", "middle", "young"):
        submit(target, name, 8, max_tokens=16)
    run(target, finished)
    assert target.preemptions_total > 0
    assert list(finished) == ["old", "middle", "young"]
    assert all(tokens == answer(list(range(1, 9)), 16) for tokens in finished.values())
    assert ledger.counts().free == 20


def test_a_sequence_dropped_in_mid_step_keeps_its_pages_until_the_step_is_done() -> None:
    target, ledger = scheduler()
    request = submit(target, "a", 8)
    plan = target.plan()
    target.drop(request)
    assert ledger.free_pages < 40
    assert target.complete(ENGINE.step(plan, None)) == []
    assert ledger.free_pages == 40 and target.idle


def test_held_pages_outlive_their_sequence() -> None:
    target, ledger = scheduler()
    request = submit(target, "a", 8)
    target.sequences.hold(request)
    target.complete(ENGINE.step(target.plan(), None))
    target.drop(request)
    assert ledger.free_pages < 40
    target.sequences.unhold(request)
    assert ledger.free_pages == 40 and target.idle


def test_waiting_sequences_start_in_the_order_they_came() -> None:
    target, _ = scheduler(pages=200, max_running=1)
    finished: dict[str, list[int]] = {}
    for name in ("a", "b", "c"):
        submit(target, name, 5)
    run(target, finished)
    assert list(finished) == ["a", "b", "c"]


def test_a_request_that_could_never_fit_is_known_beforehand() -> None:
    assert LAYOUT.pages_at_most(12, 5) == 8
    assert LAYOUT.pages_at_most(12, 6) > 8


@pytest.mark.parametrize("seed", range(60))
def test_everything_admitted_finishes_with_the_right_tokens_whatever_the_sizes(seed: int) -> None:
    rng = random.Random(seed)
    pages = rng.randrange(8, 60, 2)
    target, ledger = scheduler(pages, max_running=rng.randrange(1, 6), max_step_tokens=rng.randrange(6, 40))
    finished: dict[str, list[int]] = {}
    prompts: dict[str, int] = {}
    for number in range(12):
        prompt, max_tokens = rng.randrange(1, 20), rng.randrange(1, 12)
        if LAYOUT.pages_at_most(prompt, max_tokens) > pages:
            continue
        prompts[submit(target, f"r{number}", prompt, max_tokens)] = prompt
        if rng.random() < 0.5 and (plan := target.plan()):
            target.complete(ENGINE.step(plan, None))
            for request in list(prompts):
                sequence = target.sequences.get(request)
                if sequence is not None and (
                    rng.random() < 0.1 or sequence.generated_tokens >= sequence.sampling.max_tokens
                ):
                    target.drop(request)
                    del prompts[request]
        ledger.check()
    run(target, finished)
    assert set(finished) == set(prompts)
    for request, prompt in prompts.items():
        assert finished[request] == answer(list(range(1, prompt + 1)), len(finished[request]))
    assert ledger.free_pages == pages
    ledger.check()


@pytest.mark.parametrize("spare_pages", [8, 0])
def test_a_block_is_given_before_it_is_needed_only_if_one_is_free(spare_pages: int) -> None:
    reuse = PrefixReuse(BlockPool(Ledger(4 + spare_pages), 2, Lru()), Keep.NOTHING, 4, lead_tokens=2)
    target = Scheduler(reuse, LAYOUT, DecodeFirst(16, 4), max_running=8, context_tokens=1_000)
    request = submit(target, "one", 5, max_tokens=4)
    tables = []
    for _ in range(4):
        plan = target.plan()
        assert plan is not None
        tables.append(plan.segments[0].table.n_blocks)
        target.complete(ENGINE.step(plan, None))
    assert (
        tables == [2] * 4
    )  # 5 + 4 tokens, of which the last is never computed, fill two blocks: no third one is ever needed
    target.drop(request)
    submit(target, "other", 5, max_tokens=30)
    plan = target.plan()
    assert plan is not None and plan.segments[0].table.n_blocks == 2
    target.complete(ENGINE.step(plan, None))
    plan = target.plan()
    assert plan is not None and plan.segments[0].table.n_blocks == (3 if spare_pages else 2)
