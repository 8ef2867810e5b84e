"""Laws of a worker's page memory: what it tells peers, and that it grows and shrinks at its end."""

import os
import random
from collections.abc import Callable, Iterator

import pytest
import torch

from common.errors import ConfigError, OutOfChunks
from common.ids import Owner
from common.kv_layout import KvLayout
from common.policy.eviction import Lru
from kvstore.index.block_pool import BlockPool
from kvstore.index.ledger import Ledger, PageState
from kvstore.memory import cuda_driver, page_memory
from kvstore.memory.available import Available
from kvstore.memory.cuda_vmm import CudaVmmBackend
from kvstore.memory.page_memory import PageMemory, open_page_memory
from kvstore.memory.shareable import PROBE_SLOT_BYTES, PROBE_SLOTS
from tests.kvstore.memory.pretended_driver import PretendedCuda, Status

LAYOUT = KvLayout(layers=3, kv_heads=2, head_dim=64, dtype="float32")
MIB = 2**20


def on_host(monkeypatch: pytest.MonkeyPatch) -> PageMemory:
    del monkeypatch
    return open_page_memory(8 * MIB, LAYOUT, torch.device("cpu"))


def pretended(monkeypatch: pytest.MonkeyPatch, capacity_bytes: int = 512 * MIB) -> tuple[PretendedCuda, PageMemory]:
    """The device's path over host memory: the driver is pretended, and torch sees the bytes as its own."""
    cuda = PretendedCuda(capacity_bytes)
    monkeypatch.setattr(cuda_driver, "_bindings", lambda: cuda)
    monkeypatch.setattr(
        page_memory, "open_cuda", lambda device: CudaVmmBackend(torch.device("cpu"), cuda_driver.CudaDriver(0))
    )
    monkeypatch.setattr(page_memory, "_free_memory", lambda device: Available(64 * MIB, "pretended"))
    monkeypatch.setattr(page_memory, "whole_memory_bytes", lambda device: 64 * MIB)
    try:
        return cuda, open_page_memory(8 * MIB, LAYOUT, torch.device("cuda", 0))
    finally:
        if capacity_bytes < 512 * MIB:
            assert not (cuda.handles or cuda.mapped or cuda.reserved)


def on_pretended_device(monkeypatch: pytest.MonkeyPatch) -> PageMemory:
    return pretended(monkeypatch)[1]


def on_device(monkeypatch: pytest.MonkeyPatch) -> PageMemory:
    del monkeypatch
    return open_page_memory(64 * MIB, LAYOUT, torch.device("cuda", 0))


@pytest.fixture(params=[on_host, on_pretended_device, pytest.param(on_device, marks=pytest.mark.gpu)])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[PageMemory]:
    if request.param is on_device and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    make: Callable[[pytest.MonkeyPatch], PageMemory] = request.param
    opened = make(monkeypatch)
    yield opened
    opened.close()


def test_pages_hold_what_is_written_and_new_ones_hold_zeros(memory: PageMemory) -> None:
    pages = memory.pages
    assert bool((pages.tensor == 0).all())
    pages.tensor[-1].fill_(3.0)
    assert float(pages.tensor.sum()) == 3.0 * pages.tensor[0].numel()


