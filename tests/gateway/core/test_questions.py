"""Laws of what the gateway asks about requests without news: every question has an answer, or the request goes elsewhere."""

from collections.abc import Callable

import pytest

from common.ids import PeerId, RequestId
from common.messages.actions import Send
from common.messages.requests import AskAbout, NotHere, StillHere
from gateway.core.actions import Action
from gateway.core.attempts import ASK_AFTER_MS
from gateway.core.dispatch import Dispatch
from gateway.core.recovery import RetryTerms
from tests.gateway.core.builders import (
    cancels,
    delivered,
    dispatch,
    ends,
    failed,
    generates,
    order,
    peer,
    report,
    tokens,
)

R = RequestId("r")
NAMES = ("prefill-0", "prefill-1", "decode-0", "decode-1")
FIRST = {name: peer(name) for name in ("prefill-0", "decode-0")}
"""Where the first request goes."""
ASKED = 5


def ready(**options: object) -> Dispatch:
    """A gateway that has given `r` to the first workers of each role; it has a minute."""
    core = dispatch(*NAMES, retry=RetryTerms(), **options)  # type: ignore[arg-type]  # a builder
    ((to, generate),) = generates(core.submit([order(max_tokens=100)], 0.0))
    assert (to, generate.decode) == (FIRST["prefill-0"], "decode-0"), "the story does not begin"
    return core


def look(core: Dispatch, now_ms: float) -> list[Action]:
    """A tick at which every worker is alive."""
    for name in NAMES:
        core.on_message(peer(name), report(name), now_ms)
    return core.on_tick(now_ms)


def asked(actions: list[Action], wire: RequestId = R) -> list[PeerId]:
    return [
        a.to for a in actions if isinstance(a, Send) and isinstance(a.message, AskAbout) and wire in a.message.requests
    ]


def lost(core: Dispatch) -> float:
    return core.counters().get("unanswered_attempts_total", 0)


def questions(core: Dispatch, n: int, answer: Callable[[PeerId, float], object]) -> float:
    """So many in a row; when the last was asked."""
    now_ms = 0.0
    for nth in range(1, n + 1):
        now_ms = nth * ASK_AFTER_MS
        (to,) = asked(look(core, now_ms))
        answer(to, now_ms)
    return now_ms


def nothing(core: Dispatch) -> None:
    """The prefill worker is asked, and says nothing."""


def left(core: Dispatch) -> None:
    """The prefill worker has handed it over."""
    core.on_message(FIRST["prefill-0"], NotHere(requests=(R,)), 1.0)


def begun(core: Dispatch) -> None:
    """Some tokens came."""
    core.on_message(FIRST["decode-0"], tokens(0, 5, 6), 1.0)


@pytest.mark.parametrize(
    ("story", "silent", "where"),
    [
        (nothing, "prefill-0", "in phase prefill before the first token"),
        (left, "decode-0", "in phase decode before the first token"),
        (begun, "decode-0", "in phase decode after 2 tokens"),
    ],
)
def test_a_request_about_which_its_worker_answers_nothing_goes_on_at_another_one(
    story: Callable[[Dispatch], None], silent: str, where: str
) -> None:
    core = ready()
    story(core)
    first = 2 if story is left else 1  # whoever takes it over is asked at once
    now_ms = 1.0
    for _ in range(first, ASKED + 1):
        now_ms += ASK_AFTER_MS
        assert asked(look(core, now_ms)) == [FIRST[silent]]
    assert lost(core) == 0
    now_ms += ASK_AFTER_MS
    given_up = look(core, now_ms)
    assert lost(core) == 1 and not ends(given_up)
    assert FIRST[silent] in asked(given_up) and FIRST[silent] in cancels(given_up), "it may have it still"
    assert core.counters()[f"retries_total{{code=peer_failed,kind={'replay' if story is begun else 'retry'}}}"] == 1
    (state,) = core.state(now_ms)["requests"]  # type: ignore[misc]  # JSON
    assert silent in state["last_error"] and f"answers nothing about it {where}" in state["last_error"]
    ((to, again),) = generates(look(core, now_ms + 100.0))
    assert silent not in (to.partition("@")[0], again.decode)
    begun_again = core.begun(again.request)
    assert begun_again is not None
    assert (begun_again.failed[-1].worker, begun_again.failed[-1].phase) == (silent, where.split()[2])
    core.check()


