"""With a cluster key only its holders are heard, and both sides say why the others are not."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.ids import PeerId
from common.log import Log
from common.messages import encode
from common.messages.liveness import Ping
from common.net import cluster_key
from common.net.cluster_key import ClusterKey, make_cluster_key, read_cluster_key
from common.net.sockets import Exchange
from services.launcher.key import main as key_command

SERVER, CLIENT = PeerId("server@1"), PeerId("client@2")
_LIMIT_S = 10.0


def made(folder: Path, name: str = "key") -> ClusterKey:
    make_cluster_key(str(folder / name))
    key = read_cluster_key(str(folder / name))
    assert key is not None
    return key


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as found:
        yield found


def two(stack: ExitStack, server_key: ClusterKey | None, client_key: ClusterKey | None) -> tuple[Exchange, Exchange]:
    server = stack.enter_context(closing(Exchange(SERVER, "tcp://127.0.0.1:0", key=server_key, log=Log(side="server"))))
    client = stack.enter_context(closing(Exchange(CLIENT, None, key=client_key, log=Log(side="client"))))
    client.dial(SERVER, server.endpoint)
    return server, client


def run(server: Exchange, client: Exchange, until: Callable[[], bool]) -> list[object]:
    """Messages that the server hears until then."""
    heard: list[object] = []
    deadline_s = time.monotonic() + _LIMIT_S
    while not until() and not heard:
        assert time.monotonic() < deadline_s, "neither heard nor told"
        client.receive(5)
        heard += [message for _, message, _ in server.receive(5)]
    return heard


def test_holders_of_the_key_talk_in_both_directions(stack: ExitStack, tmp_path: Path) -> None:
    key = made(tmp_path)
    server, client = two(stack, key, key)
    assert client.send(SERVER, Ping(sequence=1), [b"KV"])
    assert run(server, client, lambda: False) == [Ping(sequence=1)]
    assert server.send(CLIENT, Ping(sequence=2))
    assert run(client, server, lambda: False) == [Ping(sequence=2)]


@pytest.mark.parametrize(
    ("server_has", "client_has"), [("key", None), (None, "key"), ("key", "other")], ids=["server", "client", "another"]
)
def test_who_has_no_or_another_key_is_not_heard_and_both_logs_say_why(
    stack: ExitStack,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    server_has: str | None,
    client_has: str | None,
) -> None:
    keys = {"key": made(tmp_path, "key"), "other": made(tmp_path, "other"), None: None}
    server, client = two(stack, keys[server_has], keys[client_has])
    assert client.send(SERVER, Ping(sequence=1))
    heard = run(server, client, lambda: server.refused_connections > 0 and client.refused_connections > 0)
    assert heard == []
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {line["side"] for line in lines} == {"server", "client"}
    for line in lines:
        assert line["event"] == "connection_refused"
        assert "--cluster-key" in line["text"] or "logs why" in line["text"]
    assert any("--cluster-key must name the same secret" in line["text"] for line in lines)
    assert server.counters()["refused_connections_total"] >= 1


@pytest.mark.parametrize("has_key", [True, False], ids=["with a key", "without"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_a_protocol_older_than_curve_is_no_way_around_the_key(
    stack: ExitStack, tmp_path: Path, version: str, has_key: bool
) -> None:
    """ZMTP before 3.0 has no security, and libzmq still speaks it."""
    server = stack.enter_context(
        closing(Exchange(SERVER, "tcp://127.0.0.1:0", key=made(tmp_path) if has_key else None))
    )
    ping, name = encode(Ping(sequence=1)), CLIENT.encode()
    if version == "1.0":  # frames: length with flags, flags, body; the first one is the name
        said = bytes([len(name) + 1, 0]) + name + bytes([len(ping) + 1, 0]) + ping
    else:  # signature, revision 1, socket type DEALER; frames: flags, length, body
        said = b"\xff" + bytes(8) + b"\x7f\x01\x05" + bytes([0, len(name)]) + name + bytes([0, len(ping)]) + ping
    old = stack.enter_context(socket.create_connection(("127.0.0.1", int(server.endpoint.rsplit(":", 1)[1]))))
    old.sendall(said)
    heard: list[object] = []
    deadline_s = time.monotonic() + _LIMIT_S
    while not heard and not _hung_up(old):
        assert time.monotonic() < deadline_s, "neither heard nor hung up on"
        heard += [(peer, message) for peer, message, _ in server.receive(5)]
    assert heard == ([] if has_key else [(CLIENT, Ping(sequence=1))])


def _hung_up(connection: socket.socket) -> bool:
    """What the other side says is thrown away."""
    try:
        return connection.recv(4096, socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_what_travels_is_not_readable(stack: ExitStack, tmp_path: Path) -> None:
    """A wire tapped between the two shows nothing of a message that it would show without a key."""
    import threading

    for key in (None, made(tmp_path)):
        server = stack.enter_context(closing(Exchange(SERVER, "tcp://127.0.0.1:0", key=key)))
        seen = bytearray()
        tap = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = int(server.endpoint.rsplit(":", 1)[1])

        def relay(tap: socket.socket = tap, port: int = port, seen: bytearray = seen) -> None:
            near = tap.accept()[0]
            far = socket.create_connection(("127.0.0.1", port))
            threading.Thread(target=_copy, args=(far, near, bytearray()), daemon=True).start()
            _copy(near, far, seen)

        threading.Thread(target=relay, daemon=True).start()
        client = stack.enter_context(closing(Exchange(CLIENT, None, key=key)))
        client.dial(SERVER, f"tcp://127.0.0.1:{tap.getsockname()[1]}")
        client.send(SERVER, Ping(sequence=1), [b"the words of a user"])
        run(server, client, lambda: False)
        assert (b"the words of a user" in seen) == (key is None)


def _copy(source: object, target: object, seen: bytearray) -> None:
    import contextlib

    with contextlib.suppress(OSError):
        while piece := source.recv(65536):  # type: ignore[attr-defined]
            seen += piece
            target.sendall(piece)  # type: ignore[attr-defined]


def test_the_command_makes_a_key_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    before = os.umask(0)
    try:
        assert key_command([str(path)]) == 0
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_cluster_key(str(path)) is not None
    with pytest.raises(ConfigError, match="is there already"):
        key_command([str(path)])


def test_one_secret_is_one_key_and_another_is_another(tmp_path: Path) -> None:
    first, other = made(tmp_path, "a"), made(tmp_path, "b")
    (tmp_path / "copy").write_bytes((tmp_path / "a").read_bytes().rstrip() + b"\r\n")
    (tmp_path / "copy").chmod(0o600)
    assert read_cluster_key(str(tmp_path / "copy")) == first != other
    assert first.secret.decode() not in repr(first)


@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [
        (b"0123456789abcdef" * 2, 0o640, "0640"),
        (b"0123456789abcdef" * 2, 0o604, "0604"),
        (b"0123456789abcdef"[:-1] * 2, 0o600, "has 30"),
        (b"", 0o600, "has 0"),
        (b"\0" * 64, 0o600, "not random"),
        (os.urandom(5000), 0o600, "more"),
    ],
)
def test_a_key_that_is_none_is_refused_and_says_what_would_be_right(
    tmp_path: Path, content: bytes, mode: int, says: str
) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=says) as refused:
        read_cluster_key(str(path))
    assert str(path) in str(refused.value)


def test_a_key_among_a_containers_secrets_may_be_read_by_others_and_written_by_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secrets").mkdir()
    monkeypatch.setattr(cluster_key, "_CONTAINER_SECRETS", f"{tmp_path}/secrets/")
    made(tmp_path / "secrets")
    (tmp_path / "outside").write_bytes((tmp_path / "secrets/key").read_bytes())
    (tmp_path / "outside").chmod(0o444)
    (tmp_path / "secrets/link").symlink_to(tmp_path / "outside")
    for mode, name, right in (
        (0o444, "key", True),
        (0o464, "key", False),
        (0o446, "key", False),
        (0o444, "link", False),
    ):
        (tmp_path / "secrets/key").chmod(mode)
        if right:
            assert read_cluster_key(str(tmp_path / "secrets" / name)) is not None
            continue
        with pytest.raises(ConfigError, match="others may"):
            read_cluster_key(str(tmp_path / "secrets" / name))


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="--cluster-key"):
            read_cluster_key(str(path))


def test_who_is_refused_comes_again_no_sooner_than_after_half_a_second(stack: ExitStack, tmp_path: Path) -> None:
    server, client = two(stack, made(tmp_path, "one"), made(tmp_path, "other"))
    run(server, client, lambda: refusals(client) > 0)
    began_s, before = time.monotonic(), refusals(client)
    run(server, client, lambda: time.monotonic() - began_s > 1.3)
    assert refusals(client) - before <= 1 + (time.monotonic() - began_s) / 0.5


def refusals(exchange: Exchange) -> float:
    return exchange.counters()["refused_connections_total"]
