import json
from typing import Any

import pytest

from common.errors import ConfigError
from loadgen.traces.answers import Answers
from loadgen.traces.measure import BY_CHARACTERS
from loadgen.traces.own import read_own
from loadgen.traces.trace import Trace
from loadgen.workload.lengths import Uniform


def read(*rows: dict[str, Any]) -> Trace:
    return read_own([json.dumps(row) for row in rows], "f.jsonl")


def test_a_prompt_may_be_text_ids_or_a_length() -> None:
    trace = read({"prompt": "a" * 8, "output_tokens": 3}, {"prompt": [5, 6, 7], "osl": 4}, {"isl": 9, "osl": 5})
    requests = [session.requests[0] for session in trace.sessions]
    assert [request.content for request in requests] == ["a" * 8, (5, 6, 7), None]
    assert [request.added_tokens for request in requests] == [2, 3, 9]
    assert [request.output_tokens for request in requests] == [3, 4, 5]


def test_lines_of_a_session_are_one_conversation_in_the_order_of_turns() -> None:
    trace = read(
        {"session": "s", "turn": 1, "isl": 2, "osl": 1, "think_s": 1.5},
        {"isl": 7, "osl": 1, "t": 4.0},
        {"session": "s", "turn": 0, "isl": 1, "osl": 1, "t": 5.0, "opening": [1, 2], "cancel_after_tokens": 0},
    )
    alone, session = trace.sessions
    assert alone.requests[0].at_s == 0.0
    assert [request.added_tokens for request in session.requests] == [1, 2]
    assert [request.at_s for request in session.requests] == [1.0, None]
    assert session.requests[0].cancel_after_tokens == 0
    assert session.requests[1].think_s == 1.5
    assert (session.name, session.opening) == ("s", (1, 2))


def test_messages_become_turns_and_recorded_answers_give_lengths() -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "a" * 20},
        {"role": "user", "content": "two?"},
    ]
    (session,) = read({"messages": messages, "output_tokens": 7, "t": 3.0}).sessions
    assert session.opening == "be brief"
    assert [request.content for request in session.requests] == ["one?", "two?"]
    assert [request.output_tokens for request in session.requests] == [5, 7]


def test_answers_that_no_line_measures_are_drawn_by_seed() -> None:
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one?"}]
    rows = [json.dumps({"messages": chat}), json.dumps({"prompt": "a"}), json.dumps({"prompt": "a", "osl": 3})]

    def lengths(seed: int) -> list[int]:
        answers = Answers(lengths=Uniform(10, 10_000), seed=seed)
        trace = read_own(rows, "f", BY_CHARACTERS, answers)
        return [session.requests[0].output_tokens for session in trace.sessions]

    first, second, said = lengths(1)
    assert first != second
    assert min(first, second) >= 10
    assert said == 3
    assert lengths(1) == [first, second, said] != lengths(2)


def test_sharing_is_judged_by_pages_where_no_block_is_named() -> None:
    assert read({"isl": 5, "osl": 1}).block_tokens == 16
    assert read({"isl": 5, "osl": 1, "hash_ids": [1], "block": 8}).block_tokens == 8


def test_keys_that_are_not_used_are_counted_in_a_note() -> None:
    trace = read({"isl": 1, "osl": 1, "priority": 3}, {"isl": 1, "osl": 1, "priority": 4})
    assert trace.notes == ("not used: 'priority' of 2 lines",)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"osl": 5}, "needs prompt, messages, or isl"),
        ({"prompt": "", "osl": 5}, "prompt is empty"),
        ({"prompt": "a"}, "give output_tokens in the line, or --osl"),
        ({"messages": [{"role": "user", "content": "a"}]}, "give output_tokens in the line, or --osl"),
        ({"prompt": "a", "osl": 0}, "of 1 or more"),
        ({"prompt": "a", "messages": [], "osl": 1}, "give one of them"),
        ({"prompt": 5, "osl": 1}, "no request"),
        ({"isl": 5, "osl": 1, "cancel_after_s": 2}, "say cancel_after_tokens"),
        ({"isl": 5, "osl": 1, "think_s": -1}, "negative"),
        ({"isl": 1000, "osl": 1, "hash_ids": [1], "block": 16}, "1024 or more would fit: set block"),
        ({"messages": [{"role": "assistant", "content": "a"}], "osl": 1}, "roles do not take turns"),
        ({"messages": [], "osl": 1}, "messages is empty"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^f\.jsonl:2: .*{said}"):
        read({"isl": 1, "osl": 1}, row)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"session": "s", "turn": 0, "prompt": [1], "osl": 1}, "no two alike"),
        ({"session": "s", "prompt": [1], "osl": 1}, "a turn each"),
        ({"session": "s", "turn": 1, "prompt": "a", "osl": 1}, "text and token ids"),
        ({"session": "s", "turn": 1, "prompt": [1], "opening": [1], "osl": 1}, "first turn"),
    ],
)
def test_lines_of_a_session_must_fit_together(second: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read({"session": "s", "turn": 0, "prompt": [1], "osl": 1}, second)


def test_a_trace_has_one_block_size() -> None:
    with pytest.raises(ConfigError, match=r"f\.jsonl:2: .*one block size"):
        read({"isl": 4, "osl": 1, "hash_ids": [1], "block": 4}, {"isl": 8, "osl": 1, "hash_ids": [1], "block": 8})
