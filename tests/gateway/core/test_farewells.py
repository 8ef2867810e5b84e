"""Laws of what workers are told of requests that nobody wants any more: a Cancel that was lost is said again."""

from common.ids import PeerId, RequestId
from common.messages.actions import Send
from common.messages.requests import AskAbout, Cancel, NotHere
from gateway.core.actions import Action
from gateway.core.dispatch import Dispatch
from gateway.core.farewells import AGAIN_MS, Farewells
from gateway.core.recovery import RetryTerms
from tests.gateway.core.builders import TIMEOUT_MS, cancels, dispatch, failed, order, peer, report, tokens

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
    assert cancels(core.cancel(R, 1.0)) == [P, D]
    assert not cancels(heard_of_all(core, AGAIN_MS))
    again = heard_of_all(core, AGAIN_MS + 1.0)
    assert (said_to(again, P), said_to(again, D)) == (SAID, SAID)
    core.on_message(D, NotHere(requests=(R,)), AGAIN_MS + 2.0)
    again = heard_of_all(core, 2 * AGAIN_MS + 1.0)
    assert (said_to(again, P), said_to(again, D)) == (SAID, ())
    core.on_message(P, NotHere(requests=(R,)), 2 * AGAIN_MS + 2.0)
    assert not cancels(heard_of_all(core, 3 * AGAIN_MS + 1.0))
    core.check()


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


def test_who_is_not_connected_is_told_nothing() -> None:
    farewells = Farewells()
    farewells.expect((P, D), R, 1e9, 0.0)
    assert {a.to for a in farewells.on_tick(AGAIN_MS, lambda one: one == D)} == {D}
    assert len(farewells) == 1


def test_a_storm_of_lost_cancels_has_a_bound_in_memory_and_in_every_tick() -> None:
    farewells = Farewells()
    for n in range(5_000):
        farewells.expect((P,), RequestId(f"r{n}"), 1e9, float(n))
    assert len(farewells) == 4_096
    told = [cancels(farewells.on_tick(1e6, lambda _: True)) for _ in range(16)]
    assert {len(one) for one in told} == {256}
    assert not farewells.on_tick(1e6, lambda _: True), "each once"
