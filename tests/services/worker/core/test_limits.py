"""What an engine's buffers are sized by is never exceeded: the context, sequences in a step, the range of every number."""

import random

import msgspec
import pytest

from common.block_hash import BlockHash
from common.ids import RequestId
from common.kv_layout import KvLayout
from common.messages.handover import GrantRefused, GrantRequest
from common.messages.requests import Sampling
from common.policy.batching import DecodeFirst
from common.policy.eviction import Lru
from kvstore.index.block_pool import BlockPool
from kvstore.index.ledger import Ledger, PageState
from kvstore.index.page_table import PageTable
from services.worker.core.prefix import Keep, PrefixReuse
from services.worker.core.scheduler import Scheduler
from services.worker.core.sequence import NewPrompt, request_owner
from tests.support.fake_engine import FakeEngine, answer
from tests.support.world import GATEWAY, World

WAYS = ["prefill", "decode"]
R = RequestId("r")
SHORT = {"prefill": 32, "decode": 32}
PROMPT = list(range(3, 103))


def world(seed: int = 1, **settings: object) -> World:
    made = World(random.Random(seed), prefill_pages=400, decode_pages=400, **settings)
    made.greet()
    return made


@pytest.mark.parametrize("to", WAYS)
@pytest.mark.parametrize("emitted", [0, 2])
def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_by_the_limits_name(to: str, emitted: int) -> None:
    target = world(context_tokens=SHORT)
    target.send("r", PROMPT[: 32 - emitted], 5, to=to, emitted=tuple(range(5, 5 + emitted)))
    target.settle()
    failed = target.answers[R].failed
    assert failed is not None and (failed.code, failed.retryable) == ("invalid_request", False)
    assert "--max-context-tokens=32" in failed.text


@pytest.mark.parametrize("to", WAYS)
def test_an_answer_ends_where_the_context_does(to: str) -> None:
    target = world(context_tokens=SHORT)
    target.send("r", PROMPT[:31], 5, to=to)
    target.send("s", PROMPT[:29], 5, to=to)
    target.settle()
    assert [(len(a.tokens), a.finish) for a in target.answers.values()] == [(1, "length"), (3, "length")]


def test_a_decode_worker_that_takes_less_than_the_prefill_worker_refuses_the_grant() -> None:
    target = world(context_tokens={"decode": 32})
    target.send("r", PROMPT, 5)
    target.send("s", PROMPT[:20], 5)
    target.settle()
    failed, served = target.answers[R].failed, target.answers[RequestId("s")]
    assert failed is not None and "--max-context-tokens=32" in failed.text
    assert served.tokens == answer(served.prompt, 5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ahead", [False, True])
def test_prompts_asked_directly_and_prompts_taken_over_share_the_places_of_a_step(seed: int, ahead: bool) -> None:
    """The world checks every plan."""
    target = world(seed, max_running=3, ahead=ahead)
    for number in range(12):
        prompt = [target.rng.randrange(3, 900) for _ in range(12)]
        target.send(f"r{number}", prompt, 12, to=WAYS[number % 2])
    target.settle()
    assert all(seen.tokens == answer(seen.prompt, 12) for seen in target.answers.values())


def test_a_promised_place_is_kept_for_whoever_was_promised_it() -> None:
    scheduler, promised = _scheduler(max_running=2), [1]
    scheduler.room.count_promised(lambda: promised[0])
    for name in ("a", "b"):
        scheduler.submit(_prompt(name))
    assert (scheduler.n_running, scheduler.n_waiting) == (1, 1)
    promised[0] = 0  # it never came
    plan = scheduler.plan()
    assert plan is not None and [one.request for one in plan.segments] == ["a", "b"]


def test_sequences_that_nobody_was_promised_still_make_no_step_too_wide() -> None:
    scheduler = _scheduler(max_running=2)
    for name in ("a", "b", "c"):
        table, pool = PageTable(2), scheduler.sequences._pool
        table.append(pool.alloc(request_owner(RequestId(name)), 2, PageState.ACTIVE))
        scheduler.adopt(_prompt(name), 7, table, 0)
    plan = scheduler.plan()
    assert plan is not None and [one.request for one in plan.segments] == ["a", "b"]
    scheduler.complete(FakeEngine(layers=2, block_tokens=4).step(plan, None))
    scheduler.drop(RequestId("a"))
    plan = scheduler.plan()
    assert plan is not None and [one.request for one in plan.segments] == ["b", "c"]


def test_pages_in_quarantine_take_nobodys_place() -> None:
    target = world(max_running=1, silent_peer_ms=3_000)
    decode, prefill = target.processes["decode"], target.processes["prefill"]
    target.send("r", PROMPT[:40], 5)
    while not decode.ledger.counts().granted:
        assert target.turn()
    prefill.alive = False  # stopped, and not known to be dead
    target.cancel(R)
    target.send("s", PROMPT[:20], 5, to="decode")
    for _ in range(3_000):
        if target.answers[RequestId("s")].done:
            break
        if not target.turn():
            target.pass_time(100.0)
    assert target.answers[RequestId("s")].tokens == answer(PROMPT[:20], 5)
    assert decode.ledger.counts().quarantined


@pytest.mark.parametrize("to", WAYS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 3_000_000_000),
        ("top_k", 1_001),
        ("top_k", 0),
        ("max_tokens", 0),
        ("temperature", 1e300),
        ("temperature", float("nan")),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", 2.1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 2**63),
        ("logprobs", 21),
        ("logprobs", -1),
    ],
)
def test_a_number_that_no_gateway_sends_is_refused_by_its_name(to: str, name: str, value: float) -> None:
    target = world()
    whole = target.generate("r", PROMPT[:8], msgspec.structs.replace(Sampling(max_tokens=3), **{name: value}))
    message = msgspec.structs.replace(whole, decode=whole.decode if to == "prefill" else None)
    target.post(GATEWAY, target.processes[to].peer, message)
    target.settle()
    failed = target.answers[R].failed
    assert failed is not None and (failed.code, failed.retryable) == ("invalid_request", False)
    assert failed.text.startswith(name)


