"""Is KV in another memory worth fetching, or is computing it anew as good? Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FetchFromBlocks:
    """Fetch runs of at least `min_blocks`: a fetch costs a fixed round trip, computing costs by the block.

    The default is where both cost the same on the slowest link measured (docs/benchmarks).
    """

    min_blocks: int = 2

    def worth(self, n_blocks: int) -> bool:
        """Whether a run of so many blocks should be fetched."""
        return n_blocks >= self.min_blocks
