"""The KV store as an operating system process, with a real Redis, real memory and a real folder."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from common.clock import MonotonicClock
from common.errors import EXIT_SUCCEEDED
from common.ids import PeerId, peer_id
from common.kv_layout import KvLayout
from common.messages.blocks import BlockName
from common.messages.liveness import Member, Report
from common.net.redis import Registry
from common.net.sockets import Exchange
from kvstore.transport.share import Share
from kvstore.transport.shared_pages import SharedPages
from tests.kvstore.server.builders import chain, identity, member, name
from tests.kvstore.server.store_client import KvStoreClient
from tests.support.redis import redis_server

pytestmark = pytest.mark.system
_START_S, ROOT = 60.0, Path(__file__).parents[3]
LAYOUT = KvLayout(layers=4, kv_heads=8, head_dim=256, dtype="float32")
SHAPE = {"layers": LAYOUT.layers, "kv_heads": LAYOUT.kv_heads, "head_dim": LAYOUT.head_dim, "dtype": LAYOUT.dtype}
BLOCK_BYTES = LAYOUT.layers * LAYOUT.page_bytes
assert BLOCK_BYTES == 1 << 20

WRITER = """
import sys, time
from contextlib import closing
from common.clock import MonotonicClock
from common.ids import PeerId
from common.messages.blocks import Reserve, Reserved
from common.net.sockets import Exchange
from tests.kvstore.server.store_client import KvStoreClient
from kvstore.transport.share import Share
from tests.kvstore.server.builders import chain, identity, member
assert "torch" not in sys.modules
store, endpoint, path, shape = PeerId(sys.argv[1]), sys.argv[2], sys.argv[3], eval(sys.argv[4])
exchange = Exchange(PeerId("writer@1"), None)
client = KvStoreClient(exchange, store, MonotonicClock(), 30_000)
client.connect(member("prefill", identity(**shape)), endpoint)
share = Share(PeerId("writer@1"), on_joined=lambda peer: None, on_gone=lambda peer: None)
pages = share.connect(store, path)
published = [(block, bytes([7]) * (1 << 20)) for block in chain(1, 2)]
assert client.put_shared(pages, published) == 2
reserved, _ = client._ask(Reserve(call=99, blocks=chain(5, 6)), (), Reserved, 99)
assert all(reserved.pages)
print("reserved", flush=True)
import numpy as np
while True:
    for places in reserved.pages:
        pages.write(places, np.full((len(places), pages.description.page_bytes), 9, np.uint8), range(len(places)))
"""


@contextmanager
def kvstore(redis_url: str, *flags: str) -> Iterator["subprocess.Popen[str]"]:
    """A store that is ready: its log says so."""
    command = [sys.executable, "-m", "kvstore.server", "--redis", redis_url, "--id", "store-a", *flags]
    with (
        tempfile.TemporaryDirectory() as folder,  # a store that is killed leaves its socket behind
        subprocess.Popen([*command, "--run-dir", folder], stderr=subprocess.PIPE, text=True) as process,
    ):
        try:
            await_event(process, "ready")
            yield process
        finally:
            process.kill()
            process.wait()


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


def stop(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGTERM)
    await_event(process, "stopped")
    assert process.wait(_START_S) == 0


@contextmanager
def connected(url: str) -> Iterator[KvStoreClient]:
    registry = Registry(url, "default")
    (found,) = registry.members()
    registry.close()
    with closing(Exchange(PeerId("prefill-0@1"), None)) as exchange:
        clock = MonotonicClock()
        store = peer_id(found.id, found.incarnation)
        client = KvStoreClient(exchange, store, clock, 1000 * _START_S)
        assert client.connect(member("prefill", identity(**SHAPE)), found.endpoint) == found
        yield client


@contextmanager
def mapped(found: Member) -> Iterator[SharedPages]:
    assert found.share_path is not None
    with closing(Share(PeerId("prefill-0@1"), on_joined=lambda peer: None, on_gone=lambda peer: None)) as share:
        yield share.connect(peer_id(found.id, found.incarnation), found.share_path)


def blocks(*numbers: int) -> list[tuple[BlockName, bytes]]:
    return [(one, os.urandom(BLOCK_BYTES)) for one in chain(*numbers)]


def report_when(client: KvStoreClient, gauge: str, value: float) -> Report:
    """The first report with that gauge; the test's own time limit ends the wait."""
    report = client.report()
    while report.gauges.get(gauge) != value:
        report = client.report()
    return report


def contents(frames: Sequence[bytes | bytearray | memoryview]) -> list[bytes]:
    return [bytes(frame) for frame in frames]