def test_a_grant_for_a_number_that_no_gateway_sends_is_refused() -> None:
    target = world()
    decode, prefill = target.processes["decode"], target.processes["prefill"]
    target.send("r", PROMPT[:8], 4)
    while not any(isinstance(m, GrantRequest) for m, _ in target.links.get((prefill.peer, decode.peer), ())):
        assert target.turn()
    request = next(m for m, _ in target.links[prefill.peer, decode.peer] if isinstance(m, GrantRequest))
    sampling = msgspec.structs.replace(request.sampling, top_k=2**31)
    hostile = msgspec.structs.replace(request, transfer="x/1", sampling=sampling)
    target.perform(decode, decode.core.on_message(prefill.peer, hostile, target.now_ms))
    refused = [m for m, _ in target.links[decode.peer, prefill.peer] if isinstance(m, GrantRefused)]
    assert [(one.code, one.text.split()[0]) for one in refused] == [("invalid_request", "top_k")]
    target.settle()


def test_the_ends_of_every_range_are_served() -> None:
    target = world()
    least = Sampling(max_tokens=2, top_k=1, repetition_penalty=0.01, presence_penalty=-2.0, logprobs=0)
    most = Sampling(max_tokens=2, top_k=1_000, temperature=2.0, min_p=1.0, seed=2**63 - 1, logprobs=20)
    for name, sampling in (("least", least), ("most", most)):
        target.post(GATEWAY, target.processes["prefill"].peer, target.generate(name, PROMPT[:8], sampling))
    target.settle()
    assert all(seen.finish == "length" for seen in target.answers.values())


def _scheduler(*, max_running: int) -> Scheduler:
    layout = KvLayout(layers=2, kv_heads=1, head_dim=8, dtype="float32", block_tokens=4)
    reuse = PrefixReuse(BlockPool(Ledger(40), 2, Lru()), Keep.NOTHING, 4)
    return Scheduler(reuse, layout, DecodeFirst(16, 4), max_running=max_running, context_tokens=1_000)


def _prompt(name: str) -> NewPrompt:
    sampling = Sampling(max_tokens=4)
    return NewPrompt(request=RequestId(name), tokens=(1, 2, 3), sampling=sampling, root=BlockHash(bytes(16)))
