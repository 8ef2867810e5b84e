from dataclasses import replace

import pytest

from loadgen.traces.facts import facts_of
from loadgen.traces.make import made_trace
from loadgen.traces.replay import Replay
from loadgen.traces.trace import Session, Trace, TraceRequest
from loadgen.workload.content import ContentSource
from tests.loadgen.workload.made import made


def alone(at_s: float, added_tokens: int, *hash_ids: int, osl: int = 10) -> Session:
    request = TraceRequest(added_tokens=added_tokens, output_tokens=osl, at_s=at_s, hash_ids=hash_ids)
    return Session(requests=(request,))


TINY = Trace(
    format="mooncake",
    sessions=(
        alone(0.0, 12, 1, 2, 3),  # nothing is cached: 0 of 3
        alone(1.0, 16, 1, 2, 4, 5),  # 1 and 2: 2 of 4
        alone(2.0, 12, 9, 2, 3),  # begins anew, so that 2 and 3 do not count: 0 of 3
        alone(5.0, 6, 1, 2),  # 2 of 2
    ),
    block_tokens=4,
)


def test_the_ideal_hit_share_is_that_of_prefixes_of_earlier_prompts() -> None:
    assert facts_of(TINY).ideal_hit_share == pytest.approx(4 / 12)


def test_counts_rate_and_lengths() -> None:
    facts = facts_of(TINY)
    assert (facts.requests, facts.sessions, facts.span_s, facts.requests_per_s) == (4, 4, 5.0, 0.8)
    assert (facts.input.mean_tokens, facts.input.p50_tokens, facts.input.most_tokens) == (11.5, 12, 16)
    assert facts.output.mean_tokens == 10


def test_hits_do_not_depend_on_the_order_of_lines() -> None:
    backwards = replace(TINY, sessions=TINY.sessions[::-1])
    assert facts_of(backwards).ideal_hit_share == pytest.approx(4 / 12)


def test_a_later_turn_hits_the_prompt_before_it_and_its_length_counts_the_answer() -> None:
    turns = (TraceRequest(added_tokens=8, output_tokens=4), TraceRequest(added_tokens=4, output_tokens=4))
    facts = facts_of(Trace(format="x", sessions=(Session(requests=turns),), block_tokens=4))
    assert facts.input.most_tokens == 16
    assert facts.ideal_hit_share == pytest.approx(2 / 6)
    assert facts.span_s is None


def test_a_later_turn_hits_named_blocks_and_all_of_the_answer_but_its_last_token() -> None:
    turns = (
        TraceRequest(added_tokens=8, output_tokens=5, hash_ids=(0, 1)),
        TraceRequest(added_tokens=4, output_tokens=1),
    )
    facts = facts_of(Trace(format="x", sessions=(Session(requests=turns),), block_tokens=4))
    assert facts.ideal_hit_share == pytest.approx(3 / 7)
    assert facts.ideal_token_share == pytest.approx(12 / 25)


def test_recorded_content_shares_what_is_equal() -> None:
    texts = ("same beginning, one", "same beginning, two")
    sessions = [Session(requests=(TraceRequest(added_tokens=5, output_tokens=1, content=text),)) for text in texts]
    facts = facts_of(Trace(format="x", sessions=tuple(sessions), block_tokens=2))
    assert facts.ideal_hit_share == pytest.approx(2 / 6)


def test_lengths_alone_say_nothing_about_sharing() -> None:
    assert facts_of(Trace(format="x", sessions=(alone(0.0, 5), alone(1.0, 5)))).ideal_hit_share is None


def test_facts_agree_with_what_a_replay_sends() -> None:
    workload = Replay(trace=TINY, source=ContentSource(last_token_id=30_000), seed=0)
    cached: set[object] = set()
    hits = total = 0
    for index in range(4):
        prompt = workload.conversation(index).turns[0].added
        prefixes = [prompt[: min(len(prompt), end)] for end in range(4, len(prompt) + 4, 4)]
        hits += sum(prefix in cached for prefix in prefixes)
        total += len(prefixes)
        # A cache of whole blocks holds every beginning of what was sent.
        cached |= {prompt[:end] for end in range(1, len(prompt) + 1)}
    assert facts_of(TINY).ideal_hit_share == pytest.approx(hits / total)


def test_a_replay_caches_no_more_than_the_facts_of_a_made_trace_say() -> None:
    trace = made_trace(
        made("multi-turn", turns="3", isl="20", osl="25", prefix_len="40", prefix_groups="2"), 30, 2.0, 16, 1
    )
    workload = Replay(trace=trace, source=ContentSource(last_token_id=30_000), seed=0)
    answers = ContentSource(first_token_id=30_001, last_token_id=60_000)
    cached: set[object] = set()
    cached_tokens = total_tokens = 0
    for index in range(workload.n_conversations):
        history: tuple[int, ...] = ()
        for place, turn in enumerate(workload.conversation(index).turns):
            prompt = (*history, *turn.added)
            ends = range(16, len(prompt), 16)
            cached_tokens += 16 * sum(prompt[:end] in cached for end in ends)
            total_tokens += len(prompt)
            history = (*prompt, *answers.draw(f"{index}/{place}", turn.output_tokens))
            cached |= {history[:end] for end in range(16, len(history), 16)}
    share = facts_of(trace).ideal_token_share
    assert share is not None
    assert share >= cached_tokens / total_tokens > 0.4
    assert share == pytest.approx(cached_tokens / total_tokens, abs=0.1)
