"""TCP ports that nobody listens on: to be given to a process that is started now and listens seconds later."""

import random
import socket

_FROM, _BELOW = 20_000, 32_000
"""No port for a moment's connection comes from here: Linux takes those from 32,768 on (`ip_local_port_range`)."""
_TRIES = 100


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on just now, and that nobody is likely to be given soon. Raises OSError if there is none."""
    for _ in range(_TRIES):
        port = random.SystemRandom().randrange(_FROM, _BELOW)
        if port_is_free(host, port):
            return port
    raise OSError(f"none of {_TRIES} ports of {host} from {_FROM} to {_BELOW - 1} is free")


def port_is_free(host: str, port: int) -> bool:
    """True if a server could listen there now. Raises OSError for a bad host."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
        return True
