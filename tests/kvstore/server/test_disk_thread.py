"""The disk's thread, and a full disk as a store sees it."""

import errno
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from common.clock import MonotonicClock
from common.ids import PeerId
from common.log import Log
from common.net.inbox import Inbox
from common.net.sockets import Exchange
from kvstore.memory.available import Available
from kvstore.server.block_memory import MIN_BYTES, BlockMemory
from kvstore.server.core.actions import DeleteDisk, DiskJob, ReadDisk, ScanDisk, WriteDisk
from kvstore.server.core.store import Budget, KvStoreCore
from kvstore.server.disk_folder import DiskFolder, Parts, write_file
from kvstore.server.disk_thread import DiskThread
from kvstore.server.inbox import DiskDied, DiskRead, DiskScanned, DiskWritten, Event
from kvstore.server.page_checks import PageChecks
from kvstore.server.service import KvStoreService, Ports
from tests.kvstore.server.builders import BLOCK_BYTES, FILE_BYTES, LAYOUT, block, chain, identity, member, name
from tests.kvstore.server.store_client import KvStoreClient

CAP_BYTES, WAIT_S = 100 * FILE_BYTES, 30
Events = queue.SimpleQueue[Event]


@pytest.fixture
def memory() -> Iterator[BlockMemory]:
    with closing(BlockMemory(MIN_BYTES, Available(1 << 60, "nothing"))) as made:
        made.shape(LAYOUT.page_bytes, 16 * LAYOUT.layers)
        yield made


def test_a_read_does_not_wait_for_writes(memory: BlockMemory, tmp_path: Path) -> None:
    begun, go_on, events = threading.Event(), threading.Event(), Events()

    def slow(path: Path, parts: Parts) -> None:
        begun.set()
        assert go_on.wait(WAIT_S)
        write_file(path, parts)

    with closing(DiskFolder(tmp_path, CAP_BYTES, write=slow)) as folder:
        thread = DiskThread(folder, memory, events.put)
        thread.post(ScanDisk(LAYOUT, 10))
        thread.post(WriteDisk(block(1), (0, 1)))
        assert begun.wait(WAIT_S)
        thread.post(WriteDisk(block(2), (0, 1)))
        thread.post(ReadDisk(block(1), (8, 9)))
        go_on.set()
        thread.stop(WAIT_S)
    expected = [DiskScanned([]), DiskWritten(name(1), ""), DiskRead(name(1), True), DiskWritten(name(2), "")]
    assert [events.get(timeout=WAIT_S) for _ in expected] == expected


def test_bytes_go_to_disk_and_come_back(memory: BlockMemory, tmp_path: Path) -> None:
    events, content = Events(), os.urandom(BLOCK_BYTES)
    memory.write((0, 1), content)
    with closing(DiskFolder(tmp_path, CAP_BYTES)) as folder:
        thread = DiskThread(folder, memory, events.put)
        jobs: list[tuple[DiskJob, Event | None]] = [
            (ScanDisk(LAYOUT, 10), DiskScanned([])),
            (WriteDisk(block(1), (0, 1)), DiskWritten(name(1), "")),
            (ReadDisk(block(1), (5, 4)), DiskRead(name(1), True)),
            (DeleteDisk(name(1)), None),
            (WriteDisk(block(2), (0, 1)), DiskWritten(name(2), "")),
            (ReadDisk(block(1), (8, 9)), DiskRead(name(1), False)),
        ]
        for job, event in jobs:
            thread.post(job)
            if event is not None:
                assert events.get(timeout=WAIT_S) == event
        thread.stop(WAIT_S)
    assert bytes(memory.read((5, 4))) == content


def test_a_page_that_went_wrong_before_its_write_is_told_and_does_not_become_a_file(
    memory: BlockMemory, tmp_path: Path
) -> None:
    events, checks = Events(), PageChecks(memory)
    checks.shape(LAYOUT, 16 * LAYOUT.layers)
    for pages in ((0, 1), (2, 3)):
        checks.make(pages)
    memory.parts((1,))[0][0] ^= 1
    with closing(DiskFolder(tmp_path, CAP_BYTES)) as folder:
        thread = DiskThread(folder, memory, events.put, checks)
        for job in (ScanDisk(LAYOUT, 10), WriteDisk(block(1), (0, 1)), WriteDisk(block(2), (2, 3))):
            thread.post(job)
        thread.stop(WAIT_S)
    assert events.get(timeout=WAIT_S) == DiskScanned([])
    refused = events.get(timeout=WAIT_S)
    assert isinstance(refused, DiskWritten) and refused.corrupt and refused.error_text
    assert events.get(timeout=WAIT_S) == DiskWritten(name(2), "")


