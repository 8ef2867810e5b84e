"""Laws of what a step takes beside weights and pages."""

import random
from dataclasses import replace

from services.worker.core.scratch_terms import ScratchTerms

TERMS = ScratchTerms(fixed_bytes=640, row_bytes=1000, key_bytes=24, block_tokens=16, group_keys=512)


def test_rows_within_is_the_largest_step_that_needs_no_more() -> None:
    chance = random.Random(0)
    for _ in range(300):
        n_bytes, longest_keys = chance.randrange(200_000), chance.randrange(1, 2000)
        rows = TERMS.rows_within(n_bytes, longest_keys)
        assert TERMS.needs_bytes(rows + 1, longest_keys) > n_bytes
        assert rows == 0 or TERMS.needs_bytes(rows, longest_keys) <= n_bytes


def test_keys_count_by_whole_blocks_for_the_longest_sequence_or_for_a_group_of_short_ones() -> None:
    def keys(rows: int, longest_keys: int) -> float:
        return (TERMS.needs_bytes(rows, longest_keys) - TERMS.fixed_bytes - rows * TERMS.row_bytes) / TERMS.key_bytes

    assert keys(1, 17) == 32
    assert keys(5, 17) == 160
    assert keys(100, 17) == 512
    assert keys(100, 513) == 528


def test_where_sequences_are_shown_one_at_the_most_is_gathered() -> None:
    terms = replace(TERMS, group_keys=0)
    assert [terms.gathers_bytes(rows, 17) for rows in (1, 5, 100)] == [32 * terms.key_bytes] * 3
