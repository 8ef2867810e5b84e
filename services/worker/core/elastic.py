"""Scratch for steps out of the memory of KV pages, taken when a step is planned and given back when KV is short. Pure
but for one port: what moves the memory of chunks (`CarryOut`) does it now, and says whether it could.

    deflation   a step needs more than the arena has: chunks that are free, or only cached, become its end; KV that anybody
                holds never gives way, the step is cut instead
    inflation   pages are short: what no step in flight needs leaves the arena's end and is pages again

Nothing moves for its own sake: the arena keeps what it has until pages are short, and KV what it has until a step needs it.
A sequence has its pages before it is in a step, and the step's scratch is taken whole or the step is cut; the least arena
lasts, so whatever was admitted can always be computed. Memory moves while this decides, and where the system refuses, nothing
was decided: the step is cut to what the arena has, KV does without. Source: eLLM (arXiv 2506.15155), E3 to E6 of our card.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from common.errors import ConfigError
from common.ids import Owner
from common.policy.batching import Candidate, DecodeFirst
from common.policy.elastic import ArenaTerms
from kvstore.index.block_pool import BlockPool
from services.worker.core.actions import CarryOut, LendChunks, TakeBackChunks, always_moves

ACTIVATIONS = Owner("activations")
"""Who holds the chunks of the arena in the block pool."""
_REFUSED_PLANS = 16
"""So many plans lend no chunks after the system did not bear it, or take none back: each try evicts blocks for nothing, or
unmaps and maps again. Plans, not steps: all that is here may be somebody who waits for memory."""


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
        """Make so many pages available that serve steps now; False, and nothing, if there are not so many."""
        ...

    @property
    def spare_pages(self) -> int:
        """How many `inflate` could make available."""
        ...

    def carry_out_with(self, carry_out: CarryOut) -> None:
        """From now on memory moves by this. Raises ConfigError if what lasts cannot be had."""
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

    @property
    def spare_pages(self) -> int:
        """None."""
        return 0

    def carry_out_with(self, carry_out: CarryOut) -> None:
        """Nothing moves."""

    def counters(self) -> dict[str, float]:
        """None."""
        return {}

    def check(self) -> None:
        """It has none."""


class ElasticScratch:
    """Owns which chunks the arena has, in order, and what each step in flight needs of it. Pages are the pool's.

    Law: the arena holds the lasting chunks, and what every step in flight needs.
    """

    def __init__(
        self, pool: BlockPool, terms: ArenaTerms, mode: str, recall: Callable[[int], None] = lambda _: None
    ) -> None:
        """`mode`: static, kv or full. Takes the lasting chunks at once. Raises ConfigError if that leaves no room for KV.

        Where the lasting chunks hold any step of `max_rows` (static), only the one step of a longer prompt whose layers leave
        takes more, for as long as pages are not short. `recall(n)`: have up to so many chunks fetched that are not in the pool now.
        """
        terms.require_room(mode, pool.ledger.total_pages, pool.pages_per_block)
        self._pool, self._terms, self._recall = pool, terms, recall
        self._lasting_chunks = terms.lasting_chunks(mode)
        self._needed_bytes: deque[int] = deque()
        self._reserved_bytes = 0
        self._chunks = pool.lent.lend(self._lasting_chunks, terms.chunk_pages, ACTIVATIONS, lasting=True)
        self._carry_out: CarryOut = always_moves
        self._plans_without_lending = self._plans_without_inflating = 0  # since the system refused
        self.lent_chunks_total = self.returned_chunks_total = self.cut_steps_total = 0
        """Chunks that KV gave to steps, and got back, since the start; steps that were smaller than the policy's choice."""
        self.refused_chunks_total = 0
        """Chunks that were to move, either way, and that the system could not map."""

    def carry_out_with(self, carry_out: CarryOut) -> None:
        """Chunks move by this from now on; those that last do so at once. Raises ConfigError if they cannot."""
        self._carry_out = carry_out
        if problem := carry_out(LendChunks(tuple(self._chunks), ACTIVATIONS)):
            raise ConfigError(f"--elastic: the {self._lasting_chunks} chunks that steps always keep: {problem}")

    @property
    def n_chunks(self) -> int:
        """Chunks that the arena has."""
        return len(self._chunks)

    def choose(self, policy: DecodeFirst, candidates: Sequence[Candidate]) -> list[int]:
        """The largest choice of the policy that has its scratch. Nothing is lent for a larger one."""
        if not self._needed_bytes:
            self._count_plan()
        limit = policy.max_step_tokens
        cut = 0
        while True:
            counts = policy.choose(candidates, limit)
            ends = [one.computed_tokens + count for one, count in zip(candidates, counts, strict=True) if count]
            rows = sum(counts)
            if not rows:
                return counts
            allowed = self._rows_within_reach(rows, max(ends))
            if allowed == rows:
                allowed = self.rows_allowed(rows, max(ends))
            if allowed == rows:
                self.cut_steps_total += cut
                return counts
            limit, cut = allowed, 1

    def rows_allowed(self, rows_wanted: int, longest_keys: int) -> int:
        """Reserve scratch for the next step: for all its rows, or for as many as what can be had suffices for.

        `longest_keys`: of one of its sequences at the most, the step's own tokens included. A second call before `began`
        replaces the first.
        """
        rows = self._rows_within_reach(rows_wanted, longest_keys)
        missing = self._missing_chunks(rows, longest_keys)
        if missing > 0 and not self._deflate(missing):
            rows = self._rows_within_reach(rows, longest_keys)
        self._reserved_bytes = self._terms.step.needs_bytes(rows, longest_keys)
        return rows

    def _missing_chunks(self, rows: int, longest_keys: int) -> int:
        terms = self._terms
        return terms.chunks_for(terms.step.needs_bytes(rows, longest_keys)) - len(self._chunks)

    def _rows_within_reach(self, rows_wanted: int, longest_keys: int) -> int:
        """How many rows the chunks suffice for that the arena has or could have now; the others are asked for."""
        terms = self._terms
        missing = self._missing_chunks(rows_wanted, longest_keys)
        if missing <= 0:
            return rows_wanted
        lendable = 0 if self._plans_without_lending else self._pool.lent.lendable(terms.chunk_pages)
        if lendable >= missing:
            return rows_wanted
        if not self._plans_without_lending:
            self._recall(missing - lendable)
        rows = terms.step.rows_within((len(self._chunks) + lendable) * terms.chunk_bytes, longest_keys)
        least = min(terms.least_rows, terms.max_rows)  # a prompt whose layers leave is a step of more
        assert rows >= min(rows_wanted, least), "the least arena does not hold the least step"
        return rows

    def _deflate(self, n_chunks: int) -> bool:
        """So many chunks that nobody's KV is in become the arena's end; False, and none, if the system does not bear it."""
        chunks = self._pool.lent.lend(n_chunks, self._terms.chunk_pages, ACTIVATIONS)
        if self._carry_out(LendChunks(tuple(chunks), ACTIVATIONS)):
            self._pool.lent.take_back(ACTIVATIONS, chunks)
            self.refused_chunks_total += n_chunks
            self._plans_without_lending = _REFUSED_PLANS
            return False
        self._chunks += chunks
        self.lent_chunks_total += n_chunks
        return True

    def began(self) -> None:
        """The step that scratch was reserved for is in flight."""
        if self._needed_bytes:  # planned ahead; until it begins, that may be tried many times
            self._count_plan()
        self._needed_bytes.append(self._reserved_bytes)

    def _count_plan(self) -> None:
        self._plans_without_lending = max(0, self._plans_without_lending - 1)
        self._plans_without_inflating = max(0, self._plans_without_inflating - 1)

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

        Nothing, if all that no step needs would not be enough, or the system refuses, or did so a few plans ago. Not between
        `choose` and `began`.
        """
        if self._plans_without_inflating:
            return False
        spare, chunk_pages, n_chunks = self.spare_chunks, self._terms.chunk_pages, 0
        if spare * (chunk_pages + 2 * (self._pool.pages_per_block - 1)) < n_pages or self.spare_pages < n_pages:
            return False
        while (short := n_pages - self._freed_by(n_chunks)) > 0:  # a block in a chunk that stays does not become free
            n_chunks = min(spare, n_chunks + -(-short // chunk_pages))
        leaving = self._chunks[len(self._chunks) - n_chunks :]
        if self._carry_out(TakeBackChunks(tuple(leaving), ACTIVATIONS)):
            self.refused_chunks_total += n_chunks
            self._plans_without_inflating = _REFUSED_PLANS
            return False
        del self._chunks[len(self._chunks) - n_chunks :]
        self._pool.lent.take_back(ACTIVATIONS, leaving)
        self.returned_chunks_total += n_chunks
        return True

    @property
    def spare_pages(self) -> int:
        """Pages that become free when all that no step needs leaves the arena."""
        return self._freed_by(self.spare_chunks)

    def _freed_by(self, n_chunks: int) -> int:
        """Pages that become free when so many chunks leave the arena's end."""
        return self._pool.lent.freed_by(ACTIVATIONS, self._chunks[len(self._chunks) - n_chunks :]) if n_chunks else 0

    def counters(self) -> dict[str, float]:
        """As in reports."""
        return {
            "scratch_chunks_total{to=steps}": float(self.lent_chunks_total),
            "scratch_chunks_total{to=kv}": float(self.returned_chunks_total),
            "scratch_refused_chunks_total": float(self.refused_chunks_total),
            "cut_steps_total": float(self.cut_steps_total),
        }

    def check(self) -> None:
        """Raise RuntimeError if the pool knows of other chunks, or a step in flight lacks scratch."""
        if sorted(self._chunks) != sorted(self._pool.lent.of(ACTIVATIONS)) or self.spare_chunks < 0:
            raise RuntimeError(
                f"arena: chunks {self._chunks}, lent to it {self._pool.lent.of(ACTIVATIONS)}; steps in flight need "
                f"{list(self._needed_bytes)} bytes, {self._lasting_chunks} chunks of {self._terms.chunk_bytes} last"
            )
