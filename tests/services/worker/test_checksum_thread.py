"""Every job ends exactly once, in order, with the checksums of what lay there."""

import queue
import zlib
from collections.abc import Iterator

import pytest

from common.kv_layout import KvLayout
from kvstore.memory.page_memory import PageMemory, open_page_memory
from kvstore.transport.own_pages import HostPages
from services.worker.checksum_thread import ChecksumsMade, ChecksumThread, Pages, Payloads

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=8, dtype="float32")


@pytest.fixture
def memory() -> Iterator[PageMemory]:
    made = open_page_memory(4 * 2**20, LAYOUT)
    made.pages.rows[3] = 7
    yield made
    made.close()


def test_pages_and_payloads_are_read_in_order_and_the_rest_ends_with_the_thread(memory: PageMemory) -> None:
    made: queue.SimpleQueue[ChecksumsMade] = queue.SimpleQueue()
    thread = ChecksumThread(HostPages(memory.pages), made.put, 1)
    page = memory.pages.rows[3].tobytes()
    thread.post(1, Pages((3, 0)))
    thread.post(2, Payloads((page, page + bytes(LAYOUT.page_bytes))))
    thread.post(3, Pages((10**6,)))
    full, empty = zlib.crc32(page), zlib.crc32(bytes(LAYOUT.page_bytes))
    ends = [made.get(timeout=30) for _ in range(3)]
    assert [(end.ticket, end.checksums) for end in ends] == [(1, (full, empty)), (2, (full, full, empty)), (3, ())]
    assert "1000000" in ends[2].problem
    thread.stop()
    thread.post(4, Pages((3,)))
    assert made.get_nowait().problem and made.empty()
