"""Memory is ordered away only when nobody reads it for a checksum any more, and what reads other pages is not waited for."""

import queue
import threading
from collections.abc import Iterator
from unittest.mock import MagicMock

import pytest

from common.ids import PeerId, RequestId
from common.kv_layout import KvLayout
from common.log import Log
from common.messages.requests import Cancel
from kvstore.memory.page_memory import open_page_memory
from kvstore.memory.page_pool import PagePool
from kvstore.transport.own_pages import HostPages
from kvstore.transport.pages import Rows
from services.worker.checksum_thread import ChecksumsMade, ChecksumThread, Pages, Payloads
from services.worker.core.actions import LendChunks, ResizeMemory, TakeBackChunks
from services.worker.core.spare_memory import SYSTEM
from services.worker.service import WorkerService

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=8, dtype="float32")
CHUNK_PAGES, WAIT_S = 32, 30
LONG = tuple(range(CHUNK_PAGES, 2 * CHUNK_PAGES))
"""More pages than are read in one go, all in chunk 1."""


class Held(HostPages):
    """Pages of which a portion is begun when the test hears of it, and goes on when the test says."""

    def __init__(self, pool: PagePool) -> None:
        super().__init__(pool)
        self.begun, self.go_on, self.n_read = threading.Semaphore(0), threading.Semaphore(0), 0

    @property
    def rows(self) -> Rows:
        self.begun.release()
        assert self.go_on.acquire(timeout=WAIT_S)
        self.n_read += 1
        return super().rows


class Awaited(threading.Event):
    """Who waits for it lets the portion go on."""

    def __init__(self, go_on: threading.Semaphore) -> None:
        super().__init__()
        self._go_on = go_on

    def wait(self, timeout: float | None = None) -> bool:
        self._go_on.release()
        return super().wait(WAIT_S if timeout is None else timeout)


class Setting:
    """A service that can be given orders, and what its checksum thread made."""

    def __init__(self, pool: PagePool) -> None:
        self.pages, self.made = Held(pool), queue.SimpleQueue[ChecksumsMade]()
        self.thread = ChecksumThread(self.pages, self.made.put, CHUNK_PAGES)
        core, ports = MagicMock(), MagicMock(checksums=self.thread)
        self.read_before = list[int]()
        ports.memory.order = ports.lender.carry_out = lambda _: self.read_before.append(self.pages.n_read)
        self._service = WorkerService(core, ports, Log(), plan_ahead=False)
        (self._move_chunks,) = core.move_chunks_with.call_args.args

    def give(self, order: ResizeMemory | LendChunks | TakeBackChunks) -> None:
        if isinstance(order, ResizeMemory):
            self._service._act([order], ())
        else:
            self._move_chunks(order)


@pytest.fixture
def at() -> Iterator[Setting]:
    memory = open_page_memory(4 * 2**20, LAYOUT)
    made = Setting(memory.pages)
    yield made
    made.pages.go_on.release(100)
    made.thread.stop()
    memory.close()


TAKING = pytest.mark.parametrize(
    "order", [ResizeMemory(CHUNK_PAGES), LendChunks((1,), SYSTEM)], ids=lambda one: type(one).__name__
)


@TAKING
def test_memory_goes_only_after_the_portion_that_is_read_of_it_and_the_rest_is_left(
    at: Setting, order: ResizeMemory | LendChunks
) -> None:
    at.thread.post(1, Pages(LONG))
    at.thread.post(2, Pages((CHUNK_PAGES,)))
    at.thread.post(3, Payloads((bytes(LAYOUT.page_bytes),)))
    assert at.pages.begun.acquire(timeout=WAIT_S)
    assert at.thread._current is not None
    at.thread._current.left = Awaited(at.pages.go_on)
    at.give(order)
    assert at.read_before == [1] == [at.pages.n_read]
    ends = [at.made.get(timeout=WAIT_S) for _ in range(3)]
    assert [(end.ticket, bool(end.problem), len(end.checksums)) for end in ends] == [
        (1, True, 0),
        (2, True, 0),
        (3, False, 1),
    ]
    assert at.pages.n_read == 1


@pytest.mark.parametrize(
    "order",
    [ResizeMemory(2 * CHUNK_PAGES), LendChunks((0, 2), SYSTEM), TakeBackChunks((1,), SYSTEM)],
    ids=lambda one: type(one).__name__,
)
def test_who_reads_other_pages_is_not_waited_for_and_goes_on(
    at: Setting, order: ResizeMemory | LendChunks | TakeBackChunks
) -> None:
    at.thread.post(1, Pages(LONG))
    assert at.pages.begun.acquire(timeout=WAIT_S)
    at.give(order)
    assert at.read_before == [0]
    at.pages.go_on.release(100)
    assert len(at.made.get(timeout=WAIT_S).checksums) == len(LONG)


def test_a_peer_that_cannot_be_sent_anything_fills_no_log(capsys: pytest.CaptureFixture[str]) -> None:
    core, ports = MagicMock(), MagicMock()
    ports.exchange.send.return_value = False
    service = WorkerService(core, ports, Log(), plan_ahead=False)
    for number in range(50):
        service._send(PeerId("decode-0@1"), Cancel(request=RequestId(f"r{number}")), ())
    assert "".join(capsys.readouterr()).count('"send_refused"') == 1
    assert core.on_unsent.call_count == 50
    assert service._unsent.total == 50
