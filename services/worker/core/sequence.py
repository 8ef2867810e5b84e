"""One sequence as the scheduler sees it."""

from dataclasses import dataclass

from common.ids import Owner, RequestId
from common.messages.requests import Sampling
from kvstore.index.page_table import PageTable


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable record, owned by the Scheduler; everybody else gets it to read."""

    request: RequestId
    order: int
    """Arrival number; the youngest gives way when pages run out."""
    tokens: list[int]
    """Prompt and generated tokens."""
    prompt_tokens: int
    sampling: Sampling
    table: PageTable
    streamed: bool = False
    computed_tokens: int = 0
    reserved: bool = False
    """Its pages are RESERVED in the ledger, because its first token is not drawn yet."""
    in_step: bool = False
    """The engine is computing it now: its pages must stay."""
    held: bool = False
    """Somebody outside the scheduler (a copy in flight) still reads its pages."""
    dropped: bool = False
    """Over for its owner; pages go as soon as neither `in_step` nor `held`."""

    @property
    def owner(self) -> Owner:
        """Name under which the ledger keeps this sequence's pages."""
        return Owner(self.request)

    @property
    def generated_tokens(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def uncomputed_tokens(self) -> int:
        """Positions still to compute before the next token can be drawn."""
        return len(self.tokens) - self.computed_tokens
