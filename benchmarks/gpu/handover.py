"""KV from one process to another on one device, and to and from the host: bandwidth, and what of it compute hides.

    python -m benchmarks.gpu.handover [--quick] [--json FILE]

Shape: Llama-3-8B (32 layers, 8 KV heads, 128, bfloat16, blocks of 16 tokens: pages of 64 KiB). Bandwidths count each byte
once, and stand beside a plain copy within the device of the same run. `direct`: the sender writes into the granted pages.
`ring`: it writes into a ring, and the receiver scatters. `exposed`: from the end of compute to the last byte there; compute is
a matrix product for each layer with as many operations as the layer's prefill, without attention.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu._handover_peer import LAYOUT, PEER, SLOT_PAGES, SLOTS, rows_of, scattered_pages
from benchmarks.gpu.table import Row, run_and_write
from common.ids import PeerId, TransferId
from common.messages.handover import KvSpan
from common.net.sockets import Payload
from kvstore.memory.cuda_driver import CudaDriver
from kvstore.memory.page_memory import open_page_memory
from kvstore.transport.copier import Copier, CopyDone, CopyJob
from kvstore.transport.cuda_pages import CudaMapper, CudaSharedPages
from kvstore.transport.device_channel import DeviceChannel
from kvstore.transport.layer_events import layer_events
from kvstore.transport.own_pages import AcceleratorPages
from kvstore.transport.pinned_mapping import PinnedMapping
from kvstore.transport.share import Share
from kvstore.transport.shared_pages import SharedPages

DEVICE = torch.device("cuda", 0)
POOL_BYTES, FILE_BYTES = 5 * 2**30, 2**30
STORE = PeerId("store@1")
CHUNK_TOKENS = 8192
_HIDDEN, _LAYER_WEIGHTS = 4096, 218_103_808
_ROUNDS = 5


@dataclass(frozen=True)
class Peer:
    """The other process."""

    process: subprocess.Popen[str]
    path: str

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise RuntimeError("the other process of the benchmark has ended")
        return answer


@contextmanager
def peer_process(run_dir: str) -> Iterator[Peer]:
    command = [sys.executable, "-m", "benchmarks.gpu._handover_peer", str(POOL_BYTES), run_dir]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Peer(process, process.stdout.readline().strip())
        finally:
            process.kill()


def _unheard(peer: PeerId) -> None:
    """Who joins and goes is not of interest here."""


class Bench:
    """The sending process: its pool, the peer's pages, and a file of the host."""

    def __init__(self, peer: Peer, run_dir: str) -> None:
        self.peer, self.driver = peer, CudaDriver(0)
        self.memory = open_page_memory(POOL_BYTES, LAYOUT, DEVICE)
        self.rows = rows_of(self.memory)
        self.rows.view(torch.int64).random_()
        self.events = layer_events(LAYOUT.layers, DEVICE)
        self.own = AcceleratorPages(self.memory.pages, self.events)
        mapper = CudaMapper(self.driver, DEVICE)
        self.share = Share(PeerId("prefill@1"), on_joined=_unheard, on_gone=_unheard, mapper=mapper)
        began_s = time.perf_counter()
        target = self.share.connect(PEER, peer.path)
        self.connect_s = time.perf_counter() - began_s
        assert isinstance(target, CudaSharedPages)
        self.target, self.targets = target, scattered_pages(self.memory.pages.n_pages)
        self.file = open_page_memory(FILE_BYTES, LAYOUT, torch.device("cpu"))
        self.store = Share(STORE, on_joined=_unheard, on_gone=_unheard)
        mapping = self.share.connect(STORE, self.store.serve(self.file, Path(run_dir)))
        assert isinstance(mapping, SharedPages)
        self.mapping = mapping

    def close(self) -> None:
        self.share.close()
        self.store.close()
        self.memory.close()
        self.file.close()
        self.driver.close()


def run(quick: bool) -> list[Row]:
    """All rows."""
    with tempfile.TemporaryDirectory() as run_dir, peer_process(run_dir) as peer:
        bench = Bench(peer, run_dir)
        try:
            copy_gb = device_copy_gb_per_s(bench)
            rows = [
                Row("copy within the device", copy_gb, "GB/s", None, "each byte once"),
                Row("connect: import and map the peer's pool", bench.connect_s * 1e3, "ms", None, f"{POOL_BYTES >> 30} GiB"),
                Row("connect: rate that the probe found", bench.target.gib_per_s, "GiB/s", None, ""),
            ]  # fmt: skip
            rows += between_processes(bench, copy_gb) + host_legs(bench, copy_gb)
            for tokens in (1024, 4096) if quick else (1024, 4096, 32768):
                rows += exposed(bench, tokens)
            return rows
        finally:
            bench.close()


