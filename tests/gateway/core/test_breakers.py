"""Laws of workers that fail: who is blamed, what absolves, and that the healthy are used while the broken are spared."""

import pytest

from common.policy.routing import Router
from gateway.core.breaker import Breaker, BreakerState, BreakerTerms
from gateway.core.dispatch import Dispatch
from gateway.core.failure import is_workers_fault
from tests.gateway.core.builders import PLAIN, dispatch, failed, generates, order, peer, tokens

PAIR = ("prefill-0", "decode-0")


def broken(core: Dispatch, now_ms: float = 0.0) -> list[str]:
    """Workers that are kept away from requests."""
    return [state.member.id for state in core.workers(now_ms) if state.breaker is BreakerState.OPEN]


def told(core: Dispatch, sender: str, code: str, phase: str, *, name: str = "r") -> None:
    """A request that one of its workers gives up."""
    core.submit([order(name)], 0.0)
    if phase == "decode":
        core.on_message(peer("decode-0"), tokens(0, 7, request=name), 0.0)
    core.on_message(peer(sender), failed(name, code, phase=phase), 0.0)


@pytest.mark.parametrize("code", ["peer_failed", "protocol_violation", "load_failed", "internal"])
@pytest.mark.parametrize(
    ("sender", "phase", "blamed"),
    [
        ("prefill-0", "prefill", "prefill-0"),
        ("prefill-0", "grant", "decode-0"),
        ("prefill-0", "transfer", "decode-0"),
        ("decode-0", "grant", "decode-0"),
        ("decode-0", "decode", "decode-0"),
    ],
)
def test_who_could_not_hand_over_speaks_of_the_other_side_and_everybody_else_of_himself(
    code: str, sender: str, phase: str, blamed: str
) -> None:
    core = dispatch(*PAIR, breaker=BreakerTerms(failures=1))
    told(core, sender, code, phase)
    assert broken(core) == [blamed]


@pytest.mark.parametrize("code", ["busy", "no_worker", "out_of_pages", "deadline_exceeded", "invalid_request"])
def test_being_full_or_asked_for_the_impossible_is_nobodys_fault(code: str) -> None:
    core = dispatch(*PAIR, breaker=BreakerTerms(failures=1))
    told(core, "prefill-0", code, "prefill")
    assert (broken(core), is_workers_fault(code)) == ([], False)


def test_a_worker_that_cannot_be_reached_has_failed() -> None:
    core = dispatch(*PAIR, breaker=BreakerTerms(failures=1))
    ((to, generate),) = generates(core.submit([order()], 0.0))
    core.on_unsent(to, generate, 0.0)
    assert broken(core) == ["prefill-0"]


@pytest.mark.parametrize(("worker", "phase"), [("prefill-0", "prefill"), ("decode-0", "decode")])
@pytest.mark.parametrize("heals", [True, False])
def test_only_failures_in_a_row_count(worker: str, phase: str, heals: bool) -> None:
    core = dispatch(*PAIR, breaker=BreakerTerms(failures=2))
    told(core, worker, "internal", phase, name="a")
    if heals:
        core.submit([order("b")], 0.0)
        core.on_message(peer("decode-0"), tokens(0, 7, finish="length", request="b"), 0.0)
    told(core, worker, "internal", phase, name="c")
    assert broken(core) == ([] if heals else [worker])


@pytest.mark.parametrize(
    ("names", "breaks", "fallback", "entries"),
    [
        (("prefill-0", "prefill-1", "decode-0"), "prefill-0", False, {"prefill-1"}),
        (("prefill-0", "decode-0"), "prefill-0", True, {"decode-0"}),
        (("prefill-0", "decode-0"), "prefill-0", False, {"prefill-0"}),
        (("prefill-0", "decode-0", "mixed-0", "mixed-1"), "prefill-0", False, {"mixed-0", "mixed-1"}),
        (("prefill-0", "decode-0", "mixed-0"), "decode-0", False, {"mixed-0"}),
        (("mixed-0",), "mixed-0", False, {"mixed-0"}),
    ],
)
def test_the_broken_are_spared_where_the_healthy_can_serve_and_tried_where_they_cannot(
    names: tuple[str, ...], breaks: str, fallback: bool, entries: set[str]
) -> None:
    router = Router(prefill="round-robin", decode="round-robin", local_prefill_tokens=0, fallback=fallback)
    core = dispatch(*names, breaker=BreakerTerms(failures=1), router=router)
    for n in range(len(names)):  # everybody has had one
        ((to, generate),) = generates(core.submit([order(f"x{n}")], 0.0))
        if breaks in (to.partition("@")[0], generate.decode):
            core.on_message(peer(breaks), failed(generate.request, "internal", phase="prefill"), 0.0)
            break
    assert broken(core) == [breaks]
    sent = [generates(core.submit([order(f"r{n}")], 1.0))[0][0].partition("@")[0] for n in range(8)]
    assert set(sent) == entries


def test_without_trust_in_anybody_the_plain_router_goes_round_everybody() -> None:
    core = dispatch("mixed-0", "mixed-1", breaker=BreakerTerms(failures=1), router=PLAIN)
    for name in ("a", "b"):
        ((to, _),) = generates(core.submit([order(name)], 0.0))
        core.on_message(to, failed(name, "internal"), 0.0)
    assert broken(core) == ["mixed-0", "mixed-1"]
    assert {generates(core.submit([order(n)], 1.0))[0][0] for n in ("c", "d")} == {peer("mixed-0"), peer("mixed-1")}


def test_failures_of_what_was_already_under_way_do_not_keep_a_worker_away_for_longer() -> None:
    one = Breaker(BreakerTerms(failures=2, open_ms=1_000.0))
    for now_ms in (0.0, 0.0, 500.0, 900.0):
        one.on_failure(now_ms)
    assert (one.state(999.0), one.state(1_000.0)) == (BreakerState.OPEN, BreakerState.HALF_OPEN)
    assert one.opened_total == 1


def test_a_decode_worker_that_is_tried_again_gets_one_request_at_a_time() -> None:
    terms = BreakerTerms(failures=1, open_ms=1_000.0, trial_ms=500.0)
    core = dispatch("prefill-0", "decode-0", "decode-1", breaker=terms)
    ((_, generate),) = generates(core.submit([order("a")], 0.0))
    core.on_message(peer(str(generate.decode)), failed("a", "internal"), 0.0)
    sent = [generates(core.submit([order(f"r{n}")], 1_000.0))[0][1].decode for n in range(8)]
    assert sent.count(generate.decode) == 1
