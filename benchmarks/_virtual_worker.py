"""A mixed worker in virtual time: the service's own core, and an engine that takes as long for a step as a StepCost says.

Nothing of the worker's rules is done anew here. The engine draws always the same token; messages take no time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from common.cost.step_cost import StepCost
from common.cost.step_fit import StepFit
from common.ids import Incarnation, PeerId, RequestId, WorkerId
from common.kv_layout import KvLayout
from common.messages.actions import Send
from common.messages.liveness import Hello, Member, ModelIdentity
from common.messages.requests import Failed, Generate, Sampling, Tokens
from services.worker.build_core import build_core
from services.worker.build_parts import Machine
from services.worker.core.actions import Action
from services.worker.core.costing import step_work
from services.worker.core.plan import Sampled, StepPlan, StepResult
from services.worker.core.resizing import PoolSize
from services.worker.settings import WorkerSettings

TICK_MS = 50.0
_GATEWAY = PeerId("gateway@1")
_ANSWER = 7
_TIMEOUT_MS = 10**12


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    at_ms: float
    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(slots=True)
class Timed:
    """What became of it."""

    asked_ms: float
    token_ms: list[float] = field(default_factory=list)
    """When each of its tokens was drawn."""
    failed: str = ""

    @property
    def ttft_ms(self) -> float:
        return self.token_ms[0] - self.asked_ms

    @property
    def tpot_ms(self) -> float:
        """Mean time per token after the first; 0 if there is none."""
        return (self.token_ms[-1] - self.token_ms[0]) / max(1, len(self.token_ms) - 1)


class VirtualWorker:
    """Runs requests through one worker. `cost` is what steps take, and what the core knows of it from the start."""

    def __init__(self, settings: WorkerSettings, cost: StepCost, layout: KvLayout, n_pages: int) -> None:
        model = ModelIdentity(
            name="m",
            fingerprint="f",
            architecture="a",
            dtype=layout.dtype,
            layers=layout.layers,
            kv_heads=layout.kv_heads,
            head_dim=layout.head_dim,
            block_tokens=layout.block_tokens,
            vocab_tokens=2**31,
            context_tokens=2**20,
        )
        mine = Member(
            id=WorkerId("mixed-0"),
            role="mixed",
            incarnation=Incarnation(1),
            endpoint="",
            host="",
            pid=0,
            model=model,
        )
        fit = StepFit(settings.step_tokens_limit, cost)
        self.core = build_core(
            mine, settings, Machine(size=PoolSize(n_pages, 1, layout.page_bytes), layout=layout, fit=fit)
        )
        self._cost = cost
        self._step: StepPlan | None = None
        self._ends_ms = self.now_ms = 0.0
        self._timed: dict[RequestId, Timed] = {}
        gateway = Member(id=WorkerId("g"), role="gateway", incarnation=Incarnation(1), endpoint="", host="", pid=0)
        self._perform(self.core.on_message(_GATEWAY, Hello(member=gateway), 0.0))

    def run(self, asks: Sequence[Ask], *, most_events: int = 10**7) -> list[Timed]:
        """All requests, by the time at which they come. Raises RuntimeError if some are not over after so many events."""
        coming = sorted(range(len(asks)), key=lambda index: asks[index].at_ms)
        self._timed = {RequestId(str(index)): Timed(ask.at_ms) for index, ask in enumerate(asks)}
        for _ in range(most_events):
            if not coming and self.core.idle:
                return list(self._timed.values())
            next_ms = asks[coming[0]].at_ms if coming else float("inf")
            end_ms = self._ends_ms if self._step is not None else self.now_ms + TICK_MS
            if next_ms <= end_ms:
                self._ask(coming[0], asks[coming.pop(0)])
            else:
                self.now_ms = end_ms
                self._end_step()
        raise RuntimeError(f"not idle after {most_events} events")

    def _ask(self, index: int, ask: Ask) -> None:
        self.now_ms = max(self.now_ms, ask.at_ms)
        generate = Generate(
            request=RequestId(str(index)),
            prompt=ask.prompt,
            sampling=Sampling(max_tokens=ask.max_tokens),
            timeout_ms=_TIMEOUT_MS,
        )
        self._perform(self.core.on_message(_GATEWAY, generate, self.now_ms))

    def _end_step(self) -> None:
        """The engine's step ended; without one, time passed."""
        step, self._step = self._step, None
        if step is None:
            self._perform(self.core.on_tick(self.now_ms))
            return
        sampled = tuple(Sampled(segment.request, _ANSWER, None) for segment in step.segments if segment.sample)
        took_ms = step_work(step.segments).predict_ms(self._cost)
        self._perform(self.core.on_step(StepResult(step.number, sampled, took_ms), self.now_ms))

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Send(_, Tokens(deltas=deltas)):
                    for delta in deltas:
                        self._timed[delta.request].token_ms += [self.now_ms] * len(delta.tokens)
                case Send(_, Failed() as failed):
                    self._timed[failed.request].failed = failed.text
        if self._step is None and (plan := self.core.plan()) is not None:
            self._step = plan
            self._ends_ms = self.now_ms + step_work(plan.segments).predict_ms(self._cost)
        self.core.loads(self.now_ms)