def device_copy_gb_per_s(bench: Bench) -> float:
    half = len(bench.rows) // 2
    seconds = median_s(lambda: bench.rows[half : 2 * half].copy_(bench.rows[:half]))
    return half * LAYOUT.page_bytes / seconds / 1e9


def between_processes(bench: Bench, copy_gb: float) -> list[Row]:
    """Direct pages and a ring, for a prompt of 4096 tokens."""
    n_pages = LAYOUT.pages_for(4096)
    here, there = np.arange(n_pages), bench.targets[:n_pages]
    by_layer = [(here.reshape(-1, LAYOUT.layers)[:, layer], there.reshape(-1, LAYOUT.layers)[:, layer])
                for layer in range(LAYOUT.layers)]  # fmt: skip

    def layers() -> None:
        for source, target in by_layer:
            bench.own.copy_out(source, bench.target, target)

    rows = []
    for name, move in (
        ("direct, aggregated", lambda: bench.own.copy_out(here, bench.target, there)),
        ("direct, one copy for each layer (16 MiB)", layers),
        ("ring of 4 x 32 MiB, aggregated", lambda: through_ring(bench, here)),
    ):
        gb = n_pages * LAYOUT.page_bytes / median_s(move) / 1e9
        rows.append(Row(f"4096 tokens: {name}", gb, "GB/s", gb / copy_gb, "copy within the device"))
        with bench.target.using() as peer_rows:
            same = bool((peer_rows[torch.from_numpy(there).to(DEVICE)] == bench.rows[:n_pages]).all())
            if not same:
                raise RuntimeError(f"{name}: the pages of the other process differ from ours")
            peer_rows[torch.from_numpy(there).to(DEVICE)] = 0
            torch.cuda.synchronize()
    one = here[:1]
    seconds = median_s(lambda: bench.own.copy_out(one, bench.target, one), rounds=50)
    rows.append(Row("direct, one page: time until it is there", seconds * 1e6, "us", None, ""))
    return rows


def through_ring(bench: Bench, pages: np.ndarray) -> None:
    waiting = 0
    for number, first in enumerate(range(0, len(pages), SLOT_PAGES)):
        part = pages[first : first + SLOT_PAGES]
        if waiting == SLOTS:  # the slot's last contents are scattered
            bench.peer.hear()
            waiting -= 1
        slot = number % SLOTS
        bench.own.copy_out(part, bench.target, slot * SLOT_PAGES + np.arange(len(part)))
        bench.peer.tell(f"scatter {slot} {first} {len(part)}")
        waiting += 1
    for _ in range(waiting):
        bench.peer.hear()


