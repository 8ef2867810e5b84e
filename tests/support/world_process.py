"""One life of a worker in a pure world: its real core, its pretended memory, and what waits to be done for it."""

from collections import deque
from dataclasses import dataclass, field

from common.ids import PeerId, peer_id
from common.kv_layout import KvLayout
from common.messages.liveness import Member, ModelIdentity
from kvstore.index.ledger import Ledger
from services.worker.build_core import build_core
from services.worker.build_parts import Machine
from services.worker.core.actions import Copy, FetchBlocks, StoreBlocks
from services.worker.core.decode import DecodeCore
from services.worker.core.plan import StepPlan, StepResult
from services.worker.core.prefill import PrefillCore
from services.worker.settings import WorkerSettings
from tests.support.world_memory import Memory, Page

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=8, dtype="float32", block_tokens=4)
CHUNK_PAGES = 4
MODEL = ModelIdentity(
    name="m",
    fingerprint="f",
    architecture="a",
    dtype="float32",
    layers=2,
    kv_heads=1,
    head_dim=8,
    block_tokens=4,
    vocab_tokens=1000,
    context_tokens=1000,
)
SETTINGS: dict[str, object] = {
    "max_running": 5,
    "max_step_tokens": 16,
    "max_queued": 100,
    "silent_peer_ms": 3_000,
    "fetch": "always",
}
"""Of WorkerSettings, where a test says nothing else."""


@dataclass
class Move:
    """A job of the block mover: one layer, or all of it, at a time."""

    order: FetchBlocks | StoreBlocks
    next_layer: int = 0
    """Column of the order's pages."""
    broken: bool = False

    @property
    def first_missing(self) -> int:
        layers = self.order.layers if isinstance(self.order, FetchBlocks) else ()
        return layers[self.next_layer] if layers else self.next_layer


@dataclass
class Process:
    """Owns what its shell would: steps that are planned, copies that wait, and the order in which they are done."""

    peer: PeerId
    core: PrefillCore | DecodeCore
    ledger: Ledger
    layers: int
    """Of the model."""
    memory: Memory
    host: Memory
    """Its host buffer."""
    max_running: int
    context_tokens: int
    steps: deque[StepPlan] = field(default_factory=deque)
    """Planned and not computed."""
    results: deque[StepResult] = field(default_factory=deque)
    """Computed, and not told yet: only when steps are planned ahead."""
    layer: int = 0
    """Of the first step, to be computed next."""
    untold: int = 0
    """Layers of it that were computed and not told yet."""
    wrong: set[str] = field(default_factory=set)
    copies: deque[Copy] = field(default_factory=deque)
    payloads: dict[tuple[object, object], list[Page]] = field(default_factory=dict)
    arena: list[int] = field(default_factory=list)
    """Chunks that serve steps, in order."""
    refills: deque[tuple[int, ...]] = field(default_factory=deque)
    """Chunks that the system was asked for."""
    resizes: deque[int] = field(default_factory=deque)
    """Pages that there shall be memory for."""
    moves: deque[Move] = field(default_factory=deque)
    rings: dict[int, int] = field(default_factory=dict)
    """Up to which layer the engine may write those that have not ended."""
    alive: bool = True

    @property
    def step(self) -> StepPlan | None:
        """What is computed now."""
        return self.steps[0] if self.steps else None

    @property
    def waits_for_load(self) -> bool:
        """The gate: a layer is computed when it has been fetched, or never will be; and when its pages may be written."""
        if self.is_ring_closed:
            return True
        loads = self.step.loads if self.step is not None else ()
        moves = [move for move in self.moves if move.order.call in loads]
        return any(move.first_missing <= self.layer for move in moves)

    @property
    def is_ring_closed(self) -> bool:
        """The pages of the next layer may not be written yet."""
        return any(
            self.rings.get(ring, self.layers) < self.layer < self.layers
            for ring in (self.step.rings if self.step is not None else ())
        )

    def begin_ring(self, ring: int, free_layer: int) -> None:
        assert ring not in self.rings
        self.rings[ring] = free_layer

    def open_ring(self, ring: int, free_layer: int | None) -> None:
        """Up to that layer, never less than before; None: it ends."""
        if ring not in self.rings:
            return
        if free_layer is None:
            del self.rings[ring]
        else:
            self.rings[ring] = max(self.rings[ring], free_layer)

    def free_ring(self, order: FetchBlocks | StoreBlocks) -> None:
        """A copy has ended, well or not: the engine may write its pages again."""
        if isinstance(order, StoreBlocks) and order.ring is not None:
            if order.free_layer is None:
                del self.rings[order.ring]
            else:
                self.rings[order.ring] = order.free_layer

    @property
    def next_move(self) -> Move:
        """The oldest fetch before the oldest store."""
        return next((move for move in self.moves if isinstance(move.order, FetchBlocks)), self.moves[0])

    def break_moves(self, peer: PeerId) -> None:
        """Blocks that wait to go to a peer, or come from it, will not."""
        for move in self.moves:
            move.broken = move.broken or move.order.peer == peer


def new_process(mine: Member, settings: WorkerSettings, machine: Machine) -> Process:
    """A life that begins, with memory that nobody has written."""
    core = build_core(mine, settings, machine)
    assert isinstance(core, PrefillCore | DecodeCore)
    return Process(
        peer=peer_id(mine.id, mine.incarnation),
        core=core,
        ledger=core.pool.ledger,
        layers=machine.layout.layers,
        memory=Memory(LAYOUT.block_tokens, n_pages=machine.size.n_pages),
        host=Memory(LAYOUT.block_tokens, n_pages=machine.size.host_pages),
        max_running=settings.running_limit,
        context_tokens=mine.takes_tokens,
    )
