"""Real processes that are killed while they share memory."""

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.errors import PeerFailed
from common.ids import PeerId
from common.kv_layout import KvLayout
from common.messages.handover import KvSpan
from kvstore.memory.page_memory import open_page_memory
from kvstore.transport.share import Share
from kvstore.transport.shm import ShmChannel

LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=32, dtype="float32")
HOST, GUEST = PeerId("decode-0@1"), PeerId("prefill-0@2")
ROOT, WAIT_S, MIB = Path(__file__).parents[3], 60, 2**20

pytestmark = pytest.mark.system

COMMON = """
import sys, time
import numpy as np
from pathlib import Path
from common.ids import PeerId
from common.kv_layout import KvLayout
from kvstore.memory.page_memory import open_page_memory
from kvstore.transport.share import Share
silent = {"on_joined": lambda peer: None, "on_gone": lambda peer: None}
share = Share(PeerId(sys.argv[1]), **silent)
"""
SERVE = (
    COMMON
    + """
memory = open_page_memory(64 << 20, KvLayout(layers=2, kv_heads=2, head_dim=32, dtype="float32"))
memory.pages.rows[:] = 5
print(share.serve(memory, Path(sys.argv[2])), flush=True)
time.sleep(600)
"""
)
WRITE = (
    COMMON
    + """
pages = share.connect(PeerId("decode-0@1"), sys.argv[2])
print("mapped", flush=True)
number, every = 0, range(pages.description.n_pages)
while True:
    number = (number + 1) % 256
    pages.write(every, np.full((len(every), 8192), number, np.uint8), every)
"""
)


@contextmanager
def process(script: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Runs until the block ends; yields it with its first line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    assert child.stdout is not None
    try:
        yield child, child.stdout.readline().strip()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_after_the_news_of_a_killed_guest_it_writes_no_more(tmp_path: Path) -> None:
    gone: queue.SimpleQueue[PeerId] = queue.SimpleQueue()
    memory = open_page_memory(4 * MIB, LAYOUT)
    share = Share(HOST, on_joined=lambda peer: None, on_gone=gone.put)
    path = share.serve(memory, tmp_path)
    with process(WRITE, GUEST, path) as (guest, line):
        assert line == "mapped"
        deadline_s = time.monotonic() + WAIT_S
        while not memory.pages.rows[0, 0] and time.monotonic() < deadline_s:
            os.sched_yield()  # until the guest is really writing
        guest.send_signal(signal.SIGKILL)
        assert gone.get(timeout=WAIT_S) == GUEST
        memory.pages.rows[:] = 77
        guest.wait()
        assert (memory.pages.rows == 77).all()
    share.close()
    memory.close()


def test_a_killed_hosts_memory_outlives_it_only_until_the_guest_heard(tmp_path: Path) -> None:
    gone: queue.SimpleQueue[PeerId] = queue.SimpleQueue()
    memory = open_page_memory(4 * MIB, LAYOUT)
    share = Share(GUEST, on_joined=lambda peer: None, on_gone=gone.put)
    before = mapped_files()
    with process(SERVE, HOST, str(tmp_path)) as (host, path):
        target = share.connect(HOST, path)
        channel = ShmChannel(memory.pages.rows, target)
        with target.using() as rows:  # as if a copy were running
            host.send_signal(signal.SIGKILL)
            host.wait()
            assert (rows[:500] == 5).all(), "a copy in progress must not fault"
            del rows  # a view keeps the memory mapped
        assert gone.get(timeout=WAIT_S) == HOST
        with pytest.raises(PeerFailed, match="not mapped any more"):
            channel.copy(KvSpan(0, 0, 1), (0,), (0,))
    assert mapped_files() <= before, "the dead process's memory is still mapped"
    share.close()
    memory.close()


def mapped_files() -> set[str]:
    """Inodes of the page files that this process maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "penstock-pages" in line}
