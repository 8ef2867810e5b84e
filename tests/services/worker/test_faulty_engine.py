"""Steps that meet the fault kit: which points a step strikes, and that it is struck before it begins."""

from collections.abc import Callable

import pytest
from torch import Tensor

from common.ids import RequestId
from common.log import Log
from common.messages.requests import Sampling
from common.net.fault_kit import FaultKit
from kvstore.index.page_table import PageTable
from services.worker.core.plan import Segment, StepPlan, StepResult
from services.worker.faulty_engine import FaultyEngine


class Step:
    done = True


class Recorder:
    """An engine that notes what it began, and how long it slept before."""

    def __init__(self) -> None:
        self.done: list[object] = []

    def launch(
        self,
        plan: StepPlan,
        on_layer: Callable[[int], None] | None,
        await_layer: Callable[[int], None] | None,
        await_ring: Callable[[int], None] | None = None,
    ) -> Step:
        self.done.append("launched")
        return Step()

    def collect(self, launched: Step) -> StepResult:
        return StepResult(0, (), 0.0)

    def use_pages(self, pages: Tensor) -> None:
        self.done.append("pages")

    def use_scratch(self, memory: Tensor) -> None:
        self.done.append("scratch")


def segment(start: int, count: int) -> Segment:
    table = PageTable.__new__(PageTable)
    return Segment(RequestId("r"), [1] * 9, 8, start, count, table, Sampling(max_tokens=1), sample=True)


PROMPT, ANSWER = segment(0, 8), segment(8, 1)


@pytest.mark.parametrize(
    ("segments", "slept"), [((PROMPT,), [0.001]), ((ANSWER,), [0.002]), ((ANSWER, PROMPT), [0.001, 0.002])]
)
def test_a_step_strikes_what_it_computes_before_it_begins(segments: tuple[Segment, ...], slept: list[float]) -> None:
    inner = Recorder()
    kit = FaultKit("compute:delay ms=1;decode:delay ms=2", "mixed-0", Log())
    FaultyEngine(inner, kit, inner.done.append).launch(StepPlan(1, segments), None, None)
    assert inner.done == [*slept, "launched"]


def test_an_engine_that_fails_raises_and_computes_nothing() -> None:
    inner = Recorder()
    engine = FaultyEngine(inner, FaultKit("decode:fail", "decode-0", Log()), inner.done.append)
    with pytest.raises(RuntimeError, match="injected failure of step 4 at decode"):
        engine.launch(StepPlan(4, (ANSWER,)), None, None)
    assert inner.done == []
