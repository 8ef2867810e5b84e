"""How much memory a step takes beside weights and KV pages, from its size alone."""

from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ScratchTerms:
    """An upper bound, off by no more than gaps of alignment and padding of blocks: what an engine takes of its scratch.

    A layer's keys are gathered for one prefilling sequence at a time, or for a group of decoding ones that have, padded
    to the longest, `group_keys` in all at the most; one sequence that is longer is a group by itself. An engine that reads
    sequences where they are shown gathers only one that could not be, by itself: there `group_keys` is 0.
    """

    fixed_bytes: int
    """Whatever the step is."""
    row_bytes: int
    """For each token that is computed."""
    key_bytes: int
    """For each key that is gathered; 0: keys are read where they are."""
    block_tokens: int
    """Keys are gathered by whole blocks."""
    group_keys: int
    """0: one sequence at a time."""

    def needs_bytes(self, rows: int, longest_keys: int) -> int:
        """For a step of `rows` tokens none of whose sequences has more keys, its own tokens of this step included."""
        return self.fixed_bytes + rows * self.row_bytes + self.gathers_bytes(rows, longest_keys)

    def gathers_bytes(self, rows: int, longest_keys: int) -> int:
        """The part of it that gathered keys take."""
        padded_keys = -(-longest_keys // self.block_tokens) * self.block_tokens
        return max(padded_keys, min(rows * padded_keys, self.group_keys)) * self.key_bytes

    def rows_within(self, n_bytes: int, longest_keys: int) -> int:
        """The most rows of which a step of such sequences may consist that is to take no more; 0: not even one."""
        most_rows = max(0, n_bytes - self.fixed_bytes) // self.row_bytes
        rows = range(1, most_rows + 1)
        return bisect_right(rows, n_bytes, key=lambda count: self.needs_bytes(count, longest_keys))
