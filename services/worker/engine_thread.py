"""The thread that computes. It owns nothing but the engine, and talks by queue."""

import functools
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol, TypeVar

from torch import Tensor

from kvstore.transport.load_gate import LoadGate
from services.worker.core.plan import StepPlan, StepResult
from services.worker.inbox import EngineDied, Events, LayerDone, StepDone


class Launched(Protocol):
    """A step that an engine has begun."""

    @property
    def done(self) -> bool:
        """Whether `collect` would return at once. On a processor always: it computes while it launches."""
        ...


LaunchedT = TypeVar("LaunchedT", bound=Launched)


class Engine(Protocol[LaunchedT]):
    """Computes steps in the order of their launches; a step may be launched while the one before it runs."""

    def launch(
        self,
        plan: StepPlan,
        on_layer: Callable[[int], None] | None,
        await_layer: Callable[[int], None] | None,
        await_ring: Callable[[int], None] | None = None,
    ) -> LaunchedT:
        """Begin one forward pass; pending segments go on with what the launch before draws.

        `on_layer(l)`: after layer l wrote K and V, if a segment is streamed; `await_layer(l)`: before it reads, if the plan
        has loads; `await_ring(l)`: before it writes.
        """
        ...

    def collect(self, launched: LaunchedT) -> StepResult:
        """Wait for its end. In the order of the launches, each once."""
        ...

    def use_pages(self, pages: Tensor) -> None:
        """The pool was resized: what is launched from now on works with this view, which begins at the same address."""
        ...

    def use_scratch(self, memory: Tensor) -> None:
        """What is launched from now on takes its tensors from `memory` [n] uint8."""
        ...


@dataclass(frozen=True, slots=True)
class _Scratch:
    """Memory to take a step's tensors from."""

    memory: Tensor


class _Word(Enum):
    NOTHING_FOLLOWS = auto()
    END = auto()


class EngineThread:
    """Computes plans in order; results go to the inbox.

    A device that computes by itself must get the next step before this one ends. So the thread collects a step that is
    still running only when it has launched the one that follows, or has been told that nothing does: whoever submits a
    plan must say one of both, as soon as all steps before it have been heard of.
    """

    def __init__(self, engine: Engine[LaunchedT], inbox: Events, gate: LoadGate) -> None:
        """`gate` holds the engine back while KV it is about to read is still being fetched."""
        self._inbox, self._gate = inbox, gate
        self._orders: queue.SimpleQueue[StepPlan | Tensor | _Scratch | _Word] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(engine,), name="engine", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        """Compute this next."""
        self._orders.put(plan)

    def nothing_follows(self) -> None:
        """The plan submitted last is not followed by another yet. One may still be submitted."""
        self._orders.put(_Word.NOTHING_FOLLOWS)

    def use_pages(self, pages: Tensor) -> None:
        """Steps submitted from now on are computed with this view of the pool, which was resized at its end."""
        self._orders.put(pages)

    def use_scratch(self, memory: Tensor) -> None:
        """Steps submitted from now on take their tensors from `memory` [n] uint8; those before may still use what was."""
        self._orders.put(_Scratch(memory))

    def stop(self, timeout_s: float) -> None:
        """End after the current step."""
        self._orders.put(_Word.END)
        self._thread.join(timeout=timeout_s)

    def _run(self, engine: Engine[LaunchedT]) -> None:
        try:
            self._compute(engine)
        except BaseException as error:  # noqa: BLE001 - the loop's top of this thread: the main loop re-raises it
            self._inbox.put(EngineDied(error))

    def _compute(self, engine: Engine[LaunchedT]) -> None:
        running: LaunchedT | None = None
        while True:
            if running is not None and running.done:
                self._inbox.put(StepDone(engine.collect(running)))
                running = None
            order = self._orders.get()
            while isinstance(order, Tensor | _Scratch):
                if isinstance(order, Tensor):
                    engine.use_pages(order)
                else:
                    engine.use_scratch(order.memory)
                order = self._orders.get()
            following = self._launch(engine, order) if isinstance(order, StepPlan) else None
            if running is not None:
                self._inbox.put(StepDone(engine.collect(running)))
            if order is _Word.END:
                return
            running = following

    def _launch(self, engine: Engine[LaunchedT], plan: StepPlan) -> LaunchedT:
        await_layer = functools.partial(self._gate.wait, plan.loads)
        if not plan.rings:
            return engine.launch(plan, self._on_layer, await_layer)
        return engine.launch(plan, self._on_layer, await_layer, functools.partial(self._gate.wait, plan.rings))

    def _on_layer(self, layer: int) -> None:
        self._inbox.put(LayerDone(layer))
