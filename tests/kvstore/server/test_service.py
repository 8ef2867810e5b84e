"""A store's loop in a thread of the test, asked over tcp and by shared memory."""

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.clock import MonotonicClock
from common.errors import PeerFailed
from common.ids import PeerId
from common.log import Log
from common.messages.blocks import BlockName, Publish
from common.messages.cache_events import CacheEvent
from common.messages.liveness import Drain
from common.net.sockets import Exchange
from kvstore.memory.available import Available
from kvstore.server.block_memory import MIN_BYTES, BlockMemory
from kvstore.server.core import reads as reads_module
from kvstore.server.core.store import Budget, KvStoreCore
from kvstore.server.inbox import Events, GuestGone, GuestJoined
from kvstore.server.service import KvStoreService, Ports
from kvstore.transport.share import Share
from kvstore.transport.shared_pages import SharedPages
from tests.kvstore.server import store_client as client_module
from tests.kvstore.server.builders import BLOCK_BYTES, LAYOUT, chain, identity, member, name
from tests.kvstore.server.store_client import KvStoreClient

STORE, MINE = PeerId("kvstore-0@1"), PeerId("prefill-0@1")


@dataclass
class Running:
    endpoint: str
    path: str
    events: list[CacheEvent]


@pytest.fixture
def running(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    """A store of 16 blocks, or as many as the parameter says; `None`: its layout is not known."""
    capacity_blocks = getattr(request, "param", 16)
    stopping, events = threading.Event(), list[CacheEvent]()
    with ExitStack() as stack:
        memory = stack.enter_context(closing(BlockMemory(MIN_BYTES, Available(1 << 60, "nothing"))))
        exchange = stack.enter_context(closing(Exchange(STORE, "tcp://127.0.0.1:0")))
        inbox = Events(exchange.wake)
        share = Share(
            STORE,
            on_joined=lambda peer: inbox.put(GuestJoined(peer)),
            on_gone=lambda peer: inbox.put(GuestGone(peer)),
        )
        stack.callback(share.close)
        budget = Budget((capacity_blocks or 16) * BLOCK_BYTES)
        core = KvStoreCore(member(), budget, LAYOUT if capacity_blocks else None)
        service = KvStoreService(core, Ports(exchange, inbox, memory, events.extend, MonotonicClock()), Log())
        thread = threading.Thread(target=service.serve, args=(stopping.is_set, lambda: False))
        thread.start()
        stack.callback(thread.join)
        stack.callback(exchange.wake)
        stack.callback(stopping.set)
        yield Running(exchange.endpoint, share.serve(memory, tmp_path), events)


@contextmanager
def client(endpoint: str) -> Iterator[KvStoreClient]:
    with closing(Exchange(MINE, None)) as exchange:
        made = KvStoreClient(exchange, STORE, MonotonicClock(), 30_000)
        made.connect(member("prefill", identity()), endpoint)
        yield made


@contextmanager
def shared(path: str) -> Iterator[SharedPages]:
    share = Share(MINE, on_joined=lambda peer: None, on_gone=lambda peer: None)
    with closing(share):
        yield share.connect(STORE, path)


def blocks(*numbers: int) -> list[tuple[BlockName, bytes]]:
    return [(one, os.urandom(BLOCK_BYTES)) for one in chain(*numbers)]


def names(*numbers: int) -> list[bytes]:
    return [name(number) for number in numbers]


def test_bytes_come_back_as_they_were_put(running: Running) -> None:
    with client(running.endpoint) as store:
        put = blocks(1, 2, 3)
        assert store.put(put) == 3
        found = store.fetch(names(1, 2, 3, 4))
        assert [bytes(frame) for frame in found] == [content for _, content in put]
        assert store.report().pages.cached == 3 * LAYOUT.layers
        assert store.put([]) == 0
        assert store.fetch([]) == []
    assert [event.name for event in running.events] == names(1, 2, 3)


def test_bytes_go_and_come_by_shared_memory(running: Running) -> None:
    with client(running.endpoint) as store, shared(running.path) as pages:
        put = blocks(1, 2, 3)
        assert store.put_shared(pages, put) == 3
        for found in (store.fetch_shared(pages, names(1, 2, 3, 4)), store.fetch(names(1, 2, 3))):
            assert [bytes(frame) for frame in found] == [content for _, content in put]
        assert store.put_shared(pages, put) == 3
        assert store.fetch_shared(pages, names(9)) == []
        report = store.report()
        assert (report.pages.reserved, report.gauges["pinned_blocks"]) == (0, 0)
        assert report.counters["kv_received_bytes_total"] == 0


def test_a_copy_that_fails_takes_its_reservation_back(running: Running) -> None:
    with client(running.endpoint) as store, shared(running.path) as pages:
        with pytest.raises(ValueError):
            store.put_shared(pages, [(chain(1)[0], b"no whole pages")])
        report = store.report()
        assert (report.pages.reserved, report.pages.cached) == (0, 0)


def test_who_hangs_up_its_mapping_loses_what_it_reserved(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with client(running.endpoint) as store:
        with shared(running.path) as pages:
            monkeypatch.setattr(client_module, "Publish", _lost)
            with pytest.raises(PeerFailed, match="lost"):
                store.put_shared(pages, blocks(1))
            assert store.report().pages.reserved == LAYOUT.layers
        report = store.report()
        while report.pages.reserved:  # the news of the end is on its way
            report = store.report()
        assert report.pages.free == report.pages.total
        with pytest.raises(PeerFailed, match="does not map the memory"):
            store.put_shared(pages, blocks(1))


def _lost(call: int, ok: bool) -> Publish:
    raise PeerFailed("lost")


@pytest.mark.parametrize("running", [None], indirect=True)
def test_memory_whose_layout_is_not_known_is_not_shared_and_then_it_is(running: Running) -> None:
    with pytest.raises(PeerFailed, match="waits for the first Hello"), shared(running.path):
        raise AssertionError("there is nothing to map")
    with client(running.endpoint) as store, shared(running.path) as pages:
        put = blocks(1)
        assert store.put_shared(pages, put) == 1
        assert [bytes(frame) for frame in store.fetch(names(1))] == [put[0][1]]


@pytest.mark.parametrize("running", [5], indirect=True)
def test_long_puts_and_fetches_take_several_calls_and_lose_the_end_of_a_chain_first(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_PUT_BATCH_BYTES", 2 * BLOCK_BYTES)
    monkeypatch.setattr(reads_module, "REPLY_LIMIT_BYTES", 2 * BLOCK_BYTES)
    with client(running.endpoint) as store:
        put = blocks(*range(1, 8))
        store.put(put)
        found = store.fetch([one.name for one, _ in put])
        assert [bytes(frame) for frame in found] == [content for _, content in put[:5]]


def test_a_refused_put_is_an_error_that_says_why(running: Running) -> None:
    with client(running.endpoint) as store, pytest.raises(PeerFailed, match="keeps blocks of"):
        store.put([(chain(1)[0], b"short")])


def test_a_refused_hello_is_an_error_that_says_why(running: Running) -> None:
    with closing(Exchange(MINE, None)) as exchange:
        store = KvStoreClient(exchange, STORE, MonotonicClock(), 30_000)
        with pytest.raises(PeerFailed, match="layers: 2 here, 9 there"):
            store.connect(member("prefill", identity(layers=9)), running.endpoint)


def test_a_report_tells_what_is_so_when_it_is_asked_for_not_some_time_before(running: Running) -> None:
    with closing(Exchange(MINE, None)) as exchange:
        store = KvStoreClient(exchange, STORE, MonotonicClock(), 30_000)
        store.connect(member("prefill", identity()), running.endpoint)
        for number in range(1, 4):
            exchange.send(STORE, Drain(on=True))  # no business of a store's
            assert store.report().counters["protocol_violations_total"] == number