def test_a_store_is_found_through_redis_serves_and_leaves_cleanly() -> None:
    with redis_server() as url, kvstore(url, "--host-memory", "4MiB") as process:
        registry = Registry(url, "default")
        (found,) = registry.members()
        assert (found.id, found.role, found.pid) == ("store-a", "kvstore", process.pid)
        with connected(url) as client:
            put = blocks(1, 2, 3, 4, 5, 6)
            assert client.put(put[:3]) == 3
            assert client.put(put[3:]) == 3
            report = client.report()
            assert (report.pages.total, report.pages.cached) == (16, 16)
            assert report.counters["evicted_blocks_total"] == 2
            assert contents(client.fetch([one.name for one, _ in put[3:]])) == [content for _, content in put[3:]]
            with mapped(found) as pages:
                assert contents(client.fetch_shared(pages, [name(4), name(5)])) == [content for _, content in put[3:5]]
        stop(process)
        assert registry.members() == []
        registry.close()


def held(report: Report) -> int:
    """Pages that a writer reserved, and says nothing of: after some silence they are in quarantine."""
    return report.pages.reserved + report.pages.quarantined


def test_a_writer_that_is_killed_while_it_writes_gives_its_pages_back_and_keeps_what_it_published() -> None:
    with redis_server() as url, kvstore(url, "--host-memory", "8MiB"), connected(url) as client:
        registry = Registry(url, "default")
        (found,) = registry.members()
        registry.close()
        assert found.share_path is not None
        arguments = (peer_id(found.id, found.incarnation), found.endpoint, found.share_path, repr(SHAPE))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, *arguments], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        ) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "reserved\n"
            assert held(client.report()) == 2 * LAYOUT.layers
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        report = client.report()
        while held(report):
            report = client.report()
        assert report.pages.cached == 2 * LAYOUT.layers
        assert contents(client.fetch([name(1), name(2)])) == [bytes([7]) * BLOCK_BYTES] * 2
        assert client.fetch([name(5)]) == []
        fill = blocks(11, 12, 13, 14, 15, 16, 17, 18)  # every page, those of the dead one too
        assert client.put(fill) == 8
        assert contents(client.fetch([one.name for one, _ in fill])) == [content for _, content in fill]


def test_blocks_on_disk_outlive_eviction_restart_and_corruption(tmp_path: Path) -> None:
    flags = ("--host-memory", "8MiB", "--disk", str(tmp_path / "kv"), "--disk-size", "64MiB")
    put = blocks(1, 2, 3)
    with redis_server() as url:
        with kvstore(url, *flags) as process, connected(url) as client:
            await_event(process, "disk_scanned")  # what is put before is not written behind
            for number in range(3):
                client.put(put[number : number + 1])
                report_when(client, "blocks{tier=disk}", number + 1.0)
            others = blocks(*range(101, 109))
            assert client.put(others) == 8
            assert client.report().gauges["blocks{tier=host}"] == 8
            report_when(client, "waiting_disk_writes", 0.0)
            assert contents(client.fetch([name(1), name(2), name(3)])) == [content for _, content in put]
            assert client.report().counters["hit_tokens_total{tier=disk}"] == 3 * LAYOUT.block_tokens
            stop(process)
        bad = tmp_path / "kv" / "00" / f"{name(2).hex()}.kv"
        torn = bytearray(bad.read_bytes())
        torn[5000] ^= 1
        bad.write_bytes(torn)
        with kvstore(url, *flags) as process, connected(url) as client:
            await_event(process, "disk_scanned")
            assert contents(client.fetch([name(1), name(2), name(3)])) == [put[0][1]]
            assert not bad.exists()
            assert client.report().counters["load_failures_total"] == 1
            assert client.put(put[1:2]) == 1
            assert contents(client.fetch([name(1), name(2), name(3)])) == [content for _, content in put]


def test_the_memory_taken_is_the_budget() -> None:
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


def test_a_store_that_was_stopped_while_another_took_its_name_ends_by_itself() -> None:
    with redis_server() as url, kvstore(url, "--host-memory", "16MiB") as old:
        old.send_signal(signal.SIGSTOP)
        with kvstore(url, "--host-memory", "16MiB") as new:
            old.send_signal(signal.SIGCONT)
            await_event(old, "succeeded")
            assert old.wait(timeout=30) == EXIT_SUCCEEDED
            with closing(Registry(url, "default")) as registry:
                assert [one.pid for one in registry.members()] == [new.pid]
            assert new.poll() is None
