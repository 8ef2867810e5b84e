"""Laws of chunks on loan: the same memory comes home, nothing else moves, and what the system gets it really has."""

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from common.errors import OutOfChunks
from common.kv_layout import KvLayout
from kvstore.memory.backend import HalfMoved, VmBackend, VmMisuse
from kvstore.memory.chunks import ChunkPool
from kvstore.memory.fake import FakeBackend
from kvstore.memory.lending import ChunkLending
from kvstore.memory.memfd import MemfdBackend
from kvstore.memory.page_pool import PagePool
from tests.kvstore.memory.test_backends import _pretended

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=32, dtype="float32")
N_CHUNKS, CHUNK_PAGES = 8, 2
CHUNK_BYTES = CHUNK_PAGES * LAYOUT.page_bytes


@dataclass
class Bench:
    backend: VmBackend
    chunks: ChunkPool
    pages: PagePool
    lending: ChunkLending
    forgotten: list[int]
    lock: threading.Lock

    def fill(self) -> None:
        """Every page knows its number."""
        for page in range(self.pages.n_pages):
            self.pages.rows[page] = page + 1

    def holds(self, chunk: int, value: Callable[[int], int]) -> bool:
        rows = self.pages.rows
        return all((rows[page] == value(page)).all() for page in self.of(chunk))

    def of(self, chunk: int) -> range:
        return range(chunk * CHUNK_PAGES, (chunk + 1) * CHUNK_PAGES)


def opened(backend: VmBackend) -> Bench:
    chunks = ChunkPool(backend, N_CHUNKS * CHUNK_BYTES, CHUNK_BYTES)
    pages = PagePool(chunks, LAYOUT)
    pages.grow(N_CHUNKS)
    forgotten: list[int] = []
    lock = threading.Lock()
    lending = ChunkLending(pages, chunks, lock, forget_pages=forgotten.extend)
    return Bench(backend, chunks, pages, lending, forgotten, lock)


@pytest.fixture(params=[FakeBackend, MemfdBackend, _pretended])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = opened(request.param(N_CHUNKS * CHUNK_BYTES))
    yield made
    made.lending.close()
    made.pages.close()
    made.chunks.close()


@pytest.fixture
def host() -> Iterator[Bench]:
    made = opened(MemfdBackend(N_CHUNKS * CHUNK_BYTES))
    made.fill()
    yield made
    made.lending.close()
    made.pages.close()
    made.chunks.close()


def test_a_lent_chunk_is_the_arena_s_end_and_the_other_pages_stay(host: Bench) -> None:
    host.lending.to_arena([5, 2])
    arena = host.lending.arena_bytes.view(2, CHUNK_BYTES)
    assert [int(row[0]) for row in arena] == [5 * CHUNK_PAGES + 1, 2 * CHUNK_PAGES + 1], "no copy: what lay there shows"
    arena.fill_(0xFF)
    assert all(host.holds(chunk, lambda page: page + 1) for chunk in (0, 1, 3, 4, 6, 7))


def test_what_comes_home_is_zeros_in_its_own_place(host: Bench) -> None:
    chunks, offsets = host.pages.chunks, host.pages.chunk_offsets
    host.lending.to_arena([5, 2])
    host.lending.arena_bytes.fill_(0xFF)  # reads as not a number
    host.lending.from_arena([2])
    assert host.lending.arena_bytes.numel() == CHUNK_BYTES
    assert host.holds(2, lambda page: 0)
    host.lending.from_arena([5])
    assert host.pages.tensor.isfinite().all()
    assert (host.pages.chunks, host.pages.chunk_offsets) == (chunks, offsets)
    assert host.holds(4, lambda page: page + 1)
    assert host.holds(6, lambda page: page + 1)


def test_the_arena_s_beginning_stays_while_its_end_moves(host: Bench) -> None:
    host.lending.to_arena([1])
    begin = host.lending.arena_bytes
    begin.fill_(7)
    host.lending.to_arena([2, 3])
    assert host.lending.arena_bytes.data_ptr() == begin.data_ptr()
    host.lending.from_arena([3, 2])
    assert begin.eq(7).all()