def test_one_answer_in_five_is_enough() -> None:
    core = ready()
    n_asked = 0

    def answer(to: PeerId, now_ms: float) -> None:
        nonlocal n_asked
        n_asked += 1
        if n_asked % ASKED == 0:
            core.on_message(to, StillHere(requests=(R,)), now_ms)

    questions(core, 4 * ASKED, answer)
    assert lost(core) == 0


def test_tokens_are_as_good_as_an_answer() -> None:
    core = ready()
    begun(core)
    now_ms = 1.0
    for position in range(2, 6):
        for _ in range(ASKED):
            now_ms += ASK_AFTER_MS
            look(core, now_ms)
        assert delivered(core.on_message(FIRST["decode-0"], tokens(position, 7), now_ms)) == [7]
    assert lost(core) == 0


def test_only_the_worker_that_was_asked_can_answer() -> None:
    core = ready()
    other = FIRST["decode-0"]
    now_ms = questions(core, ASKED, lambda _, now_ms: core.on_message(other, StillHere(requests=(R,)), now_ms))
    look(core, now_ms + ASK_AFTER_MS)
    assert lost(core) == 1


def test_a_gateway_that_was_stopped_does_not_take_its_own_sleep_for_silence() -> None:
    core = ready()
    for nth in range(1, ASKED):
        actions = look(core, nth * 5 * ASK_AFTER_MS)
        assert asked(actions) == [FIRST["prefill-0"]]
    assert lost(core) == 0


def test_a_question_that_had_no_room_does_not_count() -> None:
    core = dispatch("mixed-0", retry=RetryTerms(), max_open=400)
    core.submit([order(f"r{n}") for n in range(300)], 0.0)
    for nth in range(1, ASKED + 2):
        core.on_message(peer("mixed-0"), report("mixed-0"), nth * ASK_AFTER_MS)
        core.on_tick(nth * ASK_AFTER_MS)
    assert lost(core) == 256
    core.check()


def test_a_worker_that_answers_nothing_again_and_again_is_passed_over() -> None:
    core = dispatch("mixed-0", "mixed-1", max_open=100)
    core.submit([order(f"r{n}") for n in range(12)], 0.0)
    for nth in range(1, ASKED + 2):
        for name in ("mixed-0", "mixed-1"):
            core.on_message(peer(name), report(name), nth * ASK_AFTER_MS)
        for to in (a.to for a in core.on_tick(nth * ASK_AFTER_MS) if isinstance(a, Send)):
            if to == peer("mixed-1"):
                core.on_message(to, StillHere(requests=tuple(RequestId(f"r{n}") for n in range(12))), 0.0)
    breakers = {one["id"]: one["breaker"] for one in core.state(12_000.0)["workers"]}  # type: ignore[attr-defined]  # JSON
    assert breakers == {"mixed-0": "open", "mixed-1": "closed"}


def test_an_attempt_that_was_cancelled_is_not_taken_back_because_it_is_still_there() -> None:
    core = ready()
    core.cancel(R, 1.0)
    for name in ("prefill-0", "decode-0"):
        assert not core.on_message(peer(name), StillHere(requests=(R,)), 2.0)
    assert set(cancels(look(core, 1.0 + ASK_AFTER_MS))) == set(FIRST.values()), "until it is not there"
    assert lost(core) == 0


def test_a_gap_in_a_replay_is_told_of_the_phase_that_the_tokens_came_from() -> None:
    """The first token of the attempt is in the gap: its prompt was computed."""
    core = ready()
    begun(core)
    core.on_message(FIRST["decode-0"], failed(code="peer_failed", phase="decode"), 2.0)
    ((to, again),) = generates(look(core, 200.0))
    core.on_message(peer(str(again.decode)), tokens(3, 8, request=again.request), 300.0)
    (state,) = core.state(300.0)["requests"]  # type: ignore[misc]  # JSON
    assert f"{again.decode} skipped 1 tokens in phase decode after 2 tokens" in state["last_error"]
    core.check()
    ((_, third),) = generates(look(core, 1_000.0))
    begun_again = core.begun(third.request)
    assert begun_again is not None and begun_again.failed[-1].worker == again.decode != to


def test_a_replay_that_fails_before_it_gave_a_token_says_that_it_was_one() -> None:
    core = ready()
    begun(core)
    core.on_message(FIRST["decode-0"], failed(code="peer_failed", phase="decode"), 2.0)
    ((to, again),) = generates(look(core, 200.0))
    core.on_message(to, failed(again.request, phase="prefill"), 300.0)
    (state,) = core.state(300.0)["requests"]  # type: ignore[misc]  # JSON
    assert "gave up in phase prefill of a replay after 2 tokens: full" in state["last_error"]
