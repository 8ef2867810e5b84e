"""Scratch for steps out of the memory of KV pages, taken when a step is planned and given back when KV is short. Pure.

    deflation   a step needs more than the arena has: chunks that are free, or only cached, become its end; KV that anybody
                holds never gives way, the step is cut instead
    inflation   pages are short: what no step in flight needs leaves the arena's end and is pages again

Nothing moves for its own sake: the arena keeps what it has until pages are short, and KV what it has until a step needs it.
A sequence has its pages before it is in a step, and the step's scratch is taken whole or the step is cut; the least arena
lasts, so whatever was admitted can always be computed. Source: eLLM (arXiv 2506.15155), E3 to E6 of our card.
"""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from common.ids import Owner
from common.policy.batching import Candidate, DecodeFirst
from common.policy.elastic import ArenaTerms
from kvstore.index.block_pool import BlockPool
from services.worker.core.actions import LendChunks, TakeBackChunks

ACTIVATIONS = Owner("activations")
"""Who holds the chunks of the arena in the block pool."""


class StepScratch(Protocol):
    """Who says how large a step may be."""

    def choose(self, policy: DecodeFirst, candidates: Sequence[Candidate]) -> list[int]:
        """As `policy.choose`, for a step that has the scratch it needs."""
        ...

    def began(self) -> None:
        """The step chosen last is in flight now."""
        ...

    def ended(self) -> None:
        """The oldest step in flight has ended."""
        ...

    def inflate(self, n_pages: int) -> bool:
        """Make so many pages available that serve steps now; False if there are not so many."""
        ...

    def take_orders(self) -> list[LendChunks | TakeBackChunks]:
        """What is to be done since the last call, in this order."""
        ...

    def counters(self) -> dict[str, float]:
        """As in reports."""
        ...

    def check(self) -> None:
        """Its laws. Raises RuntimeError."""
        ...


class OwnScratch:
    """The engine has memory of its own for steps: nothing is lent."""

    def choose(self, policy: DecodeFirst, candidates: Sequence[Candidate]) -> list[int]:
        """Every step fits."""
        return policy.choose(candidates)

    def began(self) -> None:
        """Not of interest."""

    def ended(self) -> None:
        """Not of interest."""

    def inflate(self, n_pages: int) -> bool:
        """There is nothing to be had."""
        return False

    def take_orders(self) -> list[LendChunks | TakeBackChunks]:
        """None, ever."""
        return []

    def counters(self) -> dict[str, float]:
        """None."""
        return {}

    def check(self) -> None:
        """It has none."""


