import os
from contextlib import closing

import pytest

from common.errors import ConfigError
from common.units import MIB
from kvstore.memory.available import Available
from kvstore.server.block_memory import CHUNK_BYTES, BlockMemory

PLENTY = Available(1 << 60, "nothing")


def test_slots_keep_their_bytes_also_across_chunks() -> None:
    block_bytes = CHUNK_BYTES // 3 * 2  # every other block lies in two chunks
    with closing(BlockMemory(3 * CHUNK_BYTES, PLENTY)) as memory:
        slots = memory.capacity_bytes // block_bytes
        blocks = [os.urandom(block_bytes) for _ in range(slots)]
        for slot, block in enumerate(blocks):
            memory.write(slot, block)
        assert [bytes(memory.read(slot, block_bytes)) for slot in range(slots)] == blocks


def test_the_budget_is_rounded_down_to_whole_chunks() -> None:
    with closing(BlockMemory(5 * MIB, PLENTY)) as memory:
        assert memory.capacity_bytes == 4 * MIB


def test_more_than_is_available_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"--host-memory=8.0 MiB is more than the 4.0 MiB .*\(the limit\)"):
        BlockMemory(8 * MIB, Available(4 * MIB, "the limit"))


def test_less_than_a_chunk_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be 2\.0 MiB or more"):
        BlockMemory(MIB, PLENTY)
