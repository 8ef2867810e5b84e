"""`shared-prefix`: groups of requests that begin alike and end each in its own way. Pure.

The load that prefix caches and routers that know about them are made for; SGLang calls it generated-shared-prefix.
"""

from dataclasses import dataclass
from random import Random

from loadgen.workload.content import ContentSource
from loadgen.workload.lengths import LengthLaw
from loadgen.workload.plan import Conversation, Turn
from loadgen.workload.popularity import draw_group

ORDERS = ("shuffled", "grouped", "together")


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefix:
    """Conversations of one turn: the prefix of a group, then a question that nobody else asks.

    `shuffled`: every request draws its group by popularity. `grouped`: all groups in turn, `siblings` requests each, over
    and over. `together`: a group drawn by popularity sends `siblings` requests one after the other, then another is drawn;
    the first of them is still being computed when the others arrive, which tests routers that look at finished work only.
    """

    seed: int | str
    source: ContentSource
    n_groups: int
    question_lengths: LengthLaw
    output_lengths: LengthLaw
    prefix_lengths: LengthLaw | None = None
    """One draw per group. None: `prefix_share` decides."""
    prefix_share: float = 0.0
    """Without `prefix_lengths`: the question law is that of whole prompts, and this share of each is its group's."""
    zipf: float = 0.0
    order: str = "shuffled"
    siblings: int = 1

    @property
    def n_conversations(self) -> None:
        """Endless."""
        return None

    def group_of(self, index: int) -> int:
        """The group that the request at this place belongs to."""
        if self.order == "grouped":
            return index // self.siblings % self.n_groups
        place = index // self.siblings if self.order == "together" else index
        return draw_group(Random(f"{self.seed}/group/{place}"), self.n_groups, self.zipf)

    def conversation(self, index: int) -> Conversation:
        """The request at that place."""
        group = self.group_of(index)
        lengths = Random(f"{self.seed}/lengths/{index}")
        question_tokens = self.question_lengths.draw_tokens(lengths)
        output_tokens = self.output_lengths.draw_tokens(lengths)
        prefix = f"{self.seed}/prefix/{group}"
        if self.prefix_lengths is not None:
            prefix_tokens = self.prefix_lengths.draw_tokens(Random(f"{prefix}/length"))
            opening = self.source.shared(prefix, prefix_tokens)
        else:
            # At least one token stays the request's own: a prompt that is wholly another's is no new request.
            prefix_tokens = min(question_tokens - 1, round(self.prefix_share * question_tokens))
            question_tokens -= prefix_tokens
            opening = self.source.draw(prefix, prefix_tokens)
        question = self.source.draw(f"{self.seed}/question/{index}", question_tokens)
        return Conversation(index=index, opening=opening, turns=(Turn(added=question, output_tokens=output_tokens),))
