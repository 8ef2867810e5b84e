"""Laws of dividing memory."""

import pytest

from common.errors import ConfigError
from common.units import GIB, MIB, MemoryShare
from kvstore.memory.plan import chunk_bytes_for, device_chunk_bytes, kv_budget


def test_a_share_is_of_all_memory_and_the_model_comes_out_of_it() -> None:
    assert kv_budget(80 * GIB, MemoryShare(90), 15 * GIB, 2 * GIB) == 72 * GIB - 17 * GIB


@pytest.mark.parametrize(
    ("weights_bytes", "way_out"), [(71 * GIB, "give more than 91%"), (90 * GIB, "a smaller model or a larger device")]
)
def test_a_share_that_leaves_nothing_is_refused_with_a_way_out(weights_bytes: int, way_out: str) -> None:
    with pytest.raises(ConfigError, match=rf"--device-memory=80% is 64\.0 GiB of 80\.0 GiB; .*{way_out}"):
        kv_budget(80 * GIB, MemoryShare(80), weights_bytes, 2 * GIB)


@pytest.mark.parametrize("budget_bytes", [64 * MIB, 600 * MIB, 2 * GIB, 100 * GIB])
def test_a_device_has_sixteen_chunks_at_least_and_none_far_above_64_mib(budget_bytes: int) -> None:
    chunk_bytes = chunk_bytes_for(64 * 2**10, 2 * MIB, device_chunk_bytes(budget_bytes))
    assert chunk_bytes % (2 * MIB) == 0
    assert 2 * MIB <= chunk_bytes <= 64 * MIB
    assert round(budget_bytes / chunk_bytes) >= 16
