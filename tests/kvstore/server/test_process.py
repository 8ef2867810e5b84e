"""The KV store as an operating system process, with a real Redis."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from common.clock import MonotonicClock
from common.ids import PeerId, peer_id
from common.messages.liveness import Member
from common.net.redis import Registry
from common.net.sockets import Exchange
from kvstore.server.client import KvStoreClient
from tests.kvstore.server.builders import member, name
from tests.support.redis import redis_server

pytestmark = pytest.mark.system
_START_S = 60.0


@contextmanager
def kvstore(redis_url: str, *flags: str) -> Iterator["subprocess.Popen[str]"]:
    """A store that is ready: its log says so."""
    command = [sys.executable, "-m", "kvstore.server", "--redis", redis_url, "--id", "store-a", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            await_event(process, "ready")
            yield process
        finally:
            process.kill()


def await_event(process: "subprocess.Popen[str]", event: str) -> None:
    assert process.stderr is not None
    killer = threading.Timer(_START_S, process.kill)  # a process that never gets there ends its log, and this wait
    killer.start()
    try:
        seen = []
        for line in process.stderr:
            seen.append(line)
            if f'"event": "{event}"' in line:
                return
    finally:
        killer.cancel()
    raise AssertionError(f"no {event} in the log:\n{''.join(seen)}")


@contextmanager
def connected(found: Member) -> Iterator[KvStoreClient]:
    with closing(Exchange(PeerId("prefill-0@1"), None)) as exchange:
        clock = MonotonicClock()
        client = KvStoreClient(
            exchange, peer_id(found.id, found.incarnation), clock, lambda received: None, 1000 * _START_S
        )
        assert client.connect(member("prefill"), found.endpoint) == found
        yield client


def test_a_store_is_found_through_redis_serves_and_leaves_cleanly() -> None:
    with redis_server() as url, kvstore(url, "--host-memory", "4MiB") as process:
        registry = Registry(url, "default")
        (found,) = registry.members()
        assert (found.id, found.role, found.pid) == ("store-a", "kvstore", process.pid)
        with connected(found) as client:
            chain = [(name(number), os.urandom(1 << 20)) for number in range(6)]
            assert client.put(chain[:3]) == 3
            assert client.put(chain[3:]) == 3
            report = client.report()
            assert (report.pages.total, report.pages.cached) == (4, 4)
            assert report.counters["kv_evicted_blocks_total"] == 2
            frames = client.fetch([block for block, _ in chain[3:]])
            assert [bytes(frame) for frame in frames] == [block for _, block in chain[3:]]
        process.send_signal(signal.SIGTERM)
        await_event(process, "stopped")
        assert process.wait(_START_S) == 0
        assert registry.members() == []
        registry.close()


def test_the_budget_is_taken_at_start() -> None:
    with redis_server() as url, kvstore(url, "--host-memory", "64MiB") as process:
        with open(f"/proc/{process.pid}/smaps") as smaps:
            text = smaps.read()
        mapped_kib = 0
        for part in text.split("VmFlags")[:-1]:
            if "penstock-pages" in part:
                mapped_kib += int(part.split("Size:")[1].split()[0])
        assert mapped_kib == 64 * 1024


def test_a_store_needs_no_torch() -> None:
    code = "import sys, kvstore.server.__main__; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
