"""Answers that one worker began and another one ends: the tokens are those of the answer that was never cut."""

import random
from collections.abc import Iterator

import msgspec
import pytest

from common.ids import RequestId
from common.messages.blocks import Offered
from common.messages.handover import GrantRefused, GrantRequest
from tests.services.worker.core.test_caching import check_end
from tests.support.fake_engine import answer
from tests.support.world import World

N_TOKENS = 14
PROMPT = [(at * 11) % 900 + 3 for at in range(26)]
WAYS = ("prefill", "decode", "mixed-1")


def world(caching: int = 3, **more: object) -> World:
    made = World(
        random.Random(3), prefill_pages=200, decode_pages=200, caching=caching, more=("mixed-1", "prefill-1"), **more
    )
    made.greet()
    return made


def replay(target: World, name: str, cut: int, *, to: str, max_tokens: int = N_TOKENS, **more: object) -> None:
    emitted = tuple(answer(PROMPT, max_tokens)[:cut])
    target.send(name, PROMPT, max_tokens, to=to, emitted=emitted, **more)
    target.settle()


def counters(target: World, name: str) -> dict[str, float]:
    return target.processes[name].core.report(0, target.now_ms).counters


@pytest.mark.parametrize("to", WAYS)
@pytest.mark.parametrize("caching", range(4))
def test_cut_anywhere_the_answer_goes_on_as_if_it_had_never_been_cut(to: str, caching: int) -> None:
    """`World.hear` checks that the first new token has the position of the cut."""
    target = world(caching)
    for cut in range(N_TOKENS):
        replay(target, f"r{cut}", cut, to=to, cache_salt=str(cut))
        seen = target.answers[RequestId(f"r{cut}")]
        assert (seen.finish, seen.tokens) == ("length", answer(PROMPT, N_TOKENS))
        assert len(seen.deltas) == N_TOKENS - cut, "max_tokens counts what was emitted"
    check_end(target)


@pytest.mark.parametrize("to", WAYS)
def test_a_stop_token_behind_the_cut_ends_the_answer(to: str) -> None:
    whole = answer(PROMPT, N_TOKENS)
    assert whole.index(whole[9]) == 9
    target = world()
    replay(target, "r", 5, to=to, stop_token_ids=(whole[9],))
    seen = target.answers[RequestId("r")]
    assert (seen.finish, seen.tokens) == ("stop", whole[:10])


@pytest.mark.parametrize("to", WAYS)
def test_what_was_emitted_is_cached_by_the_same_names(to: str) -> None:
    """26 + 10 tokens are nine blocks; a prompt that holds them all finds eight of nine, since the last token is computed."""
    target = world()
    replay(target, "r", 10, to=to, max_tokens=12)
    target.send("again", PROMPT + answer(PROMPT, 10), 2, to=to)
    target.settle()
    assert target.answers[RequestId("again")].deltas[0].cached_tokens == 32
    check_end(target)


@pytest.mark.parametrize("to", WAYS)
def test_the_client_hears_of_cached_prompt_tokens_alone_and_the_counters_of_all(to: str) -> None:
    target = world()
    for name in ("first", "second"):
        replay(target, name, 10, to=to)
    assert target.answers[RequestId("second")].deltas[0].cached_tokens == len(PROMPT)
    totals = counters(target, to)
    hits = sum(value for key, value in totals.items() if key.startswith("hit_tokens_total"))
    assert (hits, totals["missed_tokens_total"]) == (32, 36 + 4)


def test_only_what_was_drawn_here_is_offered_back() -> None:
    """The prefill worker computed prompt and emitted tokens, 36 of them; 49 are known at the end: blocks 9 to 11."""
    target = world()
    offered: list[Offered] = []
    prefill = target.processes["prefill"].core
    hear = prefill.on_message

    def listen(peer, message, now_ms):
        offered.extend([message] if isinstance(message, Offered) else [])
        return hear(peer, message, now_ms)

    prefill.on_message = listen
    replay(target, "r", 10, to="prefill", max_tokens=24)
    target.settle()
    assert [(offer.depth, len(offer.blocks)) for offer in offered] == [(9, 3)]
    assert counters(target, "prefill")["returned_blocks_total"] == 3
    target.send("turn", PROMPT + answer(PROMPT, 24), 1)
    target.settle()
    assert target.answers[RequestId("turn")].deltas[0].cached_tokens == 48


@pytest.mark.parametrize("to", WAYS)
@pytest.mark.parametrize(
    ("emitted", "wrong"),
    [((5, -1), "0 to 999"), ((5, 1_000), "0 to 999"), (tuple(range(3, 17)), "14 tokens"), ((5, 7, 9), "stop token")],
)
def test_emitted_tokens_that_cannot_be_are_refused(to: str, emitted: tuple[int, ...], wrong: str) -> None:
    target = world()
    target.send("r", PROMPT, N_TOKENS, to=to, emitted=emitted, stop_token_ids=(7,) if wrong == "stop token" else ())
    target.settle()
    failed = target.answers[RequestId("r")].failed
    assert failed is not None and (failed.code, failed.retryable) == ("invalid_request", False)
    assert wrong in failed.text


def test_a_decode_worker_refuses_a_grant_for_emitted_tokens_that_cannot_be() -> None:
    target = world()
    decode = target.processes["decode"]
    target.send("r", PROMPT, 4, emitted=(5, 6))
    prefill = target.processes["prefill"]
    while not any(isinstance(m, GrantRequest) for m, _ in target.links.get((prefill.peer, decode.peer), ())):
        assert target.turn()
    link = target.links[prefill.peer, decode.peer]
    request = next(m for m, _ in link if isinstance(m, GrantRequest))
    hostile = msgspec.structs.replace(request, transfer="x/1", emitted=(5, 6, 7, 8))
    target.perform(decode, decode.core.on_message(prefill.peer, hostile, target.now_ms))
    refusals = [m for m, _ in target.links[decode.peer, prefill.peer] if isinstance(m, GrantRefused)]
    assert [(r.code, r.retryable) for r in refusals] == [("invalid_request", False)]
    target.settle()


def test_a_replay_with_one_token_left_that_fills_the_decode_pool_exactly_is_granted() -> None:
    """The last token needs no page, also if it is not the first of the answer."""
    target = World(random.Random(4), prefill_pages=60, decode_pages=20)
    target.greet()
    emitted = tuple(answer(PROMPT, 14))
    target.send("r", PROMPT, 15, emitted=emitted)
    target.settle()
    assert target.answers[RequestId("r")].tokens == answer(PROMPT, 15)


def cuts(seed: int) -> Iterator[tuple[str, int]]:
    rng = random.Random(seed)
    for number in range(12):
        yield f"r{number}", rng.randrange(N_TOKENS)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("seed", range(10))
def test_replays_at_once_on_little_memory_are_all_right(seed: int, transport: str) -> None:
    """They are preempted, displaced, and loaded from the KV store in between."""
    target = World(
        random.Random(seed),
        prefill_pages=28,
        decode_pages=34,
        transport=transport,
        store_blocks=100,
        more=("mixed-1",),
        ahead=seed % 2 == 1,
    )
    target.greet()
    for name, cut in cuts(seed):
        prompt = [target.rng.randrange(3, 900) for _ in range(target.rng.randrange(1, 26))]
        emitted = tuple(answer(prompt, cut))
        target.send(name, prompt, N_TOKENS, to=target.rng.choice(WAYS), emitted=emitted)
    target.settle()
    check_end(target)
    assert all(seen.finish == "length" for seen in target.answers.values())
