"""A worker asks and fetches only where that is predicted to be faster than computing; what it fetches teaches it."""

import pytest

from common.cost.step_cost import StepCost
from common.ids import PeerId, RequestId
from common.messages.actions import Send
from common.messages.blocks import Find, Found, Release
from services.worker.core.calls import Calls
from services.worker.core.fetch_costs import FetchCosts, slowest
from services.worker.core.lookups import Lookups, Question, Wanted
from services.worker.core.neighbours import BlockLink

COST = StepCost(1.0, 0.01, 0.0, 0.1, 0.0, chunk_tokens=512, n_samples=9)
"""A block of 16 tokens costs 0.16 ms beside the steps; ten of them 1.6 ms."""
R = RequestId("r")
STORE = BlockLink(PeerId("kvstore-0@1"), True, 1_000, True, 1e8)
WORKER = BlockLink(PeerId("prefill-1@1"), True, 1_000, False, 1e8)
NAMES = tuple(bytes([n]) * 16 for n in range(10))


def costs(cost: StepCost | None = COST, *, always: bool = False) -> FetchCosts:
    return FetchCosts(lambda: cost, 16, always=always)


def lookups(judge: FetchCosts) -> Lookups:
    return Lookups(Calls(), judge, layers=1)


def ask(target: Lookups, *links: BlockLink, now_ms: float = 0.0) -> list[Send]:
    questions = [Question(link, NAMES) for link in links]  # type: ignore[arg-type]  # names of tests
    actions = target.look_up(Wanted(R, 400, 0), questions, now_ms)
    return [action for action in actions if isinstance(action, Send)]


def found(call: int, n_blocks: int, tier: str = "host") -> Found:
    rows = tuple((page,) for page in range(n_blocks))
    return Found(call=call, n_blocks=n_blocks, pages=rows, tiers=(tier,) * n_blocks, lease_ms=10_000)


def make_slow(judge: FetchCosts, link: BlockLink, tier: str, now_ms: float = 0.0) -> None:
    for _ in range(20):
        judge.asked(link, tier, 1_000, now_ms)
        judge.came(link, tier, 1_000, 1_000.0, now_ms)


def test_a_place_that_was_found_too_slow_is_not_asked_and_later_it_is_again() -> None:
    judge = costs()
    make_slow(judge, STORE, "host")
    assert ask(lookups(judge), STORE) == []
    assert [type(send.message) for send in ask(lookups(judge), STORE, now_ms=600_000.0)] == [Find]


def test_a_place_whose_loads_fail_is_not_asked_any_more_and_later_it_is_again() -> None:
    judge, asked = costs(), []
    for _ in range(10):
        asked.append(len(ask(lookups(judge), WORKER)))
        judge.asked(WORKER, "device", 10_000, 0.0)
        judge.ended(WORKER, "device", 10_000, 0.0, ok=False)
    assert asked[:2] == [1, 1] and asked[-1] == 0
    assert [type(send.message) for send in ask(lookups(judge), WORKER, now_ms=600_000.0)] == [Find]


def test_a_slow_worker_leaves_the_store_to_ask() -> None:
    judge = costs()
    make_slow(judge, WORKER, "device")
    assert [send.to for send in ask(lookups(judge), WORKER, STORE)] == [STORE.peer]


@pytest.mark.parametrize(("cost", "always"), [(None, False), (COST, True)])
def test_who_knows_no_cost_or_is_told_not_to_ask_fetches_over_any_link(cost: StepCost | None, always: bool) -> None:
    judge = costs(cost, always=always)
    make_slow(judge, STORE, "host")
    assert len(ask(lookups(judge), STORE)) == 1


def test_what_was_found_in_a_slow_tier_is_given_back() -> None:
    judge = costs()
    make_slow(judge, STORE, "disk")
    target = lookups(judge)
    ask(target, STORE)
    assert target.on_found(STORE.peer, found(1, 10, "disk"), 1.0) == [Send(STORE.peer, Release(call=1))]
    assert target.take(R) is None and target.n_open == 0


@pytest.mark.parametrize("n_blocks", [0, 2, 10])
def test_what_was_found_and_is_worth_the_copy_is_kept(n_blocks: int) -> None:
    target = lookups(costs())
    ask(target, STORE)
    target.on_found(STORE.peer, found(1, n_blocks), 1.0)
    kept = target.take(R)
    assert (0 if kept is None else kept.end_block) == n_blocks
    assert target.settled(R)


def test_the_time_to_an_answer_is_the_links_delay() -> None:
    judge = costs()
    for now_ms in range(0, 4_000, 100):
        target = lookups(judge)
        ask(target, WORKER, now_ms=float(now_ms))
        target.on_found(WORKER.peer, found(1, 10, "device"), now_ms + 0.5)
    (link,) = judge.links(4_000.0)
    assert (link.peer, link.tier) == (WORKER.peer, "device")
    assert link.delay_ms == pytest.approx(0.5, rel=0.1)


def test_by_message_the_rate_does_not_pay_for_the_delay() -> None:
    far = BlockLink(WORKER.peer, False, 1_000, False, 0.0)
    judge = costs()
    for now_ms in range(0, 4_000, 100):
        judge.answered(far, "device", 10.0, now_ms)
        judge.asked(far, "device", 10_000, now_ms)
        judge.arrived(far, "device", 10_000, now_ms, now_ms + 20.0)  # of which 10 are the way there and back
    (link,) = judge.links(4_000.0)
    assert link.bytes_per_s == pytest.approx(1e6, rel=0.1)


@pytest.mark.parametrize(
    ("tiers", "tier"),
    [((), "device"), (("device", "host"), "host"), (("disk", "host"), "disk"), (("device",), "device")],
)
def test_a_run_is_as_slow_as_its_slowest_part(tiers: tuple[str, ...], tier: str) -> None:
    assert slowest(tiers) == tier
