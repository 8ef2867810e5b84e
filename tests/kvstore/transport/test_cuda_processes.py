"""Two processes on one device: bytes arrive, layers are waited for, and a killed process leaves nothing behind."""

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import PeerFailed
from common.ids import Incarnation, PeerId, WorkerId, peer_id
from common.kv_layout import KvLayout
from common.messages.handover import KvSpan
from common.messages.liveness import Member
from kvstore.memory.cuda_driver import CudaDriver
from kvstore.memory.page_memory import PageMemory, open_page_memory
from kvstore.transport.cuda_pages import CudaMapper, CudaSharedPages
from kvstore.transport.layer_events import layer_events
from kvstore.transport.own_pages import AcceleratorPages
from kvstore.transport.probe import Ways, open_channel
from kvstore.transport.share import Share

pytestmark = [pytest.mark.gpu, pytest.mark.system]
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

ROOT, WAIT_S, MIB = Path(__file__).parents[3], 60, 2**20
DEVICE = torch.device("cuda", 0)
LAYOUT = KvLayout(layers=4, kv_heads=8, head_dim=128, dtype="bfloat16")
POOL_BYTES = 512 * MIB

PARTY = """
import sys, time, os
from pathlib import Path
import torch
from common.ids import Incarnation, WorkerId, peer_id
from tests.kvstore.transport.test_cuda_processes import Party
party = Party(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
"""
SERVE = (
    PARTY
    + """
party.rows.fill_(5)
torch.cuda.synchronize()
print(party.path, flush=True)
time.sleep(600)
"""
)
HAND_OVER = (
    PARTY
    + """
from common.messages.handover import KvSpan
party.rows.copy_((torch.arange(len(party.rows), device="cuda") % 251).to(torch.uint8)[:, None].expand_as(party.rows))
opened = party.open("decode-0", 1, sys.argv[4], "cuda_ipc")
pages = list(range(len(party.rows)))
opened.channel.copy(KvSpan(0, 0, len(pages) // 4, 4), pages, pages[::-1])
print(opened.report.kind, opened.report.gib_per_s, flush=True)
time.sleep(600)
"""
)
WRITE = (
    PARTY
    + """
pages = party.share.connect(peer_id(WorkerId("decode-0"), Incarnation(1)), sys.argv[4])
every = range(pages.n_pages)
print("mapped", flush=True)
number = 0
while True:
    number = number % 70 + 1
    party.rows.fill_(number)
    torch.cuda.synchronize()
    party.own.copy_out(every, pages, every)
"""
)


class Party:
    """One worker on the device."""

    def __init__(self, worker: str, incarnation: int, run_dir: Path, pool_bytes: int = POOL_BYTES) -> None:
        self.name = peer_id(WorkerId(worker), Incarnation(incarnation))
        self.gone: queue.SimpleQueue[PeerId] = queue.SimpleQueue()
        self.memory: PageMemory = open_page_memory(pool_bytes, LAYOUT, DEVICE)
        self.driver = CudaDriver(0)
        mapper = CudaMapper(self.driver, DEVICE)
        self.share = Share(self.name, on_joined=lambda peer: None, on_gone=self.gone.put, mapper=mapper)
        self.path = self.share.serve(self.memory, run_dir)
        self.events = layer_events(LAYOUT.layers, DEVICE)
        self.own = AcceleratorPages(self.memory.pages, self.events)
        self.member = self._member(worker, incarnation, self.path)

    def _member(self, worker: str, incarnation: int, path: str, **changes: str) -> Member:
        fields = {"role": "decode", "endpoint": "", "host": "here", "share_kind": "cuda"} | changes
        return Member(
            id=WorkerId(worker), incarnation=Incarnation(incarnation), pid=os.getpid(), share_path=path, **fields
        )

    def open(self, worker: str, incarnation: int, path: str, wanted: str = "auto", **changes: str):
        theirs = self._member(worker, incarnation, path, **changes)
        return open_channel(self.member, theirs, Ways(self.own, self.share, wanted, self.driver))

    @property
    def rows(self) -> torch.Tensor:
        pages = self.memory.pages.tensor
        return pages.view(torch.uint8).view(len(pages), -1)

    def close(self) -> None:
        self.share.close()
        self.memory.close()
        self.driver.close()


