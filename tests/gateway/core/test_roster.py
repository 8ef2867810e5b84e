"""Laws of the workers that a gateway knows."""

import msgspec
import pytest

from common.cost.link_cost import LinkCost
from common.cost.step_cost import UNKNOWN_COST, StepCost
from common.errors import NoWorker, UnknownWorker
from common.ids import Incarnation, PeerId, RequestId, WorkerId, peer_id
from common.messages.actions import Dial, HangUp, Send
from common.messages.liveness import (
    Drain,
    Hello,
    Member,
    PageCounts,
    Ping,
    QueueCounts,
    Refused,
    Report,
    TransportReport,
    Welcome,
)
from common.messages.resizing import Resize
from gateway.core.actions import Note
from gateway.core.roster import Fit, Roster, RosterStep
from tests.gateway.model import NAME, VOCAB_TOKENS, identity

THIS = Member(id=WorkerId("gateway-0"), role="gateway", incarnation=Incarnation(9), endpoint="", host="", pid=0)


def roster() -> Roster:
    return Roster(this=THIS, silent_ms=3000.0, fit=Fit(NAME, VOCAB_TOKENS))


def member(incarnation: int = 1, role: str = "mixed", **model: object) -> Member:
    return Member(
        id=WorkerId("w"),
        role=role,
        incarnation=Incarnation(incarnation),
        endpoint="tcp://w",
        host="h",
        pid=1,
        model=identity(**model),
    )


W = peer_id(WorkerId("w"), Incarnation(1))


def member_named(name: str, role: str = "mixed") -> Member:
    return Member(
        id=WorkerId(name),
        role=role,
        incarnation=Incarnation(1),
        endpoint="tcp://v",
        host="h",
        pid=1,
        model=identity(),
    )


def report(
    sequence: int = 1,
    *,
    draining: bool = False,
    work_ms: float = 0.0,
    waiting: int = 0,
    pages: PageCounts | None = None,
    recallable_pages: int = 0,
) -> Report:
    return Report(
        worker=WorkerId("w"),
        role="mixed",
        incarnation=Incarnation(1),
        sequence=sequence,
        pages=pages or PageCounts(),
        recallable_pages=recallable_pages,
        queue=QueueCounts(work_ms=work_ms, waiting=waiting),
        draining=draining,
    )


def ready() -> Roster:
    one = roster()
    one.on_members([member()], 0.0)
    one.on_message(W, Welcome(member=member()), 0.0)
    return one


def condition(one: Roster, now_ms: float = 0.0) -> str:
    (state,) = one.states(now_ms)
    return state.condition


def pings(step: RosterStep) -> list[PeerId]:
    return [action.to for action in step.actions if isinstance(action, Send) and isinstance(action.message, Ping)]


def test_a_new_worker_is_dialled_once_and_greeted() -> None:
    one = roster()
    assert one.on_members([member()], 0.0).actions == [Dial(W, "tcp://w"), Send(W, Hello(member=THIS))]
    assert one.on_members([member()], 500.0).actions == []
    assert condition(one) == "connecting"


def test_gateways_are_not_dialled() -> None:
    assert roster().on_members([member(role="gateway"), THIS], 0.0).actions == []


def test_a_worker_is_ready_when_it_welcomed_us_and_pinged_every_half_second() -> None:
    one = ready()
    assert condition(one) == "ready"
    sent = []
    for now_ms in range(0, 2001, 100):
        one.on_message(W, report(), float(now_ms))
        sent += [now_ms] * len(pings(one.on_tick(float(now_ms))))
    assert sent == [500, 1000, 1500, 2000]


def test_a_silent_worker_is_lost_and_dialled_again_when_it_is_still_listed() -> None:
    one = ready()
    lost = [found for now_ms in range(0, 3200, 100) for found in one.on_tick(float(now_ms)).lost]
    assert [found.peer for found in lost] == [W]
    assert one.states(3200.0) == []
    assert Dial(W, "tcp://w") in one.on_members([member()], 3300.0).actions


