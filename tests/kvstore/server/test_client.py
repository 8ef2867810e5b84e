"""The client against a store's loop in a thread of the test."""

import os
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from common.clock import MonotonicClock
from common.errors import PeerFailed
from common.ids import PeerId
from common.log import Log
from common.messages.liveness import Ping, Welcome
from common.net.sockets import Exchange, Received
from kvstore.memory.available import Available
from kvstore.server import client as client_module
from kvstore.server.block_memory import CHUNK_BYTES, BlockMemory
from kvstore.server.client import KvStoreClient
from kvstore.server.core import store as store_module
from kvstore.server.service import KvStoreService
from tests.kvstore.server.builders import BLOCK_BYTES, core, identity, member, name

STORE, MINE = PeerId("kvstore-0@1"), PeerId("prefill-0@1")


@contextmanager
def running_store(capacity_blocks: int = 16) -> Iterator[str]:
    """Yields the endpoint."""
    stopping = threading.Event()
    memory = BlockMemory(CHUNK_BYTES, Available(1 << 60, "nothing"))
    with closing(memory), closing(Exchange(STORE, "tcp://127.0.0.1:0")) as exchange:
        service = KvStoreService(core(capacity_blocks), exchange, memory, Log())
        thread = threading.Thread(target=service.serve, args=(stopping.is_set,))
        thread.start()
        try:
            yield exchange.endpoint
        finally:
            stopping.set()
            exchange.wake()
            thread.join()


@contextmanager
def client(endpoint: str, others: list[Received] | None = None, timeout_ms: float = 30_000) -> Iterator[KvStoreClient]:
    heard: list[Received] = [] if others is None else others
    with closing(Exchange(MINE, None)) as exchange:
        made = KvStoreClient(exchange, STORE, MonotonicClock(), heard.append, timeout_ms)
        made.connect(member("prefill"), endpoint)
        yield made


def blocks(*numbers: int) -> list[tuple[bytes, bytes]]:
    return [(name(number), os.urandom(BLOCK_BYTES)) for number in numbers]


def test_bytes_come_back_as_they_were_put() -> None:
    with running_store() as endpoint, client(endpoint) as store:
        chain = blocks(1, 2, 3)
        assert store.put(chain) == 3
        found = store.fetch([name(number) for number in (1, 2, 3, 4)])
        assert [bytes(frame) for frame in found] == [block for _, block in chain]
        assert store.report().pages.cached == 3
        assert store.forget([name(2)]) == 1
        assert len(store.fetch([name(1), name(2), name(3)])) == 1
        assert store.put([]) == 0
        assert store.fetch([]) == []


def test_long_puts_and_fetches_take_several_calls_and_lose_the_end_of_a_chain_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "_PUT_BATCH_BYTES", 2 * BLOCK_BYTES)
    monkeypatch.setattr(store_module, "REPLY_LIMIT_BYTES", 2 * BLOCK_BYTES)
    with running_store(capacity_blocks=5) as endpoint, client(endpoint) as store:
        chain = blocks(*range(7))
        store.put(chain)
        found = store.fetch([block for block, _ in chain])
        assert [bytes(frame) for frame in found] == [block for _, block in chain[:5]]


def test_a_refused_put_is_an_error_that_says_why() -> None:
    with running_store() as endpoint, client(endpoint) as store, pytest.raises(PeerFailed, match="keeps blocks of"):
        store.put([(name(1), b"short")])


def test_a_refused_hello_is_an_error_that_says_why() -> None:
    with running_store() as endpoint, closing(Exchange(MINE, None)) as exchange:
        store = KvStoreClient(exchange, STORE, MonotonicClock(), lambda received: None, 30_000)
        with pytest.raises(PeerFailed, match="layers: 2 here, 9 there"):
            store.connect(member("prefill", identity(layers=9)), endpoint)


def test_a_store_that_is_silent_is_an_error_and_not_a_wait_for_ever() -> None:
    with closing(Exchange(STORE, "tcp://127.0.0.1:0")) as deaf, closing(Exchange(MINE, None)) as exchange:
        store = KvStoreClient(exchange, STORE, MonotonicClock(), lambda received: None, 50)
        with pytest.raises(PeerFailed, match="did not answer Hello within 50 ms"):
            store.connect(member("prefill"), deaf.endpoint)


def test_a_store_that_was_never_dialled_is_an_error() -> None:
    with closing(Exchange(MINE, None)) as exchange:
        store = KvStoreClient(exchange, STORE, MonotonicClock(), lambda received: None, 50)
        with pytest.raises(PeerFailed, match="not connected"):
            store.fetch([name(1)])


def test_messages_of_others_are_passed_on_while_a_call_waits() -> None:
    others: list[Received] = []
    with running_store() as endpoint, closing(Exchange(MINE, "tcp://127.0.0.1:0")) as exchange:
        store = KvStoreClient(exchange, STORE, MonotonicClock(), others.append, 30_000)
        store.connect(member("prefill"), endpoint)
        with closing(Exchange(PeerId("gateway-0@1"), None)) as gateway:
            gateway.dial(MINE, exchange.endpoint)
            gateway.send(MINE, Ping(sequence=5))
            while not others:
                store.report()
            assert exchange.send(PeerId("gateway-0@1"), Welcome(member=member("prefill")))
    ((peer, message, _),) = others
    assert (peer, message) == (PeerId("gateway-0@1"), Ping(sequence=5))
