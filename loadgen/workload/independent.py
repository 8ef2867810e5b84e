"""`random`: requests of made-up content that share nothing. No cache can help, so it measures computing alone. Pure."""

from dataclasses import dataclass
from random import Random

from loadgen.workload.content import ContentSource
from loadgen.workload.lengths import LengthLaw
from loadgen.workload.plan import Conversation, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Independent:
    """Conversations of one turn, each with a prompt of its own."""

    seed: int | str
    source: ContentSource
    input_lengths: LengthLaw
    output_lengths: LengthLaw

    @property
    def n_conversations(self) -> None:
        """Endless."""
        return None

    def conversation(self, index: int) -> Conversation:
        """The request at that place."""
        lengths = Random(f"{self.seed}/lengths/{index}")
        prompt = self.source.draw(f"{self.seed}/prompt/{index}", self.input_lengths.draw_tokens(lengths))
        return Conversation(
            index=index, turns=(Turn(added=prompt, output_tokens=self.output_lengths.draw_tokens(lengths)),)
        )