def test_what_goes_to_the_system_is_really_gone_and_comes_back_as_zeros() -> None:
    backend = MemfdBackend(N_CHUNKS * CHUNK_BYTES)
    host = opened(backend)
    host.fill()
    offsets = host.pages.chunk_offsets
    host.lending.to_system([6, 3])
    assert backend.resident_bytes == (N_CHUNKS - 2) * CHUNK_BYTES
    assert host.lending.released_bytes == 2 * CHUNK_BYTES
    assert host.forgotten == [12, 13, 6, 7], "whoever shows the pages is told before"
    host.lending.from_system([3])
    assert backend.resident_bytes == (N_CHUNKS - 1) * CHUNK_BYTES
    assert host.holds(3, lambda page: 0)
    assert host.holds(5, lambda page: page + 1)
    assert host.pages.chunk_offsets == offsets
    host.lending.close()
    host.pages.close()  # while a chunk is away
    host.chunks.close()


def test_a_chunk_that_is_shown_elsewhere_does_not_lose_its_memory(host: Bench) -> None:
    shown = host.backend.reserve(CHUNK_BYTES)
    host.backend.map_run(shown, 0, [host.pages.chunks[4]])
    with pytest.raises(VmMisuse, match="still mapped"):
        host.lending.to_system([4])
    host.backend.unmap_run(shown, 0, 1)


def test_nobody_else_gets_a_place_in_the_file_while_its_memory_is_away() -> None:
    backend = MemfdBackend((N_CHUNKS + 1) * CHUNK_BYTES)
    host = opened(backend)
    host.lending.to_system([0])
    host.chunks.set_budget(N_CHUNKS + 1)
    (other,) = host.chunks.alloc("other", 1)
    assert other.offset_bytes not in host.pages.chunk_offsets
    host.chunks.free("other", [other])
    host.lending.close()
    host.pages.close()
    host.chunks.close()


def test_a_refill_that_fails_half_way_gives_all_back() -> None:
    backend = FakeBackend(N_CHUNKS * CHUNK_BYTES)
    bench = opened(backend)
    bench.lending.to_system([1, 2])
    taken = backend.create(CHUNK_BYTES)  # by somebody else, meanwhile
    with pytest.raises(OutOfChunks):
        bench.lending.from_system([1, 2])
    assert backend.created_bytes == (N_CHUNKS - 1) * CHUNK_BYTES
    backend.release(taken)
    bench.lending.from_system([1, 2])
    assert bench.lending.released_bytes == 0


def test_a_system_without_mappings_leaves_all_where_it_was(host: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    host.lending.to_arena([1])
    arena, home = host.lending._arena, host.pages.memory

    def full(*_: object) -> None:
        raise OutOfChunks("no more mappings")

    monkeypatch.setattr(arena, "grow", full)
    with pytest.raises(OutOfChunks):
        host.lending.to_arena([2])
    assert host.holds(2, lambda page: page + 1)
    monkeypatch.undo()
    monkeypatch.setattr(home, "lay", full)
    with pytest.raises(OutOfChunks):
        host.lending.from_arena([1])
    assert host.lending.arena_bytes.numel() == CHUNK_BYTES


def failing(bench: Bench, patched: pytest.MonkeyPatch, name: str, after: int) -> list[int]:
    """That call of the back end fails from then on. Each is noted."""
    original, calls = getattr(bench.backend, name), list[int]()

    def call(*given: object) -> object:
        calls.append(0)
        if len(calls) > after:
            raise OutOfChunks("no more mappings")
        return original(*given)

    patched.setattr(bench.backend, name, call)
    return calls


@pytest.mark.parametrize(
    ("name", "after", "order"),
    [
        ("map_run", 0, lambda lending: lending.to_arena([5, 2])),
        ("map_run", 0, lambda lending: lending.from_arena([4])),
        ("map_run", 1, lambda lending: lending.from_arena([4, 1])),
    ],
)
def test_an_order_that_cannot_be_undone_is_no_order_that_moved_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str, after: int, order: Callable[[ChunkLending], None]
) -> None:
    bench.lending.to_arena([1, 4])
    with monkeypatch.context() as patched:
        failing(bench, patched, name, after)
        with pytest.raises(HalfMoved, match="could not be undone, so memory that is in use may lie nowhere: no more"):
            order(bench.lending)
    # What is left can be closed, as the fixture does; nobody may use it.


