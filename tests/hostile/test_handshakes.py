"""Connections that come to nothing: told with the reason that they had, and never in the way of others."""

import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import zmq

from common.ids import PeerId
from common.log import Log
from common.messages import encode
from common.messages.liveness import Ping
from common.net import handshakes
from common.net.cluster_key import ClusterKey, make_cluster_key, read_cluster_key
from common.net.sockets import Exchange

SERVER, CLIENT = PeerId("server@1"), PeerId("client@2")
_LIMIT_S = 20.0
_MORE_THAN_ZEROMQ_QUEUES = 2_200
_RESET = struct.pack("ii", 1, 0)


@pytest.fixture
def server() -> Iterator[Exchange]:
    with closing(Exchange(SERVER, "tcp://127.0.0.1:0", log=Log(side="server"))) as made:
        yield made


def probe(server: Exchange, said: bytes = b"") -> None:
    """A connection that is cut after these bytes."""
    with socket.create_connection(("127.0.0.1", int(server.endpoint.rsplit(":", 1)[1])), timeout=5.0) as made:
        made.sendall(said)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def until(server: Exchange, done: Callable[[], bool]) -> list[object]:
    heard: list[object] = []
    deadline_s = time.monotonic() + _LIMIT_S
    while not done() and not heard:
        assert time.monotonic() < deadline_s, "neither heard nor refused"
        heard += [message for _, message, _ in server.receive(5)]
    return heard


@pytest.mark.system
def test_aborted_connections_that_nobody_looked_at_stop_neither_new_ones_nor_the_end(server: Exchange) -> None:
    """libzmq's thread waits for room in a monitor's queue: a full one stops all sockets of the process."""
    for _ in range(_MORE_THAN_ZEROMQ_QUEUES):
        probe(server)
    with closing(Exchange(CLIENT, None)) as client:
        client.dial(SERVER, server.endpoint)
        assert client.send(SERVER, Ping(sequence=1))
        assert until(server, lambda: False) == [Ping(sequence=1)]
    began_s = time.monotonic()
    server.close()
    assert time.monotonic() - began_s < _LIMIT_S


def test_a_flood_is_told_over_many_turns_and_wholly(server: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshakes, "_MOST_PER_LOOK", 3)
    for _ in range(10):
        probe(server)
    seen = {server.refused_connections}
    until(server, lambda: seen.add(server.refused_connections) or server.refused_connections == 10)
    assert max(later - earlier for earlier, later in zip(sorted(seen), sorted(seen)[1:], strict=False)) <= 3


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n"], ids=["probe", "http"])
def test_what_is_no_zeromq_is_not_blamed_on_the_key(
    said: bytes, server: Exchange, capsys: pytest.CaptureFixture[str]
) -> None:
    probe(server, said)
    assert until(server, lambda: server.refused_connections == 1) == []
    (line,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert line["event"] == "connection_refused" and "as a probe does" in line["text"]
    assert "key" not in line["text"]


@pytest.mark.parametrize("own_pair", [True, False], ids=["own pair", "cluster's pair"])
def test_who_knows_the_servers_public_key_needs_its_secret_as_well(keyed: ClusterKey, own_pair: bool) -> None:
    """The public half is no secret of CURVE: ZAP must tell who has the other one."""
    heard = heard_of(keyed, zmq.curve_keypair() if own_pair else (keyed.public, keyed.secret))
    assert heard == ([] if own_pair else [Ping(sequence=9)])


def test_nobody_is_let_in_when_there_is_nobody_to_ask(keyed: ClusterKey, monkeypatch: pytest.MonkeyPatch) -> None:
    """libzmq by itself would let in whoever knows the public half, if ZAP's address is not there."""
    monkeypatch.setattr(handshakes, "_ZAP", "inproc://elsewhere")
    assert heard_of(keyed, zmq.curve_keypair()) == []


@pytest.fixture
def keyed(tmp_path: Path) -> ClusterKey:
    make_cluster_key(str(tmp_path / "key"))
    key = read_cluster_key(str(tmp_path / "key"))
    assert key is not None
    return key


def heard_of(key: ClusterKey, pair: tuple[bytes, bytes]) -> list[object]:
    """What a server with this key hears of who knows its public half and has this pair (public, secret)."""
    with closing(Exchange(SERVER, "tcp://127.0.0.1:0", key=key)) as server, zmq.Context() as context:
        with context.socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.setsockopt(zmq.IDENTITY, CLIENT.encode())
            dealer.setsockopt(zmq.CURVE_SERVERKEY, key.public)
            dealer.setsockopt(zmq.CURVE_PUBLICKEY, pair[0])
            dealer.setsockopt(zmq.CURVE_SECRETKEY, pair[1])
            dealer.connect(server.endpoint)
            dealer.send(encode(Ping(sequence=9)))
            return until(server, lambda: server.refused_connections > 0)
