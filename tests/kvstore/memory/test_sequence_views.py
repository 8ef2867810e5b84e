"""Laws of sequence views: what they show is what the pages hold, in the sequence's order, and nothing is left behind."""

import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from common.kv_layout import KvLayout
from kvstore.memory.backend import VmMisuse
from kvstore.memory.chunks import ChunkPool
from kvstore.memory.fake import FakeBackend
from kvstore.memory.memfd import MemfdBackend
from kvstore.memory.page_pool import PagePool
from kvstore.memory.sequence_views import SequenceViews

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=16, dtype="float32", block_tokens=16)
N_PAGES, CONTEXT_BLOCKS, N_SLOTS = 64, 8, 4
WAIT_S = 20.0


@dataclass
class Opened:
    """A pool whose pages are filled with their own numbers, and views of it."""

    pages: PagePool
    chunks: ChunkPool
    views: SequenceViews
    lock: threading.Lock
    home_mappings: int = field(init=False)

    def __post_init__(self) -> None:
        self.home_mappings = self.pages.backend.live_mappings

    def reads(self, slot: int, layer: int, n_blocks: int) -> NDArray[np.uint8]:
        """[blocks, page_bytes] as attention sees them."""
        shown = self.views.keys_values(slot, layer, 0, n_blocks * LAYOUT.block_tokens)
        return shown.contiguous().view(torch.uint8).view(n_blocks, LAYOUT.page_bytes).numpy()

    def shows(self, slot: int, ids: NDArray[np.int32]) -> bool:
        """Whether each layer reads as its pages' own bytes."""
        return all(
            np.array_equal(self.reads(slot, layer, ids.shape[1]), self.pages.rows[ids[layer]])
            for layer in range(LAYOUT.layers)
        )


def opened(*, max_mappings: int | None = None, n_slots: int = N_SLOTS) -> Opened:
    chunks = ChunkPool(MemfdBackend(N_PAGES * LAYOUT.page_bytes), N_PAGES * LAYOUT.page_bytes, LAYOUT.page_bytes)
    pages, lock = PagePool(chunks, LAYOUT), threading.Lock()
    pages.grow(N_PAGES)
    rows = pages.rows.view(np.uint32)
    rows[:] = np.arange(N_PAGES, dtype=np.uint32)[:, None] * 1000 + np.arange(rows.shape[1], dtype=np.uint32) % 997
    views = SequenceViews(pages, n_slots=n_slots, context_blocks=CONTEXT_BLOCKS, lock=lock, max_mappings=max_mappings)
    return Opened(pages, chunks, views, lock)


@pytest.fixture
def pool() -> Iterator[Opened]:
    made = opened()
    yield made
    made.views.check()
    made.views.close()
    made.pages.close()  # raises while any page is mapped elsewhere
    made.chunks.close()


def table(*blocks: int) -> NDArray[np.int32]:
    """Pages [layers, blocks] as a pool that allocates block by block gives them."""
    return np.array([[block * LAYOUT.layers + layer for block in blocks] for layer in range(LAYOUT.layers)], np.int32)


def shown(pool: Opened, owner: str, ids: NDArray[np.int32]) -> int:
    slot = pool.views.show(owner, ids)
    assert slot is not None
    return slot


def step(pool: Opened, *owners: str) -> None:
    pool.views.begin_step(owners)
    pool.views.end_step()


def test_scattered_pages_read_as_one_sequence(pool: Opened) -> None:
    ids = table(5, 1, 17, 2)
    assert pool.shows(shown(pool, "a", ids), ids)


