"""A scheduler with a host buffer, an engine that tells a wrong page by a wrong token, and copies in random order.

The engine may run ahead of the copies as far as the gate lets it, and no further: a layer that is written too early, or read
before it is there, shows as a wrong token.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from common.block_hash import BlockHash
from common.ids import RequestId
from common.kv_layout import KvLayout
from common.messages.requests import Sampling
from common.policy.batching import Candidate, DecodeFirst
from common.policy.eviction import Lru
from kvstore.index.block_pool import BlockPool
from kvstore.index.ledger import Ledger
from services.worker.core.actions import Action, BeginRing, FetchBlocks, Moved, StoreBlocks
from services.worker.core.calls import Calls
from services.worker.core.elastic import OwnScratch
from services.worker.core.host_buffer import HostBuffer
from services.worker.core.layer_rings import OffloadRule
from services.worker.core.outputs import finish_of
from services.worker.core.parking import Parking
from services.worker.core.plan import StepPlan
from services.worker.core.pool_memory import PoolMemory
from services.worker.core.prefix import Keep, PrefixReuse
from services.worker.core.restoring import Restoring
from services.worker.core.scheduler import Scheduler
from services.worker.core.sequence import NewPrompt
from tests.support.world_memory import Memory, MemoryEngine

LAYERS, BLOCK_TOKENS = 6, 4
LAYOUT = KvLayout(layers=LAYERS, kv_heads=1, head_dim=8, dtype="float32", block_tokens=BLOCK_TOKENS)
ROOT = BlockHash(bytes(16))


class ShortScratch(OwnScratch):
    """Of an engine that lacks memory for larger steps."""

    def __init__(self, most_rows: int) -> None:
        self._most_rows = most_rows

    def choose(self, policy: DecodeFirst, candidates: Sequence[Candidate]) -> list[int]:
        return policy.choose(candidates, self._most_rows)


@dataclass
class Tiered:
    """`retained`: layers that stay while a prompt is computed; None: prompts are computed with all layers or not at all."""

    rng: random.Random
    pages: int = 60
    host_pages: int = 600
    retained: int | None = 0
    keep: Keep = Keep.NOTHING
    flaky: float = 0.0
    most_rows: int = 10**6
    """That there is scratch for."""
    copies: deque[StoreBlocks | FetchBlocks] = field(default_factory=deque)
    finished: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pool = BlockPool(Ledger(self.pages), LAYERS, Lru())
        reuse = PrefixReuse(self.pool, self.keep, BLOCK_TOKENS, PoolMemory(ShortScratch(self.most_rows)))
        self.target = Scheduler(reuse, LAYOUT, DecodeFirst(16, BLOCK_TOKENS), max_running=8, context_tokens=400)
        rule = None if self.retained is None else OffloadRule(lambda _: self.retained or 0, 300)
        self.parking = Parking(reuse, HostBuffer(self.host_pages, LAYERS), Calls())
        self.target.park_in(self.parking, rule)
        self.restoring = Restoring(self.target)
        self.engine = MemoryEngine(layers=LAYERS, block_tokens=BLOCK_TOKENS)
        self.memory, self.host = Memory(BLOCK_TOKENS, self.pages), Memory(BLOCK_TOKENS, self.host_pages)
        self.plan: StepPlan | None = None
        self.layer, self.wrong = 0, set[str]()
        self.ring_free: dict[int, int] = {}
        self.loaded: dict[int, int] = {}
        self.queued: deque[NewPrompt] = deque()

    # -- requests

    def submit(self, name: str, tokens: list[int], max_tokens: int) -> None:
        """It waits, as a worker's prompts do, until there is room."""
        sampling = Sampling(max_tokens=max_tokens)
        self.queued.append(NewPrompt(request=RequestId(name), tokens=tuple(tokens), sampling=sampling, root=ROOT))
        self.pump()

    def pump(self) -> None:
        while self.queued and self.target.has_room(len(self.queued[0].tokens)):
            self.target.submit(self.queued.popleft())
        if self.plan is None:
            self.plan = self.target.plan()
        self.act(self.parking.take_orders())
        for started in self.target.take_started():
            if started.load is not None:
                self.act(self.restoring.start(started.load))

    def drop(self, name: str) -> None:
        self.queued = deque(one for one in self.queued if one.request != name)
        self.target.drop(RequestId(name))
        self.pump()

    def act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case BeginRing(ring, free_layer):
                    assert ring not in self.ring_free
                    self.ring_free[ring] = free_layer
                case StoreBlocks() | FetchBlocks():
                    self.copies.append(action)

    # -- events

    @property
    def may_compute(self) -> bool:
        """What the gate says of the next layer."""
        if self.plan is None:
            return False
        if self.layer == LAYERS:
            return True
        free = all(self.ring_free.get(ring, LAYERS) >= self.layer for ring in self.plan.rings)
        missing = (move for move in self.copies if isinstance(move, FetchBlocks) and move.call in self.plan.loads)
        return free and all(self.layer < self.first_missing(move) for move in missing)

    def first_missing(self, move: FetchBlocks) -> int:
        layers = move.layers or tuple(range(LAYERS))
        return layers[self.loaded.get(move.call, 0)]

    def turn(self) -> bool:
        """One random event; False if there is none."""
        choices = [self.compute] * self.may_compute + [self.copy] * bool(self.copies)
        if not choices:
            return False
        self.rng.choice(choices)()
        self.pump()
        return True

    def compute(self) -> None:
        assert self.plan is not None
        if self.layer < LAYERS:
            self.engine.layer(self.plan, self.layer, self.memory, self.wrong)
            self.layer += 1
            if any(segment.streamed for segment in self.plan.segments):
                self.act(self.target.offload.on_layer(self.layer - 1, 1))
            return
        result = self.engine.finish(self.plan, self.memory, self.wrong)
        self.plan, self.layer, self.wrong = None, 0, set()
        for new in self.target.complete(result):
            if finish_of(new.sequence) is not None:
                self.finished[new.sequence.request] = new.sequence.tokens[new.sequence.prompt_tokens :]
                self.target.drop(new.sequence.request)

    def copy(self) -> None:
        """The oldest fetch before the oldest store, as the block mover does; a fetch by one layer."""
        move = next((one for one in self.copies if isinstance(one, FetchBlocks)), self.copies[0])
        ok = self.rng.random() >= self.flaky
        if isinstance(move, StoreBlocks):
            if ok:
                self.host.write_all(
                    move.peer_pages.ravel().tolist(), self.memory.read_all(move.own_pages.ravel().tolist())
                )
            if move.ring is not None:
                if move.free_layer is None:
                    del self.ring_free[move.ring]
                else:
                    self.ring_free[move.ring] = move.free_layer
        else:
            column = self.loaded.get(move.call, 0)
            if ok:
                source, target = move.peer_pages[:, column].tolist(), move.own_pages[:, column].tolist()
                self.memory.write_all(target, self.host.read_all(source))
                self.loaded[move.call] = column + 1
                if column + 1 < move.own_pages.shape[1]:
                    return
            else:
                self.restoring.on_layer_failed(move.call)
        self.copies.remove(move)
        assert self.restoring.on_moved(move.call, Moved(ok, 1.0, 1, 1000), 0.0)

    def run(self) -> None:
        self.pump()
        while self.turn():
            self.restoring.check()

    def settled(self) -> None:
        """Nothing is left anywhere."""
        self.pool.check()
        self.restoring.check()
        assert self.target.idle and not self.queued and not self.copies and not self.ring_free
        assert self.pool.available_pages == self.pages and self.parking.buffer.used_pages == 0
        assert self.restoring.n_open == 0 and self.pool.cache.n_pinned == 0