def test_a_gateway_that_was_stopped_itself_does_not_bury_its_workers() -> None:
    one = ready()
    one.on_tick(100.0)
    step = one.on_tick(20_000.0)
    assert step.lost == []
    assert pings(step) == [W]
    assert condition(one, 20_000.0) == "ready"


def test_a_newer_incarnation_replaces_the_older() -> None:
    one = ready()
    step = one.on_members([member(incarnation=2)], 100.0)
    assert [found.peer for found in step.lost] == [W]
    new = peer_id(WorkerId("w"), Incarnation(2))
    assert step.actions[0] == HangUp(W)
    assert Dial(new, "tcp://w") in step.actions


def test_a_worker_missing_from_the_membership_serves_on_for_a_grace_time() -> None:
    one = ready()
    one.on_members([], 1000.0)
    assert condition(one, 3900.0) == "ready"
    assert condition(one, 4100.0) == "leaving"
    one.on_members([member()], 4200.0)
    assert condition(one, 4200.0) == "ready"


def test_a_worker_with_another_model_is_known_but_not_used() -> None:
    for model, words in (({"name": "other"}, "'other'"), ({"vocab_tokens": 7}, "7 token ids")):
        one = roster()
        one.on_members([member(**model)], 0.0)
        one.on_message(W, Welcome(member=member(**model)), 0.0)
        assert condition(one) == "misfit"
        assert words in one.states(0.0)[0].text
        assert not one.views(0.0)[0].accepting


def test_a_refusal_is_kept_for_people_to_read() -> None:
    one = roster()
    one.on_members([member()], 0.0)
    one.on_message(W, Refused(text="dtype: a here, b there"), 0.0)
    assert (condition(one), one.states(0.0)[0].text) == ("refused", "dtype: a here, b there")
    assert one.on_tick(10_000.0).lost == []
    one.on_members([], 10_000.0)
    assert one.states(10_000.0) == []


def test_a_draining_worker_takes_no_more() -> None:
    one = ready()
    one.on_message(W, report(draining=True), 0.0)
    assert condition(one) == "draining"


def queued_ms(one: Roster, now_ms: float = 0.0) -> float:
    (view,) = one.views(now_ms)
    return view.queued_ms


def test_what_was_sent_counts_until_a_report_shows_it() -> None:
    """A report that answers Ping n shows what was sent before Ping n, and nothing later."""
    one, r1, r2 = ready(), RequestId("r1"), RequestId("r2")
    one.charge(W, r1, work_ms=100.0, tokens=10, now_ms=0.0)
    assert queued_ms(one) == 100.0
    one.on_tick(600.0)  # Ping 2
    one.charge(W, r2, work_ms=7.0, tokens=10, now_ms=600.0)
    one.on_message(W, report(1, work_ms=0.0), 600.0)
    assert queued_ms(one, 600.0) == 107.0
    one.on_message(W, report(2, work_ms=90.0), 610.0)
    assert queued_ms(one, 610.0) == 97.0
    one.release(W, r1)
    one.release(W, r1)
    assert queued_ms(one, 610.0) == 97.0, "the report speaks for it"
    one.release(W, r2)
    assert (queued_ms(one, 610.0), one.charged()) == (90.0, {"w": 0})


def test_a_promised_request_counts_until_it_arrives_whatever_reports_say_in_between() -> None:
    one, r1 = ready(), RequestId("r1")

    def counted() -> tuple[int, int]:
        (view,) = one.views(0.0)
        return view.requests, view.kv_tokens

    one.promise(W, r1, tokens=10, now_ms=0.0)
    for sequence in (1, 2, 3):
        one.on_message(W, report(sequence), 0.0)
        assert counted() == (1, 10)
        one.on_tick(sequence * 600.0)  # Ping sequence + 1
    one.arrived(W, r1)
    one.on_message(W, report(4), 0.0)
    assert counted() == (1, 10), "sent before it arrived"
    one.on_tick(2400.0)  # Ping 5
    one.on_message(W, report(5), 0.0)
    assert counted() == (0, 0), "the report speaks for it"
    one.release(W, r1)
    assert (counted(), one.charged()) == ((0, 0), {"w": 0})


