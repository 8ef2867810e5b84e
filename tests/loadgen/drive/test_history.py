import pytest

from loadgen.drive.history import Answer, History
from tests.loadgen.plans import talk, turn


def test_token_prompts_grow_by_what_turns_add_and_what_was_answered() -> None:
    history = History(talk(turns=(turn((3,)), turn((5, 6))), opening=(1, 2)), "completions")
    assert history.ask(turn((3,))) == {"prompt": [1, 2, 3]}
    assert history.hear(Answer("x", (4,), 1))
    assert history.ask(turn((5, 6))) == {"prompt": [1, 2, 3, 4, 5, 6]}
    assert history.input_tokens == 6


def test_chats_grow_by_messages() -> None:
    history = History(talk(turns=(turn("hi"),), opening="be brief"), "chat")
    history.ask(turn("hi"))
    history.hear(Answer("hello", (7,), 1))
    assert history.ask(turn("and?")) == {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "and?"},
        ]
    }
    assert history.input_tokens is None


def test_text_prompts_grow_by_text() -> None:
    history = History(talk(turns=(turn("b"),), opening="a"), "completions")
    history.ask(turn("b"))
    history.hear(Answer(" c", None, 1))
    assert history.ask(turn("d")) == {"prompt": "a b c d"}


@pytest.mark.parametrize("n_tokens", [1, 5])
def test_an_answer_without_token_ids_is_replaced_by_as_many_and_that_is_told(n_tokens: int) -> None:
    history = History(talk(), "completions")
    history.ask(turn((1,)))
    assert not history.hear(Answer("x", None, n_tokens))
    history.ask(turn((2,)))
    assert history.input_tokens == 2 + n_tokens
