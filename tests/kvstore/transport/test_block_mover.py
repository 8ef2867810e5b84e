"""Every job ends exactly once, blocks arrive whole or are said not to have, and loads go before stores."""

import queue
import threading
import zlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.errors import PeerFailed
from common.ids import PeerId
from common.kv_layout import KvLayout
from kvstore.index.ledger import PageIds
from kvstore.memory.page_memory import PageMemory, open_page_memory
from kvstore.transport import block_mover
from kvstore.transport.block_jobs import BlockEvent, BlockJobDone, FetchJob, LayerFetched, StoreJob
from kvstore.transport.block_mover import BlockMover
from kvstore.transport.descriptions import PoolDescription
from kvstore.transport.layer_events import NoLayerEvents
from kvstore.transport.load_gate import LoadGate
from kvstore.transport.own_pages import AcceleratorPages, HostPages
from kvstore.transport.page_mover import PageMover
from kvstore.transport.shared_pages import SharedPages

MIB, WAIT_S = 2**20, 30
LAYOUT = KvLayout(layers=3, kv_heads=8, head_dim=128, dtype="bfloat16")  # pages so long that no two layers go together
PAGE_BYTES = LAYOUT.page_bytes
STORE, NOBODY = PeerId("kvstore@1"), PeerId("kvstore@2")
NEVER_MS = 1e12


class HandClock:
    """Every reading may be made to wait, and to jump."""

    def __init__(self) -> None:
        self.now, self.jump_ms = 0.0, 0.0
        self.read, self.going = threading.Semaphore(0), threading.Event()
        self.going.set()

    def now_ms(self) -> float:
        self.read.release()
        assert self.going.wait(WAIT_S)
        self.now += self.jump_ms
        return self.now

    def halt(self) -> None:
        """The next reading waits for `going`."""
        self.going.clear()
        while self.read.acquire(blocking=False):
            continue

    def await_reading(self) -> None:
        assert self.read.acquire(timeout=WAIT_S)


class Setting:
    """A mover with its own pages, a peer's pages, and what was told."""

    def __init__(self) -> None:
        self.own, self.peer = open_page_memory(16 * MIB, LAYOUT), open_page_memory(16 * MIB, LAYOUT)
        for side, memory in enumerate((self.own, self.peer)):
            rows = memory.pages.rows
            rows[:] = np.random.default_rng(side).integers(0, 256, rows.shape, np.uint8)
        self.shared = mapped(self.peer)
        self.clock, self.gate = HandClock(), LoadGate(WAIT_S)
        self.told: queue.SimpleQueue[BlockEvent] = queue.SimpleQueue()
        self.mover = BlockMover(HostPages(self.own.pages), self.gate, self.told.put, self.clock)
        self.mover.attach(STORE, self.shared)

    def hear(self, n_events: int) -> list[BlockEvent]:
        return [self.told.get(timeout=WAIT_S) for _ in range(n_events)]

    def close(self) -> None:
        self.clock.going.set()
        self.mover.stop()
        assert self.gate.calls == []
        assert self.told.empty(), "something was told that no test asked for"
        self.shared.close()
        self.own.close()
        self.peer.close()


def mapped(memory: PageMemory) -> SharedPages:
    description = PoolDescription(
        peer=STORE,
        page_bytes=PAGE_BYTES,
        chunk_bytes=memory.pages.chunk_bytes,
        chunk_offsets=memory.pages.chunk_offsets,
        probe_offset_bytes=0,
        probe_bytes=1,
    )
    return SharedPages(description, memory.backend.fd)


@pytest.fixture
def at() -> Iterator[Setting]:
    made = Setting()
    yield made
    made.close()


def blocks(*first_pages: int) -> PageIds:
    return np.array([[first + layer for layer in range(3)] for first in first_pages], np.int32)


OURS, THEIRS = blocks(30, 3, 90), blocks(60, 63, 66)


def fetch(call: int, *, by_layer: bool = True, deadline_ms: float = NEVER_MS, peer: PeerId = STORE) -> FetchJob:
    return FetchJob(call, peer, OURS, THEIRS, deadline_ms, by_layer)


def store(call: int, peer: PeerId = STORE) -> StoreJob:
    return StoreJob(call, peer, OURS, THEIRS)


def end(event: BlockEvent) -> tuple[int, bool]:
    assert isinstance(event, BlockJobDone)
    return event.call, event.ok


