"""Exposed hand-over time by layer, by request and aggregated, at several hand-overs side by side.

    python -m benchmarks.handover_modes [--rounds 9] [--compute-ratio 4] [--shape 0.5B] [--json FILE]

Two processes: the prefill side runs the real Sender, the copier's thread and an engine thread; the decode side the real
Receiver over the pages it shares. The engine computes some prompts as one batch: per layer it multiplies matrices, for
`compute-ratio` times as long as plain memcpy takes for that layer's KV, and tells the loop, as in service. Exposed: from
the last layer computed until everything is copied and HandOver is sent (HandOver.timings.transfer_ms), mean of the
prompts, median of the rounds; the modes take turns. Wall: from the first layer until the last HandOver, per prompt.
`early`: grants come before the first layer; `late`: after the last one, as from a decode worker without free pages.
Ratios are to by-layer at one hand-over with an early grant.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch

from common.clock import MonotonicClock
from common.ids import Incarnation, PeerId, RequestId, TransferId
from common.kv_layout import KvLayout
from common.messages import AnyMessage, decode, encode
from common.messages.actions import Send
from common.messages.handover import Grant, GrantRequest, HandOver, KvSpan
from common.messages.requests import Sampling
from common.policy.transfer import Granularity
from kvstore.handover.actions import Asked, GaveUp, HandedOver, PostCopy, SenderAction
from kvstore.handover.outgoing import FirstToken, Way
from kvstore.handover.receiver import Receiver
from kvstore.handover.sender import Sender
from kvstore.memory.page_memory import PageMemory, open_page_memory
from kvstore.transport.copier import Copier, CopyDone, CopyJob
from kvstore.transport.share import Share
from kvstore.transport.shared_pages import SharedPages
from kvstore.transport.shm import ShmChannel

PREFILL, DECODE, GATEWAY, EPOCH = PeerId("prefill@1"), PeerId("decode@1"), PeerId("gateway@1"), Incarnation(1)
CONCURRENT = (1, 4, 8, 16)
WAIT_S = 60


@dataclass(frozen=True)
class Shape:
    """A model's KV and the prompts that are handed over."""

    layout: KvLayout
    prompt_tokens: int

    @property
    def n_blocks(self) -> int:
        """Of one prompt."""
        return self.layout.blocks_for(self.prompt_tokens)

    @property
    def budget_bytes(self) -> int:
        """Pages of as many prompts as are handed over at once."""
        return (max(CONCURRENT) * self.n_blocks * self.layout.layers * self.layout.page_bytes // 2**21 + 2) * 2**21


SHAPES = {
    "0.5B": Shape(KvLayout(layers=24, kv_heads=2, head_dim=64, dtype="bfloat16"), 1024),
    "8B": Shape(KvLayout(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16"), 512),
}


@dataclass(frozen=True)
class Row:
    """One line of the result."""

    shape: str
    grants: str
    concurrent: int
    mode: str
    exposed_ms: float
    exposed_ratio: float
    wall_ms: float
    copies: int
    """Contiguous pieces of one hand-over."""


@dataclass
class Round:
    """What one round showed."""

    exposed_ms: list[float] = field(default_factory=list)
    wall_ms: float = 0.0
    copies: int = 0


Event = AnyMessage | CopyDone | int
"""A message of the decode side, the end of a copy, or a layer that was computed."""


class PrefillSide:
    """A worker's loop, reduced to hand-overs: one thread that owns the Sender, fed by engine, copier and link."""

    def __init__(self, shape: Shape, memory: PageMemory, target: SharedPages, link: Connection, units: int) -> None:
        self._shape, self._memory, self._target, self._link, self._units = shape, memory, target, link, units
        self._clock = MonotonicClock()
        self._events: SimpleQueue[Event] = SimpleQueue()
        layout = shape.layout
        self._sender = Sender(layout.layers, max_copy_pages=max(1, 16 * 2**20 // layout.page_bytes))
        self._copier = Copier(self._events.put)
        self._copier.attach(DECODE, ShmChannel(memory.pages.rows, target))
        self._numbers = 0
        self._slots: dict[TransferId, int] = {}
        self._round = Round()
        threading.Thread(target=self._listen, daemon=True).start()

    def run(self, mode: Granularity, concurrent: int, late: bool) -> Round:
        """Hand `concurrent` prompts over, computed as one batch."""
        self._round, now_ms = Round(), self._clock.now_ms()
        for slot in range(concurrent):
            self._numbers += 1
            transfer = TransferId(f"{self._numbers}/{slot}")
            self._slots[transfer] = slot
            request = GrantRequest(
                transfer=transfer,
                request=RequestId(transfer),
                gateway=GATEWAY,
                prompt=(),
                sampling=Sampling(max_tokens=1),
                timeout_ms=60_000,
            )
            self._perform(self._sender.ask(DECODE, request, self._shape.n_blocks, now_ms, now_ms + 60_000, Way(mode)))
        held: list[AnyMessage] = []
        self._take(lambda event: isinstance(event, Grant), concurrent, held)
        if not late:
            self._hear_all(held)
        self._compute(concurrent, held)
        return self._round

    def _compute(self, concurrent: int, held: list[AnyMessage]) -> None:
        began_ms, layers = self._clock.now_ms(), self._shape.layout.layers
        engine = threading.Thread(target=self._engine, args=(concurrent,))
        engine.start()
        transfers = list(self._slots)
        for _ in range(layers):
            self._take(lambda event: isinstance(event, int), 1, held)
        engine.join()
        for transfer in transfers:
            self._perform(self._sender.finished(transfer, FirstToken(token=1), self._clock.now_ms()))
        self._hear_all(held)
        while self._slots:
            self._handle(self._events.get(timeout=WAIT_S))
        self._round.wall_ms = (self._clock.now_ms() - began_ms) / concurrent

    def _engine(self, concurrent: int) -> None:
        matrix = torch.ones((128, 128))
        for layer in range(self._shape.layout.layers):
            for _ in range(self._units * concurrent):
                torch.mm(matrix, matrix)
            self._events.put(layer)

    def _take(self, wanted: Callable[[Event], bool], count: int, held: list[AnyMessage]) -> None:
        """Handle events until `count` wanted ones have come; grants are kept back."""
        while count:
            event = self._events.get(timeout=WAIT_S)
            count -= wanted(event)
            if isinstance(event, Grant):
                held.append(event)
            else:
                self._handle(event)

    def _hear_all(self, held: list[AnyMessage]) -> None:
        while held:
            self._handle(held.pop(0))

    def _handle(self, event: Event) -> None:
        now_ms = self._clock.now_ms()
        match event:
            case int():
                for transfer in list(self._slots):
                    span = KvSpan(event, 0, self._shape.n_blocks)
                    self._perform(self._sender.computed(transfer, span))
            case CopyDone(job=job):
                if not event.ok:
                    raise RuntimeError(event.error_text)
                self._round.copies += event.n_copies
                self._perform(self._sender.copied(job.transfer, job.span, now_ms))
            case _:
                self._perform(self._sender.on_message(DECODE, event, now_ms))

    def _perform(self, actions: list[SenderAction]) -> None:
        for action in actions:
            match action:
                case Send(message=message):
                    if isinstance(message, HandOver):
                        self._round.exposed_ms.append(message.timings.transfer_ms)
                    self._link.send_bytes(encode(message))
                case PostCopy(transfer=transfer, to=to, span=span, target_pages=pages):
                    source = pages_of(self._shape, self._slots[transfer], span)
                    self._copier.post(CopyJob(transfer, to, span, source, pages))
                case HandedOver(transfer=transfer):
                    del self._slots[transfer]
                case GaveUp():
                    raise RuntimeError(action.text)
                case _:
                    continue

    def _listen(self) -> None:
        while message := self._link.recv_bytes():
            self._events.put(decode(message))

    def require_equal(self) -> None:
        """Raise unless every page has arrived."""
        shape = self._shape
        n_pages = max(CONCURRENT) * shape.n_blocks * shape.layout.layers
        if not np.array_equal(self._target.read(range(n_pages)), self._memory.pages.rows[:n_pages]):
            raise RuntimeError("pages arrived with other bytes")

    def close(self) -> None:
        """End the copier."""
        self._copier.stop()


def pages_of(shape: Shape, slot: int, span: KvSpan) -> tuple[int, ...]:
    """Pages of a span of prompt `slot`, as a pool with room gives them: block by block."""
    first, layers = slot * shape.n_blocks + span.first_block, shape.layout.layers
    ids = np.arange(first, first + span.n_blocks)[:, None] * layers + span.layer + np.arange(span.n_layers)
    return tuple(ids.reshape(-1).tolist())


def measure(name: str, shape: Shape, rounds: int, compute_ratio: float) -> list[Row]:
    """All lines of one shape."""
    units = work_units(shape, compute_ratio)
    seen: dict[tuple[bool, int, Granularity], list[Round]] = {}
    with tempfile.TemporaryDirectory() as folder, decode_process(name, folder) as (link, path):
        memory = open_page_memory(shape.budget_bytes, shape.layout)
        memory.pages.rows[:] = (np.arange(memory.pages.n_pages) % 251).astype(np.uint8)[:, None]
        share = Share(PREFILL, on_joined=lambda peer: None, on_gone=lambda peer: None)
        target = share.connect(DECODE, path)
        assert isinstance(target, SharedPages)  # host memory has no other
        side = PrefillSide(shape, memory, target, link, units)
        for mode in Granularity:
            side.run(mode, max(CONCURRENT), late=False)  # touches every page once
            side.require_equal()
        for late, concurrent in product((False, True), CONCURRENT):
            for _ in range(rounds):
                for mode in Granularity:
                    seen.setdefault((late, concurrent, mode), []).append(side.run(mode, concurrent, late))
        side.close()
        share.close()
        memory.close()
    exposed = {key: statistics.median(statistics.fmean(one.exposed_ms) for one in found) for key, found in seen.items()}
    unit_ms = exposed[False, 1, Granularity.LAYER]
    return [
        Row(
            shape=name,
            grants="late" if late else "early",
            concurrent=concurrent,
            mode=mode.value,
            exposed_ms=exposed[late, concurrent, mode],
            exposed_ratio=exposed[late, concurrent, mode] / unit_ms,
            wall_ms=statistics.median(one.wall_ms for one in found),
            copies=found[0].copies // concurrent,
        )
        for (late, concurrent, mode), found in seen.items()
    ]


def work_units(shape: Shape, compute_ratio: float) -> int:
    """Matrix products that last `compute_ratio` times as long as memcpy of one layer of one prompt."""
    layer = np.ones((2, 32, shape.n_blocks * shape.layout.page_bytes), np.uint8)
    matrix = torch.ones((128, 128))
    copy_s, unit_s = [], []
    for number in range(96):
        began_s = time.perf_counter()
        np.copyto(layer[1, number % 32], layer[0, number % 32])
        copied_s = time.perf_counter()
        for _ in range(10):
            torch.mm(matrix, matrix)
        copy_s.append(copied_s - began_s)
        unit_s.append((time.perf_counter() - copied_s) / 10)
    return max(1, round(compute_ratio * statistics.median(copy_s) / statistics.median(unit_s)))


@contextmanager
def decode_process(name: str, folder: str) -> Iterator[tuple[Connection, str]]:
    """The decode side; yields the link to it and where it shares its pages."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=serve, args=(theirs, name, folder), daemon=True)
    child.start()
    try:
        yield ours, ours.recv()
        ours.send_bytes(b"")
    finally:
        child.join(timeout=10)
        child.kill()


def serve(link: Connection, name: str, folder: str) -> None:
    """Answer messages with the real Receiver; a transfer's pages are named by its slot."""
    shape, clock = SHAPES[name], MonotonicClock()
    memory = open_page_memory(shape.budget_bytes, shape.layout)
    share = Share(DECODE, on_joined=lambda peer: None, on_gone=lambda peer: None)
    link.send(share.serve(memory, Path(folder)))
    receiver = Receiver(EPOCH, shape.layout.layers)
    receiver.on_peer_joined(PREFILL)
    while frame := link.recv_bytes():
        actions = receiver.on_message(PREFILL, decode(frame), clock.now_ms())
        while actions:
            match actions.pop(0):
                case Send(message=message):
                    link.send_bytes(encode(message))
                case Asked(request=request):
                    actions += receiver.open(PREFILL, grant(shape, request.transfer), True, clock.now_ms())
                case GaveUp(text=text):
                    raise RuntimeError(text)
                case _:
                    continue
    link.send_bytes(b"")
    share.close()
    memory.close()


def grant(shape: Shape, transfer: TransferId) -> Grant:
    """Pages for a whole prompt."""
    slot = int(transfer.rpartition("/")[2])
    rows = tuple(pages_of(shape, slot, KvSpan(layer, 0, shape.n_blocks)) for layer in range(shape.layout.layers))
    return Grant(transfer=transfer, epoch=EPOCH, first_block=0, pages=rows, lease_ms=60_000)


def main() -> int:
    """Print a table; write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compute-ratio", type=float, default=4.0)
    parser.add_argument("--shape", choices=list(SHAPES), action="append")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = arguments.shape or list(SHAPES)
    rows = [row for name in names for row in measure(name, SHAPES[name], arguments.rounds, arguments.compute_ratio)]
    print(
        f"{'shape':6} {'grants':6} {'n':>3} {'mode':10} {'exposed':>11} {'ratio':>7} {'wall/prompt':>11} {'copies':>7}"
    )
    for row in rows:
        numbers = f"{row.exposed_ms:8.2f} ms {row.exposed_ratio:7.2f} {row.wall_ms:8.2f} ms {row.copies:7}"
        print(f"{row.shape:6} {row.grants:6} {row.concurrent:3} {row.mode:10} {numbers}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
