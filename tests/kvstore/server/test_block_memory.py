import os
from contextlib import closing

import pytest

from common.errors import ConfigError
from common.units import MIB
from kvstore.memory.available import Available
from kvstore.memory.shareable import PagesInFile
from kvstore.server.block_memory import MIN_BYTES, BlockMemory

PLENTY = Available(1 << 60, "nothing")


def test_pages_keep_their_bytes_neighbours_or_not() -> None:
    with closing(BlockMemory(MIN_BYTES, PLENTY)) as memory:
        assert memory.pages_in_file is None
        memory.shape(4096, 512)
        assert memory.pages_in_file == PagesInFile(4096, MIN_BYTES, (0,))
        places = [(0, 1, 2), (510, 511, 3), (9, 8, 7)]
        blocks = [os.urandom(3 * 4096) for _ in places]
        for pages, block in zip(places, blocks, strict=True):
            memory.write(pages, block)
        assert [bytes(memory.read(pages)) for pages in places] == blocks
        assert [len(part) for part in memory.parts((510, 511, 3))] == [2 * 4096, 4096]
        assert memory.read_scratch(9 * 4096, 4096) == blocks[2][:4096]


@pytest.mark.parametrize("budget_bytes", [2 * MIB, 3 * MIB - 1, 5 * MIB + 123, 64 * MIB])
def test_the_memory_taken_is_the_budget_to_one_percent(budget_bytes: int) -> None:
    with closing(BlockMemory(budget_bytes, PLENTY)) as memory:
        (fd,) = memory.export_fds()
        taken_bytes = os.fstat(fd).st_blocks * 512
        os.close(fd)
        assert budget_bytes * 0.99 <= taken_bytes <= budget_bytes
        assert taken_bytes == memory.capacity_bytes


def test_more_than_is_available_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"--host-memory=8.0 MiB is more than the 4.0 MiB .*\(the limit\)"):
        BlockMemory(8 * MIB, Available(4 * MIB, "the limit"))


def test_too_little_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be 2\.0 MiB or more"):
        BlockMemory(MIB, PLENTY)
