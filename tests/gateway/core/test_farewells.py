"""Laws of what workers are told of requests that nobody wants any more: a Cancel that was lost is said again."""

from common.ids import PeerId, RequestId
from common.messages.actions import HangUp, Send
from common.messages.liveness import Welcome
from common.messages.requests import AskAbout, Cancel, NotHere
from gateway.core.actions import Action
from gateway.core.dispatch import Dispatch
from gateway.core.farewells import AGAIN_MS, Farewells
from gateway.core.recovery import RetryTerms
from tests.gateway.core.builders import TIMEOUT_MS, cancels, dispatch, failed, member, order, peer, report, tokens

P, D, R = peer("prefill-0"), peer("decode-0"), RequestId("r")
SAID = (Cancel(request=R), AskAbout(requests=(R,)))


def said_to(actions: list[Action], to: PeerId) -> tuple[object, ...]:
    """Of requests that are over."""
    return tuple(a.message for a in actions if isinstance(a, Send) and a.to == to and a.message in SAID)


def heard_of_all(core: Dispatch, now_ms: float) -> list[Action]:
    """A tick at which every worker is alive."""
    for name in ("prefill-0", "decode-0"):
        core.on_message(peer(name), report(name), now_ms)
    return core.on_tick(now_ms)


def test_a_cancel_is_said_again_until_the_worker_knows_nothing_of_it() -> None:
    core = dispatch("prefill-0", "decode-0")
    core.submit([order()], 0.0)
    first = core.cancel(R, 1.0)
    assert (said_to(first, P), said_to(first, D)) == (SAID, SAID)
    assert not cancels(heard_of_all(core, AGAIN_MS))
    again = heard_of_all(core, AGAIN_MS + 1.0)
    assert (said_to(again, P), said_to(again, D)) == (SAID, SAID)
    core.on_message(D, NotHere(requests=(R,)), AGAIN_MS + 2.0)
    again = heard_of_all(core, 2 * AGAIN_MS + 1.0)
    assert (said_to(again, P), said_to(again, D)) == (SAID, ())
    assert core.state(2 * AGAIN_MS + 1.0)["unanswered_cancels"] == 1
    core.on_message(P, NotHere(requests=(R,)), 2 * AGAIN_MS + 2.0)
    assert not cancels(heard_of_all(core, 3 * AGAIN_MS + 1.0))
    core.check()


def test_a_cancel_that_is_answered_is_not_said_again() -> None:
    core = dispatch("prefill-0", "decode-0")
    core.submit([order()], 0.0)
    core.cancel(R, 1.0)
    for worker in (P, D):
        core.on_message(worker, NotHere(requests=(R,)), 2.0)
    assert core.state(2.0)["unanswered_cancels"] == 0
    assert not cancels(heard_of_all(core, AGAIN_MS + 1.0))


def test_after_the_first_token_the_entry_worker_has_nothing_to_end() -> None:
    core = dispatch("prefill-0", "decode-0")
    core.submit([order()], 0.0)
    core.on_message(D, tokens(0, 7), 1.0)
    core.cancel(R, 2.0)
    again = heard_of_all(core, AGAIN_MS + 2.0)
    assert (said_to(again, P), said_to(again, D)) == ((), SAID)


def test_of_an_answer_that_ended_well_nobody_is_told_again() -> None:
    core = dispatch("prefill-0", "decode-0")
    core.submit([order()], 0.0)
    core.on_message(D, tokens(0, 7, finish="length"), 1.0)
    assert not cancels(heard_of_all(core, AGAIN_MS + 1.0))


def test_an_attempt_that_another_one_follows_is_ended_where_it_did_not_fail() -> None:
    core = dispatch("prefill-0", "decode-0", retry=RetryTerms())
    core.submit([order()], 0.0)
    core.on_message(D, failed(), 1.0)
    again = heard_of_all(core, AGAIN_MS + 1.0)
    assert (said_to(again, P), said_to(again, D)) == (SAID, ())
    assert core.open_requests == 1


def test_after_its_deadline_a_worker_has_ended_it_by_itself() -> None:
    core = dispatch("prefill-0", "decode-0")
    core.submit([order()], 0.0)
    core.cancel(R, TIMEOUT_MS - AGAIN_MS / 2)
    assert not cancels(heard_of_all(core, TIMEOUT_MS + AGAIN_MS / 2))


def test_who_is_not_connected_is_told_when_it_is_back() -> None:
    """It was stopped for so long that it was given up: what it computed then, it computes still."""
    core = dispatch("prefill-0", "decode-0", retry=RetryTerms())
    core.submit([order()], 0.0)
    gone = [a for t in range(500, 5_001, 500) for a in (*core.on_message(D, report("decode-0"), t), *core.on_tick(t))]
    assert HangUp(P) in gone and P not in cancels(gone)
    core.on_members([member("prefill-0"), member("decode-0")], 5_001.0)
    core.on_message(P, Welcome(member=member("prefill-0")), 5_002.0)
    assert said_to(heard_of_all(core, 5_001.0 + AGAIN_MS), P) == SAID


def test_a_storm_of_lost_cancels_has_a_bound_in_memory_and_in_every_tick() -> None:
    farewells = Farewells()
    for n in range(5_000):
        farewells.expect((P,), RequestId(f"r{n}"), 1e9, float(n))
    assert len(farewells) == 4_096
    told = [cancels(farewells.on_tick(1e6, lambda _: True)) for _ in range(16)]
    assert {len(one) for one in told} == {256}
    assert not farewells.on_tick(1e6, lambda _: True), "each once"
