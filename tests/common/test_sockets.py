"""The mailbox of a process: two of them talk, strangers are refused, rubbish is counted, nothing is left behind."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
import zmq

from common.errors import ConfigError
from common.ids import PeerId
from common.messages.liveness import Ping
from common.messages.requests import Cancel
from common.net.sockets import Exchange, Received

SERVER, CLIENT = PeerId("server@1"), PeerId("client@2")
_LIMIT_S = 10.0


@pytest.fixture
def server() -> Iterator[Exchange]:
    exchange = Exchange(SERVER, "tcp://127.0.0.1:0")
    yield exchange
    exchange.close()


@pytest.fixture
def client(server: Exchange) -> Iterator[Exchange]:
    exchange = Exchange(CLIENT, None)
    exchange.dial(SERVER, server.endpoint)
    yield exchange
    exchange.close()


def first(exchange: Exchange, wanted: Callable[[], bool] | None = None) -> list[Received]:
    """What arrives first, or [] once `wanted` holds."""
    deadline_s = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline_s:
        received = exchange.receive(50)
        if received or (wanted is not None and wanted()):
            return received
    raise AssertionError("nothing arrived")


def test_the_listening_side_answers_on_the_connection_that_was_dialled(server: Exchange, client: Exchange) -> None:
    assert client.send(SERVER, Ping(sequence=1), [b"payload", b""])
    assert first(server) == [(CLIENT, Ping(sequence=1), [b"payload", b""])]
    assert server.send(CLIENT, Ping(sequence=2))
    assert first(client) == [(SERVER, Ping(sequence=2), [])]


def test_messages_of_one_peer_keep_their_order(server: Exchange, client: Exchange) -> None:
    for number in range(1000):
        assert client.send(SERVER, Ping(sequence=number))
    received: list[Received] = []
    while len(received) < 1000:
        received += first(server)
    assert [message for _, message, _ in received] == [Ping(sequence=number) for number in range(1000)]


def test_sending_to_a_stranger_says_so(server: Exchange, client: Exchange) -> None:
    assert not server.send(PeerId("nobody@3"), Ping(sequence=1))
    assert not client.send(PeerId("nobody@3"), Ping(sequence=1))


def test_a_full_queue_says_so_and_drops_nothing_in_silence() -> None:
    lonely = Exchange(CLIENT, None, queue_limit=5)
    lonely.dial(SERVER, "tcp://127.0.0.1:1")
    sent = [lonely.send(SERVER, Ping(sequence=number)) for number in range(20)]
    lonely.close()
    assert sent[0] and not sent[-1]


def test_what_could_not_be_sent_never_comes_and_what_could_does() -> None:
    """Whoever says a Grant takes its pages back after False."""
    with closing(Exchange(SERVER, "tcp://127.0.0.1:0", queue_limit=2)) as server:
        with closing(Exchange(CLIENT, None, queue_limit=2)) as slow:
            slow.dial(SERVER, server.endpoint)
            slow.send(SERVER, Ping(sequence=0))
            first(server)
            sent = [number for number in range(64) if server.send(CLIENT, Ping(sequence=number), [bytes(2**20)])]
            heard: list[Received] = []
            while not heard or heard[-1][1] != Ping(sequence=sent[-1]):
                heard += first(slow)
    assert [message for _, message, _ in heard] == [Ping(sequence=number) for number in sent]
    assert len(sent) < 64, "nothing was refused"


def test_what_who_dialled_could_not_send_never_comes_and_what_it_could_does() -> None:
    with closing(Exchange(SERVER, "tcp://127.0.0.1:0", queue_limit=2)) as slow:
        with closing(Exchange(CLIENT, None, queue_limit=2)) as client:
            client.dial(SERVER, slow.endpoint)
            sent = [number for number in range(64) if client.send(SERVER, Ping(sequence=number), [bytes(2**20)])]
            heard: list[Received] = []
            while not heard or heard[-1][1] != Ping(sequence=sent[-1]):
                heard += first(slow)
    assert [message for _, message, _ in heard] == [Ping(sequence=number) for number in sent]
    assert len(sent) < 64, "nothing was refused"


def test_rubbish_is_counted_and_the_rest_goes_on(server: Exchange, client: Exchange) -> None:
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.setsockopt(zmq.IDENTITY, b"stranger@4")
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.connect(server.endpoint)
    stranger.send_multipart([b"\xc1 no message"])
    stranger.send_multipart([b""])
    assert first(server, lambda: server.bad_frames == 2) == []
    assert client.send(SERVER, Cancel(request="r"))  # type: ignore[arg-type]
    assert [message for _, message, _ in first(server)] == [Cancel(request="r")]  # type: ignore[arg-type]
    context.destroy()


def test_wake_ends_a_wait_from_another_thread(server: Exchange) -> None:
    waker = threading.Thread(target=server.wake)
    began_s = time.monotonic()
    waker.start()
    assert server.receive(_LIMIT_S * 1e3) == []
    assert time.monotonic() - began_s < _LIMIT_S
    waker.join()


def test_a_wake_before_the_wait_is_not_lost(server: Exchange) -> None:
    server.wake()
    began_s = time.monotonic()
    server.receive(_LIMIT_S * 1e3)
    assert time.monotonic() - began_s < _LIMIT_S


def test_a_wake_after_the_end_does_nothing() -> None:
    """Threads that dial for a worker may outlive its exchange."""
    with closing(Exchange(SERVER, None)) as gone:
        pass
    gone.wake()


def test_a_peer_that_hung_up_is_a_stranger_again(server: Exchange, client: Exchange) -> None:
    client.hang_up(SERVER)
    client.hang_up(SERVER)
    assert not client.send(SERVER, Ping(sequence=1))


def test_what_is_left_of_a_connection_that_was_replaced_is_not_heard(server: Exchange, client: Exchange) -> None:
    """A process that was stopped finds the messages of both."""
    client.send(SERVER, Ping(sequence=1))
    assert len(first(server)) == 1  # connected
    for number in (2, 3):
        client.send(SERVER, Ping(sequence=number))
    assert server._router is not None and server._router.poll(_LIMIT_S * 1e3), "they have arrived"
    client.hang_up(SERVER)
    client.dial(SERVER, server.endpoint)
    client.send(SERVER, Ping(sequence=4))
    heard: list[Received] = []
    while not any(message == Ping(sequence=4) for _, message, _ in heard):
        heard += server.receive(50)
    heard += server.receive(0)
    assert {peer for peer, _, _ in heard} == {CLIENT}


def test_a_second_dial_changes_nothing(server: Exchange, client: Exchange) -> None:
    client.dial(SERVER, server.endpoint)
    client.send(SERVER, Ping(sequence=1))
    assert len(first(server)) == 1


def test_an_address_that_is_taken_is_named(server: Exchange) -> None:
    with pytest.raises(ConfigError, match=server.endpoint.replace(".", r"\.")):
        Exchange(CLIENT, server.endpoint)


def test_close_leaves_no_descriptor_and_no_thread() -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    Exchange(CLIENT, "tcp://127.0.0.1:0").close()  # whatever the library keeps for ever is kept now
    files, threads = open_files(), threading.active_count()
    for _ in range(3):
        exchange = Exchange(CLIENT, "tcp://127.0.0.1:0")
        exchange.dial(SERVER, "tcp://127.0.0.1:1")
        exchange.send(SERVER, Ping(sequence=1))
        exchange.close()
    assert open_files() <= files
    assert threading.active_count() <= threads
