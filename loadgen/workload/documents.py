"""`documents`: sessions that ask short questions about long documents, in the shape of LooGLE. Pure.

Every document is read by exactly `share_ratio` sessions: MemServe's share ratio, read as sessions per document.
"""

from dataclasses import dataclass
from functools import lru_cache
from random import Random

from loadgen.workload.dialogue import Dialogue
from loadgen.workload.lengths import LengthLaw
from loadgen.workload.plan import Conversation

ORDERS = ("shuffled", "together")


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """Shelves of `n_documents`, one after the other, so that the workload is endless and the share ratio stays exact.

    `shuffled`: the sessions of one shelf come in any order. `together`: the sessions of a document follow one another.
    """

    seed: int | str
    dialogue: Dialogue
    document_lengths: LengthLaw
    n_documents: int
    share_ratio: int
    order: str = "shuffled"

    @property
    def n_conversations(self) -> None:
        """Endless."""
        return None

    def document_of(self, index: int) -> int:
        """The document that the session at this place reads; counted over all shelves."""
        per_shelf = self.n_documents * self.share_ratio
        shelf, place = divmod(index, per_shelf)
        if self.order == "shuffled":
            place = _shuffled(f"{self.seed}/shelf/{shelf}", per_shelf)[place]
        return shelf * self.n_documents + place // self.share_ratio

    def conversation(self, index: int) -> Conversation:
        """The session at that place."""
        name = f"{self.seed}/document/{self.document_of(index)}"
        n_tokens = self.document_lengths.draw_tokens(Random(f"{name}/length"))
        return Conversation(
            index=index,
            opening=self.dialogue.source.shared(name, n_tokens),
            turns=self.dialogue.turns(f"{self.seed}/session/{index}"),
        )


@lru_cache(maxsize=16)
def _shuffled(name: str, n: int) -> tuple[int, ...]:
    places = list(range(n))
    Random(name).shuffle(places)
    return tuple(places)
