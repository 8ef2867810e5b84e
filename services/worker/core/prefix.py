"""What a sequence takes from the cache when it starts, and gives to it as it is computed. Pure.

Only whole blocks are reused and kept, and the last known token is always computed: its result draws the next one.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

from common.block_hash import extend_hashes
from common.ids import Owner
from kvstore.index.block_pool import BlockPool
from kvstore.index.ledger import PageIds, PageState
from kvstore.index.page_table import PageTable
from services.worker.core.found import PARKED_TIER, Load
from services.worker.core.pool_memory import NOTHING_LENT, PoolMemory
from services.worker.core.sequence import Sequence
from services.worker.core.wire import PEER_TIER, TIERS


class Keep(Enum):
    """Which finished blocks stay for reuse."""

    NOTHING = auto()
    PROMPTS = auto()
    ALL = auto()


@dataclass(slots=True)
class ReuseTotals:
    """Prompt tokens by where their KV came from, since the start."""

    hit_tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*TIERS, PEER_TIER), 0))
    missed_tokens: int = 0


class PrefixReuse:
    """Gives sequences their pages, cached ones first; publishes what they have finished. Owns no sequence."""

    def __init__(
        self,
        pool: BlockPool,
        keep: Keep,
        block_tokens: int,
        memory: PoolMemory = NOTHING_LENT,
        *,
        lead_tokens: int = 0,
    ) -> None:
        """`memory`: who else has memory of the pool, to be asked when pages are short. `lead_tokens`: how long before it is
        needed a block is given, if one is free."""
        self.pool, self._keep, self.block_tokens, self._lead_tokens = pool, keep, block_tokens, lead_tokens
        self.memory = memory
        """To read."""
        self.totals = ReuseTotals()

    def hits(self, sequence: Sequence) -> int:
        """Leading blocks of the sequence that are cached here and may be reused."""
        if self._keep is Keep.NOTHING:
            return 0
        usable = (len(sequence.tokens) - 1) // self.block_tokens
        self._extend_hashes(sequence, usable * self.block_tokens)
        return self.pool.match(sequence.hashes[:usable])

    def new_blocks(self, sequence: Sequence) -> int:
        """Blocks that starting the sequence now would take from what `available_pages` counts."""
        hits = self.hits(sequence)
        return self.blocks_for(len(sequence.tokens)) - self.pool.pinned_run(sequence.hashes[:hits])

    def begin(
        self, sequence: Sequence, new_pages: Callable[[int], PageIds] | None = None, *, most_hits: int | None = None
    ) -> Load | None:
        """Give a sequence without pages all pages for its tokens; room was checked.

        `new_pages`: gives those of so many blocks that are not cached, [blocks, layers]; None: the pool does. `most_hits`: of the cached ones.
        Returns what of its found blocks must be loaded into them (perhaps nothing), if it has any.
        """
        hits, found = self.hits(sequence), sequence.found
        hits = hits if most_hits is None else min(hits, most_hits)
        sequence.found = None
        if hits:
            sequence.table.append(self.pool.take(sequence.owner, sequence.hashes[:hits]))
        n_new = self.blocks_for(len(sequence.tokens)) - hits
        if new_pages is None:
            sequence.table.append(self.pool.alloc(sequence.owner, n_new, PageState.RESERVED))
        else:
            sequence.table.append(new_pages(n_new))
        sequence.reserved, sequence.began_tokens, sequence.passed = True, len(sequence.tokens), None
        sequence.cached_blocks = sequence.published_blocks = hits
        if self._keep is not Keep.NOTHING:  # others see by the names what is coming
            self._extend_hashes(sequence, sequence.known_tokens - sequence.known_tokens % self.block_tokens)
        end = hits
        if found is not None and found.first_block <= hits:
            end = max(hits, min(found.end_block, (len(sequence.tokens) - 1) // self.block_tokens))
        sequence.computed_tokens = end * self.block_tokens
        tiers = () if found is None or end == hits else found.tiers[hits - found.first_block : end - found.first_block]
        self._note_hits(sequence, hits, tiers)
        if found is None:
            return None
        if end == hits:
            return Load(sequence.request, found, hits, sequence.table.blocks(hits, hits))
        sequence.loading = found.call
        return Load(sequence.request, found, hits, sequence.table.blocks(hits, end))

    def _note_hits(self, sequence: Sequence, hits: int, tiers: tuple[str, ...]) -> None:
        """What of it is reused: `hits` blocks of the cache, and those of `tiers`."""
        began_before, hit = bool(sequence.hit_tokens), sum(sequence.hit_tokens.values())
        if began_before and PARKED_TIER in tiers:
            return  # it has all that it had
        sequence.hit_tokens = {"device": hits * self.block_tokens}
        if began_before:  # it had to give way: what it finds of its own work is no reuse
            sequence.hit_tokens = {"device": min(hit, hits * self.block_tokens)}
        for tier in tiers:
            if tier != PARKED_TIER:
                sequence.hit_tokens[tier] = sequence.hit_tokens.get(tier, 0) + self.block_tokens

    def extend(self, sequence: Sequence, n_blocks: int) -> bool:
        """Give a sequence that has pages that many blocks more; False, and nothing, if there is no room."""
        short = n_blocks * self.pool.pages_per_block - self.pool.available_pages
        if short > 0 and not self.memory.inflate(short):
            return False
        state = PageState.RESERVED if sequence.reserved else PageState.ACTIVE
        sequence.table.append(self.pool.alloc(sequence.owner, n_blocks, state))
        return True

    def extend_ahead(self, sequences: Iterable[Sequence]) -> None:
        """Give those that will soon need one more block that block, if one is free: there is time then to map it.

        Source: vTensor (arXiv 2407.15309), its extend ahead of decoding.
        """
        for one in sequences if self._lead_tokens else ():
            end_tokens = one.table.n_blocks * self.block_tokens
            soon = (
                end_tokens - self._lead_tokens <= len(one.tokens) and end_tokens < one.limit_tokens - 1
            )  # the last token is never computed
            if soon and one.ring is None and self.pool.ledger.free_pages >= 2 * self.pool.pages_per_block:
                self.extend(one, 1)

    def give_up(self, sequence: Sequence, *, to: Owner | None = None) -> None:
        """Take all its pages from a sequence; it will `begin` again. `to`: who gets them and its pins; None: nobody."""
        if to is None:
            self.pool.release(sequence.owner)
        else:
            self.pool.rename(sequence.owner, to)
        sequence.table = PageTable(sequence.table.layers)
        sequence.computed_tokens = sequence.cached_blocks = sequence.published_blocks = 0
        sequence.reserved = False

    def restart(self, sequence: Sequence) -> None:
        """What was to be loaded did not come: compute everything behind the blocks that were cached here."""
        sequence.computed_tokens = sequence.cached_blocks * self.block_tokens
        reused = min(sum(sequence.hit_tokens.values()), sequence.computed_tokens)  # its own work is none
        sequence.hit_tokens = {"device": reused}

    def count(self, sequence: Sequence) -> None:
        """The sequence's prompt is computed for the first time: from now on it is known what was reused."""
        sequence.reused_tokens = sum(sequence.hit_tokens.values())
        for tier, tokens in sequence.hit_tokens.items():
            self.totals.hit_tokens[tier] += tokens
        self.totals.missed_tokens += sequence.known_tokens - sequence.reused_tokens

    def publish(self, sequence: Sequence) -> None:
        """Make the blocks that are complete by now visible to others."""
        if self._keep is Keep.NOTHING or sequence.ring is not None:  # not whole
            return
        tokens = sequence.computed_tokens
        if self._keep is Keep.PROMPTS:
            tokens = min(tokens, sequence.known_tokens)
        first, end = sequence.published_blocks, tokens // self.block_tokens
        if end <= first:
            return
        self._extend_hashes(sequence, end * self.block_tokens)
        names, pages = sequence.hashes[first:end], sequence.table.blocks(first, end)
        parent = sequence.hashes[first - 1] if first else sequence.root
        self.pool.publish(sequence.owner, names, pages, parent=parent, depth=first)
        sequence.published_blocks = end

    def _extend_hashes(self, sequence: Sequence, tokens: int) -> None:
        if len(sequence.hashes) * self.block_tokens < tokens:
            extend_hashes(sequence.hashes, sequence.tokens[:tokens], sequence.root, self.block_tokens)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_tokens)
