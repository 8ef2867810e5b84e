"""Laws of the chunk budget."""

import random

import pytest

from common.errors import OutOfChunks
from kvstore.memory.backend import Chunk, VmMisuse
from kvstore.memory.chunks import ChunkPool
from kvstore.memory.fake import FakeBackend

UNIT = 4096


def pool(budget_chunks: int, system_chunks: int | None = None) -> tuple[ChunkPool, FakeBackend]:
    backend = FakeBackend((budget_chunks if system_chunks is None else system_chunks) * UNIT)
    return ChunkPool(backend, budget_chunks * UNIT + 5, UNIT), backend


def test_the_budget_is_hard_and_a_refusal_changes_nothing() -> None:
    chunks, backend = pool(4)
    chunks.alloc("kv", 3)
    with pytest.raises(OutOfChunks, match=r"kv needs 2 chunks of 4.0 KiB; 1 of 4 are free"):
        chunks.alloc("kv", 2)
    assert (chunks.used_chunks, chunks.free_chunks, backend.created_bytes) == (3, 1, 3 * UNIT)


def test_a_system_that_runs_dry_halfway_gets_everything_back() -> None:
    chunks, backend = pool(8, system_chunks=3)
    with pytest.raises(OutOfChunks):
        chunks.alloc("kv", 4)
    assert (chunks.used_chunks, backend.created_bytes) == (0, 0)
    chunks.check()


def test_only_the_owner_frees_and_only_once() -> None:
    chunks, _ = pool(4)
    mine = chunks.alloc("kv", 2)
    with pytest.raises(VmMisuse, match="does not belong"):
        chunks.free("weights", mine)
    chunks.free("kv", mine)
    with pytest.raises(VmMisuse, match="freed before"):
        chunks.free("kv", mine)


def test_a_pool_in_use_does_not_close() -> None:
    chunks, _ = pool(2)
    mine = chunks.alloc("kv", 1)
    with pytest.raises(VmMisuse, match="still in use"):
        chunks.close()
    chunks.free("kv", mine)
    chunks.close()


@pytest.mark.parametrize("seed", range(20))
def test_chunks_add_up_after_any_sequence_of_calls(seed: int) -> None:
    rng, (chunks, backend) = random.Random(seed), pool(16)
    held: dict[str, list[Chunk]] = {"kv": [], "weights": [], "activations": []}
    for _ in range(200):
        owner = rng.choice(list(held))
        if rng.random() < 0.5:
            wanted = rng.randrange(6)
            if wanted <= chunks.free_chunks:
                held[owner] += chunks.alloc(owner, wanted)
        else:
            cut = rng.randrange(len(held[owner]) + 1)
            chunks.free(owner, held[owner][cut:])
            del held[owner][cut:]
        chunks.check()
        assert chunks.used_chunks == sum(map(len, held.values()))
        assert backend.created_bytes == chunks.used_chunks * UNIT
