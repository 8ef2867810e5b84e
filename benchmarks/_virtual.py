"""A cluster in virtual time: the gateway's own cores, and workers that only count. Nothing of the routing is done anew here.

A prefill or mixed worker computes its prompts one after the other, each for StepCost.exec_ms of what its cache lacks when its
turn comes. Its cache gives up least recently used leaves. It answers Pings like a real one: pages, queue, predicted work, cost,
links. What its cache gains and loses reaches the prompt tree `event_delay_ms` later. A prefix is fetched from a peer when
Generate says so: it travels while the prompt waits. Decoding goes on beside it and costs no prompt any time; moving the KV to
the decode worker takes none, and messages take none.
"""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from common.block_hash import BlockHash, root_hash
from common.cost.link_cost import LinkCost
from common.cost.step_cost import StepCost
from common.ids import Incarnation, PeerId, RequestId, WorkerId, peer_id
from common.messages.actions import Send
from common.messages.cache_events import CacheBatch, CacheEvent, CacheSnapshot
from common.messages.liveness import Hello, Member, ModelIdentity, PageCounts, Ping, QueueCounts, Report, Welcome
from common.messages.requests import AskAbout, Generate, Sampling, StillHere, TokenDelta, Tokens
from common.policy.eviction import Lru
from common.policy.routing import Router
from gateway.core.actions import Action, Deliver, End
from gateway.core.dispatch import Dispatch
from gateway.core.inflight import Parts
from gateway.core.keys import KeyLimits
from gateway.core.order import Order
from gateway.core.placement import Placement, token_bytes
from gateway.core.prompt_tree import Checked, PromptTree
from gateway.core.recovery import RetryTerms
from gateway.core.roster import Fit, Roster
from gateway.core.terms import Terms
from gateway.core.totals import RoutingTotals
from kvstore.index.block_cache import BlockCache

TICK_MS, CHECK_MS = 50.0, 1_000.0
_NEVER_MS = 1e12
_ANSWER = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One request of a trace."""

    at_ms: float
    prompt: tuple[int, ...]
    names: Sequence[BlockHash]
    max_tokens: int = 1
    session: str | None = None
    after: int | None = None
    """Place in the trace of the turn whose answer must be there first."""


@dataclass(frozen=True, slots=True)
class Served:
    """What became of one request."""

    entry: WorkerId
    prompt_tokens: int
    cached_tokens: int
    """Not computed; fetched ones are among them."""
    ttft_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A cluster."""

    roles: Sequence[str]
    """One per worker: prefill, decode or mixed."""
    model: ModelIdentity
    cost: StepCost
    router: Router
    capacity_blocks: int | None = None
    """What a worker caches; None: everything."""
    link_bytes_per_s: float | None = None
    """Between any two workers that compute prompts; None: there is no link, nothing is fetched."""
    event_delay_ms: float = 5.0
    expectations: bool = True
    """Whether a prompt counts as cached from when it was routed."""
    lost_share: float = 0.0
    """Share of prompts whose cached prefix is gone when their turn comes, and no event told."""
    seed: int = 0


class ForgetfulTree(PromptTree):
    """Believes only what workers have told."""

    def expect(self, peer: PeerId, names: Sequence[BlockHash], now_ms: float) -> None:
        pass  # that is the difference


@dataclass(slots=True)
class _Job:
    generate: Generate
    names: Sequence[BlockHash]
    ready_ms: float
    cached_tokens: int = 0


@dataclass(slots=True)
class Calendar:
    """What happens when. Equal times in the order of planning."""

    now_ms: float = 0.0
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _serials: "itertools.count[int]" = field(default_factory=itertools.count)

    def plan(self, at_ms: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (max(at_ms, self.now_ms), next(self._serials), event))

    def step(self) -> None:
        self.now_ms, _, event = heapq.heappop(self._events)
        event()