def test_a_stored_block_is_in_the_peers_pages_and_nowhere_else(at: Setting) -> None:
    before = at.peer.pages.rows.copy()
    at.mover.post(store(1))
    done = at.hear(1)[0]
    assert isinstance(done, BlockJobDone)
    assert (done.call, done.ok, done.n_bytes, done.n_copies) == (1, True, 9 * PAGE_BYTES, 3)
    before[THEIRS.reshape(-1)] = at.own.pages.rows[OURS.reshape(-1)]
    assert np.array_equal(at.peer.pages.rows, before)


@pytest.mark.parametrize("by_layer", [True, False])
def test_a_fetched_block_is_in_our_pages_and_nowhere_else(at: Setting, by_layer: bool) -> None:
    before = at.own.pages.rows.copy()
    at.mover.post(fetch(7, by_layer=by_layer))
    *layers, done = at.hear(4 if by_layer else 1)
    assert layers == ([LayerFetched(7, layer, True) for layer in range(3)] if by_layer else [])
    assert end(done) == (7, True)
    before[OURS.reshape(-1)] = at.peer.pages.rows[THEIRS.reshape(-1)]
    assert np.array_equal(at.own.pages.rows, before)


@pytest.mark.parametrize("by_layer", [True, False])
def test_pieces_of_one_page_move_the_same(at: Setting, by_layer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_mover, "PIECE_BYTES", PAGE_BYTES)
    mover = BlockMover(HostPages(at.own.pages), at.gate, at.told.put)
    mover.attach(STORE, at.shared)
    mover.post(fetch(1, by_layer=by_layer))
    done = at.hear(4 if by_layer else 1)[-1]
    assert end(done) == (1, True)
    assert np.array_equal(at.own.pages.rows[OURS.reshape(-1)], at.peer.pages.rows[THEIRS.reshape(-1)])
    mover.stop()


def test_the_engine_may_read_a_layer_as_soon_as_it_was_told_and_not_before(at: Setting) -> None:
    at.clock.halt()
    at.mover.post(fetch(1))
    at.clock.await_reading()
    assert at.gate.calls == [1]
    assert at.told.empty()
    at.clock.going.set()
    at.gate.wait([1], 2)
    told = [at.told.get_nowait() for _ in range(3)]
    assert told == [LayerFetched(1, layer, True) for layer in range(3)], "told before the gate opened"
    assert end(at.hear(1)[0]) == (1, True)


def test_a_copy_that_ends_after_the_lease_has_failed_with_the_layers_that_follow(at: Setting) -> None:
    at.clock.jump_ms = 1.0  # two readings per layer: layer 1 ends at 4 ms
    at.mover.post(fetch(1, deadline_ms=3.5))
    events = at.hear(3)
    assert events[:2] == [LayerFetched(1, 0, True), LayerFetched(1, 1, False)]
    assert end(events[2]) == (1, False)
    assert isinstance(events[2], BlockJobDone)
    assert "0.5 ms after its lease" in events[2].error_text
    at.gate.wait([1], 2)


def test_a_copy_that_ends_with_the_lease_is_good(at: Setting) -> None:
    at.clock.jump_ms = 1.0
    at.mover.post(fetch(1, deadline_ms=2.0, by_layer=False))
    assert end(at.hear(1)[0]) == (1, True)


def test_nothing_is_copied_once_the_lease_is_over(at: Setting) -> None:
    before = at.own.pages.rows.copy()
    at.clock.now = 10.0
    at.mover.post(fetch(1, deadline_ms=9.0))
    failed, done = at.hear(2)
    assert failed == LayerFetched(1, 0, False)
    assert end(done) == (1, False)
    assert np.array_equal(at.own.pages.rows, before)


def test_a_fetch_goes_before_waiting_stores_and_between_the_pieces_of_a_running_one(
    at: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_mover, "PIECE_BYTES", PAGE_BYTES)  # a store has a piece per block
    mover = BlockMover(HostPages(at.own.pages), at.gate, at.told.put, at.clock)
    mover.attach(STORE, at.shared)
    at.clock.halt()
    mover.post(store(1))
    mover.post(store(2))
    at.clock.await_reading()
    mover.post(fetch(3, by_layer=False))
    mover.post(fetch(4, by_layer=False))
    at.clock.going.set()
    assert [end(event) for event in at.hear(4)] == [(3, True), (4, True), (1, True), (2, True)]
    mover.stop()


