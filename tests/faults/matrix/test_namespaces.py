"""What a cut is: the network is gone, what processes of one kernel share is not."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.namespaces import Network, network, why_not

pytestmark = pytest.mark.system

_ECHO = """
import socket, sys
served = socket.create_server((sys.argv[1], 7000))
print("listening", flush=True)
while True:
    connection, _ = served.accept()
    connection.sendall(b"here")
    connection.close()
"""
_ASK = "import socket, sys; print(socket.create_connection((sys.argv[1], 7000), timeout=1).recv(4).decode())"


@pytest.fixture
def two() -> Iterator[tuple[Network, str]]:
    """A network with the spaces `server` and `client`; something answers at the address."""
    if reason := why_not():
        pytest.skip(f"no network namespaces: {reason}")
    with network() as net:
        address = net.add("server")
        net.add("client")
        server = subprocess.Popen([*net.inside("server"), sys.executable, "-c", _ECHO, address], stdout=subprocess.PIPE)
        try:
            assert server.stdout is not None and server.stdout.readline() == b"listening\n"
            yield net, address
        finally:
            server.kill()
            server.communicate()


def asks(net: Network, address: str) -> str:
    command = [*net.inside("client"), sys.executable, "-c", _ASK, address]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def test_a_process_that_is_cut_off_is_not_reached_until_it_is_mended(two: tuple[Network, str]) -> None:
    net, address = two
    assert asks(net, address) == "here"
    net.cut("server")
    assert asks(net, address) == ""
    net.mend("server")
    assert asks(net, address) == "here"


def test_networks_side_by_side_do_not_meet_and_leave_nothing_behind(two: tuple[Network, str]) -> None:
    net, address = two
    with network() as second:
        second.add("server")
        second.add("client")
        assert asks(second, address) == "", "what is in another run's network is not reached"
        assert asks(net, address) == "here"
        names = [words[3] for words in (second.inside("server"), second.inside("client"))]
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not any(name in left for name in names)
