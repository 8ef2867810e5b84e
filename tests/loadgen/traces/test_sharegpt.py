import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from common.errors import ConfigError
from loadgen.traces.answers import Answers
from loadgen.traces.measure import BY_CHARACTERS, with_tokenizer
from loadgen.traces.sharegpt import read_sharegpt
from loadgen.workload.lengths import Fixed


def told(*texts: str, roles: tuple[str, str] = ("human", "gpt"), keys: tuple[str, str] = ("from", "value")) -> Any:
    who, what = keys
    name = "conversations" if who == "from" else "messages"
    return {"id": "x", name: [{who: roles[place % 2], what: text} for place, text in enumerate(texts)]}


def test_what_people_wrote_is_sent_and_answers_give_lengths() -> None:
    trace = read_sharegpt([json.dumps([told("a" * 8, "b" * 40, "c" * 9, "d" * 4)])], "f")
    (session,) = trace.sessions
    assert [request.content for request in session.requests] == ["a" * 8, "c" * 9]
    assert [request.added_tokens for request in session.requests] == [2, 3]
    assert [request.output_tokens for request in session.requests] == [10, 1]
    assert "four characters" in trace.notes[0].replace("4", "four")


@pytest.mark.parametrize("roles", [("human", "gpt"), ("user", "assistant"), ("User", "chatgpt")])
@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
def test_roles_and_keys_of_every_release_are_understood(roles: tuple[str, str], keys: tuple[str, str]) -> None:
    assert read_sharegpt([json.dumps([told("q", "a", roles=roles, keys=keys)])], "f").n_requests == 1


def test_one_conversation_a_line_is_read_too() -> None:
    assert read_sharegpt([json.dumps(told("q", "a")), json.dumps(told("q", "a"))], "f").n_requests == 2


def test_a_system_prompt_is_the_opening() -> None:
    entry = told("q", "a")
    entry["conversations"].insert(0, {"from": "system", "value": "be brief"})
    assert read_sharegpt([json.dumps([entry])], "f").sessions[0].opening == "be brief"


def test_broken_conversations_are_left_out_and_counted_by_reason() -> None:
    entries = [
        told("a", "b", roles=("gpt", "human")),
        told("q", ""),
        told("q"),
        {"id": "x", "conversations": []},
        told("q", "a", "left open"),
        told("q", "a"),
    ]
    trace = read_sharegpt([json.dumps(entries)], "f")
    assert trace.n_requests == 2
    assert trace.left_out == {
        "roles do not take turns": 1,
        "empty texts": 1,
        "nothing was answered (--osl would say how long to answer)": 1,
        "empty conversations": 1,
        "last questions without answer": 1,
    }


def test_last_questions_are_asked_where_their_answers_length_is_told() -> None:
    entries = [told("q", "a", "left open"), told("q")]
    trace = read_sharegpt([json.dumps(entries)], "f", BY_CHARACTERS, Answers(lengths=Fixed(9), seed=0))
    assert [[request.output_tokens for request in session.requests] for session in trace.sessions] == [[1, 9], [9]]
    assert not trace.left_out


def test_what_is_no_json_is_named_by_file_and_line() -> None:
    with pytest.raises(ConfigError, match=r"^f: no list"):
        read_sharegpt(["[{]"], "f")
    with pytest.raises(ConfigError, match=r"^f:2: no conversation"):
        read_sharegpt([json.dumps(told("q", "a")), "{"], "f")


def test_a_tokenizer_counts_exactly_and_nothing_needs_to_be_said(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    measure = with_tokenizer(str(tmp_path))
    trace = read_sharegpt([json.dumps([told("one two one", "two two")])], "f", measure)
    (request,) = trace.sessions[0].requests
    assert (request.added_tokens, request.output_tokens) == (3, 2)
    assert trace.notes == ()
    assert measure.split("two one") == (2, 1)


@pytest.mark.parametrize("broken", [True, False])
def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path: Path, broken: bool) -> None:
    if broken:
        (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="--tokenizer="):
        with_tokenizer(str(tmp_path))
