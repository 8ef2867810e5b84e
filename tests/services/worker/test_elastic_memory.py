"""What cannot lend or give back memory says so when the worker starts."""

from collections.abc import Iterator

import pytest
from torch import Tensor

from common.errors import ConfigError
from common.kv_layout import KvLayout
from common.policy.elastic import StepBytes
from common.units import MIB
from kvstore.memory.chunks import ChunkPool
from kvstore.memory.page_memory import PageMemory, open_page_memory
from services.worker.elastic_memory import arena_terms, require_spare_memory
from services.worker.settings import WorkerSettings
from tests.kvstore.memory.test_backends import _pretended
from tests.services.worker.core.arenas import Linear

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=32, dtype="float32")


class Willing:
    """An engine that takes its scratch where it is told to."""

    scratch_terms: StepBytes = Linear()

    def use_scratch(self, memory: Tensor) -> None:
        del memory


@pytest.fixture
def memory() -> Iterator[PageMemory]:
    opened = open_page_memory(16 * MIB, LAYOUT)
    yield opened
    opened.close()


def settings(**more: object) -> WorkerSettings:
    return WorkerSettings(model="m", **more)  # type: ignore[arg-type]  # a test's keywords


def test_an_engine_with_memory_of_its_own_cannot_be_elastic(memory: PageMemory) -> None:
    assert arena_terms(object(), settings(), memory, 100) is None
    with pytest.raises(ConfigError, match=r"--elastic=kv: .* --elastic must be off"):
        arena_terms(object(), settings(elastic="kv"), memory, 100)


def test_the_least_step_has_a_tile_and_the_longest_sequence_fits_the_pool(memory: PageMemory) -> None:
    terms = arena_terms(Willing(), settings(elastic="kv", max_running=8, max_step_tokens=900), memory, 10**6)
    assert terms is not None
    assert (terms.least_rows, terms.max_rows, terms.max_keys) == (256, 900, memory.plan.tokens)
    assert terms.chunk_pages * LAYOUT.page_bytes == terms.chunk_bytes == memory.plan.chunk_bytes
    many = arena_terms(Willing(), settings(elastic="kv", max_running=400), memory, 100)
    assert many is not None
    assert (many.least_rows, many.max_keys) == (416, 100)


def test_memory_that_comes_back_as_other_chunks_is_not_given_away(memory: PageMemory) -> None:
    require_spare_memory(settings(spare_memory="release"), memory.chunks)
    device = ChunkPool(_pretended(8 * 4096), 8 * 4096, 4096)
    require_spare_memory(settings(), device)
    with pytest.raises(ConfigError, match="--spare-memory must be keep"):
        require_spare_memory(settings(spare_memory="release"), device)
