import pytest

from common.errors import ConfigError
from loadgen.traces.change import Change, changed
from loadgen.traces.trace import Session, Trace, TraceRequest


def trace(*at_s: float | None) -> Trace:
    requests = [
        TraceRequest(
            added_tokens=8 * 512 + 76,
            output_tokens=50,
            at_s=time_s,
            think_s=4.0,
            hash_ids=(*range(1, 9), 90 + place),
            cancel_after_tokens=20,
        )
        for place, time_s in enumerate(at_s)
    ]
    return Trace(format="x", sessions=tuple(Session(requests=(request,)) for request in requests))


def test_speed_moves_times_and_pauses_together() -> None:
    requests = [session.requests[0] for session in changed(trace(0.0, 6.0), Change(speed=2)).sessions]
    assert [(request.at_s, request.think_s) for request in requests] == [(0.0, 2.0), (3.0, 2.0)]


def test_lengths_shrink_and_whole_blocks_stay_whole() -> None:
    small = changed(trace(0.0), Change(scale_isl=0.1, scale_osl=0.5))
    (request,) = small.sessions[0].requests
    assert small.block_tokens == 51
    assert request.added_tokens == 8 * 51 + 8
    assert request.hash_ids == (*range(1, 9), 90)
    assert (request.output_tokens, request.cancel_after_tokens) == (25, 10)


def test_no_length_falls_below_one() -> None:
    (request,) = changed(trace(0.0), Change(scale_isl=1e-9, scale_osl=1e-9)).sessions[0].requests
    assert request.added_tokens >= 1
    assert request.output_tokens == 1


def test_a_window_keeps_what_begins_in_it_and_starts_at_zero() -> None:
    kept = changed(trace(0.0, 2.0, 3.0, 5.0), Change(start_s=2, end_s=5, speed=2)).sessions
    assert [session.requests[0].at_s for session in kept] == [0.0, 0.5]


def test_a_window_without_requests_says_where_the_trace_ends() -> None:
    with pytest.raises(ConfigError, match="last at 3 s"):
        changed(trace(0.0, 3.0), Change(start_s=10))


def test_a_window_needs_times() -> None:
    with pytest.raises(ConfigError, match="with times"):
        changed(trace(None), Change(start_s=1))


def test_recorded_text_is_cut_and_never_made_longer() -> None:
    request = TraceRequest(added_tokens=10, output_tokens=1, content="word " * 8)
    texts = Trace(format="x", sessions=(Session(requests=(request,), opening="abcd " * 8),))
    (half,) = changed(texts, Change(scale_isl=0.5)).sessions
    assert half.requests[0].content == "word word word word"
    assert half.requests[0].added_tokens == 5
    assert half.opening == "abcd abcd abcd abcd"
    with pytest.raises(ConfigError, match="not made longer"):
        changed(texts, Change(scale_isl=2))
