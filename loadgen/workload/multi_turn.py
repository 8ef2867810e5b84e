"""`multi-turn`: people who chat. Every turn adds to the history, answers included, after a time to think. Pure."""

from dataclasses import dataclass
from random import Random

from loadgen.workload.dialogue import Dialogue
from loadgen.workload.lengths import LengthLaw
from loadgen.workload.plan import Conversation
from loadgen.workload.popularity import draw_group


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiTurn:
    """Conversations that begin with a system prompt, or with nothing."""

    seed: int | str
    dialogue: Dialogue
    system_lengths: LengthLaw | None = None
    """Length of the system prompt; None: there is none."""
    n_systems: int = 1
    """So many different system prompts; 0: every conversation has its own."""
    zipf: float = 0.0
    """Popularity of the system prompts."""

    @property
    def n_conversations(self) -> None:
        """Endless."""
        return None

    def conversation(self, index: int) -> Conversation:
        """The conversation at that place."""
        turns = self.dialogue.turns(f"{self.seed}/chat/{index}")
        if self.system_lengths is None:
            return Conversation(index=index, turns=turns)
        place = index
        if self.n_systems:
            place = draw_group(Random(f"{self.seed}/system/of/{index}"), self.n_systems, self.zipf)
        name = f"{self.seed}/system/{place}"
        n_tokens = self.system_lengths.draw_tokens(Random(f"{name}/length"))
        source = self.dialogue.source
        opening = source.shared(name, n_tokens) if self.n_systems else source.draw(name, n_tokens)
        return Conversation(index=index, opening=opening, turns=turns)
