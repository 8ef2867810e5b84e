"""One worker that computes prompts and draws answers, in virtual time, with or without layer-wise KV: a small loop of its own.

How many layers stay, who may start and who is in time is said by the service's own parts (common/policy/layer_retention.py,
services/worker/core/slo.py). The loop itself is none of the service's: one thing happens at a time, either a prompt (alone)
or a step in which all who draw get a token; a request is given room for its whole length or none, so nobody gives way; moving
KV costs time on the link, and neither memory bandwidth nor processors.
"""

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from common.cost.step_cost import StepCost
from common.ids import RequestId
from common.messages.liveness import QueueCounts
from common.messages.requests import Generate, Sampling
from common.policy.admission import AdmissionGate, FirstComeFirstServed, SlackGate
from common.policy.layer_retention import retained_layers
from common.policy.output_length import LengthPredictor
from services.worker.core.slo import PromptGate, Slo, SloWatch

RING_LAYERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What is served with."""

    cost: StepCost
    layers: int
    layer_token_bytes: int
    """KV of a token in one layer."""
    kv_tokens: int
    """All layers of so many tokens fit."""
    link_bytes_per_s: float
    host_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How it is served."""

    layer_wise: bool
    gated: bool
    slo: Slo
    percentile: float = 0.9
    """Of lengths seen, for what is foretold of answers."""


@dataclass(slots=True)
class Job:
    """One request."""

    number: int
    at_ms: float
    prompt_tokens: int
    output_tokens: int
    most_tokens: int
    """Of output: what is known of it beforehand."""
    generated_tokens: int = 0
    first_ms: float = 0.0
    last_ms: float = 0.0

    @property
    def request(self) -> RequestId:
        return RequestId(str(self.number))

    @property
    def tokens(self) -> range:
        """As long as what is known of it."""
        return range(self.prompt_tokens + self.generated_tokens)

    @property
    def limit_tokens(self) -> int:
        return self.prompt_tokens + self.most_tokens

    @property
    def room_tokens(self) -> int:
        """What it will need, as if its length were known."""
        return self.prompt_tokens + self.output_tokens

    @property
    def message(self) -> Generate:
        """As it came, as far as a gate reads it."""
        sampling = Sampling(max_tokens=self.most_tokens)
        return Generate(request=self.request, prompt=(), sampling=sampling, timeout_ms=1)

    has_pages = False
    """Of those that the gate is shown: who has drawn and is parked, and who has not begun."""

    @property
    def uncomputed_tokens(self) -> int:
        return 1 if self.generated_tokens else self.prompt_tokens

    @property
    def ttft_ms(self) -> float:
        return self.first_ms - self.at_ms

    @property
    def tpot_ms(self) -> float:
        return (self.last_ms - self.first_ms) / max(1, self.output_tokens - 1)


@dataclass(slots=True)
class Served:
    """All requests, and what it took."""

    jobs: list[Job]
    counters: dict[str, float]
    most_parked_tokens: int
    copied_tokens: int


