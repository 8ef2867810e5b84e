"""The thread that computes. It owns nothing but the engine, and talks by queue."""

import functools
import queue
import threading
from collections.abc import Callable
from typing import Protocol

from kvstore.transport.load_gate import LoadGate
from services.worker.core.plan import StepPlan, StepResult
from services.worker.inbox import EngineDied, Events, LayerDone, StepDone


class Engine(Protocol):
    """Computes steps. `on_layer(l)`: after layer l wrote K and V, if a segment is streamed; `await_layer(l)`: before it
    reads, if the plan has loads."""

    def step(
        self,
        plan: StepPlan,
        on_layer: Callable[[int], None] | None,
        await_layer: Callable[[int], None] | None,
    ) -> StepResult:
        """Run one forward pass and draw the next tokens."""
        ...


class EngineThread:
    """Computes one plan at a time; results go to the inbox."""

    def __init__(self, engine: Engine, inbox: Events, gate: LoadGate) -> None:
        """`gate` holds the engine back while KV it is about to read is still being fetched."""
        self._engine, self._inbox, self._gate = engine, inbox, gate
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        """Compute this next."""
        self._plans.put(plan)

    def _run(self) -> None:
        try:
            while (plan := self._plans.get()) is not None:
                await_layer = functools.partial(self._gate.wait, plan.loads)
                self._inbox.put(StepDone(self._engine.step(plan, self._on_layer, await_layer)))
        except BaseException as error:  # noqa: BLE001 - the loop's top of this thread: the main loop re-raises it
            self._inbox.put(EngineDied(error))

    def _on_layer(self, layer: int) -> None:
        self._inbox.put(LayerDone(layer))

    def stop(self, timeout_s: float) -> None:
        """End after the current step."""
        self._plans.put(None)
        self._thread.join(timeout=timeout_s)
