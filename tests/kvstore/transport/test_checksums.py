"""A page has one checksum, wherever it lies, and a copier that verifies makes those of its own pages."""

import queue
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from common.errors import PeerFailed
from common.ids import PeerId, TransferId
from common.kv_layout import KvLayout
from common.messages.handover import KvSpan
from kvstore.memory.page_memory import PageMemory, open_page_memory
from kvstore.transport.channel import Copied
from kvstore.transport.checksums import UNKNOWN, checksums_of, in_rows, wrong_places
from kvstore.transport.copier import Copier, CopyDone, CopyJob
from kvstore.transport.layer_events import NoLayerEvents
from kvstore.transport.own_pages import AcceleratorPages, HostPages
from kvstore.transport.page_sums import page_sums

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=8, dtype="float32")


@pytest.fixture
def memory() -> Iterator[PageMemory]:
    made = open_page_memory(4 * 2**20, LAYOUT)
    made.pages.rows[:] = np.random.default_rng(0).integers(0, 256, made.pages.rows.shape, np.uint8)
    yield made
    made.close()


def test_pages_have_the_same_checksums_in_memory_on_a_device_and_in_a_payload(memory: PageMemory) -> None:
    rows, pages = memory.pages.rows, (4, 2, 9)
    expected = tuple(zlib.crc32(rows[page]) for page in pages)
    device = AcceleratorPages(memory.pages, NoLayerEvents())
    assert checksums_of(HostPages(memory.pages), pages) == checksums_of(device, pages) == expected
    assert page_sums(rows[list(pages)].tobytes(), LAYOUT.page_bytes) == expected


@pytest.mark.parametrize("page", [-1, 10**6])
def test_a_page_that_is_not_there_has_none(memory: PageMemory, page: int) -> None:
    with pytest.raises(PeerFailed, match=str(page)):
        checksums_of(HostPages(memory.pages), (0, page))


def test_a_place_is_wrong_where_a_known_checksum_is_another() -> None:
    assert wrong_places((1, 2, UNKNOWN, 4), (1, 3, 3, 5)) == [1, 3]
    assert in_rows((1, 2, 3, 4), 2) == ((1, 2), (3, 4))


class Wrong:
    """A channel that sends other pages than it was told."""

    kind = "tcp"

    def posted(self, span: KvSpan) -> None:
        del span

    def copy(self, span: KvSpan, source_pages: Sequence[int], target_pages: Sequence[int]) -> Copied:
        return Copied(1, 1, b"others")

    def close(self) -> None:
        pass


def test_a_copier_that_verifies_says_what_should_have_come(memory: PageMemory) -> None:
    done: queue.SimpleQueue[CopyDone] = queue.SimpleQueue()
    copier, peer = Copier(done.put, verify=HostPages(memory.pages)), PeerId("decode@1")
    copier.attach(peer, Wrong())
    copier.post(CopyJob(TransferId("t"), peer, KvSpan(0, 0, 2), (4, 2), (0, 1)))
    assert done.get(timeout=30).checksums == tuple(zlib.crc32(memory.pages.rows[page]) for page in (4, 2))
    copier.stop()