@pytest.fixture
def decode(tmp_path: Path) -> Iterator[Party]:
    made = Party("decode-0", 1, tmp_path)
    yield made
    made.close()


@contextmanager
def process(script: str, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Runs until the block ends; yields it with its first line."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *(str(argument) for argument in arguments)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    assert child.stdout is not None
    try:
        yield child, child.stdout.readline().strip()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def await_free_memory(at_least_bytes: int) -> None:
    """Until the device has so much; what a dead process held comes back a moment after it."""
    deadline_s = time.monotonic() + WAIT_S
    while (free_bytes := torch.cuda.mem_get_info(DEVICE)[0]) < at_least_bytes:
        assert time.monotonic() < deadline_s, f"{free_bytes} bytes are free, {at_least_bytes} were"
        os.sched_yield()


def test_every_page_that_another_process_hands_over_is_here(decode: Party, tmp_path: Path) -> None:
    with process(HAND_OVER, "prefill-0", 2, tmp_path, decode.path) as (_, line):
        kind, rate = line.split()
        assert kind == "cuda_ipc"
        assert float(rate) > 50
        wanted = (torch.arange(len(decode.rows), device=DEVICE).flip(0) % 251).to(torch.uint8)
        assert bool((decode.rows == wanted[:, None]).all())


def test_after_the_news_of_a_killed_guest_it_writes_no_more_and_its_memory_is_back(
    decode: Party, tmp_path: Path
) -> None:
    decode.rows.zero_()
    torch.cuda.synchronize()
    before_bytes = torch.cuda.mem_get_info(DEVICE)[0]
    with process(WRITE, "prefill-0", 2, tmp_path, decode.path) as (guest, line):
        assert line == "mapped"
        deadline_s = time.monotonic() + WAIT_S
        while not int(decode.rows[-1, -1]):
            assert time.monotonic() < deadline_s
        guest.send_signal(signal.SIGKILL)
        assert decode.gone.get(timeout=WAIT_S) == peer_id(WorkerId("prefill-0"), Incarnation(2))
        decode.rows.fill_(77)
        torch.cuda.synchronize()
        guest.wait()
        assert bool((decode.rows == 77).all())
    await_free_memory(before_bytes - 64 * MIB)


def test_a_killed_hosts_memory_outlives_it_only_until_the_guest_heard(tmp_path: Path) -> None:
    guest = Party("prefill-0", 2, tmp_path)
    before_bytes = torch.cuda.mem_get_info(DEVICE)[0]
    with process(SERVE, "decode-0", 1, tmp_path) as (host, path):
        opened = guest.open("decode-0", 1, path, "cuda_ipc")
        assert isinstance(opened.mapping, CudaSharedPages)
        with opened.mapping.using() as rows:  # as if a copy were running
            host.send_signal(signal.SIGKILL)
            host.wait()
            assert bool((rows == 5).all()), "a copy in progress must not fault"
        assert guest.gone.get(timeout=WAIT_S) == peer_id(WorkerId("decode-0"), Incarnation(1))
        with pytest.raises(PeerFailed, match="not mapped any more"):
            opened.channel.copy(KvSpan(0, 0, 1), (0,), (0,))
    torch.cuda.empty_cache()
    await_free_memory(before_bytes - 64 * MIB)
    guest.close()


def test_a_copy_waits_on_the_device_for_its_layer(decode: Party, tmp_path: Path) -> None:
    prefill = Party("prefill-0", 2, tmp_path)
    opened = prefill.open("decode-0", 1, decode.path, "cuda_ipc")
    for value in (1, 2, 3):
        engine = torch.cuda.Stream(DEVICE)
        with torch.cuda.stream(engine):
            torch.cuda._sleep(200_000_000)  # about 0.1 s: the write below is launched long before it runs
            prefill.rows[7].fill_(value)
            prefill.events.record(2)
        opened.channel.copy(KvSpan(2, 0, 1), (7,), (9,))
        assert bool((decode.rows[9] == value).all())
    prefill.close()


@pytest.mark.parametrize("pinned", [True, False])
def test_a_file_of_the_host_is_reached_both_ways(tmp_path: Path, pinned: bool) -> None:
    worker = Party("prefill-0", 2, tmp_path)
    worker.rows.copy_(torch.randint(0, 256, worker.rows.shape, dtype=torch.uint8, device=DEVICE))
    with ExitStack() as stack:
        file = open_page_memory(256 * MIB, LAYOUT, torch.device("cpu"))
        stack.callback(file.close)
        store = Share(
            peer_id(WorkerId("store"), Incarnation(3)), on_joined=lambda peer: None, on_gone=lambda peer: None
        )
        stack.callback(store.close)
        stack.callback(worker.close)
        path = store.serve(file, tmp_path)
        if pinned:
            opened = worker.open("store", 3, path, share_kind="memfd", role="kvstore")
            assert (opened.report.kind, opened.report.reason) == ("shm", "")
            mapping = opened.mapping
        else:
            mapping = worker.share.connect(peer_id(WorkerId("store"), Incarnation(3)), path)
        random = np.random.default_rng(1)
        n_pages = file.pages.n_pages
        for there in (np.arange(1000), random.permutation(n_pages)[:1000], np.arange(0, 4000, 4)):
            here = random.permutation(n_pages)[:1000] if there[1] != 1 else np.arange(500, 1500)
            worker.own.copy_out(here, mapping, there)
            assert np.array_equal(file.pages.rows[there], worker.rows[torch.from_numpy(here).to(DEVICE)].cpu().numpy())
            back = here + n_pages
            worker.own.copy_in(back, mapping, there)
            assert np.array_equal(
                file.pages.rows[there], worker.rows[torch.from_numpy(back.copy()).to(DEVICE)].cpu().numpy()
            )


def test_payloads_come_and_go_through_pinned_buffers(decode: Party) -> None:
    decode.rows.copy_(torch.randint(0, 256, decode.rows.shape, dtype=torch.uint8, device=DEVICE))
    out, back = np.random.default_rng(1).permutation(decode.memory.pages.n_pages)[:1000].reshape(2, 500)
    wanted = decode.rows[torch.from_numpy(out).to(DEVICE)].cpu().numpy()
    payload = decode.own.read(out.tolist())
    assert payload == wanted.tobytes()
    decode.own.write(back.tolist(), payload)
    assert np.array_equal(decode.rows[torch.from_numpy(back).to(DEVICE)].cpu().numpy(), wanted)


def test_a_pool_that_grows_and_shrinks_is_followed_and_its_memory_is_back(decode: Party, tmp_path: Path) -> None:
    prefill = Party("prefill-0", 2, tmp_path)
    opened = prefill.open("decode-0", 1, decode.path, "cuda_ipc")
    assert isinstance(opened.mapping, CudaSharedPages)
    before_bytes, n_chunks = torch.cuda.mem_get_info(DEVICE)[0], len(decode.memory.pages.chunks)
    for change in (4, -6, 2):
        n_chunks += change
        settled: queue.SimpleQueue[None] = queue.SimpleQueue()
        decode.memory.resize(n_chunks)
        decode.share.resized(lambda settled=settled: settled.put(None))
        settled.get(timeout=WAIT_S)
        assert opened.mapping.n_pages == decode.memory.pages.n_pages
        last = decode.memory.pages.n_pages - 1
        opened.channel.copy(KvSpan(0, 0, 1), (3,), (last,))
        assert torch.equal(decode.rows[last], prefill.rows[3])
        taken_bytes = (n_chunks - len(prefill.memory.pages.chunks)) * decode.memory.plan.chunk_bytes
        await_free_memory(before_bytes - taken_bytes - 8 * MIB)
    prefill.close()