class VirtualWorker:
    """Owns its queue and its cache."""

    def __init__(self, world: "World", member: Member) -> None:
        self.member, self.peer = member, peer_id(member.id, member.incarnation)
        self._world, self._scene = world, world.scene
        self._root = root_hash(world.scene.model)
        self.cache = BlockCache[None](Lru())
        self._waiting: deque[_Job] = deque()
        self._running: _Job | None = None
        self._ends_ms = 0.0
        self._link_free_ms = 0.0
        self._event_number = 0
        self._decoding, self._kv_tokens = 0, 0

    # -- prompts

    def on_generate(self, generate: Generate) -> None:
        names = self._world.names_of(generate.request)
        self._waiting.append(_Job(generate, names, self._fetched_ms(generate, names)))
        self._start_next()

    def _fetched_ms(self, generate: Generate, names: Sequence[BlockHash]) -> float:
        """When what was hinted at is here. Only what the holder really has travels."""
        now_ms, hint, rate = self._world.now_ms, generate.fetch, self._scene.link_bytes_per_s
        if hint is None or rate is None:
            return now_ms
        mine, theirs = self.cache.run(names), self._world.worker(hint.holder).cache.run(names[: hint.n_blocks])
        if theirs <= mine:
            return now_ms
        n_bytes = (theirs - mine) * self._scene.model.block_tokens * token_bytes(self._scene.model)
        self._link_free_ms = max(now_ms, self._link_free_ms) + LinkCost("", "", rate, 1.0).fetch_ms(n_bytes)
        self._world.plan(self._link_free_ms, lambda: self._keep(names[:theirs]))
        return self._link_free_ms

    def _start_next(self) -> None:
        if self._running is not None or not self._waiting:
            return
        job = self._running = self._waiting.popleft()
        self._world.plan(job.ready_ms, lambda: self._compute(job))

    def _compute(self, job: _Job) -> None:
        run, block = self.cache.run(job.names), self._scene.model.block_tokens
        if run and self._world.draw() < self._scene.lost_share:
            for name in reversed(job.names[:run]):
                self.cache.remove(name)
            run = 0
        self.cache.use(job.names[:run])
        tokens = len(job.generate.prompt)
        job.cached_tokens = min(run, (tokens - 1) // block) * block
        self._ends_ms = self._world.now_ms + self._scene.cost.exec_ms(tokens, job.cached_tokens)
        self._world.plan(self._ends_ms, self._computed)

    def _computed(self) -> None:
        job, self._running = self._running, None
        assert job is not None, "something was computed"
        self._keep(job.names)
        decode = job.generate.decode
        (self if decode is None else self._world.named(decode)).on_prompt(job.generate, job.cached_tokens)
        self._start_next()

    def _keep(self, names: Sequence[BlockHash]) -> None:
        """Cache them, give up others for them, and tell."""
        new = self.cache.insert(names, [None] * len(names), parent=self._root, depth=0)
        events = [("stored", names[position]) for position in new]
        capacity = self._scene.capacity_blocks
        if capacity is not None and len(self.cache) > capacity:
            events += [("removed", block.name) for block in self.cache.evict(len(self.cache) - capacity)]
        if events:
            first, self._event_number = self._event_number + 1, self._event_number + len(events)
            told = tuple(CacheEvent(first + at, kind, name) for at, (kind, name) in enumerate(events))
            self._world.tell(CacheBatch(self.peer, first, self._event_number, told))

    # -- answers

    def on_prompt(self, generate: Generate, cached_tokens: int) -> None:
        """All KV of the prompt is here: the first token after a step, the last one after as many as it takes."""
        self._decoding += 1
        self._kv_tokens += len(generate.prompt)
        step_ms = self._scene.cost.step_ms(self._decoding, self._kv_tokens)
        more = generate.sampling.max_tokens - 1
        first = TokenDelta(generate.request, 0, (_ANSWER,), None if more else "length", cached_tokens=cached_tokens)
        self._world.plan(self._world.now_ms + step_ms, lambda: self._draw(generate, first))
        if more:
            rest = TokenDelta(generate.request, 1, (_ANSWER,) * more, "length")
            self._world.plan(self._world.now_ms + step_ms * (1 + more), lambda: self._draw(generate, rest))

    def _draw(self, generate: Generate, delta: TokenDelta) -> None:
        if delta.finish is not None:
            self._decoding -= 1
            self._kv_tokens -= len(generate.prompt)
        self._world.hear(self, Tokens(deltas=(delta,)))

    # -- reports

    def report(self, sequence: int) -> Report:
        block, layers, cached = self._scene.model.block_tokens, self._scene.model.layers, len(self.cache)
        capacity = 10**7 if self._scene.capacity_blocks is None else self._scene.capacity_blocks
        return Report(
            worker=self.member.id,
            role=self.member.role,
            incarnation=self.member.incarnation,
            sequence=sequence,
            pages=PageCounts(
                total=capacity * layers, free=max(0, capacity - cached) * layers, cached=min(cached, capacity) * layers
            ),
            queue=QueueCounts(
                waiting=len(self._waiting),
                running=self._decoding + (self._running is not None),
                waiting_tokens=sum(len(job.generate.prompt) for job in self._waiting),
                work_ms=self._work_ms(block),
                kv_tokens=self._kv_tokens,
            ),
            cost=self._scene.cost,
            links=self._links(),
        )

    def _work_ms(self, block: int) -> float:
        """As services/worker/core/costing.py counts it: cached is what the device holds now."""
        exec_ms = self._scene.cost.exec_ms
        left_ms = max(0.0, self._ends_ms - self._world.now_ms) if self._running is not None else 0.0
        return left_ms + sum(exec_ms(len(j.generate.prompt), self.cache.run(j.names) * block) for j in self._waiting)

    def _links(self) -> tuple[LinkCost, ...]:
        rate = self._scene.link_bytes_per_s
        if rate is None or self.member.role == "decode":
            return ()
        queued_bytes = int(max(0.0, self._link_free_ms - self._world.now_ms) / 1e3 * rate)
        others = [peer for peer in self._world.computing_peers if peer != self.peer]
        return tuple(LinkCost(peer, "device", rate, 1.0, queued_bytes) for peer in others)


class World:
    """Runs one trace through one gateway."""

    def __init__(self, scene: Scene, trace: Sequence[Visit]) -> None:
        self.scene, self._trace = scene, trace
        self._calendar = Calendar()
        self.plan = self._calendar.plan
        self.draw = random.Random(scene.seed).random
        self._tree = PromptTree() if scene.expectations else ForgetfulTree()
        self._dispatch = _dispatch(scene, self._tree)
        members = [_member(scene, role, number) for number, role in enumerate(scene.roles)]
        workers = [VirtualWorker(self, member) for member in members]
        self._by_peer = {worker.peer: worker for worker in workers}
        self._by_name = {worker.member.id: worker for worker in workers}
        self.computing_peers = [worker.peer for worker in workers if worker.member.role != "decode"]
        self._entries: dict[RequestId, WorkerId] = {}
        self._sent_ms: dict[RequestId, float] = {}
        self._found: dict[RequestId, Served] = {}
        self._cached: dict[RequestId, int] = {}
        self._ended: set[RequestId] = set()
        self._followers: dict[int, list[int]] = {}
        for peer in self._by_peer:
            self._tree.put(CacheSnapshot(peer, 0, []))
        self._tree.apply_some(1, 0.0)
        self._perform(self._dispatch.on_members(members, 0.0))

    @property
    def now_ms(self) -> float:
        return self._calendar.now_ms

    def worker(self, peer: PeerId) -> VirtualWorker:
        return self._by_peer[peer]

    def named(self, name: WorkerId) -> VirtualWorker:
        return self._by_name[name]

    def names_of(self, request: RequestId) -> Sequence[BlockHash]:
        return self._trace[int(request)].names

    def run(self) -> list[Served]:
        """All requests of the trace, in its order. Raises RuntimeError if one fails."""
        for index, visit in enumerate(self._trace):
            if visit.after is None:
                self.plan(visit.at_ms, lambda index=index: self._submit(index))  # type: ignore[misc]  # bound now
            else:
                self._followers.setdefault(visit.after, []).append(index)
        self._tick()
        self._check_numbers()
        while len(self._ended) < len(self._trace):
            self._calendar.step()
        self._dispatch.check()
        return [self._found[RequestId(str(index))] for index in range(len(self._trace))]

    def _submit(self, index: int) -> None:
        visit, request = self._trace[index], RequestId(str(index))
        self._sent_ms[request] = self.now_ms
        order = Order(
            request=request,
            prompt=visit.prompt,
            sampling=Sampling(max_tokens=visit.max_tokens),
            model=self.scene.model.name,
            session=visit.session,
        )
        self._perform(self._dispatch.submit([order], self.now_ms))

    def _tick(self) -> None:
        self.plan(self.now_ms + TICK_MS, self._tick)
        self._tree.on_tick(self.now_ms)
        self._perform(self._dispatch.on_tick(self.now_ms))

    def _check_numbers(self) -> None:
        """The feed's sign of life. It says nothing that has not been passed on."""
        self.plan(self.now_ms + CHECK_MS, self._check_numbers)
        self._tree.put(Checked({peer: self._tree.number(peer) for peer in self._by_peer}))
        self._tree.apply_some(1, self.now_ms)

    def tell(self, batch: CacheBatch) -> None:
        """The tree hears of it later."""

        def arrive() -> None:
            self._tree.put(batch)
            while not self._tree.idle:
                assert not self._tree.apply_some(10_000, self.now_ms), "no event is lost here"

        self.plan(self.now_ms + self.scene.event_delay_ms, arrive)

    def hear(self, worker: VirtualWorker, message: Tokens | StillHere | Report | Welcome) -> None:
        self._perform(self._dispatch.on_message(worker.peer, message, self.now_ms))

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Send(to, Generate() as generate):
                    self._entries[generate.request] = self._by_peer[to].member.id
                    self._by_peer[to].on_generate(generate)
                case Send(to, Ping(sequence=sequence)):
                    self.hear(self._by_peer[to], self._by_peer[to].report(sequence))
                case Send(to, AskAbout(requests=requests)):
                    self.hear(self._by_peer[to], StillHere(requests=requests))
                case Send(to, Hello()):
                    self.hear(self._by_peer[to], Welcome(member=self._by_peer[to].member))
                case Deliver(request, delta):
                    self._on_delivered(request, delta)
                case End(request, error):
                    raise RuntimeError(f"request {request} failed: {error}")

    def _on_delivered(self, request: RequestId, delta: TokenDelta) -> None:
        if delta.position == 0:
            tokens, cached = len(self._trace[int(request)].prompt), delta.cached_tokens or 0
            ttft_ms = self.now_ms - self._sent_ms[request]
            self._found[request] = Served(self._entries[request], tokens, cached, ttft_ms)
        if delta.finish is not None:
            self._ended.add(request)
            for index in self._followers.get(int(request), ()):
                self.plan(self._trace[index].at_ms, lambda index=index: self._submit(index))  # type: ignore[misc]  # bound now


def _member(scene: Scene, role: str, number: int) -> Member:
    name = WorkerId(f"{role}-{number}")
    return Member(id=name, role=role, incarnation=Incarnation(1), endpoint="", host="", pid=0, model=scene.model)


def _dispatch(scene: Scene, tree: PromptTree) -> Dispatch:
    this = Member(id=WorkerId("gateway-0"), role="gateway", incarnation=Incarnation(9), endpoint="", host="", pid=0)
    roster = Roster(this=this, silent_ms=_NEVER_MS, fit=Fit(scene.model.name, scene.model.vocab_tokens))
    totals = RoutingTotals()
    parts = Parts(
        roster=roster,
        placement=Placement(roster, scene.router, tree, totals),
        keys=KeyLimits({}),
        totals=totals,
        draw=random.Random(scene.seed).random,
    )
    return Dispatch(parts, Terms(timeout_ms=_NEVER_MS, max_open=10**9, retry=RetryTerms(attempts=1)))