def test_a_view_is_a_plain_tensor_of_tokens_that_starts_where_it_says(pool: Opened) -> None:
    slot = shown(pool, "a", table(3, 9))
    seen = pool.views.keys_values(slot, 1, 0, 2 * LAYOUT.block_tokens)
    assert seen.shape == (2 * LAYOUT.block_tokens, 2, LAYOUT.kv_heads, LAYOUT.head_dim)
    assert seen.stride(0) == pool.views.token_elements
    start = pool.views.start(slot, 1)
    assert seen.data_ptr() == pool.views.tensor[start:].data_ptr()
    later = pool.views.keys_values(slot, 1, 5, 7)
    assert later.data_ptr() - seen.data_ptr() == 5 * pool.views.token_elements * seen.element_size()


def test_what_is_written_into_a_page_is_seen_by_every_sequence_that_shares_it(pool: Opened) -> None:
    a, b = shown(pool, "a", table(4, 5, 6)), shown(pool, "b", table(4, 5, 7))
    assert a != b
    pool.pages.rows[table(5)[0, 0]] = 77
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


def test_an_ended_sequences_slot_goes_to_the_one_that_continues_it(pool: Opened) -> None:
    slots = [shown(pool, name, table(8 * at, 8 * at + 1)) for at, name in enumerate("abc")]
    for _ in range(5):
        step(pool, "x")
    before = pool.views.stats()
    assert shown(pool, "next", table(8, 9, 30)) == slots[1]
    assert pool.views.stats().waited_blocks - before.waited_blocks == 1


def test_what_a_step_in_flight_reads_stays_though_its_owner_shows_other_pages(pool: Opened) -> None:
    first = shown(pool, "a", table(1, 2))
    pool.views.begin_step(["a"])
    second = shown(pool, "a", table(3, 4, 5))
    assert second != first
    assert pool.shows(first, table(1, 2))
    assert pool.shows(second, table(3, 4, 5))
    pool.views.end_step()


def test_a_step_that_begins_before_it_is_shown_anything_is_fenced_all_the_same(pool: Opened) -> None:
    pool.views.begin_step(["a"])
    first = shown(pool, "a", table(1, 2))
    assert shown(pool, "a", table(3, 4)) != first
    assert pool.shows(first, table(1, 2))
    pool.views.end_step()


def test_without_a_slot_that_nobody_reads_a_sequence_is_not_shown(pool: Opened) -> None:
    owners = [f"s{number}" for number in range(N_SLOTS)]
    for number, owner in enumerate(owners):
        shown(pool, owner, table(number))
    pool.views.begin_step(owners)
    assert pool.views.show("late", table(20)) is None
    pool.views.end_step()
    assert pool.views.show("late", table(20)) is not None


def test_the_ceiling_is_kept_and_ended_sequences_go_first() -> None:
    pool = opened()
    most = pool.home_mappings + 4 * 4
    pool.views.close()
    pool.views = SequenceViews(
        pool.pages, n_slots=N_SLOTS, context_blocks=CONTEXT_BLOCKS, lock=pool.lock, max_mappings=most
    )
    refused = 0
    for number in range(12):
        ids = table(2 * number, 2 * number + 1)
        slot = pool.views.show(f"s{number}", ids)
        refused += slot is None
        assert slot is None or pool.shows(slot, ids)
        assert pool.pages.backend.live_mappings <= most
        step(pool, f"s{number}")
    assert refused == 0
    assert pool.views.show("long", table(*range(8))) is None
    pool.views.check()
    pool.views.close()


def test_stale_mappings_go_in_the_background_once_they_are_many(pool: Opened) -> None:
    slots = [shown(pool, name, table(*range(8 * at, 8 * at + 8))) for at, name in enumerate("abcd")]
    for _ in range(5):
        step(pool, "x")
    shown(pool, "e", table(0))
    assert pool.views.stats().zombies == 7 * LAYOUT.layers
    shown(pool, "f", table(8))
    assert pool.views.wait_ahead(WAIT_S)
    stats = pool.views.stats()
    assert (stats.zombies, stats.live_mappings) == (0, (2 * 8 + 2) * LAYOUT.layers)
    assert {0, 1} == {slots.index(slot) for slot in (shown(pool, "e", table(0)), shown(pool, "f", table(8)))}


