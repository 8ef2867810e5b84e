"""The turns of a made-up conversation, common to chats, agents and questions about documents. Pure."""

from dataclasses import dataclass
from random import Random

from loadgen.workload.content import ContentSource
from loadgen.workload.lengths import LengthLaw
from loadgen.workload.plan import Turn
from loadgen.workload.think import ThinkLaw


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """How many turns, how long, how far apart."""

    source: ContentSource
    n_turns: LengthLaw
    first_lengths: LengthLaw
    """What the first turn adds to the opening."""
    next_lengths: LengthLaw
    """What each later turn adds to the answer before it."""
    output_lengths: LengthLaw
    pauses: ThinkLaw

    def turns(self, name: str) -> tuple[Turn, ...]:
        """The turns of the conversation of that name; equal names give equal turns."""
        laws = Random(f"{name}/lengths")
        turns = []
        for place in range(max(1, self.n_turns.draw_tokens(laws))):
            added_tokens = (self.next_lengths if place else self.first_lengths).draw_tokens(laws)
            output_tokens, pause_s = self.output_lengths.draw_tokens(laws), self.pauses.draw_s(laws)
            turns.append(
                Turn(
                    added=self.source.draw(f"{name}/turn/{place}", added_tokens),
                    output_tokens=output_tokens,
                    think_s=pause_s if place else 0.0,
                )
            )
        return tuple(turns)