@dataclass(slots=True)
class LayerKvWorker:
    """Owns the room on the device, who is where, and the link's time."""

    device: Device
    way: Way
    now_ms: float = 0.0
    _waiting: deque[Job] = field(default_factory=deque)
    _drawing: list[Job] = field(default_factory=list)
    _parked: deque[Job] = field(default_factory=deque)
    _coming: list[tuple[float, int, Job]] = field(default_factory=list)
    _used_tokens: int = 0
    _parked_tokens: int = 0
    _link_free_ms: float = 0.0
    _most_parked_tokens: int = 0
    _copied_tokens: int = 0

    def run(self, jobs: Sequence[Job]) -> Served:
        """All requests, to their ends."""
        watch, arrivals = (
            SloWatch(self.way.slo, LengthPredictor(self.way.percentile)),
            deque(sorted(jobs, key=lambda job: job.at_ms)),
        )
        policy: AdmissionGate = SlackGate(self.way.slo.tpot_ms) if self.way.gated else FirstComeFirstServed()
        gate = PromptGate(policy, watch, self._parts())  # type: ignore[arg-type]  # what a gate reads of a worker
        while arrivals or self._waiting or self._drawing or self._parked or self._coming:
            while arrivals and arrivals[0].at_ms <= self.now_ms:
                self._waiting.append(arrivals.popleft())
                watch.arrived(self._waiting[-1].request, self._waiting[-1].at_ms)
            self._bring_back()
            if self._waiting and self._may_start(self._waiting[0], gate):
                self._compute(self._waiting.popleft(), watch)
            elif self._drawing:
                self._draw(watch)
            else:
                times_ms = [arrivals[0].at_ms] if arrivals else []
                self.now_ms = min(times_ms + [ready_ms for ready_ms, _, _ in self._coming])
            watch.end_step(self.now_ms)
        return Served(list(jobs), watch.counters(), self._most_parked_tokens, self._copied_tokens)

    def _parts(self) -> SimpleNamespace:
        cost = self.device.cost
        costing = SimpleNamespace(
            cost=cost,
            sequence_ms=lambda job: cost.exec_ms(len(job.tokens), len(job.tokens) - job.uncomputed_tokens),
            prompt_ms=lambda prompt: cost.exec_ms(len(prompt.tokens), 0),
        )
        return SimpleNamespace(costing=costing, scheduler=_Standing(self))

    # -- room

    @property
    def absent(self) -> list[Job]:
        """Who has a first token and no pages, in the order in which they get them."""
        return [*(job for _, _, job in sorted(self._coming)), *self._parked]

    @property
    def drawing_tokens(self) -> int:
        """Of KV that a step reads."""
        return sum(len(job.tokens) for job in self._drawing)

    def _may_start(self, job: Job, gate: PromptGate) -> bool:
        need = job.room_tokens
        if self.way.layer_wise and (self._parked or self._used_tokens + need > self.device.kv_tokens):
            if self._parked_tokens + job.prompt_tokens > self.device.host_tokens:
                return False
            layer_bytes = job.prompt_tokens * self.device.layer_token_bytes
            prefill_ms = self.device.cost.exec_ms(job.prompt_tokens, 0)
            kept = retained_layers(self.device.layers, prefill_ms, layer_bytes, self.device.link_bytes_per_s)
            layers = min(self.device.layers, kept + RING_LAYERS)
            need = job.prompt_tokens * layers // self.device.layers
        fits = self._used_tokens + need <= self.device.kv_tokens
        return fits and gate.admits(job, self.now_ms)  # type: ignore[arg-type]  # it reads the tokens

    def _compute(self, job: Job, watch: SloWatch) -> None:
        self.now_ms += self.device.cost.exec_ms(job.prompt_tokens, 0)
        self._give_token(job, watch)
        if not job.generated_tokens < job.output_tokens:
            return
        if not self._parked and self._used_tokens + job.room_tokens <= self.device.kv_tokens:
            self._used_tokens += job.room_tokens
            self._drawing.append(job)
        else:
            self._parked.append(job)
            self._parked_tokens += job.prompt_tokens
            self._most_parked_tokens = max(self._most_parked_tokens, self._parked_tokens)
            self._occupy_link(job)

    def _bring_back(self) -> None:
        """The oldest first, when there is room for it to its end."""
        while self._parked and self._used_tokens + self._parked[0].room_tokens <= self.device.kv_tokens:
            job = self._parked.popleft()
            self._used_tokens += job.room_tokens
            heapq.heappush(self._coming, (self._occupy_link(job), job.number, job))
        while self._coming and self._coming[0][0] <= self.now_ms:
            job = heapq.heappop(self._coming)[2]
            self._parked_tokens -= job.prompt_tokens
            self._drawing.append(job)

    def _occupy_link(self, job: Job) -> float:
        """Its whole KV crosses behind what crosses already, and not before the prompt that is being computed began to."""
        self._copied_tokens += job.prompt_tokens
        n_bytes = job.prompt_tokens * self.device.layers * self.device.layer_token_bytes
        self._link_free_ms = max(self._link_free_ms, self.now_ms) + n_bytes / self.device.link_bytes_per_s * 1e3
        return self._link_free_ms

    # -- tokens

    def _draw(self, watch: SloWatch) -> None:
        self.now_ms += self.device.cost.step_ms(len(self._drawing), self.drawing_tokens)
        for job in self._drawing:
            self._give_token(job, watch)
        ended = [job for job in self._drawing if job.generated_tokens == job.output_tokens]
        self._used_tokens -= sum(job.room_tokens for job in ended)
        self._drawing = [job for job in self._drawing if job.generated_tokens < job.output_tokens]

    def _give_token(self, job: Job, watch: SloWatch) -> None:
        job.generated_tokens += 1
        job.last_ms = self.now_ms
        if job.generated_tokens == 1:
            job.first_ms = self.now_ms
        watch.drawn(job, self.now_ms)  # type: ignore[arg-type]  # what a watch reads of a sequence
        if job.generated_tokens == job.output_tokens:
            watch.finished(job.request)


@dataclass(slots=True)
class _Standing:
    """What a gate reads of a scheduler."""

    worker: LayerKvWorker

    @property
    def prompts(self) -> list[Job]:
        return self.worker.absent

    def queue(self) -> QueueCounts:
        return QueueCounts(waiting=0, running=0, waiting_tokens=0, kv_tokens=self.worker.drawing_tokens)


def poisson(n: int, per_s: float, prompt_tokens: int, output_tokens: int, seed: int, spread: float = 0.0) -> list[Job]:
    """Requests in an open loop. Prompts are of one size, and so is the output, but for `spread` (a share) of it up and down."""
    draw, lengths, at_ms, jobs = random.Random(seed), random.Random(seed + 1000), 0.0, []
    for number in range(n):
        at_ms += draw.expovariate(per_s) * 1e3
        more = lengths.randint(-int(spread * output_tokens), int(spread * output_tokens))
        jobs.append(Job(number, at_ms, prompt_tokens, output_tokens + more, int((1.0 + spread) * output_tokens)))
    return jobs
