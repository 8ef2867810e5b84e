"""Without any flag nobody beyond this machine is listened to, and nobody beyond this user is handed memory."""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from common.settings import describe
from gateway.settings import GatewaySettings
from kvstore.server.settings import KvStoreSettings
from services.launcher.commands import settings_classes
from services.launcher.settings import UpSettings
from services.worker.settings import WorkerSettings
from tests.support.threads import thread_cluster

_LOOPBACK = ("0100007F", "00000000000000000000000001000000")
_LISTENING = "0A"


def test_every_address_that_is_listened_on_is_loopback_by_default() -> None:
    addresses = {
        (kind.__name__, name): one.default_text
        for kind in settings_classes()
        for name, one in describe(kind).items()
        if name in ("bind", "host")
    }
    expected = {(kind.__name__, "host") for kind in (GatewaySettings, UpSettings)}
    expected |= {(kind.__name__, "bind") for kind in (WorkerSettings, KvStoreSettings)}
    assert expected <= set(addresses)
    for where, text in addresses.items():
        assert text.removeprefix("tcp://").partition(":")[0] == "127.0.0.1", where


def listening() -> set[str]:
    """Local addresses, in hex as the kernel writes them, on which this process listens."""
    mine = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            mine.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue  # closed meanwhile
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        if Path(f"/proc/self/net/{name}").exists()
        for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]
    ]
    return {row[1].partition(":")[0] for row in rows if row[3] == _LISTENING and f"socket:[{row[9]}]" in mine}


@contextmanager
def any_mask() -> Iterator[None]:
    """As if the user let everybody read what it makes."""
    before = os.umask(0)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.system
def test_workers_and_stores_listen_on_loopback_and_their_sockets_lie_in_closed_folders(
    checkpoint: object, tmp_path: Path
) -> None:
    model = checkpoint("qwen2")  # type: ignore[operator]
    with any_mask(), thread_cluster(tmp_path) as one:
        small = {"model": model, "device_memory": "16MiB"}
        members = [
            one.start("kvstore", "kvstore-0", model=model, host_memory="16MiB"),
            one.start("prefill", "prefill-0", **small),
            one.start("decode", "decode-0", **small),
        ]
        for member in members:
            assert member.endpoint.startswith("tcp://127.0.0.1:")
            path = Path(member.share_path or "")
            assert path.is_socket() and path.parent.stat().st_mode & 0o777 == 0o700
        found = listening()
    assert found and found <= set(_LOOPBACK)


def test_what_is_listened_on_is_seen() -> None:
    """The test above could fail."""
    import socket

    with closing(socket.create_server(("0.0.0.0", 0))):
        assert "00000000" in listening()
