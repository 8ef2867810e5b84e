"""What does not fit a model's context is cut before it is sent, and counted. Pure.

A prompt grows by every turn and every answer, so the lengths of all turns follow from the plan, if answers come in full.
Templates of chat servers add tokens that nobody here can know: leave room for them in the limit.
"""

from dataclasses import dataclass, replace

from loadgen.workload.content import CountTokens, trim
from loadgen.workload.plan import Conversation, Turn, Workload


@dataclass(frozen=True, slots=True)
class Fitted:
    """A conversation that fits, and what that took."""

    conversation: Conversation
    cut_turns: int
    """Turns at the end that are not sent."""
    trimmed_tokens: int
    """Taken from the end of the opening, then from the first turn; answers are shortened only when they alone are too long."""


@dataclass(frozen=True, slots=True)
class Cuts:
    """What a whole run lost to the context's limit."""

    conversations: int
    cut_conversations: int
    cut_turns: int
    trimmed_conversations: int
    trimmed_tokens: int

    def __str__(self) -> str:
        if not self.cut_conversations and not self.trimmed_conversations:
            return f"all of {self.conversations} conversations fit the context"
        return (
            f"of {self.conversations} conversations {self.cut_conversations} lost {self.cut_turns} turns and "
            f"{self.trimmed_conversations} prompts lost {self.trimmed_tokens} tokens, to fit the context"
        )


def fit(planned: Conversation, most_tokens: int, count_tokens: CountTokens) -> Fitted:
    """`planned`, so that every prompt and its full answer take `most_tokens` or less; the first turn always stays."""
    first = planned.turns[0]
    output_tokens = min(first.output_tokens, max(1, most_tokens - 1))
    room_tokens = max(1, most_tokens - output_tokens)
    opening_tokens, added_tokens = count_tokens(planned.opening), count_tokens(first.added)
    trimmed_tokens = first.output_tokens - output_tokens
    opening, added = planned.opening, first.added
    if opening_tokens + added_tokens > room_tokens:
        opening = trim(opening, max(0, room_tokens - added_tokens), count_tokens)
        added = trim(added, room_tokens - count_tokens(opening), count_tokens)
        trimmed_tokens += opening_tokens + added_tokens - count_tokens(opening) - count_tokens(added)
    kept: list[Turn] = [replace(first, added=added, output_tokens=output_tokens)]
    history_tokens = count_tokens(opening) + count_tokens(added)
    for before, turn in zip(planned.turns, planned.turns[1:], strict=False):
        history_tokens += count_tokens(turn.added) + (before.output_tokens if planned.keeps_answers else 0)
        if history_tokens + turn.output_tokens > most_tokens:
            break
        kept.append(turn)
    return Fitted(replace(planned, opening=opening, turns=tuple(kept)), len(planned.turns) - len(kept), trimmed_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class WithinContext:
    """Another workload, cut to `most_tokens` of prompt and answer."""

    workload: Workload
    most_tokens: int
    count_tokens: CountTokens

    @property
    def n_conversations(self) -> int | None:
        """As many as the other has."""
        return self.workload.n_conversations

    def fitted(self, index: int) -> Fitted:
        """The conversation at that place with what it lost. Raises IndexError beyond the last."""
        return fit(self.workload.conversation(index), self.most_tokens, self.count_tokens)

    def conversation(self, index: int) -> Conversation:
        """The conversation at that place. Raises IndexError beyond the last."""
        return self.fitted(index).conversation

    def cuts(self, n_conversations: int) -> Cuts:
        """What the first `n_conversations` lose; makes them all again, so ask before the run, not during it."""
        if self.n_conversations is not None:
            n_conversations = min(n_conversations, self.n_conversations)
        fitted = [self.fitted(index) for index in range(n_conversations)]
        return Cuts(
            conversations=n_conversations,
            cut_conversations=sum(one.cut_turns > 0 for one in fitted),
            cut_turns=sum(one.cut_turns for one in fitted),
            trimmed_conversations=sum(one.trimmed_tokens > 0 for one in fitted),
            trimmed_tokens=sum(one.trimmed_tokens for one in fitted),
        )