def test_a_worker_that_has_measured_nothing_is_taken_to_cost_what_the_others_do() -> None:
    times = {"u": 9, "v": 1, "x": 3}
    costs = {n: StepCost(0.0, ms, 0.0, 0.0, 0.0, chunk_tokens=512, n_samples=99) for n, ms in times.items()}
    one = roster()
    one.on_members([member_named(name) for name in (*costs, "new")], 0.0)
    assert {view.cost for view in one.views(0.0)} == {UNKNOWN_COST}
    for name, cost in costs.items():
        peer = peer_id(WorkerId(name), Incarnation(1))
        one.on_message(peer, msgspec.structs.replace(report(), cost=cost), 0.0)
    assert {view.id: view.cost for view in one.views(0.0)} == {**costs, "new": costs["x"]}


def test_a_fit_to_few_steps_or_to_old_ones_does_not_keep_work_away_for_ever() -> None:
    def cost(ms: float, n_samples: int) -> StepCost:
        return StepCost(0.0, ms, 0.0, 0.0, 0.0, chunk_tokens=512, n_samples=n_samples)

    one, told = roster(), {"fast": cost(1.0, 99), "early": cost(50.0, 5), "slow": cost(9.0, 99)}
    one.on_members([member_named(name) for name in told], 0.0)

    def tell(name: str, now_ms: float) -> None:
        message = msgspec.structs.replace(report(), cost=told[name])
        one.on_message(peer_id(WorkerId(name), Incarnation(1)), message, now_ms)

    def seen(now_ms: float) -> dict[str, float]:
        return {view.id: view.cost.token_ms for view in one.views(now_ms)}

    for name in told:
        tell(name, 0.0)
    assert seen(0.0) == {"fast": 1.0, "early": 9.0, "slow": 9.0}
    told["fast"] = cost(1.0, 115)  # it has computed since; the slow one got nothing to learn from
    for name in told:
        tell(name, 40_000.0)
    assert seen(40_000.0) == {"fast": 1.0, "early": 1.0, "slow": 1.0}


def test_workers_of_one_role_say_nothing_of_another() -> None:
    one = roster()
    decode, prefill = (member_named(name, role=name) for name in ("decode", "prefill"))
    one.on_members([decode, prefill], 0.0)
    dear = StepCost(0.0, 9.0, 0.0, 0.0, 0.0, chunk_tokens=512, n_samples=99)
    one.on_message(peer_id(decode.id, decode.incarnation), msgspec.structs.replace(report(), cost=dear), 0.0)
    assert {view.id: view.cost for view in one.views(0.0)} == {"decode": dear, "prefill": UNKNOWN_COST}


def test_a_queue_gets_shorter_with_time() -> None:
    one = ready()
    one.on_message(W, report(1, work_ms=300.0), 0.0)
    assert [queued_ms(one, now_ms) for now_ms in (0.0, 100.0, 400.0)] == [300.0, 200.0, 0.0]


def test_a_computed_prompt_is_no_work_any_more() -> None:
    one, r1 = ready(), RequestId("r1")
    one.charge(W, r1, work_ms=100.0, tokens=10, now_ms=0.0)
    one.computed(W, r1)
    one.computed(W, r1)
    assert (queued_ms(one), one.charged()) == (0.0, {"w": 1})


def test_prompts_wait_until_they_are_computed_or_time_has_worked_them_off() -> None:
    one, r1, r2 = ready(), RequestId("r1"), RequestId("r2")
    one.on_message(W, report(1, work_ms=400.0, waiting=4), 0.0)
    one.charge(W, r1, work_ms=100.0, tokens=10, now_ms=0.0)
    one.charge(W, r2, work_ms=0.0, tokens=10, now_ms=0.0)  # it only decodes there
    assert [one.views(now_ms)[0].waiting for now_ms in (0.0, 100.0, 400.0)] == [5.0, 4.0, 1.0]
    one.computed(W, r1)
    assert one.views(400.0)[0].waiting == 0.0
    one.release(W, r1)
    one.release(W, r2)
    assert one.views(400.0)[0].waiting == 0.0


