"""How much of one memory is scratch for steps, and how much is KV. Pure arithmetic.

Law of the lend limit: a step in flight keeps what it needs, the least that any step needs is always there, and nothing more
is held back from KV. Source: eLLM (arXiv 2506.15155), sections 2.2 and 2.3 of our card: inflation, deflation, lend limit.
"""

from dataclasses import dataclass
from typing import Protocol

from common.errors import ConfigError
from common.units import format_bytes


class StepBytes(Protocol):
    """What steps take beside weights and KV."""

    def needs_bytes(self, rows: int, longest_keys: int) -> int:
        """For a step of so many tokens, none of whose sequences has more keys. Rises with both."""
        ...

    def gathers_bytes(self, rows: int, longest_keys: int) -> int:
        """The part of it that keys take which are copied for attention."""
        ...

    def rows_within(self, n_bytes: int, longest_keys: int) -> int:
        """The most rows that take no more."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaTerms:
    """What a worker's arena is planned from."""

    step: StepBytes
    chunk_bytes: int
    chunk_pages: int
    max_rows: int
    """Of one step at the most."""
    least_rows: int
    """Of a step that can always be computed: a token for every sequence that runs, and a block of a prompt."""
    max_keys: int
    """Of one sequence at the most."""

    def chunks_for(self, n_bytes: int) -> int:
        """The fewest chunks that hold so much."""
        return -(-n_bytes // self.chunk_bytes)

    @property
    def base_chunks(self) -> int:
        """What the arena never falls below, so that there is always a step that fits."""
        return self.chunks_for(self.step.needs_bytes(min(self.least_rows, self.max_rows), self.max_keys))

    @property
    def full_chunks(self) -> int:
        """What the largest step needs."""
        return self.chunks_for(self.step.needs_bytes(self.max_rows, self.max_keys))

    def lasting_chunks(self, mode: str) -> int:
        """What never goes to KV: all of it in mode `static`, the base in `kv` and `full`."""
        return self.full_chunks if mode == "static" else self.base_chunks

    def require_room(self, mode: str, pool_pages: int, pages_per_block: int) -> None:
        """Raise ConfigError, with the numbers, unless the lasting chunks leave room for a block of KV.

        The first chunk always holds KV, and a block may reach into a lent chunk from both sides.
        """
        lasting = self.lasting_chunks(mode)
        left_pages = pool_pages - lasting * self.chunk_pages - 2 * (pages_per_block - 1)
        if left_pages >= max(self.chunk_pages, pages_per_block) + pages_per_block:
            return
        page_bytes = self.chunk_bytes // self.chunk_pages
        rows = self.max_rows if mode == "static" else min(self.least_rows, self.max_rows)
        gathers_bytes = self.step.gathers_bytes(rows, self.max_keys)
        missing_pages = max(self.chunk_pages, pages_per_block) + pages_per_block - left_pages
        raise ConfigError(
            f"--device-memory is {format_bytes(pool_pages * page_bytes)} for KV and scratch; --elastic={mode} keeps "
            f"{format_bytes(lasting * self.chunk_bytes)} for steps of {rows} rows and {self.max_keys} keys "
            f"({format_bytes(gathers_bytes)} of it to gather keys), so nothing is left for KV: give {format_bytes(missing_pages * page_bytes)} more, or lower "
            f"{'--max-step-tokens or ' if mode == 'static' else ''}--max-context-tokens"
            f"{', or take --elastic=kv' if mode == 'static' else ''}"
        )
