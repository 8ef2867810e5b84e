"""A peer's pages under several threads: uses run side by side, and nothing is unmapped under any of them."""

import queue
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from common.errors import PeerFailed
from common.ids import PeerId
from common.kv_layout import KvLayout
from kvstore.memory.page_memory import PageMemory, open_page_memory
from kvstore.transport.descriptions import PoolDescription
from kvstore.transport.shared_pages import SharedPages

MIB, WAIT_S = 2**20, 30
LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=64, dtype="bfloat16")


@pytest.fixture
def memory() -> Iterator[PageMemory]:
    made = open_page_memory(8 * MIB, LAYOUT)
    made.pages.rows[:] = np.random.default_rng(1).integers(0, 256, made.pages.rows.shape, np.uint8)
    yield made
    made.close()


def mapped(memory: PageMemory, chunk_offsets: tuple[int, ...] | None = None) -> SharedPages:
    description = PoolDescription(
        peer=PeerId("decode@1"),
        page_bytes=LAYOUT.page_bytes,
        chunk_bytes=memory.pages.chunk_bytes,
        chunk_offsets=memory.pages.chunk_offsets if chunk_offsets is None else chunk_offsets,
        probe_offset_bytes=0,
        probe_bytes=1,
    )
    return SharedPages(description, memory.backend.fd)


@pytest.mark.parametrize("ids", [(3, 9, 4), range(5, 9), (5, 7, 9), np.array([300, 2], np.int32)])
@pytest.mark.parametrize("turned", [False, True])
def test_pages_are_read_and_written_where_the_description_says(
    memory: PageMemory, ids: tuple[int, ...], turned: bool
) -> None:
    offsets = memory.pages.chunk_offsets[::-1] if turned else memory.pages.chunk_offsets
    pages, per_chunk = mapped(memory, offsets), memory.pages.chunk_bytes // LAYOUT.page_bytes
    rows = [offsets[page // per_chunk] // LAYOUT.page_bytes + page % per_chunk for page in ids]
    assert np.array_equal(pages.read(ids), memory.pages.rows[rows])
    local = np.zeros((20, LAYOUT.page_bytes), np.uint8)
    pages.read_into(local, range(7, 7 + len(ids)), ids)
    assert np.array_equal(local[7 : 7 + len(ids)], memory.pages.rows[rows])
    assert not local[:7].any()
    pages.write(ids, local, range(len(ids)))
    assert not memory.pages.rows[rows].any()
    pages.close()


@pytest.mark.parametrize("ids", [(-1,), (0, -1), range(10**6), (1, 10**6, 3), np.array([0, 10**6, 2])])
def test_pages_that_the_peer_does_not_have_are_refused_both_ways(memory: PageMemory, ids: tuple[int, ...]) -> None:
    pages, local = mapped(memory), np.zeros((3, LAYOUT.page_bytes), np.uint8)
    with pytest.raises(PeerFailed, match="were asked for"):
        pages.write(ids, local, range(len(ids)))
    with pytest.raises(PeerFailed, match="were asked for"):
        pages.read_into(local, range(len(ids)), ids)
    with pytest.raises(PeerFailed, match="target pages 2 to 3 of 3"):
        pages.read_into(local, [2, 3], [0, 1])
    pages.close()


def test_two_uses_run_side_by_side_and_closing_waits_for_both(memory: PageMemory) -> None:
    pages, closed = mapped(memory), queue.SimpleQueue[bool]()
    with pages.using():
        with pages.using() as rows:
            assert np.array_equal(pages.read([4]), rows[[4]]), "a third one"
            closer = threading.Thread(target=lambda: closed.put(pages.close() is None))
            closer.start()
            while not pages.closed:
                continue
        assert closed.empty()
        with pytest.raises(PeerFailed, match="not mapped any more"):
            pages.read([4])
        assert len(pages._rows), "still mapped for the one that is inside"
    closer.join(WAIT_S)
    assert closed.get(timeout=WAIT_S)
    assert not len(pages._rows)
    pages.close()