def test_spare_is_what_is_free_and_not_spoken_for() -> None:
    """Two layers, 16 tokens a page: 40 free pages are 320 tokens."""
    one = ready()
    one.on_message(W, report(1, pages=PageCounts(total=100, free=40, cached=60)), 0.0)
    one.charge(W, RequestId("r"), work_ms=1.0, tokens=300, now_ms=0.0)
    (view,) = one.views(0.0)
    assert (view.spare_tokens, view.free_tokens) == (20, 500)


def test_memory_that_is_lent_for_a_while_can_be_had() -> None:
    one = ready()
    pages = PageCounts(total=100, free=10, cached=20, lent=70)
    one.on_message(W, report(1, pages=pages, recallable_pages=60), 0.0)
    (view,) = one.views(0.0)
    assert (view.spare_tokens, view.free_tokens) == (70 // 2 * 16, 90 // 2 * 16)


def test_a_resize_is_sent_once_to_a_worker_that_has_answered() -> None:
    one = roster()
    one.on_members([member()], 0.0)
    with pytest.raises(NoWorker, match="has not answered yet"):
        one.resize(WorkerId("w"), 2**20, 1)
    one.on_message(W, Welcome(member=member()), 0.0)
    (send, note) = one.resize(WorkerId("w"), 2**20, 7)
    assert send == Send(W, Resize(call=7, device_memory_bytes=2**20))
    assert isinstance(note, Note) and "1.0 MiB" in note.text
    with pytest.raises(UnknownWorker):
        one.resize(WorkerId("x"), 2**20, 8)


def test_an_operators_drain_counts_at_once_and_is_repeated_until_a_report_shows_it() -> None:
    one = ready()
    (send, _) = one.drain(WorkerId("w"), on=True)
    assert isinstance(send, Send) and send.message == Drain(on=True)
    assert condition(one) == "draining"
    again = [a for a in one.on_tick(600.0).actions if isinstance(a, Send) and isinstance(a.message, Drain)]
    assert len(again) == 1
    one.on_message(W, report(1), 650.0)
    assert condition(one) == "draining", "it has not heard of it yet"
    one.on_message(W, report(2, draining=True), 700.0)
    assert not [a for a in one.on_tick(1200.0).actions if isinstance(a, Send) and isinstance(a.message, Drain)]
    assert condition(one) == "draining"
    one.drain(WorkerId("w"), on=False)
    assert condition(one) == "draining", "it may be ending: only a report says that it works again"
    one.on_message(W, report(3), 1300.0)
    assert condition(one) == "ready"
    with pytest.raises(UnknownWorker, match="there are w"):
        one.drain(WorkerId("x"), on=True)


def test_a_worker_that_fails_in_a_row_is_passed_over_and_tried_again_later() -> None:
    one = ready()
    other = member_named("v")
    one.on_members([member(), other], 0.0)
    one.on_message(peer_id(other.id, other.incarnation), Welcome(member=other), 0.0)

    def accepting(now_ms: float) -> set[str]:
        return {view.id for view in one.views(now_ms) if view.accepting}

    for _ in range(4):
        one.on_failure(W, 0.0)
    one.on_success(W)
    for _ in range(5):
        assert accepting(0.0) == {"v", "w"}
        one.on_failure(W, 0.0)
    assert accepting(9_999.0) == {"v"}
    assert accepting(10_001.0) == {"v", "w"}
    one.charge(W, RequestId("trial"), work_ms=0.0, tokens=0, now_ms=10_001.0)
    assert accepting(10_002.0) == {"v"}, "one trial at a time"
    one.on_failure(W, 10_003.0)
    assert accepting(20_002.0) == {"v"}
    assert accepting(20_004.0) == {"v", "w"}
    one.on_success(W)
    assert accepting(20_004.0) == {"v", "w"}


def test_if_everybody_fails_everybody_is_tried() -> None:
    one = ready()
    for _ in range(9):
        one.on_failure(W, 0.0)
    assert [view.accepting for view in one.views(1.0)] == [True]


def test_links_are_as_probed_until_they_are_measured() -> None:
    one = ready()
    probed = TransportReport(peer=PeerId("k@1"), kind="shm", gib_per_s=2.0)
    measured = LinkCost("k@1", "host", 5e9, 0.3)
    message = msgspec.structs.replace(report(1), transports=(probed,), links=(measured,))
    one.on_message(W, message, 0.0)
    (view,) = one.views(0.0)
    assert view.links["k@1", "host"] == measured
    assert view.links["k@1", "device"].bytes_per_s == 2.0 * 2**30
    assert view.links["k@1", "disk"].bytes_per_s < 2.0 * 2**30


def test_a_worker_reads_from_the_store_whose_memory_it_shares() -> None:
    one = ready()
    stores = [msgspec.structs.replace(member_named(name), role="kvstore", model=None) for name in ("k-a", "k-b", "k-c")]
    one.on_members([member(), *stores], 0.0)
    for store in stores:
        one.on_message(peer_id(store.id, store.incarnation), Welcome(member=store), 0.0)

    def store(**kinds: str) -> str | None:
        transports = tuple(
            TransportReport(peer=PeerId(f"k-{name}@{1:016x}"), kind=kind, gib_per_s=1.0) for name, kind in kinds.items()
        )
        one.on_message(W, msgspec.structs.replace(report(1), transports=transports), 0.0)
        found = next(view.store for view in one.views(0.0) if view.id == "w")
        return None if found is None else found.partition("@")[0]

    assert store() is None
    assert store(c="tcp", b="tcp") == "k-b"
    assert store(a="tcp", c="shm", b="tcp") == "k-c"


def test_a_link_that_never_moved_anything_counts_as_probed() -> None:
    one = ready()
    probed = TransportReport(peer=PeerId("k@1"), kind="shm", gib_per_s=2.0)
    still = LinkCost("k@1", "device", 0.0, 0.0)
    one.on_message(W, msgspec.structs.replace(report(1), transports=(probed,), links=(still,)), 0.0)
    assert one.views(0.0)[0].links["k@1", "device"].bytes_per_s == 2.0 * 2**30


def test_what_runs_there_is_what_the_report_says_and_what_was_sent_since() -> None:
    one = ready()
    queue = QueueCounts(waiting=1, running=2, handing_over=3, kv_tokens=500)
    one.on_message(W, msgspec.structs.replace(report(1), queue=queue), 0.0)
    one.charge(W, RequestId("r"), work_ms=1.0, tokens=10, now_ms=0.0)
    (view,) = one.views(0.0)
    assert (view.requests, view.kv_tokens) == (7, 510)


def test_the_context_is_what_every_ready_worker_can_take() -> None:
    one = roster()
    assert one.context_tokens(0.0) is None
    long = member_named("long")
    one.on_members([member(context_tokens=100), long], 0.0)
    for at, welcomed, context in ((W, member(), 100), (peer_id(long.id, long.incarnation), long, 100)):
        one.on_message(at, Welcome(member=welcomed), 0.0)
        assert one.context_tokens(0.0) == context
    one.drain(WorkerId("w"), on=True)
    assert one.context_tokens(0.0) == identity().context_tokens


def test_a_worker_takes_what_it_says_where_that_is_less_than_its_model_does() -> None:
    one, short, store = roster(), member(), member_named("k", "kvstore")
    short, store = (msgspec.structs.replace(m, context_tokens=n) for m, n in ((short, 32), (store, 5)))
    one.on_members([short, store, member_named("long")], 0.0)
    for found in (short, store, member_named("long")):
        one.on_message(peer_id(found.id, found.incarnation), Welcome(member=found), 0.0)
    assert one.context_tokens(0.0) == 32
    one.drain(WorkerId("w"), on=True)
    assert one.context_tokens(0.0) == identity().context_tokens
