"""Laws of sequence views: what they show is what the pages hold, in the sequence's order, and nothing is left behind."""

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from common.errors import OutOfChunks
from common.kv_layout import KvLayout
from kvstore.memory import cuda_driver
from kvstore.memory.backend import Chunk, Range, VmBackend, VmMisuse
from kvstore.memory.chunks import ChunkPool
from kvstore.memory.cuda_vmm import CudaVmmBackend, open_cuda
from kvstore.memory.fake import FakeBackend
from kvstore.memory.memfd import MemfdBackend
from kvstore.memory.page_pool import PagePool
from kvstore.memory.plan import virtual_block_tokens
from kvstore.memory.sequence_views import SequenceViews
from tests.kvstore.memory.pretended_driver import PretendedCuda

LAYERS, N_PAGES, CONTEXT_BLOCKS = 2, 64, 8
WAIT_S = 20.0


@dataclass
class Opened:
    """A pool whose pages hold bytes of their own each, and views of it."""

    pages: PagePool
    chunks: ChunkPool
    views: SequenceViews
    lock: threading.Lock

    @property
    def rows(self) -> torch.Tensor:
        """Bytes [page, page_bytes]."""
        return self.pages.tensor.view(torch.uint8).view(self.pages.n_pages, -1)

    def reads(self, slot: int, layer: int, n_blocks: int) -> torch.Tensor:
        """Bytes [block, page_bytes] as attention sees them."""
        shown = self.views.keys_values(slot, layer, 0, n_blocks * self.pages.layout.block_tokens)
        return shown.view(n_blocks, -1).view(torch.uint8)

    def shows(self, slot: int, ids: NDArray[np.int32]) -> bool:
        """Whether each layer reads as its pages' own bytes."""
        rows = self.rows.cpu().numpy()  # numpy compares small things without waking torch's threads
        return all(
            np.array_equal(self.reads(slot, layer, ids.shape[1]).cpu().numpy(), rows[ids[layer]])
            for layer in range(LAYERS)
        )

    def close(self) -> None:
        """Raises if anything is mapped or does not add up."""
        self.views.check()
        self.views.close()
        self.pages.close()
        self.chunks.close()


def on_host() -> VmBackend:
    return MemfdBackend(1 << 20)


def pretended() -> VmBackend:
    cuda = PretendedCuda(1 << 20)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cuda_driver, "_bindings", lambda: cuda)
        return CudaVmmBackend(torch.device("cpu"), cuda_driver.CudaDriver(0))


def on_device() -> VmBackend:
    return open_cuda(torch.device("cuda", 0))


