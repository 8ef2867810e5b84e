"""Laws of the workers that a gateway knows."""

from common.ids import Incarnation, PeerId, WorkerId, peer_id
from common.messages.actions import Dial, HangUp, Send
from common.messages.liveness import Hello, Member, PageCounts, Ping, QueueCounts, Refused, Report, Welcome
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


def report(draining: bool = False, waiting_tokens: int = 0) -> Report:
    return Report(
        worker=WorkerId("w"),
        role="mixed",
        incarnation=Incarnation(1),
        sequence=1,
        pages=PageCounts(),
        queue=QueueCounts(waiting_tokens=waiting_tokens),
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


def test_load_is_the_larger_of_what_was_reported_and_what_was_charged() -> None:
    one = ready()
    one.charge(W, tokens=10, requests=1)
    assert (one.views(0.0)[0].waiting_tokens, one.views(0.0)[0].requests) == (10, 1)
    one.on_message(W, report(waiting_tokens=25), 0.0)
    assert one.views(0.0)[0].waiting_tokens == 25
    one.charge(W, tokens=-10, requests=-1)
    assert one.charged() == {"w": (0, 0)}


def test_the_context_is_what_every_ready_worker_can_take() -> None:
    one = roster()
    assert one.context_tokens(0.0) is None
    one.on_members([member(context_tokens=100)], 0.0)
    one.on_message(W, Welcome(member=member()), 0.0)
    assert one.context_tokens(0.0) == 100