class ElasticScratch:
    """Owns which chunks the arena has, in order, and what each step in flight needs of it. Pages are the pool's.

    Law: the arena holds the lasting chunks, and what every step in flight needs.
    """

    def __init__(self, pool: BlockPool, terms: ArenaTerms, mode: str) -> None:
        """`mode`: static, kv or full. Takes the lasting chunks at once. Raises ConfigError if that leaves no room for KV."""
        terms.require_room(mode, pool.ledger.total_pages, pool.pages_per_block)
        self._pool, self._terms = pool, terms
        self._lasting_chunks = terms.lasting_chunks(mode)
        self._needed_bytes: deque[int] = deque()
        self._reserved_bytes = 0
        self._chunks = pool.lent.lend(self._lasting_chunks, terms.chunk_pages, ACTIVATIONS, lasting=True)
        self._orders: list[LendChunks | TakeBackChunks] = [LendChunks(tuple(self._chunks), ACTIVATIONS)]
        self.lent_chunks_total = self.returned_chunks_total = self.cut_steps_total = 0
        """Chunks that KV gave to steps, and got back, since the start; steps that were smaller than the policy's choice."""

    @property
    def n_chunks(self) -> int:
        """Chunks that the arena has."""
        return len(self._chunks)

    def choose(self, policy: DecodeFirst, candidates: Sequence[Candidate]) -> list[int]:
        """The largest choice of the policy that has its scratch."""
        limit = policy.max_step_tokens
        cut = 0
        while True:
            counts = policy.choose(candidates, limit)
            ends = [one.computed_tokens + count for one, count in zip(candidates, counts, strict=True) if count]
            rows = sum(counts)
            allowed = self.rows_allowed(rows, max(ends)) if rows else 0
            if allowed >= rows:
                self.cut_steps_total += cut * any(counts)
                return counts
            limit, cut = allowed, 1

    def rows_allowed(self, rows_wanted: int, longest_keys: int) -> int:
        """Reserve scratch for the next step: for all its rows, or for as many as what can be had suffices for.

        `longest_keys`: of one of its sequences at the most, the step's own tokens included. A second call before `began`
        replaces the first.
        """
        terms = self._terms
        missing = terms.chunks_for(terms.step.needs_bytes(rows_wanted, longest_keys)) - len(self._chunks)
        if missing > 0:
            self._deflate(missing)
        have_bytes = len(self._chunks) * terms.chunk_bytes
        rows = rows_wanted
        if terms.step.needs_bytes(rows_wanted, longest_keys) > have_bytes:
            rows = terms.step.rows_within(have_bytes, longest_keys)
            assert rows >= min(rows_wanted, terms.least_rows), "the least arena does not hold the least step"
        self._reserved_bytes = terms.step.needs_bytes(rows, longest_keys)
        return rows

    def _deflate(self, missing: int) -> None:
        """As many of the missing chunks as nobody's KV is in."""
        chunk_pages = self._terms.chunk_pages
        n_chunks = min(missing, self._pool.lent.lendable(chunk_pages))
        if n_chunks:
            chunks = self._pool.lent.lend(n_chunks, chunk_pages, ACTIVATIONS)
            self._chunks += chunks
            self._orders.append(LendChunks(tuple(chunks), ACTIVATIONS))
            self.lent_chunks_total += n_chunks

    def began(self) -> None:
        """The step that scratch was reserved for is in flight."""
        self._needed_bytes.append(self._reserved_bytes)

    def ended(self) -> None:
        """The oldest step in flight has ended."""
        self._needed_bytes.popleft()

    @property
    def spare_chunks(self) -> int:
        """Chunks at the arena's end that no step in flight needs and that need not last."""
        needed = self._terms.chunks_for(max(self._needed_bytes, default=0))
        return len(self._chunks) - max(self._lasting_chunks, needed)

    def inflate(self, n_pages: int) -> bool:
        """Take chunks back from the arena's end until so many pages more are free.

        Nothing, if all that no step needs would not be enough. Not between `choose` and `began`.
        """
        spare, chunk_pages = self.spare_chunks, self._terms.chunk_pages
        if spare * (chunk_pages + 2 * (self._pool.pages_per_block - 1)) < n_pages:
            return False
        free_pages = 0
        while spare and free_pages < n_pages:  # a block that reaches into a chunk that stays does not become free
            n_chunks = min(spare, -(-(n_pages - free_pages) // chunk_pages))
            leaving = self._chunks[-n_chunks:]
            del self._chunks[-n_chunks:]
            free_pages += self._pool.lent.take_back(ACTIVATIONS, leaving)
            self._orders.append(TakeBackChunks(tuple(leaving), ACTIVATIONS))
            self.returned_chunks_total += n_chunks
            spare -= n_chunks
        return free_pages >= n_pages

    def take_orders(self) -> list[LendChunks | TakeBackChunks]:
        """What the shell has to do."""
        orders, self._orders = self._orders, []
        return orders

    def counters(self) -> dict[str, float]:
        """As in reports."""
        return {
            "scratch_chunks_total{to=steps}": float(self.lent_chunks_total),
            "scratch_chunks_total{to=kv}": float(self.returned_chunks_total),
            "cut_steps_total": float(self.cut_steps_total),
        }

    def check(self) -> None:
        """Raise RuntimeError if the pool knows of other chunks, or a step in flight lacks scratch."""
        if sorted(self._chunks) != sorted(self._pool.lent.of(ACTIVATIONS)) or self.spare_chunks < 0:
            raise RuntimeError(
                f"arena: chunks {self._chunks}, lent to it {self._pool.lent.of(ACTIVATIONS)}; steps in flight need "
                f"{list(self._needed_bytes)} bytes, {self._lasting_chunks} chunks of {self._terms.chunk_bytes} last"
            )