def test_jobs_of_a_detached_peer_fail_and_those_of_others_do_not(at: Setting) -> None:
    other = PeerId("decode@1")
    at.mover.attach(other, at.shared)
    at.clock.halt()
    at.mover.post(store(1, other))
    at.clock.await_reading()
    for call in (2, 3):
        at.mover.post(store(call))
    at.mover.post(store(4, other))
    at.mover.detach(STORE)
    at.clock.going.set()
    assert [end(event) for event in at.hear(4)] == [(1, True), (2, False), (3, False), (4, True)]


def test_a_job_never_uses_a_mapping_that_was_attached_after_it_was_posted(at: Setting) -> None:
    at.clock.halt()
    at.mover.post(store(1))
    at.clock.await_reading()
    at.mover.post(fetch(2, by_layer=False))
    at.mover.attach(STORE, at.shared)
    at.mover.post(fetch(3, by_layer=False))
    at.clock.going.set()
    assert {end(event) for event in at.hear(3)} == {(1, True), (2, False), (3, True)}


def test_a_peer_whose_memory_is_unmapped_or_who_was_never_there_fails_its_jobs(at: Setting) -> None:
    at.shared.close()
    at.mover.post(fetch(1))
    at.mover.post(store(2))
    at.mover.post(store(3, NOBODY))
    events = at.hear(4)
    assert events[0] == LayerFetched(1, 0, False)
    assert [end(event) for event in events[1:]] == [(1, False), (2, False), (3, False)]


def test_pages_that_the_peer_does_not_have_fail_the_job(at: Setting) -> None:
    at.mover.post(StoreJob(1, STORE, OURS, blocks(60, 63, 10**6)))
    done = at.hear(1)[0]
    assert isinstance(done, BlockJobDone)
    assert not done.ok
    assert "were asked for" in done.error_text


def test_a_job_of_no_blocks_is_done(at: Setting) -> None:
    none = np.empty((0, 3), np.int32)
    at.mover.post(FetchJob(1, STORE, none, none, NEVER_MS, by_layer=True))
    assert at.hear(1) == [BlockJobDone(1, True, 0, 0, 0.0, "")]


def test_stopping_ends_every_job_and_lets_every_waiter_through(at: Setting) -> None:
    at.clock.halt()
    at.mover.post(store(1))
    at.clock.await_reading()
    at.mover.post(store(2))
    at.mover.post(fetch(3))
    stopper = threading.Thread(target=at.mover.stop)
    stopper.start()
    with at.mover._changed:  # until the stop was heard, the copy in progress must not end
        assert at.mover._changed.wait_for(lambda: not at.mover._running, WAIT_S)
    at.clock.going.set()
    at.gate.wait([3], 2)
    stopper.join(WAIT_S)
    at.mover.post(fetch(4, by_layer=False))
    events = at.hear(5)
    assert LayerFetched(3, 0, False) in events
    assert {end(event) for event in events if isinstance(event, BlockJobDone)} == {
        *((1, False), (2, False), (3, False), (4, False)),
    }


