from dataclasses import dataclass

import pytest

from loadgen.workload.content import count_words
from loadgen.workload.context import WithinContext, fit
from loadgen.workload.plan import Conversation, Turn


def chat(*turns: tuple[int, int], opening: int = 0, keeps_answers: bool = True) -> Conversation:
    return Conversation(
        index=0,
        opening=tuple(range(opening)),
        turns=tuple(Turn(added=tuple(range(100, 100 + added)), output_tokens=osl) for added, osl in turns),
        keeps_answers=keeps_answers,
    )


def test_what_fits_stays_as_it_is() -> None:
    planned = chat((10, 5), (10, 5), opening=20)
    fitted = fit(planned, 50, count_words)
    assert fitted.conversation == planned
    assert (fitted.cut_turns, fitted.trimmed_tokens) == (0, 0)


def test_turns_are_cut_where_prompt_and_answer_would_not_fit() -> None:
    fitted = fit(chat((10, 5), (10, 5), (1, 1), opening=20), 49, count_words)
    assert len(fitted.conversation.turns) == 1
    assert fitted.cut_turns == 2


def test_answers_count_only_where_they_are_kept() -> None:
    assert fit(chat((10, 30), (10, 5)), 45, count_words).cut_turns == 1
    assert fit(chat((10, 30), (10, 5), keeps_answers=False), 45, count_words).cut_turns == 0


def test_the_opening_is_trimmed_before_what_is_asked() -> None:
    planned = chat((10, 5), opening=40)
    fitted = fit(planned, 30, count_words)
    assert fitted.conversation.opening == planned.opening[:15]
    assert fitted.conversation.turns[0].added == planned.turns[0].added
    assert fitted.trimmed_tokens == 25
    tight = fit(planned, 11, count_words)
    assert (len(tight.conversation.opening), len(tight.conversation.turns[0].added)) == (0, 6)


@pytest.mark.parametrize("most_tokens", [2, 5, 20, 40, 77])
def test_every_prompt_with_its_answer_fits(most_tokens: int) -> None:
    conversation = fit(chat((10, 9), (8, 7), (6, 5), opening=20), most_tokens, count_words).conversation
    history = len(conversation.opening)
    for turn in conversation.turns:
        history += len(turn.added)
        assert len(turn.added) >= 1
        assert history + turn.output_tokens <= most_tokens
        history += turn.output_tokens


@dataclass(frozen=True)
class _Listed:
    listed: tuple[Conversation, ...]

    @property
    def n_conversations(self) -> int:
        return len(self.listed)

    def conversation(self, index: int) -> Conversation:
        return self.listed[index]


def test_what_a_run_loses_is_counted_and_said() -> None:
    listed = _Listed((chat((10, 5)), chat((10, 5), (10, 5)), chat((30, 5))))
    cuts = WithinContext(workload=listed, most_tokens=20, count_tokens=count_words).cuts(99)
    assert (cuts.conversations, cuts.cut_conversations, cuts.cut_turns) == (3, 1, 1)
    assert (cuts.trimmed_conversations, cuts.trimmed_tokens) == (1, 15)
    assert "1 lost 1 turns" in str(cuts)
