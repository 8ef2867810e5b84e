"""Laws of placing: what a choice sees, what it tells the workers, and what is remembered of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from common.block_hash import BlockHash, hash_blocks, root_hash
from common.cost.link_cost import LinkCost
from common.cost.step_cost import UNKNOWN_COST, StepCost
from common.ids import PeerId, RequestId, WorkerId
from common.messages.liveness import PageCounts, QueueCounts, Welcome
from common.messages.requests import FetchHint, TokenDelta, Tokens
from common.policy.holdings import Held
from common.policy.routing import Router
from gateway.core.actions import Action, Routed
from gateway.core.inflight import Parts
from gateway.core.placed import Placed
from gateway.core.placement import token_bytes
from gateway.core.recovery import RetryTerms
from tests.gateway.core.builders import (
    dispatch,
    failed,
    generates,
    member,
    order,
    parts,
    peer,
    report,
    tokens,
)
from tests.gateway.model import identity

APART = Router(local_prefill_tokens=0, fallback=False)
STEP = StepCost(0.0, 1.0, 0.0, 1.0, 0.0, chunk_tokens=512)
"""A token a millisecond, a row of a decoding step a millisecond."""


@dataclass
class Told:
    """A tree that holds what a test says, and remembers what it is told."""

    runs: dict[PeerId, int] = field(default_factory=dict)
    in_sync: bool = True
    expected: list[tuple[PeerId, Sequence[BlockHash]]] = field(default_factory=list)
    forgotten: list[PeerId] = field(default_factory=list)

    def synced(self, now_ms: float) -> bool:
        return self.in_sync

    def match(self, names: Sequence[BlockHash]) -> "Told":
        return self

    def held(self, worker: PeerId, store: PeerId | None) -> Held:
        return Held(self.device_run(worker))

    def device_run(self, peer: PeerId) -> int:
        return self.runs.get(peer, 0)

    def expect(self, peer: PeerId, names: Sequence[BlockHash], now_ms: float) -> None:
        self.expected.append((peer, list(names)))

    def forget(self, peer: PeerId) -> None:
        self.forgotten.append(peer)


def placed(actions: list[Action]) -> Placed:
    (routed,) = [action for action in actions if isinstance(action, Routed)]
    return routed.placed


def ready(*names: str, router: Router = APART, **options: object) -> Parts:
    """A roster of workers that cost STEP, and what places on it."""
    made = parts(router=router, **options)  # type: ignore[arg-type]  # a builder
    made.roster.on_members([member(name) for name in names], 0.0)
    for name in names:
        made.roster.on_message(peer(name), Welcome(member=member(name)), 0.0)
        made.roster.on_message(peer(name), report(name, cost=STEP), 0.0)
    return made


def test_what_was_sent_is_load_until_it_is_computed() -> None:
    core = dispatch("mixed-0", router=APART)
    own_ms = UNKNOWN_COST.exec_ms(100, 0)

    def predicted_ms(name: str) -> float:
        return placed(core.submit([order(name, 100, explain=True)], 0.0)).predicted_ms

    assert [predicted_ms("a"), predicted_ms("b")] == pytest.approx([own_ms, 2 * own_ms])
    core.on_message(peer("mixed-0"), tokens(0, 7, request="a"), 0.0)
    assert predicted_ms("c") == pytest.approx(2 * own_ms), "a only decodes now"


def test_one_long_prompt_counts_as_much_as_the_short_ones_that_it_is_as_long_as() -> None:
    core = dispatch("prefill-0", "prefill-1", "decode-0", router=APART)
    ((busy, _),) = generates(core.submit([order("long", 400)], 0.0))
    assert busy not in [generates(core.submit([order(f"r{n}", 50)], 0.0))[0][0] for n in range(4)]


def test_a_longer_prefix_elsewhere_is_named_to_the_worker_that_shall_fetch_it() -> None:
    holder, idle = peer("prefill-0"), peer("prefill-1")
    core = dispatch("prefill-0", "prefill-1", "decode-0", router=APART, tree=Told({holder: 20}))
    core.on_message(holder, report("prefill-0", queue=QueueCounts(work_ms=1e5)), 0.0)
    core.on_message(idle, report("prefill-1", links=(LinkCost(holder, "device", 1e12, 0.0),)), 0.0)
    ((to, generate),) = generates(core.submit([order("r", 400)], 0.0))
    assert (to, generate.fetch) == (idle, FetchHint(holder=holder, n_blocks=20))
    assert core.counters()["fetch_hints_total"] == 1


def test_a_tokens_kv_is_keys_and_values_of_every_head_in_every_layer() -> None:
    model = identity(layers=3, kv_heads=2, head_dim=8, dtype="float32", block_tokens=16)
    assert token_bytes(model) == 3 * 2 * (2 * 8) * 4


def test_both_workers_are_expected_to_hold_what_they_lack_of_the_prompt() -> None:
    tree = Told({peer("prefill-0"): 3, peer("decode-0"): 1})
    core = dispatch("prefill-0", "decode-0", router=APART, tree=tree)
    core.submit([order("r", 80)], 0.0)
    names = hash_blocks((1,) * 80, root_hash(identity()), 16)
    assert tree.expected == [(peer("prefill-0"), names[3:]), (peer("decode-0"), names[1:])]


def test_what_a_dead_worker_cached_is_forgotten() -> None:
    tree = Told()
    core = dispatch("mixed-0", "mixed-1", tree=tree)
    core.on_members([member("mixed-0", 2), member("mixed-1")], 1.0)
    assert tree.forgotten == [peer("mixed-0")]


@pytest.mark.parametrize("in_sync", [True, False])
def test_choices_without_the_tree_are_counted(in_sync: bool) -> None:
    core = dispatch("mixed-0", tree=Told(in_sync=in_sync))
    found = placed(core.submit([order(explain=True)], 0.0))
    assert (found.degraded, "degraded_routes_total" in core.counters()) == (not in_sync, not in_sync)


@pytest.mark.parametrize("names", [("prefill-0", "decode-0"), ("decode-0",)])
def test_a_replay_is_placed_as_the_longer_prompt_with_the_shorter_answer_that_it_is(names: tuple[str, ...]) -> None:
    made = ready(*names, router=Router(local_prefill_tokens=0))
    replay = made.placement.place(order(max_tokens=10), [1] * 6, frozenset(), 0.0)
    whole = made.placement.place(order(prompt_tokens=10, max_tokens=4), [], frozenset(), 0.0)
    assert replay == whole


def test_the_work_of_a_local_prefill_is_the_prompt_and_not_the_answer() -> None:
    made = ready("decode-0", router=Router())
    found = made.placement.place(order(prompt_tokens=100, max_tokens=50), [], frozenset(), 0.0)
    assert (found.work_ms, found.predicted_ms) == (100.0, 100.0)


def test_a_prediction_counts_the_wait_for_room_on_the_decode_worker() -> None:
    made = ready("prefill-0", "decode-0")
    full = report("decode-0", pages=PageCounts(total=100), queue=QueueCounts(running=1, kv_tokens=1000), cost=STEP)
    made.roster.on_message(peer("decode-0"), full, 0.0)
    found = made.placement.place(order(prompt_tokens=100), [], frozenset(), 0.0)
    assert found.route.decode_choice is not None
    assert found.predicted_ms == 100.0 + found.route.decode_choice.chosen.queued_ms > 100.0


def test_a_session_stays_on_one_worker_however_busy_others_are_not() -> None:
    core = dispatch(*[f"mixed-{n}" for n in range(4)], router=replace(APART, prefill="session", gate=1e9))
    assert len({generates(core.submit([order(f"r{n}", session="s")], 0.0))[0][0] for n in range(12)}) == 1


def test_rules_that_a_client_names_reach_the_router() -> None:
    core = dispatch("prefill-0", "prefill-1", "decode-0", "decode-1", router=APART)
    wish = {"prefill_rule": "worker=prefill-1", "decode_rule": "worker=decode-1"}
    sent = [generates(core.submit([order(f"r{n}", **wish)], 0.0))[0] for n in range(4)]
    assert {(to, generate.decode) for to, generate in sent} == {(peer("prefill-1"), "decode-1")}


def test_avoided_workers_are_taken_when_nobody_else_is_there() -> None:
    made = ready("mixed-0", "mixed-1")

    def entry(*avoid: str) -> str:
        return made.placement.place(order(), [], frozenset(map(WorkerId, avoid)), 0.0).entry_worker

    assert entry("mixed-0") == "mixed-1"
    assert entry("mixed-1") == "mixed-0"
    assert entry("mixed-0", "mixed-1") in ("mixed-0", "mixed-1")


@pytest.mark.parametrize(
    ("code", "elsewhere"), [("no_worker", True), ("peer_failed", True), ("busy", False), ("internal", False)]
)
def test_whom_an_entry_worker_could_not_reach_is_avoided_together_with_it(code: str, elsewhere: bool) -> None:
    names = ("prefill-0", "prefill-1", "decode-0", "decode-1")
    core = dispatch(*names, router=replace(APART, decode="session"), retry=RetryTerms())
    ((first, generate),) = generates(core.submit([order(session="s")], 0.0))
    core.on_message(first, failed(code=code), 1.0)
    ((second, again),) = generates(core.on_tick(100.0))
    assert second != first
    assert (again.decode != generate.decode) == elsewhere


def test_everybody_who_has_failed_a_request_since_its_last_token_is_avoided() -> None:
    core = dispatch("mixed-0", "mixed-1", "mixed-2", router=replace(APART, prefill="session"), retry=RetryTerms())
    tried, now_ms = [], 0.0
    sent = generates(core.submit([order(session="s")], 0.0))
    while len(tried) < 3:
        ((to, generate),) = sent
        tried.append(to)
        core.on_message(to, failed(generate.request), now_ms)
        now_ms += 200.0
        sent = generates(core.on_tick(now_ms))
    assert len(set(tried)) == 3
    ((to, generate),) = sent
    core.on_message(to, tokens(0, 7, request=generate.request), now_ms)
    core.on_message(to, failed(generate.request), now_ms)
    ((again, _),) = generates(core.on_tick(now_ms + 200.0))
    assert again in set(tried) - {to}, "only the last one counts now"


@pytest.mark.parametrize("took_ms", [20.0, 20_000.0])
def test_predictions_are_compared_with_what_came(took_ms: float) -> None:
    core = dispatch("mixed-0", router=APART, tree=Told({peer("mixed-0"): 2}))
    predicted_ms = placed(core.submit([order("r", 100, explain=True)], 5.0)).predicted_ms
    delta = TokenDelta(RequestId("r"), 0, (7,), cached_tokens=48)
    core.on_message(peer("mixed-0"), Tokens(deltas=(delta,)), 5.0 + took_ms)
    core.on_message(peer("mixed-0"), tokens(1, 7), 15.0 + took_ms)
    assert core.counters() == {
        "routed_total{rule=predicted-time,side=prefill}": 1,
        "gated_workers_total{side=prefill}": 0,
        "first_tokens_total": 1,
        "predicted_ms_total": predicted_ms,
        "actual_ms_total": took_ms,
        "prediction_error_ms_total": abs(predicted_ms - took_ms),
        "predicted_hit_tokens_total": 32,
        "actual_hit_tokens_total": 48,
        "hit_prediction_error_tokens_total": 16,
    }
