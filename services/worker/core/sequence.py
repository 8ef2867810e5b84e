"""One sequence as the scheduler sees it."""

from dataclasses import dataclass, field

from common.block_hash import BlockHash
from common.ids import Owner, RequestId
from common.messages.requests import Sampling
from kvstore.index.page_table import PageTable
from services.worker.core.found import FoundBlocks


def request_owner(request: RequestId) -> Owner:
    """Under which name a request's pages are kept; no peer can choose one that means something else."""
    return Owner(f"request/{request}")


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable record, owned by the Scheduler; everybody else gets it to read."""

    request: RequestId
    order: int
    """Arrival number; the youngest gives way when pages run out."""
    tokens: list[int]
    """Prompt and generated tokens."""
    prompt_tokens: int
    """What the client sent. Tokens behind it are output: of this worker, or `emitted` by one that failed."""
    known_tokens: int
    """What came with the request: the prompt and the emitted tokens, computed together as one prompt."""
    limit_tokens: int
    """It ends when it has so many tokens, if not before: by what the client asked for, or by the model's context."""
    sampling: Sampling
    table: PageTable
    root: BlockHash
    """What the names of its blocks start from: model and cache salt."""
    hashes: list[BlockHash] = field(default_factory=list)
    """Names of its leading blocks, as far as anybody asked."""
    cached_blocks: int = 0
    """Leading blocks that it found in the cache and only pinned."""
    published_blocks: int = 0
    """Leading blocks that are in the cache, or that it has tried to put there."""
    hit_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens at its start that were not computed, by the tier that their KV came from."""
    reused_tokens: int | None = None
    """Their sum, from its first token on."""
    found: FoundBlocks | None = None
    """What another process keeps for its start."""
    loading: int | None = None
    """The call that fetches blocks into its pages: they must stay until it has ended."""
    ring: int | None = None
    """Its prompt is computed in one step in which layers share pages, and this is the call that the engine waits for."""
    layer_wise: bool = False
    """It may begin so, for its layers go to a decode worker; it is not computed before that has granted pages."""
    granted_block: int | None = None
    """The first block that the decode worker has pages for."""
    awaits_load: bool = False
    """It cannot be computed before the load has ended; otherwise the engine waits layer by layer."""
    lost: bool = False
    """What was fetched is worthless: the step that uses it must be computed again."""
    streamed: bool = False
    computed_tokens: int = 0
    reserved: bool = False
    """Its pages are RESERVED in the ledger, because its first token is not drawn yet."""
    began_tokens: int = 0
    """Tokens that it had when it got its pages last."""
    passed: int | None = None
    """How many were given pages while it waits because it gave way for them; None: it gave way for nobody."""
    in_steps: int = 0
    """Steps in flight that compute it: its pages must stay."""
    held: bool = False
    """Somebody outside the scheduler (a copy in flight) still reads its pages."""
    dropped: bool = False
    """Over for its owner; pages go as soon as neither `in_steps` nor `held` nor `loading`."""

    def coming_tokens(self, block_tokens: int) -> int:
        """Its leading positions that are computed, or lie elsewhere and are fetched when it starts."""
        return (
            self.computed_tokens
            if self.found is None
            else max(self.computed_tokens, self.found.end_block * block_tokens)
        )

    @property
    def owner(self) -> Owner:
        """Name under which the ledger keeps this sequence's pages."""
        return request_owner(self.request)

    @property
    def is_barred(self) -> bool:
        """Whether no step may compute it now, although it has pages."""
        return self.awaits_load or self.lost or (self.layer_wise and self.granted_block is None)

    @property
    def has_pages(self) -> bool:
        """Whether it could be in a step."""
        return self.table.n_blocks > 0

    @property
    def generated_tokens(self) -> int:
        """Output tokens so far, wherever they were drawn."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def reused_prompt_tokens(self) -> int:
        """What the client hears of: of a replay the emitted tokens do not count."""
        return min(self.reused_tokens or 0, self.prompt_tokens)

    @property
    def uncomputed_tokens(self) -> int:
        """Positions still to compute before the next token can be drawn."""
        return len(self.tokens) - self.computed_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPrompt:
    """A sequence as it arrives."""

    request: RequestId
    tokens: tuple[int, ...]
    """Prompt and emitted tokens."""
    sampling: Sampling
    root: BlockHash
    """What its blocks' names start from: model and cache salt."""
    emitted_tokens: int = 0
    """How many of `tokens` are output already."""
    hashes: tuple[BlockHash, ...] = ()
    """Names of its leading blocks, if somebody has computed them already."""
    streamed: bool = False
    """Whether the shell wants to hear of every layer."""
    found: FoundBlocks | None = None
    """Blocks that another process keeps for it."""
    layer_wise: bool = False
    """Whether it may begin without pages for all of its layers."""
