"""Conversations for tests."""

from dataclasses import dataclass

from loadgen.workload.plan import Conversation, Turn


def turn(added: tuple[int, ...] | str = (1, 2, 3), output_tokens: int = 4, **changes: object) -> Turn:
    return Turn(added=added, output_tokens=output_tokens, **changes)  # type: ignore[arg-type] # any field


def talk(index: int = 0, turns: int | tuple[Turn, ...] = 1, **changes: object) -> Conversation:
    made = tuple(turn((index, number)) for number in range(turns)) if isinstance(turns, int) else turns
    return Conversation(index=index, turns=made, **changes)  # type: ignore[arg-type] # any field


@dataclass(frozen=True)
class Talks:
    """A workload of conversations that all have so many turns."""

    turns: int = 1
    n_conversations: int | None = None

    def conversation(self, index: int) -> Conversation:
        return talk(index, self.turns)


@dataclass(frozen=True)
class Listed:
    """A workload of these conversations."""

    listed: tuple[Conversation, ...]

    @property
    def n_conversations(self) -> int | None:
        return len(self.listed)

    def conversation(self, index: int) -> Conversation:
        return self.listed[index]
