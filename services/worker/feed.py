"""Keeps the engine supplied with steps: the next one when it is free, and the one after that while it computes."""

from collections.abc import Callable
from typing import Protocol

from services.worker.core.plan import StepPlan


class Planner(Protocol):
    """Who knows what is to be computed: a worker's core."""

    def plan(self) -> StepPlan | None:
        """The next step, if none is in flight."""
        ...

    def plan_ahead(self) -> StepPlan | None:
        """The step that follows the one in flight, if it can be known already."""
        ...


class Computer(Protocol):
    """Who computes: the engine's thread. Of each plan it must hear what follows, once it is the only one in flight."""

    def submit(self, plan: StepPlan) -> None:
        """Compute this next."""
        ...

    def nothing_follows(self) -> None:
        """Nothing yet."""
        ...


class EngineFeed:
    """Counts the steps in flight: those submitted of which the end was not heard."""

    def __init__(self, planner: Planner, engine: Computer, *, ahead: bool) -> None:
        """`ahead`: plan a step while the one before it runs."""
        self._planner, self._engine, self._ahead = planner, engine, ahead
        self._n_steps = 0
        self._told = False  # whether the engine knows what follows the plan that it got last

    def feed(self, before: Callable[[], None]) -> bool:
        """Give the engine what it can have now; True if that is anything. After any event.

        `before` is called between planning and submitting: what the step waits for must begin before it does.
        """
        fed = self._submit(self._planner.plan(), before)
        if self._n_steps == 1 and self._ahead:
            fed |= self._submit(self._planner.plan_ahead(), before)
        if self._n_steps == 1 and not self._told:
            self._engine.nothing_follows()
            self._told = True
        return fed

    def ended(self) -> None:
        """The oldest step in flight was heard of."""
        self._n_steps -= 1

    def _submit(self, plan: StepPlan | None, before: Callable[[], None]) -> bool:
        before()
        if plan is None:
            return False
        self._engine.submit(plan)
        self._n_steps += 1
        self._told = False
        return True
