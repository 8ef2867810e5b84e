"""Laws of the requests in flight, with a roster and without sockets or clocks."""

import random

import pytest

from common.errors import Busy, DeadlineExceeded, NoWorker, PeerFailed
from common.ids import RequestId
from common.messages.actions import Send
from common.messages.requests import Failed, Generate, TokenDelta, TokenLogprob, Tokens
from gateway.core.actions import Action, Deliver
from tests.gateway.core.builders import (
    TIMEOUT_MS,
    cancels,
    delivered,
    dispatch,
    ends,
    generates,
    member,
    order,
    peer,
    report,
    tokens,
)

P, D, MIXED = peer("prefill-0"), peer("decode-0"), peer("mixed-0")


def test_a_request_goes_to_the_prefill_worker_and_names_its_decode_worker() -> None:
    core = dispatch("prefill-0", "decode-0")
    (action,) = core.submit([order()], 0.0)
    assert isinstance(action, Send) and isinstance(action.message, Generate)
    assert (action.to, action.message.decode) == (P, "decode-0")
    assert action.message.timeout_ms == TIMEOUT_MS


def test_a_request_to_a_mixed_worker_names_nobody_else() -> None:
    (action,) = dispatch("mixed-0").submit([order()], 0.0)
    assert isinstance(action, Send) and isinstance(action.message, Generate)
    assert (action.to, action.message.decode) == (MIXED, None)


def test_a_worker_is_told_all_that_the_client_asked_for() -> None:
    asked = order(prompt_tokens=5, cache_salt="s", priority=3)
    ((_, told),) = generates(dispatch("mixed-0").submit([asked], 0.0))
    fields = (told.prompt, told.sampling, told.model, told.cache_salt, told.priority, told.emitted, told.fetch)
    assert fields == (asked.prompt, asked.sampling, asked.model, "s", 3, (), None)


def test_logprobs_of_repeated_tokens_are_dropped_with_them() -> None:
    core = dispatch("mixed-0")
    core.submit([order()], 0.0)
    core.on_message(MIXED, tokens(0, 5, 6), 0.0)
    logprobs = tuple(TokenLogprob(token, -1.0, ()) for token in (6, 7))
    delta = TokenDelta(RequestId("r"), 1, (6, 7), logprobs=logprobs)
    (action,) = core.on_message(MIXED, Tokens(deltas=(delta,)), 0.0)
    assert isinstance(action, Deliver)
    assert (action.delta.position, action.delta.tokens, action.delta.logprobs) == (2, (7,), logprobs[1:])
    assert core.repeated_tokens_total == 1


@pytest.mark.parametrize("seed", range(200))
def test_tokens_come_out_once_and_in_order_however_they_are_repeated(seed: int) -> None:
    rng, core = random.Random(seed), dispatch("prefill-0", "decode-0")
    core.submit([order()], 0.0)
    answer, sent, out = list(range(100, 100 + rng.randrange(1, 12))), 0, []
    while sent < len(answer):
        start, end = rng.randrange(sent + 1), rng.randrange(sent, len(answer)) + 1
        finish = "length" if end == len(answer) else None
        out += delivered(core.on_message(D, tokens(start, *answer[start:end], finish=finish), 0.0))
        sent = max(sent, end)
    assert out == answer
    assert core.open_requests == 0
    core.check()


def test_a_gap_in_the_tokens_ends_the_request() -> None:
    core = dispatch("prefill-0", "decode-0")
    core.submit([order()], 0.0)
    core.on_message(D, tokens(0, 5), 0.0)
    actions = core.on_message(D, tokens(2, 7), 0.0)
    assert "skipped 1 tokens in phase decode after 1 tokens" in str(ends(actions)[0].error)
    assert cancels(actions) == [P, D]
    core.check()


def test_tokens_from_anybody_but_the_decode_worker_change_nothing() -> None:
    core = dispatch("prefill-0", "decode-0", "decode-1")
    core.submit([order()], 0.0)
    assert core.on_message(P, tokens(0, 5), 0.0) == []
    assert core.on_message(peer("decode-1"), tokens(0, 5), 0.0) == []
    assert core.open_requests == 1


def test_a_restarted_worker_takes_its_requests_along_at_once() -> None:
    core = dispatch("prefill-0", "decode-0")
    core.submit([order()], 0.0)
    core.on_message(D, tokens(0, 5, 6), 0.0)
    actions = core.on_members([member("prefill-0"), member("decode-0", incarnation=2)], 1.0)
    (end,) = ends(actions)
    assert isinstance(end.error, PeerFailed)
    assert str(end.error) == "decode worker decode-0 was restarted in phase decode after 2 tokens"
    assert cancels(actions) == [P]
    core.check()


def test_silence_ends_the_requests_of_the_silent_worker_and_of_no_other() -> None:
    core = dispatch("mixed-0", "mixed-1")
    core.submit([order("a")], 0.0)
    core.submit([order("b")], 0.0)
    actions: list[Action] = []
    for now_ms in range(0, 3600, 100):
        actions += core.on_tick(float(now_ms))
        core.on_message(peer("mixed-1"), report("mixed-1"), float(now_ms))
    assert [(end.request, str(end.error)) for end in ends(actions)] == [
        ("a", "mixed worker mixed-0 died (silent for 3.1 s) in phase prefill before the first token")
    ]
    assert core.open_requests == 1


def test_the_deadline_ends_a_request_and_tells_every_worker() -> None:
    core = dispatch("prefill-0", "decode-0")
    core.submit([order()], 0.0)
    for name in ("prefill-0", "decode-0"):
        core.on_message(peer(name), report(name), TIMEOUT_MS)
    actions = core.on_tick(TIMEOUT_MS)
    (end,) = ends(actions)
    assert isinstance(end.error, DeadlineExceeded)
    assert "60 s were over in phase prefill before the first token" in str(end.error)
    assert cancels(actions) == [P, D]
    core.check()


def test_a_failure_is_believed_only_from_a_worker_that_is_still_needed() -> None:
    core = dispatch("prefill-0", "decode-0")
    failed = Failed(request=RequestId("r"), code="busy", phase="grant", text="full", retryable=True)
    core.submit([order()], 0.0)
    core.on_message(D, tokens(0, 5), 0.0)
    assert core.on_message(P, failed, 0.0) == []
    assert ends(core.on_message(D, failed, 0.0))
    core.check()


def test_a_refused_submit_holds_nothing() -> None:
    core = dispatch("prefill-0")
    with pytest.raises(NoWorker, match="decode: 0 of 0 ready"):
        core.submit([order()], 0.0)
    core = dispatch("mixed-0", max_open=1)
    core.submit([order("a")], 0.0)
    with pytest.raises(Busy, match="limit is 1"):
        core.submit([order("b")], 0.0)
    core.cancel(RequestId("a"), 0.0)
    core.check()


def test_a_generate_that_cannot_be_sent_ends_its_request() -> None:
    core = dispatch("prefill-0", "decode-0")
    (send,) = core.submit([order()], 0.0)
    assert isinstance(send, Send)
    actions = core.on_unsent(send.to, send.message, 0.0)
    assert "cannot be reached" in str(ends(actions)[0].error)
    assert cancels(actions) == [D]
    core.check()
