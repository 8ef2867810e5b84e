"""Is KV in another memory worth fetching, or is computing it anew as good? Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FetchFromBlocks:
    """Fetch runs of at least `min_blocks`: a fetch costs a fixed round trip, computing costs by the block.

    The default is a judgement, not a measurement: one block is not worth a round trip. At 256 tokens, the shortest
    prompts measured (docs/benchmarks), fetching is far ahead.
    """

    min_blocks: int = 2

    def worth(self, n_blocks: int) -> bool:
        """Whether a run of so many blocks should be fetched."""
        return n_blocks >= self.min_blocks
