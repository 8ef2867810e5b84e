"""Laws of the thread that computes: order, what waits for what, and that nothing is lost at the end."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch

from kvstore.transport.load_gate import LoadGate
from services.worker.core.plan import StepPlan, StepResult
from services.worker.engine_thread import EngineThread
from services.worker.inbox import EngineDied, Event, Events, StepDone

SOON_S = 20.0


@dataclass
class Step:
    """On its way through a device: done when the test says so."""

    number: int
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def done(self) -> bool:
        return self.ended.is_set()


class Device:
    """Writes down what it is asked to do. `at_once`: as a processor, which computes while it launches."""

    def __init__(self, *, at_once: bool) -> None:
        self.at_once = at_once
        self.calls: queue.Queue[str] = queue.Queue()
        self.steps: dict[int, Step] = {}
        self.fails_at: int | None = None

    def launch(
        self, plan: StepPlan, on_layer: Callable[[int], None] | None, await_layer: Callable[[int], None] | None
    ) -> Step:
        if plan.number == self.fails_at:
            raise RuntimeError("broken")
        step = self.steps[plan.number] = Step(plan.number)
        if self.at_once:
            step.ended.set()
        self.calls.put(f"launch {plan.number}")
        return step

    def collect(self, launched: Step) -> StepResult:
        self.calls.put(f"collect {launched.number}")
        assert launched.ended.wait(SOON_S)
        return StepResult(launched.number, (), 1.0)

    def use_pages(self, pages: torch.Tensor) -> None:
        self.calls.put(f"use {len(pages)} pages")

    def use_scratch(self, memory: torch.Tensor) -> None:
        self.calls.put(f"use {len(memory)} bytes")

    def next_calls(self, count: int) -> list[str]:
        return [self.calls.get(timeout=SOON_S) for _ in range(count)]


class Bench:
    """A thread over a device, and what it told."""

    def __init__(self, *, at_once: bool = False) -> None:
        self.device = Device(at_once=at_once)
        self.heard: queue.Queue[Event] = queue.Queue()
        self.inbox = Events(self._woken)
        self.thread = EngineThread(self.device, self.inbox, LoadGate())

    def _woken(self) -> None:
        for event in self.inbox.take():
            self.heard.put(event)

    def submit(self, number: int) -> None:
        self.thread.submit(StepPlan(number, ()))

    def hears(self) -> int:
        event = self.heard.get(timeout=SOON_S)
        assert isinstance(event, StepDone)
        return event.result.number


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    for step in made.device.steps.values():
        step.ended.set()
    made.thread.stop(SOON_S)


def test_the_step_that_follows_is_launched_while_the_one_before_runs(bench: Bench) -> None:
    bench.submit(1)
    assert bench.device.next_calls(1) == ["launch 1"]
    bench.submit(2)
    assert bench.device.next_calls(2) == ["launch 2", "collect 1"]
    assert bench.heard.empty()
    bench.device.steps[1].ended.set()
    assert bench.hears() == 1
    bench.submit(3)
    assert bench.device.next_calls(2) == ["launch 3", "collect 2"]


def test_a_step_that_nothing_follows_is_collected_at_once(bench: Bench) -> None:
    bench.submit(1)
    bench.thread.nothing_follows()
    assert bench.device.next_calls(2) == ["launch 1", "collect 1"]
    bench.submit(2)
    bench.device.steps[1].ended.set()
    assert bench.hears() == 1
    assert bench.device.next_calls(1) == ["launch 2"]


def test_a_word_about_a_step_that_has_ended_is_not_taken_for_the_next_ones(bench: Bench) -> None:
    bench.device.at_once = True
    bench.submit(1)
    assert bench.hears() == 1
    bench.device.at_once = False
    bench.thread.nothing_follows()
    bench.submit(2)
    bench.submit(3)
    assert bench.device.next_calls(5) == ["launch 1", "collect 1", "launch 2", "launch 3", "collect 2"]


def test_a_step_that_is_done_is_told_before_the_next_one_is_launched(bench: Bench) -> None:
    bench.device.at_once = True
    for number in (1, 2, 3):
        bench.submit(number)
    bench.thread.nothing_follows()
    calls = ["launch 1", "collect 1", "launch 2", "collect 2", "launch 3", "collect 3"]
    assert bench.device.next_calls(6) == calls
    assert [bench.hears() for _ in range(3)] == [1, 2, 3]


def test_a_view_of_the_pages_or_other_scratch_is_for_the_steps_behind_it_and_ends_none(bench: Bench) -> None:
    bench.submit(1)
    bench.thread.use_pages(torch.zeros(7))
    bench.thread.use_scratch(torch.zeros(9, dtype=torch.uint8))
    assert bench.device.next_calls(3) == ["launch 1", "use 7 pages", "use 9 bytes"]
    bench.submit(2)
    assert bench.device.next_calls(2) == ["launch 2", "collect 1"]


def test_the_end_comes_after_the_steps_that_were_launched(bench: Bench) -> None:
    bench.submit(1)
    assert bench.device.next_calls(1) == ["launch 1"]
    bench.device.steps[1].ended.set()
    bench.thread.stop(SOON_S)
    assert bench.hears() == 1


def test_what_the_engine_raises_reaches_the_loop(bench: Bench) -> None:
    bench.device.fails_at = 1
    bench.submit(1)
    event = bench.heard.get(timeout=SOON_S)
    assert isinstance(event, EngineDied) and str(event.error) == "broken"