def test_pages_that_lose_their_memory_are_shown_nowhere_and_mapped_nowhere_ahead(pool: Opened) -> None:
    shown(pool, "a", table(1, 28, 2))
    step(pool, "a")
    pool.views.ahead("b", table(29))
    first_gone = 28 * LAYOUT.layers
    pool.views.forget_from(first_gone)
    with pool.lock:
        pool.pages.shrink(N_PAGES - first_gone)
    assert pool.views.stats().live_mappings == 2 * LAYOUT.layers
    slot = shown(pool, "a", table(1, 3, 2))
    assert pool.shows(slot, table(1, 3, 2))
    with pool.lock:
        pool.pages.grow(N_PAGES - first_gone)


def test_a_page_that_a_step_reads_cannot_lose_its_memory(pool: Opened) -> None:
    shown(pool, "a", table(1, 28))
    pool.views.begin_step(["a"])
    with pytest.raises(VmMisuse, match="a step reads in slot"):
        pool.views.forget([int(table(28)[0, 0])])
    pool.views.end_step()
    pool.views.forget([int(table(28)[0, 0])])
    assert pool.views.stats().live_mappings == 2 * LAYOUT.layers - 1


def test_pages_that_share_a_chunk_cannot_be_shown() -> None:
    chunks = ChunkPool(FakeBackend(1 << 30), 1 << 24, 4 * LAYOUT.page_bytes)
    with pytest.raises(VmMisuse, match="open the page memory with page_chunks"):
        SequenceViews(PagePool(chunks, LAYOUT), n_slots=1, context_blocks=1, lock=threading.Lock())


def test_more_blocks_than_a_slot_has_are_refused(pool: Opened) -> None:
    with pytest.raises(VmMisuse, match="at most 8 blocks"):
        pool.views.show("a", table(*range(9)))


def test_an_error_of_the_background_thread_reaches_whoever_shows_next(
    pool: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda _: told.set())
    pool.views.ahead("a", np.full((LAYOUT.layers, 1), N_PAGES, np.int32))
    assert told.wait(WAIT_S)
    with pytest.raises(VmMisuse, match="has failed"):
        pool.views.show("a", table(1))


@pytest.mark.parametrize("seed", range(4))
def test_any_history_shows_what_a_dictionary_of_tables_says(seed: int) -> None:
    """Sequences begin alone or with another's leading blocks, grow, end, are mapped ahead; steps overlap."""
    rng, pool = random.Random(seed), opened(max_mappings=None if seed % 2 else 200, n_slots=6)
    tables: dict[str, list[int]] = {}
    in_flight: list[dict[int, list[int]]] = []
    refused = 0
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
        begun_first = rng.random() < 0.3
        if begun_first:
            pool.views.begin_step(computed)
        reads: dict[int, list[int]] = {}
        for owner in computed:
            slot = pool.views.show(owner, table(*tables[owner]))
            if slot is None:
                refused += 1
            else:
                assert slot not in reads
                reads[slot] = list(tables[owner])
        if not begun_first:
            pool.views.begin_step(computed)
        in_flight.append(reads)
        if rng.random() < 0.1:
            pool.views.forget([page for page in range(N_PAGES) if not _read(page, in_flight)][:20])
        for slots in in_flight:
            assert all(pool.shows(slot, table(*blocks)) for slot, blocks in slots.items())
        if len(in_flight) == 2 or rng.random() < 0.6:
            in_flight.pop(0)
            pool.views.end_step()
        pool.views.check()
    assert refused < 60
    pool.views.close()
    assert pool.pages.backend.live_mappings <= pool.home_mappings
    pool.pages.close()
    pool.chunks.close()


def _read(page: int, in_flight: list[dict[int, list[int]]]) -> bool:
    return any(page // LAYOUT.layers in blocks for slots in in_flight for blocks in slots.values())