def test_stop_does_not_wait_for_a_long_queue(memory: BlockMemory, tmp_path: Path) -> None:
    begun, go_on, events = threading.Event(), threading.Event(), Events()

    def slow(path: Path, parts: Parts) -> None:
        begun.set()
        assert go_on.wait(WAIT_S)
        write_file(path, parts)

    with closing(DiskFolder(tmp_path, CAP_BYTES, write=slow)) as folder:
        thread = DiskThread(folder, memory, events.put)
        thread.post(ScanDisk(LAYOUT, 10))
        for number in (1, 2, 3):
            thread.post(WriteDisk(block(number), (0, 1)))
        assert begun.wait(WAIT_S)
        stopper = threading.Thread(target=thread.stop, args=(0.0,))
        stopper.start()
        while not thread._stopping:  # it has given up waiting for the queue
            os.sched_yield()
        go_on.set()
        stopper.join(WAIT_S)
    assert [events.get(timeout=WAIT_S) for _ in range(2)] == [DiskScanned([]), DiskWritten(name(1), "")]
    assert events.empty()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_our_own_bug_is_told(memory: BlockMemory, tmp_path: Path) -> None:
    events = Events()
    with closing(DiskFolder(tmp_path, CAP_BYTES)) as folder:
        thread = DiskThread(folder, memory, events.put)
        thread.post(WriteDisk(block(1), (0, 1)))  # before any scan
        died = events.get(timeout=WAIT_S)
        assert isinstance(died, DiskDied)
        assert isinstance(died.error, AssertionError)
        thread.stop()


@contextmanager
def store_with_disk(folder: DiskFolder) -> Iterator[KvStoreClient]:
    store, stopping = PeerId("kvstore-0@1"), threading.Event()
    with ExitStack() as stack:
        memory = stack.enter_context(closing(BlockMemory(MIN_BYTES, Available(1 << 60, "nothing"))))
        exchange = stack.enter_context(closing(Exchange(store, "tcp://127.0.0.1:0")))
        inbox = Inbox(exchange.wake)
        disk = DiskThread(folder, memory, inbox.put)
        stack.callback(disk.stop)
        core = KvStoreCore(member(), Budget(16 * BLOCK_BYTES, CAP_BYTES), LAYOUT)
        ports = Ports(exchange, inbox, memory, lambda events: None, MonotonicClock(), disk)
        service = KvStoreService(core, ports, Log())
        thread = threading.Thread(target=service.serve, args=(stopping.is_set, lambda: False))
        thread.start()
        stack.callback(thread.join)
        stack.callback(exchange.wake)
        stack.callback(stopping.set)
        mine = stack.enter_context(closing(Exchange(PeerId("prefill-0@1"), None)))
        client = KvStoreClient(mine, store, MonotonicClock(), 30_000)
        client.connect(member("prefill", identity()), exchange.endpoint)
        yield client


def test_a_full_disk_costs_no_request_and_one_log_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    full = threading.Event()
    full.set()

    def write(path: Path, parts: Parts) -> None:
        write_file(path, parts[:1] if full.is_set() else parts)
        if full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with closing(DiskFolder(tmp_path, CAP_BYTES, write=write)) as folder, store_with_disk(folder) as client:
        put = [(one, os.urandom(BLOCK_BYTES)) for one in chain(1, 2, 3, 4, 5, 6)]
        for one in put:
            assert client.put([one]) == 1
        while client.report().gauges["pinned_blocks"]:
            assert client.report().gauges["blocks{tier=disk}"] == 0
        found = client.fetch([one.name for one, _ in put])
        assert [bytes(frame) for frame in found] == [content for _, content in put]
        full.clear()
        assert client.put([(block(50), put[0][1])]) == 1
        assert client.report().gauges["waiting_disk_writes"] == 0  # still paused
    assert capfd.readouterr().err.count("disk_writing_paused") == 1
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".kv", ".tmp")]
