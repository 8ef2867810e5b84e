import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.drive.sse import SseParser

STREAM = b': hello\n\ndata: {"a": 1}\n\nevent: x\ndata:one\ndata: two\nid: 7\n\ndata: [DONE]\n\n'
EVENTS = [b'{"a": 1}', b"one\ntwo", b"[DONE]"]


@settings(deadline=None)
@given(st.lists(st.integers(0, 90), max_size=12), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_events_do_not_depend_on_how_the_stream_is_cut_or_its_line_ends(cuts: list[int], line_end: bytes) -> None:
    stream = STREAM.replace(b"\n", line_end) + (b": end" if line_end == b"\r" else b"")
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    parser = SseParser()
    pieces = [stream[start:end] for start, end in itertools.pairwise(places)]
    assert [event for piece in pieces for event in parser.feed(piece)] == EVENTS


def test_a_cut_inside_a_crlf_does_not_end_an_event() -> None:
    parser = SseParser()
    assert parser.feed(b"data: one\r") == []
    assert parser.feed(b"\ndata: two\r\n\r\n") == [b"one\ntwo"]


def test_an_event_without_its_blank_line_is_not_given() -> None:
    assert SseParser().feed(b"data: half\n") == []


def test_an_endless_event_is_refused() -> None:
    parser = SseParser()
    with pytest.raises(ValueError, match="longer"):
        for _ in range(20):
            parser.feed(b"x" * 100_000)