def host_legs(bench: Bench, copy_gb: float) -> list[Row]:
    """Half of the way over tcp, and the KV store's: out of the device, into it."""
    n_pages = 4096
    here, ids = np.arange(n_pages), list(range(n_pages))
    file_blocks = np.random.default_rng(5).permutation(bench.file.pages.n_pages // LAYOUT.layers)
    scattered = (file_blocks[:, None] * LAYOUT.layers + np.arange(LAYOUT.layers)).reshape(-1)[:n_pages]
    payload = bench.own.read(ids)
    one_layer = np.arange(0, n_pages, LAYOUT.layers)
    legs: list[tuple[str, int, Callable[[], object]]] = [
        ("pageable, device to host", n_pages, lambda: pageable_read(bench, here)),
        ("pageable, host to device", n_pages, lambda: pageable_write(bench, here, payload)),
        ("pinned buffers, device to payload", n_pages, lambda: bench.own.read(ids)),
        ("pinned buffers, payload to device", n_pages, lambda: bench.own.write(ids, payload)),
        ("pinned buffers, device to store", n_pages, lambda: bench.own.copy_out(here, bench.mapping, scattered)),
        ("pinned buffers, store to device", n_pages, lambda: bench.own.copy_in(here, bench.mapping, scattered)),
    ]
    rows = [_leg(*leg, copy_gb) for leg in legs]
    began_s = time.perf_counter()
    bench.mapping.pin(lambda pages: PinnedMapping(bench.driver, pages, DEVICE))
    pin_ms = (time.perf_counter() - began_s) * 1e3
    rows.append(Row("pin the store's mapping", pin_ms, "ms", None, f"{FILE_BYTES >> 30} GiB"))
    layer = len(one_layer)
    legs = [
        ("pinned store, device to store, blocks", n_pages, lambda: bench.own.copy_out(here, bench.mapping, scattered)),
        ("pinned store, store to device, blocks", n_pages, lambda: bench.own.copy_in(here, bench.mapping, scattered)),
        ("pinned store, store to device, one layer", layer,
         lambda: bench.own.copy_in(one_layer, bench.mapping, scattered[one_layer])),
        ("pinned store, device to store, one layer", layer,
         lambda: bench.own.copy_out(one_layer, bench.mapping, scattered[one_layer])),
    ]  # fmt: skip
    return rows + [_leg(*leg, copy_gb) for leg in legs]


def _leg(name: str, n_pages: int, move: Callable[[], object], copy_gb: float) -> Row:
    gb = n_pages * LAYOUT.page_bytes / median_s(move, rounds=3) / 1e9
    return Row(f"{n_pages * LAYOUT.page_bytes >> 20} MiB: {name}", gb, "GB/s", gb / copy_gb, "copy within the device")


def pageable_read(bench: Bench, pages: np.ndarray) -> bytearray:
    return bytearray(bench.rows.index_select(0, torch.from_numpy(pages).to(DEVICE)).cpu().numpy().data)


def pageable_write(bench: Bench, pages: np.ndarray, payload: Payload) -> None:
    source = np.frombuffer(payload, np.uint8).reshape(len(pages), -1)
    bench.rows.index_copy_(0, torch.from_numpy(pages).to(DEVICE), torch.from_numpy(source.copy()).to(DEVICE))


@dataclass(frozen=True)
class Exposed:
    """One prompt."""

    compute_ms: float
    exposed_ms: float


def exposed(bench: Bench, tokens: int) -> list[Row]:
    """By layer and aggregated, beside compute alone."""
    found = {how: prompt(bench, tokens, how) for how in ("alone", "by layer", "aggregated")}
    alone_ms = found["alone"].compute_ms
    rows = [Row(f"{tokens} tokens: compute alone", alone_ms, "ms", None, "32 layers")]
    for how in ("by layer", "aggregated"):
        one = found[how]
        ratio = one.exposed_ms / alone_ms
        rows.append(Row(f"{tokens} tokens: exposed, {how}", one.exposed_ms, "ms", ratio, "compute alone"))
    slowed = found["by layer"].compute_ms
    rows.append(
        Row(f"{tokens} tokens: compute beside copies by layer", slowed, "ms", slowed / alone_ms, "compute alone")
    )
    return rows


def prompt(bench: Bench, tokens: int, how: str) -> Exposed:
    """Median of a few rounds."""
    n_tokens = min(tokens, CHUNK_TOKENS)
    weights = torch.randn(_HIDDEN, _LAYER_WEIGHTS // _HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    inputs = torch.randn(n_tokens, _HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    out = torch.empty(n_tokens, weights.shape[1], dtype=torch.bfloat16, device=DEVICE)
    n_blocks = n_tokens // LAYOUT.block_tokens
    whole = job(bench, 0, LAYOUT.layers, 0, tokens // LAYOUT.block_tokens)
    by_layer = [
        [job(bench, layer, 1, first, n_blocks) for layer in range(LAYOUT.layers)]
        for first in range(0, tokens // LAYOUT.block_tokens, n_blocks)
    ]
    rounds = []
    for _ in range(1 + (2 if tokens > 8192 else _ROUNDS)):  # the first one is not counted
        done: list[CopyDone] = []
        copier = Copier(done.append)
        copier.attach(PEER, DeviceChannel(bench.own, bench.target))
        torch.cuda.synchronize()
        began_s, ended_s = time.perf_counter(), []
        for chunk in by_layer:
            for layer, layer_job in enumerate(chunk):
                torch.mm(inputs, weights, out=out)
                if how == "by layer":
                    bench.events.record(layer)
                    copier.post(layer_job)
        torch.cuda.current_stream().synchronize()
        ended_s.append(time.perf_counter())
        if how == "aggregated":
            copier.post(whole)
        copier.drain(60.0)
        ended_s.append(time.perf_counter())
        copier.stop()
        if not all(one.ok for one in done):
            raise RuntimeError(next(one.error_text for one in done if not one.ok))
        rounds.append(Exposed((ended_s[0] - began_s) * 1e3, (ended_s[1] - ended_s[0]) * 1e3))
    counted = rounds[1:]
    return Exposed(
        statistics.median(one.compute_ms for one in counted), statistics.median(one.exposed_ms for one in counted)
    )


def job(bench: Bench, layer: int, n_layers: int, first_block: int, n_blocks: int) -> CopyJob:
    """Some layers of some blocks."""
    layers = LAYOUT.layers
    columns = np.arange(first_block, first_block + n_blocks)[:, None] * layers + np.arange(layer, layer + n_layers)
    pages = columns.reshape(-1)
    span = KvSpan(layer, first_block, n_blocks, n_layers)
    return CopyJob(TransferId("1"), PEER, span, tuple(pages.tolist()), tuple(bench.targets[pages].tolist()))


def median_s(move: Callable[[], object], rounds: int = _ROUNDS) -> float:
    """Seconds until everything is there."""
    move()
    taken_s = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        move()
        torch.cuda.synchronize()
        taken_s.append(time.perf_counter() - began_s)
    return statistics.median(taken_s)


if __name__ == "__main__":
    run_and_write(run, __doc__)