def test_a_bug_ends_the_mover_loudly_and_leaves_nobody_waiting(at: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    loud: queue.SimpleQueue[str] = queue.SimpleQueue()
    monkeypatch.setattr(threading, "excepthook", lambda args: loud.put(str(args.exc_value)))
    monkeypatch.setattr(SharedPages, "read_into", lambda *_: 1 // 0)
    at.mover.post(fetch(1))
    assert loud.get(timeout=WAIT_S) == "integer division or modulo by zero"
    at.gate.wait([1], 2)
    failed, done = at.hear(2)
    assert failed == LayerFetched(1, 0, False)
    assert end(done) == (1, False)


def test_our_own_mistakes_are_errors(at: Setting) -> None:
    with pytest.raises(ValueError, match="peer's pages"):
        at.mover.post(StoreJob(1, STORE, OURS, THEIRS[:2]))
    at.clock.halt()
    at.mover.post(fetch(1, by_layer=False))
    with pytest.raises(ValueError, match="load 1 has not ended"):
        at.mover.post(fetch(1, by_layer=False))
    at.clock.going.set()
    assert end(at.hear(1)[0]) == (1, True)


def test_a_peer_with_other_pages_is_not_attached(at: Setting) -> None:
    other = open_page_memory(4 * MIB, KvLayout(layers=3, kv_heads=4, head_dim=64, dtype="bfloat16"))
    description = PoolDescription(
        peer=STORE,
        page_bytes=2 * PAGE_BYTES,
        chunk_bytes=other.pages.chunk_bytes,
        chunk_offsets=other.pages.chunk_offsets,
        probe_offset_bytes=0,
        probe_bytes=1,
    )
    pages = SharedPages(description, other.backend.fd)
    with pytest.raises(PeerFailed, match="has pages of 131072 bytes, not 65536"):
        at.mover.attach(STORE, pages)
    pages.close()
    other.close()


def test_a_devices_pages_come_and_go_by_way_of_host_memory(at: Setting) -> None:
    memory = open_page_memory(16 * MIB, LAYOUT)
    own = AcceleratorPages(memory.pages, NoLayerEvents())
    mover = BlockMover(own, at.gate, at.told.put)
    mover.attach(STORE, at.shared)
    mover.post(fetch(1))
    assert end(at.hear(4)[-1]) == (1, True)
    wanted = at.peer.pages.rows[THEIRS.reshape(-1)].copy()
    assert own.read(OURS.reshape(-1).tolist()) == wanted.tobytes()
    elsewhere = THEIRS + 100
    mover.post(StoreJob(2, STORE, OURS, elsewhere))
    assert end(at.hear(1)[0]) == (2, True)
    assert np.array_equal(at.peer.pages.rows[elsewhere.reshape(-1)], wanted)
    mover.stop()
    memory.close()


def test_a_device_without_room_for_the_copy_fails_the_job_alone(at: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def move(self: PageMover, *pages: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    mover = BlockMover(AcceleratorPages(at.own.pages, NoLayerEvents()), at.gate, at.told.put)
    mover.attach(STORE, at.shared)
    with monkeypatch.context() as patched:
        patched.setattr(PageMover, "move", move)
        mover.post(store(1))
        done = at.hear(1)[0]
    assert isinstance(done, BlockJobDone)
    assert "no memory to copy pages" in done.error_text
    mover.post(store(2))
    assert end(at.hear(1)[0]) == (2, True)
    mover.stop()


def expected_of(rows: np.ndarray, pages: PageIds) -> np.ndarray:
    return np.array([[zlib.crc32(rows[page]) for page in row] for row in pages.tolist()], np.int64)


@pytest.fixture
def verifying(at: Setting) -> Iterator[BlockMover]:
    mover = BlockMover(HostPages(at.own.pages), at.gate, at.told.put, verify=True)
    mover.attach(STORE, at.shared)
    yield mover
    mover.stop()


def test_a_mover_that_verifies_tells_the_checksums_of_what_it_stored(at: Setting, verifying: BlockMover) -> None:
    verifying.post(store(1))
    done = at.hear(1)[0]
    assert isinstance(done, BlockJobDone)
    assert list(done.checksums) == expected_of(at.own.pages.rows, OURS).ravel().tolist()


def test_pages_that_came_right_are_counted_and_those_of_which_nothing_is_known_too(
    at: Setting, verifying: BlockMover
) -> None:
    expected = expected_of(at.peer.pages.rows, THEIRS)
    expected[0, 0] = -1
    verifying.post(replace(fetch(1), expected=expected))
    done = at.hear(4)[-1]
    assert isinstance(done, BlockJobDone) and done.ok
    assert (done.checked_pages, done.unchecked_pages, done.wrong_pages) == (8, 1, 0)


def test_a_layer_that_came_wrong_is_never_said_to_be_there(at: Setting, verifying: BlockMover) -> None:
    expected = expected_of(at.peer.pages.rows, THEIRS)
    at.peer.pages.rows[THEIRS[2, 1], 0] ^= 1
    verifying.post(replace(fetch(1), expected=expected))
    first, second, done = at.hear(3)
    assert (first, second) == (LayerFetched(1, 0, True), LayerFetched(1, 1, False))
    assert isinstance(done, BlockJobDone)
    assert (done.ok, done.wrong_pages, str(THEIRS[2, 1]) in done.error_text) == (False, 1, True)


def test_checksums_of_another_shape_are_refused(at: Setting) -> None:
    with pytest.raises(ValueError, match="checksums"):
        at.mover.post(replace(fetch(1), expected=np.zeros((1, 3), np.int64)))