def opened(make: Callable[[], VmBackend] = on_host, *, spare_mappings: int | None = None, n_slots: int = 4) -> Opened:
    """`spare_mappings`: how many there may be besides the pages' own."""
    backend, lock = make(), threading.Lock()
    block_tokens = virtual_block_tokens(2, 16, "float32", backend.granularity_bytes)
    layout = KvLayout(layers=LAYERS, kv_heads=2, head_dim=16, dtype="float32", block_tokens=block_tokens)
    chunks = ChunkPool(backend, N_PAGES * layout.page_bytes, layout.page_bytes)
    pages = PagePool(chunks, layout)
    pages.grow(N_PAGES)
    most = None if spare_mappings is None else backend.live_mappings + spare_mappings
    views = SequenceViews(pages, n_slots=n_slots, context_blocks=CONTEXT_BLOCKS, lock=lock, max_mappings=most)
    made = Opened(pages, chunks, views, lock)
    made.rows.copy_(torch.randint(256, made.rows.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    return made


@pytest.fixture(params=[on_host, pretended, pytest.param(on_device, marks=pytest.mark.gpu)])
def pool(request: pytest.FixtureRequest) -> Iterator[Opened]:
    if request.param is on_device and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    make: Callable[[], VmBackend] = request.param
    made = opened(make)
    yield made
    made.close()


def table(*blocks: int) -> NDArray[np.int32]:
    """Pages [layers, blocks] as a pool that allocates block by block gives them."""
    return np.array([[block * LAYERS + layer for block in blocks] for layer in range(LAYERS)], np.int32)


def shown(pool: Opened, owner: str, ids: NDArray[np.int32]) -> int:
    """In a step of its own."""
    slot = show(pool, owner, ids)
    assert slot is not None
    return slot


def show(pool: Opened, owner: str, ids: NDArray[np.int32]) -> int | None:
    pool.views.begin_step([owner])
    try:
        return pool.views.show(owner, ids)
    finally:
        pool.views.end_step()


def step(pool: Opened, *owners: str) -> None:
    pool.views.begin_step(owners)
    pool.views.end_step()


def test_scattered_pages_read_as_one_sequence(pool: Opened) -> None:
    ids = table(5, 1, 17, 2)
    assert pool.shows(shown(pool, "a", ids), ids)


def test_a_view_is_a_plain_tensor_of_tokens_that_starts_where_it_says(pool: Opened) -> None:
    slot = shown(pool, "a", table(3, 9))
    tokens = 2 * pool.pages.layout.block_tokens
    seen = pool.views.keys_values(slot, 1, 0, tokens)
    assert seen.shape == (tokens, 2, 2, 16)
    assert seen.stride(0) == pool.views.token_elements
    start = pool.views.start(slot, 1)
    assert seen.data_ptr() == pool.views.tensor[start:].data_ptr()
    later = pool.views.keys_values(slot, 1, 5, 7)
    assert later.data_ptr() - seen.data_ptr() == 5 * pool.views.token_elements * seen.element_size()


def test_what_is_written_into_a_page_is_seen_by_every_sequence_that_shares_it(pool: Opened) -> None:
    a, b = shown(pool, "a", table(4, 5, 6)), shown(pool, "b", table(4, 5, 7))
    assert a != b
    pool.rows[table(5)[0, 0]] = 77
    assert all((pool.reads(slot, 0, 2)[1] == 77).all() for slot in (a, b))
    assert pool.shows(a, table(4, 5, 6))
    assert pool.shows(b, table(4, 5, 7))


def test_what_is_shown_already_is_not_mapped_again(pool: Opened) -> None:
    slot = shown(pool, "a", table(4, 5))
    before = pool.views.stats()
    assert shown(pool, "a", table(4, 5, 6)) == slot
    after = pool.views.stats()
    assert after.waited_blocks - before.waited_blocks == 1
    assert after.hit_blocks - before.hit_blocks == 2
    shown(pool, "a", table(4, 5, 6))
    assert pool.views.stats().mapped_calls == after.mapped_calls


def test_blocks_asked_for_ahead_are_there_when_they_are_shown(pool: Opened) -> None:
    slot = shown(pool, "a", table(4))
    pool.views.ahead("a", table(4, 5, 6))
    assert pool.views.wait_ahead(WAIT_S)
    before = pool.views.stats()
    assert before.mapped_ahead_blocks == 2
    assert shown(pool, "a", table(4, 5, 6)) == slot
    after = pool.views.stats()
    assert (after.mapped_calls, after.waited_blocks) == (before.mapped_calls, before.waited_blocks)
    assert pool.shows(slot, table(4, 5, 6))


def test_nothing_is_mapped_ahead_in_the_slot_of_a_sequence_that_runs(pool: Opened) -> None:
    owners = [f"s{number}" for number in range(4)]
    for number, owner in enumerate(owners):
        shown(pool, owner, table(number))
    step(pool, *owners)
    pool.views.ahead("late", table(20))
    assert pool.views.wait_ahead(WAIT_S)
    assert pool.views.stats().mapped_ahead_blocks == 0
    assert [pool.shows(shown(pool, owner, table(number)), table(number)) for number, owner in enumerate(owners)]
    assert pool.views.stats().waited_blocks == 4


def test_mapping_ahead_keeps_the_ceiling_and_takes_nothing_from_sequences_that_run() -> None:
    pool = opened(spare_mappings=16)
    most = pool.pages.backend.live_mappings + 16
    shown(pool, "a", table(1, 3))
    step(pool, "a")
    pool.views.ahead("b", table(*range(8, 16)))
    assert pool.views.wait_ahead(WAIT_S)
    assert pool.pages.backend.live_mappings <= most
    before = pool.views.stats().waited_blocks
    shown(pool, "a", table(1, 3))
    assert pool.views.stats().waited_blocks == before
    pool.close()


def test_asking_showing_and_using_the_back_end_from_several_threads_ends(pool: Opened) -> None:
    def ask(name: str) -> None:
        for number in range(100):
            pool.views.ahead(f"{name}{number % 3}", table(number % 20, number % 7, number % 5))

    def use_the_back_end() -> None:
        for _ in range(100):
            with pool.lock:
                pool.pages.backend.release(pool.pages.backend.create(pool.pages.layout.page_bytes))

    others = [threading.Thread(target=ask, args=name) for name in "ab"] + [threading.Thread(target=use_the_back_end)]
    for other in others:
        other.start()
    for number in range(100):
        ids = table(number % 20, number % 7)
        pool.views.begin_step(["a0"])
        slot = pool.views.show("a0", ids)
        assert slot is not None
        assert number % 10 or pool.shows(slot, ids)
        pool.views.end_step()
    for other in others:
        other.join(WAIT_S)
    assert not any(other.is_alive() for other in others)
    assert pool.views.wait_ahead(WAIT_S)


def test_an_ended_sequences_slot_goes_to_the_one_that_continues_it(pool: Opened) -> None:
    slots = [shown(pool, name, table(8 * at, 8 * at + 1)) for at, name in enumerate("abc")]
    for _ in range(5):
        step(pool, "x")
    before = pool.views.stats()
    assert shown(pool, "next", table(8, 9, 30)) == slots[1]
    assert pool.views.stats().waited_blocks - before.waited_blocks == 1


def test_what_a_step_in_flight_reads_stays_though_its_owner_shows_other_pages(pool: Opened) -> None:
    pool.views.begin_step(["a"])
    first = pool.views.show("a", table(1, 2))
    pool.views.begin_step(["a"])
    second = pool.views.show("a", table(3, 4, 5))
    assert first is not None and second is not None and second != first
    assert pool.shows(first, table(1, 2))
    assert pool.shows(second, table(3, 4, 5))
    pool.views.end_step()
    pool.views.end_step()


def test_showing_outside_of_a_step_is_our_own_bug_and_changes_nothing(pool: Opened) -> None:
    with pytest.raises(VmMisuse, match="outside of a step"):
        pool.views.show("a", table(1, 2))
    assert pool.views.stats().live_mappings == 0


def test_without_a_slot_that_nobody_reads_a_sequence_is_not_shown(pool: Opened) -> None:
    owners = [f"s{number}" for number in range(4)]
    for number, owner in enumerate(owners):
        shown(pool, owner, table(number))
    pool.views.begin_step([*owners, "late"])
    assert pool.views.show("late", table(20)) is None
    pool.views.end_step()
    assert show(pool, "late", table(20)) is not None


def test_the_ceiling_is_kept_and_ended_sequences_go_first() -> None:
    pool = opened(spare_mappings=16)
    most = pool.pages.backend.live_mappings + 16
    for number in range(12):
        ids = table(2 * number, 2 * number + 1)
        assert pool.shows(shown(pool, f"s{number}", ids), ids)
        assert pool.pages.backend.live_mappings <= most
        step(pool, f"s{number}")
    assert show(pool, "long", table(*range(8))) is None
    pool.close()


def test_stale_mappings_go_in_the_background_once_they_are_many(pool: Opened) -> None:
    slots = [shown(pool, name, table(*range(8 * at, 8 * at + 8))) for at, name in enumerate("abcd")]
    for _ in range(5):
        step(pool, "x")
    shown(pool, "e", table(0))
    assert pool.views.stats().zombies == 7 * LAYERS
    shown(pool, "f", table(8))
    assert pool.views.wait_ahead(WAIT_S)
    stats = pool.views.stats()
    assert (stats.zombies, stats.live_mappings) == (0, (2 * 8 + 2) * LAYERS)
    assert {0, 1} == {slots.index(slot) for slot in (shown(pool, "e", table(0)), shown(pool, "f", table(8)))}


def test_pages_that_lose_their_memory_are_shown_nowhere_and_mapped_nowhere_ahead(pool: Opened) -> None:
    shown(pool, "a", table(1, 28, 2))
    step(pool, "a")
    pool.views.ahead("b", table(29))
    first_gone = 28 * LAYERS
    pool.views.forget_from(first_gone)
    with pool.lock:
        pool.pages.shrink(N_PAGES - first_gone)
    assert pool.views.stats().live_mappings == 2 * LAYERS
    slot = shown(pool, "a", table(1, 3, 2))
    assert pool.shows(slot, table(1, 3, 2))
    with pool.lock:
        pool.pages.grow(N_PAGES - first_gone)


def test_a_page_that_a_step_reads_cannot_lose_its_memory(pool: Opened) -> None:
    pool.views.begin_step(["a"])
    pool.views.show("a", table(1, 28))
    with pytest.raises(VmMisuse, match="a step reads in slot"):
        pool.views.forget([int(table(28)[0, 0])])
    pool.views.end_step()
    pool.views.forget([int(table(28)[0, 0])])
    assert pool.views.stats().live_mappings == 2 * LAYERS - 1


class Indivisible:
    """A system without mappings: whatever would divide an area of the views cannot be unmapped."""

    def __init__(self, pool: Opened, patched: pytest.MonkeyPatch) -> None:
        self._backend, self._unmap = pool.pages.backend, pool.pages.backend.unmap_run
        self.refused = 0
        patched.setattr(self._backend, "unmap_run", self)

    def __call__(self, where: Range, offset_bytes: int, n_chunks: int) -> list[Chunk]:
        before = self._backend.live_mappings
        chunks = self._unmap(where, offset_bytes, n_chunks)
        if self._backend.live_mappings <= before:
            return chunks
        self._backend.map_run(where, offset_bytes, chunks)
        self.refused += 1
        raise OutOfChunks("no mappings")


def test_what_the_system_cannot_unmap_is_read_by_table_and_goes_with_all_around_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = opened()
    shown(pool, "a", in_file_order(0, 4))
    step(pool, "a")
    system = Indivisible(pool, monkeypatch)
    other = in_file_order(0, 4)
    other[:, 1] = in_file_order(20, 21)[:, 0]
    assert show(pool, "a", other) is None
    assert system.refused
    pool.views.check()
    pool.views.forget([int(in_file_order(0, 4)[0, 2])])
    pool.views.check()
    assert pool.views.stats().live_mappings == 0
    assert pool.shows(shown(pool, "a", other), other)
    pool.close()


def in_file_order(first: int, end: int) -> NDArray[np.int32]:
    """Pages [layers, blocks] whose memory lies one behind the other in each layer."""
    half = N_PAGES // LAYERS
    return np.array([range(layer * half + first, layer * half + end) for layer in range(LAYERS)], np.int32)


def test_pages_that_share_a_chunk_cannot_be_shown() -> None:
    layout = KvLayout(layers=1, kv_heads=2, head_dim=16, dtype="float32")
    pages = PagePool(ChunkPool(FakeBackend(1 << 30), 1 << 24, 4 * layout.page_bytes), layout)
    with pytest.raises(VmMisuse, match="open the page memory with page_chunks"):
        SequenceViews(pages, n_slots=1, context_blocks=1, lock=threading.Lock())


def test_more_blocks_than_a_slot_has_are_refused(pool: Opened) -> None:
    with pytest.raises(VmMisuse, match="at most 8 blocks"):
        show(pool, "a", table(*range(9)))


def test_an_error_of_the_background_thread_reaches_whoever_shows_next(
    pool: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda _: told.set())
    pool.views.ahead("a", np.full((LAYERS, 1), N_PAGES, np.int32))
    assert told.wait(WAIT_S)
    with pytest.raises(VmMisuse, match="has failed"):
        pool.views.show("a", table(1))


@pytest.mark.parametrize("seed", range(4))
def test_any_history_shows_what_a_dictionary_of_tables_says(seed: int) -> None:
    """Sequences begin alone or with another's leading blocks, grow, end, are mapped ahead; steps overlap."""
    rng, pool = random.Random(seed), opened(spare_mappings=None if seed % 2 else 90, n_slots=6)
    tables: dict[str, list[int]] = {}
    in_flight: list[dict[int, list[int]]] = []
    n_shown = 0
    for number in range(120):
        if len(tables) < 5 and rng.random() < 0.4:
            other = rng.choice(list(tables.values())) if tables and rng.random() < 0.5 else []
            tables[f"s{number}"] = [*other[: rng.randint(0, 4)], rng.randrange(32)]
        if tables and rng.random() < 0.15:
            del tables[rng.choice(list(tables))]
        for owner, blocks in tables.items():
            if len(blocks) < CONTEXT_BLOCKS and rng.random() < 0.5:
                blocks.append(rng.randrange(32))
                if rng.random() < 0.5:
                    pool.views.ahead(owner, table(*blocks))
        computed = [owner for owner in tables if rng.random() < 0.8]
        pool.views.begin_step(computed)
        reads: dict[int, list[int]] = {}
        for owner in computed:
            slot = pool.views.show(owner, table(*tables[owner]))
            if slot is not None:
                assert slot not in reads
                reads[slot] = list(tables[owner])
        n_shown += len(reads)
        in_flight.append(reads)
        if rng.random() < 0.1:
            pool.views.forget([page for page in range(N_PAGES) if not _read(page, in_flight)][:20])
        for slots in in_flight:
            assert all(pool.shows(slot, table(*blocks)) for slot, blocks in slots.items())
        if len(in_flight) == 2 or rng.random() < 0.6:
            in_flight.pop(0)
            pool.views.end_step()
        pool.views.check()
    assert n_shown > 150
    pool.close()


def _read(page: int, in_flight: list[dict[int, list[int]]]) -> bool:
    return any(page // LAYERS in blocks for slots in in_flight for blocks in slots.values())
