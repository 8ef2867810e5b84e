"""What `--cluster-key` costs: bytes of KV per second through two exchanges, encrypted over plain, in one run.

    python -m benchmarks.curve_price [--rounds 7] [--mib 128] [--payload-mib 1]

Both exchanges live in this process, as threads, and talk over loopback. Plain and encrypted rounds alternate; the medians
are compared. Shared memory, which workers of one host use, is not encrypted and costs nothing.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from common.ids import PeerId
from common.messages.liveness import Ping
from common.net.cluster_key import ClusterKey, make_cluster_key, read_cluster_key
from common.net.sockets import Exchange

SERVER, CLIENT, WINDOW = PeerId("server@1"), PeerId("client@2"), 8


def receive(server: Exchange, messages: int, arrived: threading.Semaphore) -> None:
    """Hear so many messages, and tell of each."""
    heard = 0
    while heard < messages:
        for _ in server.receive(1000):
            heard += 1
            arrived.release()


def gib_per_s(key: ClusterKey | None, messages: int, payload: bytes) -> float:
    """One round: at most `WINDOW` messages are on their way at once."""
    with ExitStack() as stack:
        server = stack.enter_context(closing(Exchange(SERVER, "tcp://127.0.0.1:0", key=key)))
        client = stack.enter_context(closing(Exchange(CLIENT, None, key=key)))
        client.dial(SERVER, server.endpoint)
        arrived = threading.Semaphore(0)
        hearing = threading.Thread(target=receive, args=(server, messages + 1, arrived))
        hearing.start()
        client.send(SERVER, Ping(sequence=0))
        arrived.acquire()  # connected, keys agreed
        began_s = time.perf_counter()
        for number in range(messages):
            if number >= WINDOW:
                arrived.acquire()
            if not client.send(SERVER, Ping(sequence=number), [payload]):
                raise SystemExit("a message was not taken; make --payload-mib smaller")
        hearing.join()
        return messages * len(payload) / (time.perf_counter() - began_s) / 2**30


def main(argv: Sequence[str] | None = None) -> int:
    """Print both rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mib", type=int, default=128, help="of KV in a round")
    parser.add_argument("--payload-mib", type=int, default=1, help="in a message")
    flags = parser.parse_args(argv)
    payload = os.urandom(flags.payload_mib * 2**20)
    with tempfile.TemporaryDirectory() as folder:
        make_cluster_key(str(Path(folder) / "key"))
        keys = {"plain": None, "encrypted": read_cluster_key(str(Path(folder) / "key"))}
        found: dict[str, list[float]] = {name: [] for name in keys}
        for number in range(flags.rounds + 1):
            for name in sorted(keys, reverse=number % 2 == 0):
                found[name].append(gib_per_s(keys[name], flags.mib // flags.payload_mib, payload))
    plain, encrypted = (statistics.median(found[name][1:]) for name in ("plain", "encrypted"))
    print(f"plain {plain:.2f} GiB/s, encrypted {encrypted:.2f} GiB/s, ratio {encrypted / plain:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
