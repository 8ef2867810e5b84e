"""What a run sends, as data: conversations of turns. Pure.

Every workload, trace and file becomes this; a single request is a conversation of one turn. Who sends it decides when.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

Content = tuple[int, ...] | str
"""Token ids, or text. All contents of a conversation are of one kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One request of a conversation: what it adds to the history, and what is asked for."""

    added: Content
    output_tokens: int
    """Length of the answer that is asked for."""
    think_s: float = 0.0
    """From the end of the answer before to this request; of a first turn, nothing."""
    at_s: float | None = None
    """Not before this time of the run, whatever came before; None: whoever sends it decides."""
    cancel_after_tokens: int | None = None
    """Leave once so many tokens came; 0: at once after sending; None: stay to the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Turns that are sent one after the other.

    The prompt of turn k is the opening, what turns 0..k added and, where answers are kept, the real answers between them.
    """

    index: int
    """Place in the workload; equal seeds give equal conversations under equal indices."""
    turns: tuple[Turn, ...]
    """At least one."""
    opening: Content = ()
    """What comes before the first turn and may be shared with others: a system prompt, a document, tools."""
    keeps_answers: bool = True
    group: str = ""
    """What kind of conversation this is, for reports that tell kinds apart."""
    session: str = ""
    """Goes out as `x-session-id`, if that is asked for; empty: one per conversation."""


class Workload(Protocol):
    """A source of conversations: a pure function of its settings, its seed and an index."""

    @property
    def n_conversations(self) -> int | None:
        """How many there are; None: as many as are asked for."""
        ...

    def conversation(self, index: int) -> Conversation:
        """Raises IndexError beyond the last."""
        ...


def conversations(workload: Workload) -> Iterator[Conversation]:
    """All of them, in order; endless if the workload is."""
    index = 0
    while workload.n_conversations is None or index < workload.n_conversations:
        yield workload.conversation(index)
        index += 1
