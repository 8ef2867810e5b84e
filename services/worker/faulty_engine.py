"""An engine whose steps meet the fault kit before they begin."""

import time
from collections.abc import Callable
from typing import Generic

from torch import Tensor

from common.faults.points import Kind, Point, Side
from common.net.fault_kit import FaultKit
from services.worker.core.plan import StepPlan, StepResult
from services.worker.engine_thread import Engine, LaunchedT


class FaultyEngine(Generic[LaunchedT]):
    """A step with part of a prompt strikes `compute`, one with a sequence that goes on strikes `decode`; many are both."""

    def __init__(self, inner: Engine[LaunchedT], kit: FaultKit, sleep: Callable[[float], None] = time.sleep) -> None:
        """`sleep` takes seconds: an engine that is late is late for all that is in the step."""
        self._inner, self._kit, self._sleep = inner, kit, sleep

    def launch(
        self,
        plan: StepPlan,
        on_layer: Callable[[int], None] | None,
        await_layer: Callable[[int], None] | None,
        await_ring: Callable[[int], None] | None = None,
    ) -> LaunchedT:
        """As the engine inside. Raises RuntimeError if a rule lets it fail: a worker does not outlive its engine."""
        decoding = [segment.start >= segment.prompt_tokens for segment in plan.segments]
        for point, struck in ((Point.COMPUTE, not all(decoding)), (Point.DECODE, any(decoding))):
            if struck:
                self._strike(point, plan)
        return self._inner.launch(plan, on_layer, await_layer, await_ring)

    def collect(self, launched: LaunchedT) -> StepResult:
        """As the engine inside."""
        return self._inner.collect(launched)

    def use_pages(self, pages: Tensor) -> None:
        """As the engine inside."""
        self._inner.use_pages(pages)

    def use_scratch(self, memory: Tensor) -> None:
        """As the engine inside."""
        self._inner.use_scratch(memory)

    def _strike(self, point: Point, plan: StepPlan) -> None:
        outcome = self._kit.strike(point, Side.WORK)
        late_ms = outcome.ms_of(Kind.DELAY)
        if late_ms:
            self._sleep(late_ms / 1000)
        if outcome.has(Kind.FAIL):
            raise RuntimeError(f"injected failure of step {plan.number} at {point}")