def test_part_of_what_was_to_be_lifted_that_cannot_be_put_back_is_told(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        failing(bench, patched, "unmap_run", 1)
        failing(bench, patched, "map_run", 0)
        with pytest.raises(HalfMoved):
            bench.lending.to_arena([5, 2])
    bench.backend.map_run(bench.pages.memory._range, 2 * CHUNK_BYTES, [bench.pages.chunks[2]])


def test_nothing_moves_without_what_may_be_needed_to_undo_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.lending.to_arena([1, 4])
    with monkeypatch.context() as patched:
        failing(bench, patched, "keep_for_undoing", 0)
        moved = [failing(bench, patched, name, 0) for name in ("unmap_run", "map_run")]
        for order in (bench.lending.to_arena, bench.lending.from_arena):
            with pytest.raises(OutOfChunks):
                order([4] if order == bench.lending.from_arena else [5, 2])
    assert moved == [[], []]
    bench.lending.from_arena([4])
    bench.lending.to_arena([4, 2])


def test_memory_that_would_come_back_as_another_chunk_is_not_given_away() -> None:
    made = opened(_pretended(N_CHUNKS * CHUNK_BYTES))
    with pytest.raises(VmMisuse, match="as the same chunk"):
        made.lending.to_system([1])
    made.lending.to_arena([1])  # it is where it was


def test_only_what_is_there_can_be_moved(bench: Bench) -> None:
    bench.lending.to_arena([3, 4])
    for places in ([3], [1, 1], [N_CHUNKS], [-1]):
        with pytest.raises(VmMisuse, match="are not all here"):
            bench.lending.to_arena(places)
    for places in ([3], [5], [3, 4, 5]):
        with pytest.raises(VmMisuse, match="the arena ends with"):
            bench.lending.from_arena(places)
    with pytest.raises(VmMisuse, match="not all with the system"):
        bench.lending.from_system([3])
    with pytest.raises(VmMisuse, match="are lifted out"):
        bench.pages.shrink(5)
    bench.lending.from_arena([4, 3])
    bench.pages.shrink(5)


def test_the_back_end_is_used_under_the_lock_only(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    for name in ("map_run", "unmap_run"):
        original = getattr(bench.backend, name)

        def watched(*given: object, original: Callable[..., object] = original) -> object:
            seen.append(bench.lock.locked())
            return original(*given)

        monkeypatch.setattr(bench.backend, name, watched)
    bench.lending.to_arena([1, 2])
    bench.lending.from_arena([2])
    monkeypatch.undo()
    assert len(seen) == 4
    assert all(seen)


@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_loans_keeps_what_is_at_home(host: Bench, seed: int) -> None:
    rng, arena, system = random.Random(seed), list[int](), set[int]()
    written = {chunk: chunk + 1 for chunk in range(N_CHUNKS)}
    for chunk, value in written.items():
        host.pages.rows[chunk * CHUNK_PAGES : (chunk + 1) * CHUNK_PAGES] = value
    for _ in range(60):
        home = [chunk for chunk in range(N_CHUNKS) if chunk not in arena and chunk not in system]
        some = rng.sample(home, rng.randrange(len(home) + 1))
        move = rng.randrange(4)
        if move == 0:
            host.lending.to_arena(some)
            arena += some
            host.lending.arena_bytes.fill_(rng.randrange(256))
        elif move == 1 and arena:
            back = arena[-rng.randrange(1, len(arena) + 1) :]
            host.lending.from_arena(back)
            arena = arena[: len(arena) - len(back)]
            written.update(dict.fromkeys(back, 0))
        elif move == 2:
            host.lending.to_system(some[:2])
            system.update(some[:2])
        else:
            back = rng.sample(sorted(system), rng.randrange(len(system) + 1))
            host.lending.from_system(back)
            system.difference_update(back)
            written.update(dict.fromkeys(back, 0))
        assert host.lending.arena_bytes.numel() == len(arena) * CHUNK_BYTES
        for chunk in range(N_CHUNKS):
            if chunk not in arena and chunk not in system:
                assert host.holds(chunk, lambda page: written[page // CHUNK_PAGES])
        host.chunks.check()


def test_a_step_s_tensors_lie_in_lent_memory(host: Bench) -> None:
    host.lending.to_arena([1, 2])
    rows = host.lending.arena_bytes[: 4 * 64].view(torch.float32).view(4, 16)
    rows.copy_(torch.arange(64.0).view(4, 16))
    assert host.lending.arena_bytes[: 4 * 64].view(torch.float32)[63] == 63.0