def test_what_a_peer_is_told_covers_every_page_and_scratch(memory: PageMemory) -> None:
    told, fds = memory.pages_in_file, memory.export_fds()
    try:
        if memory.kind == "memfd":
            ends = [os.fstat(fds[0]).st_size]
            assert (len(fds), memory.device_uuid) == (1, "")
        else:
            assert len(fds) == len(told.chunk_offsets) + 1
            assert told.chunk_offsets == tuple(i * told.chunk_bytes for i in range(len(fds) - 1))
            assert memory.probe_offset_bytes == memory.plan.limit_chunks * told.chunk_bytes
            assert len(bytes.fromhex(memory.device_uuid)) == 16
            ends = [memory.probe_offset_bytes + PROBE_SLOTS * PROBE_SLOT_BYTES]
    finally:
        for fd in fds:
            os.close(fd)
    assert len(told.chunk_offsets) * (told.chunk_bytes // told.page_bytes) == memory.pages.n_pages
    assert ends[0] >= memory.probe_offset_bytes + PROBE_SLOTS * PROBE_SLOT_BYTES


def test_descriptors_of_a_device_come_in_page_order(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = on_pretended_device(monkeypatch)
    memory.resize(2)
    memory.resize(4)
    per_chunk = memory.plan.chunk_bytes // LAYOUT.page_bytes
    for chunk in range(4):
        memory.pages.tensor[chunk * per_chunk].fill_(float(chunk + 1))
    fds = memory.export_fds()
    assert [torch.frombuffer(bytearray(os.pread(fd, 4, 0)), dtype=torch.float32).item() for fd in fds[:4]] == [
        1,
        2,
        3,
        4,
    ]
    for fd in fds:
        os.close(fd)
    memory.close()


def test_scratch_reads_as_written_by_a_peer_and_as_zeros_after_discard(memory: PageMemory) -> None:
    fds, slot = memory.export_fds(), memory.probe_offset_bytes + 3 * PROBE_SLOT_BYTES
    if memory.pages.device.type == "cpu":
        in_fd = slot if memory.kind == "memfd" else 3 * PROBE_SLOT_BYTES
        os.pwrite(fds[-1], b"tide", in_fd)
        assert memory.read_scratch(slot, 4) == b"tide"
    for fd in fds:
        os.close(fd)
    memory.discard(slot, PROBE_SLOT_BYTES)
    assert memory.read_scratch(slot, PROBE_SLOT_BYTES) == bytes(PROBE_SLOT_BYTES)


def test_resizing_keeps_the_pages_that_stay(memory: PageMemory) -> None:
    chunks, per_chunk = memory.plan.chunks, memory.plan.pages // memory.plan.chunks
    memory.pages.tensor[0].fill_(7.0)
    assert memory.resize(chunks - 2) == memory.pages.n_pages == (chunks - 2) * per_chunk
    assert memory.resize(chunks + 1) == memory.pages.n_pages == (chunks + 1) * per_chunk
    assert float(memory.pages.tensor[0].mean()) == 7.0
    assert bool((memory.pages.tensor[(chunks - 2) * per_chunk :] == 0).all())
    assert memory.chunks.free_chunks == 0
    memory.chunks.check()


def test_ledger_and_memory_shrink_to_what_is_held_and_grow_again(memory: PageMemory) -> None:
    pool = BlockPool(Ledger(memory.pages.n_pages), LAYOUT.layers, Lru())
    total_blocks = memory.pages.n_pages // LAYOUT.layers
    pool.alloc(Owner("early"), total_blocks // 4, PageState.ACTIVE)
    held = pool.alloc(Owner("late"), total_blocks // 4, PageState.ACTIVE)
    memory.pages.tensor[int(held.max())].fill_(4.0)
    n_pages = memory.resize(memory.chunks_for(pool.resize(1)))
    assert int(held.max()) < n_pages < memory.plan.pages
    assert float(memory.pages.tensor[int(held.max())].mean()) == 4.0
    pool.release(Owner("late"))
    assert memory.resize(memory.chunks_for(pool.resize(1))) < n_pages
    pool.resize(memory.resize(memory.plan.chunks))
    assert pool.available_pages == (total_blocks - total_blocks // 4) * LAYOUT.layers
    pool.check()


def test_low_marks_tell_how_many_chunks_stayed_since_any_generation(memory: PageMemory) -> None:
    chance, most, history = random.Random(3), len(memory.pages.chunks), list[tuple[int, int]]()
    for _ in range(30):
        memory.resize(chance.randint(1, most))
        told = memory.pages_in_file
        history.append((told.generation, len(told.chunk_offsets)))
        for generation in range(told.generation):
            fewest = min(n_chunks for began, n_chunks in history if began > generation)
            assert min(n_chunks for began, n_chunks in told.low_marks if began > generation) == fewest
        assert len(told.low_marks) <= most


def test_only_chunks_that_leave_start_a_new_generation(memory: PageMemory) -> None:
    first = memory.pages_in_file.generation
    memory.resize(memory.plan.chunks + 1)
    assert memory.pages_in_file.generation == first
    memory.resize(memory.plan.chunks)
    assert memory.pages_in_file.generation == first + 1


def test_growth_beyond_what_there_is_changes_nothing(memory: PageMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    before = memory.pages.n_pages
    with pytest.raises(OutOfChunks, match="addresses for"):
        memory.resize(memory.plan.limit_chunks + 1)
    monkeypatch.setattr(page_memory, "_free_memory", lambda device: Available(0, "the limit"))
    with pytest.raises(OutOfChunks, match=r"0 B are available \(the limit\)"):
        memory.resize(memory.plan.chunks + 1)
    assert (memory.pages.n_pages, memory.chunks.free_chunks) == (before, 0)


def test_nothing_is_unmapped_while_the_device_works(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, memory = pretended(monkeypatch)
    begin = len(cuda.calls)
    memory.resize(memory.plan.chunks - 2)
    made = cuda.calls[begin:]
    assert made.index("cuCtxSynchronize") < made.index("cuMemUnmap")
    begin = len(cuda.calls)
    memory.close()
    made = cuda.calls[begin:]
    assert made.index("cuCtxSynchronize") < made.index("cuMemUnmap")


def test_growth_that_the_driver_refuses_halfway_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, memory = pretended(monkeypatch)
    handles, before = set(cuda.handles), memory.pages.n_pages
    for call in ("cuMemCreate", "cuMemMap", "cuMemSetAccess"):
        cuda.fail[call] = Status.CUDA_ERROR_OUT_OF_MEMORY
        with pytest.raises(OutOfChunks, match=call):
            memory.resize(memory.plan.chunks + 2)
        assert (memory.pages.n_pages, memory.chunks.free_chunks, set(cuda.handles)) == (before, 0, handles)
    memory.close()
    assert not (cuda.handles or cuda.mapped or cuda.reserved)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_budget_above_the_memory_of_the_device_is_refused(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with pytest.raises(ConfigError, match=r"--device-memory=1024\.0 TiB is more than"):
        open_page_memory(2**50, LAYOUT, torch.device(device))


@pytest.mark.gpu
def test_a_closed_memory_leaves_nothing_on_the_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", 0)
    open_page_memory(64 * MIB, LAYOUT, device).close()
    torch.cuda.synchronize()
    before_bytes = torch.cuda.mem_get_info(device)[0]
    memory = open_page_memory(1024 * MIB, LAYOUT, device)
    assert torch.cuda.mem_get_info(device)[0] <= before_bytes - 1024 * MIB
    memory.close()
    assert torch.cuda.mem_get_info(device)[0] >= before_bytes - 64 * MIB


def test_a_device_that_is_filled_by_others_meanwhile_is_refused_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--device-memory=8\.0 MiB cannot be taken .*cuda_error_out_of_memory"):
        pretended(monkeypatch, 130 * MIB)  # scratch takes 128 of them


def test_pages_can_be_chunks_which_grow_and_shrink_one_by_one() -> None:
    layout = KvLayout(layers=3, kv_heads=2, head_dim=64, dtype="float32", block_tokens=16)
    memory = open_page_memory(2 * MIB, layout, page_chunks=True)
    assert memory.plan.chunk_bytes == layout.page_bytes == 16 * 1024
    assert (memory.plan.pages, memory.pages.n_pages) == (128, 128)
    assert memory.resize(100) == 100
    assert memory.resize(131) == 131
    memory.pages.rows[:] = 1
    assert len({memory.pages.chunk_of(page) for page in range(131)}) == 131
    memory.close()
