"""Laws of stop strings."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from gateway.stop_strings import Found, StopStrings

letters = st.text("ab", max_size=40)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


def read(stops: list[str], pieces: list[str]) -> Found:
    """Everything that is shown of a text in pieces, and what ended it."""
    reader, shown = StopStrings(stops), ""
    for piece in pieces:
        found = reader.push(piece)
        shown += found.text
        if found.stop is not None:
            return Found(shown, found.stop)
    return Found(shown + reader.finish())


def by_definition(stops: list[str], text: str) -> Found:
    """The first place where a stop string is complete; of several there, the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return Found(text[: end - len(longest)], longest)
    return Found(text)


@given(letters, stop_lists, st.lists(st.integers(0, 40), max_size=12))
def test_the_result_is_the_definition_however_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(borders)]
    assert read(stops, pieces) == by_definition(stops, text)


@given(letters, stop_lists)
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    reader, shown = StopStrings(stops), ""
    for index, character in enumerate(text):
        found = reader.push(character)
        if found.stop is not None:
            return
        shown += found.text
        held = text[len(shown) : index + 1]
        assert held == "" or any(stop.startswith(held) for stop in stops)
