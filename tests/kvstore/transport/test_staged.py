"""Spans out of an accelerator's pages, and what happens when the accelerator has no room for the copy."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from common.errors import PeerFailed, ProtocolViolation
from common.kv_layout import KvLayout
from common.messages.handover import KvSpan
from kvstore.memory.page_memory import PageMemory, open_page_memory
from kvstore.transport import staging
from kvstore.transport.layer_events import NoLayerEvents
from kvstore.transport.own_pages import AcceleratorPages
from kvstore.transport.page_mover import PageMover
from kvstore.transport.staged import StagedChannel

MIB = 2**20
LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=32, dtype="float32")


@pytest.fixture
def memory() -> Iterator[PageMemory]:
    made = open_page_memory(4 * MIB, LAYOUT, torch.device("cpu"))
    made.pages.rows[:] = np.random.default_rng(1).integers(0, 256, made.pages.rows.shape, np.uint8)
    yield made
    made.close()


@pytest.fixture
def pages(memory: PageMemory) -> AcceleratorPages:
    return AcceleratorPages(memory.pages, NoLayerEvents())


def test_a_span_becomes_its_pages_one_after_the_other(memory: PageMemory, pages: AcceleratorPages) -> None:
    copied = StagedChannel(pages).copy(KvSpan(0, 0, 2), [3, 1], [0, 1])
    assert (copied.n_copies, copied.n_bytes) == (2, 2 * LAYOUT.page_bytes)
    assert copied.payload == memory.pages.rows[[3, 1]].tobytes()


@pytest.mark.parametrize("buffer_pages", [1, 3, 100])
def test_payloads_of_any_length_go_out_and_in_through_two_buffers(
    memory: PageMemory, monkeypatch: pytest.MonkeyPatch, buffer_pages: int
) -> None:
    monkeypatch.setattr(staging, "BUFFER_BYTES", buffer_pages * LAYOUT.page_bytes)
    pages = AcceleratorPages(memory.pages, NoLayerEvents())
    out, back = [5, 9, 4, 30, 31, 32, 7], [100, 3, 101, 60, 61, 62, 99]
    wanted = memory.pages.rows[out].copy()
    payload = pages.read(out)
    assert payload == wanted.tobytes()
    pages.write(back, payload)
    assert np.array_equal(memory.pages.rows[back], wanted)


def test_pages_that_are_not_there_and_payloads_that_do_not_fit_are_refused(pages: AcceleratorPages) -> None:
    with pytest.raises(PeerFailed, match="were asked for"):
        pages.read([pages.n_pages])
    with pytest.raises(ProtocolViolation, match="for 2 pages"):
        pages.write([0, 1], bytes(LAYOUT.page_bytes))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError()])
def test_a_copy_that_finds_no_memory_fails_alone(
    pages: AcceleratorPages, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def move_out(self: PageMover, *arguments: object) -> None:
        raise error

    monkeypatch.setattr(PageMover, "move_out", move_out)
    with pytest.raises(PeerFailed, match="no memory to copy pages"):
        StagedChannel(pages).copy(KvSpan(0, 0, 1), [0], [0])
