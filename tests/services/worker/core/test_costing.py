"""What a worker learns and says of the cost of its steps, and of the work that waits."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from common.block_hash import BlockHash
from common.cost.step_cost import StepCost
from common.cost.step_fit import StepFit
from common.ids import RequestId
from common.messages.liveness import Report
from common.messages.requests import Generate, Sampling
from gateway.series import parse_key
from kvstore.index.page_table import PageTable
from services.worker.core.costing import Costing, step_work
from services.worker.core.plan import Segment, StepPlan, StepResult
from tests.support.world import GATEWAY, World

COST = StepCost(2.0, 0.05, 2e-5, 0.3, 4e-4, chunk_tokens=16)


class Cached:
    """A pool that holds the first blocks of some prompts."""

    def __init__(self, **blocks: int) -> None:
        self.blocks, self.asked = blocks, 0

    def match(self, names: list[BlockHash]) -> int:
        self.asked += 1
        return self.blocks.get(str(names), 0)


def costing(pool: Cached | None = None) -> Costing:
    return Costing(StepFit(16, COST), pool or Cached(), 4)  # type: ignore[arg-type]  # the one method that is used


def segment(start: int, count: int, *, known: int) -> Segment:
    table = PageTable(1)
    table.append(np.zeros((50, 1), dtype=np.int32))
    sampling = Sampling(max_tokens=1)
    return Segment(RequestId("r"), list(range(known)), 1, start, count, table, sampling, start + count == known)


def waiting(tokens: int, name: str = "", emitted: int = 0) -> SimpleNamespace:
    message = Generate(
        request=RequestId("r"),
        prompt=(5,) * tokens,
        sampling=Sampling(max_tokens=1),
        timeout_ms=1,
        emitted=(7,) * emitted,
    )
    return SimpleNamespace(message=message, names=name)


def world(**settings: object) -> World:
    made = World(random.Random(3), prefill_pages=120, decode_pages=120, **settings)
    made.greet()
    return made


def report(target: World, role: str) -> Report:
    return target.processes[role].core.report(1, target.now_ms)


def prompt(tokens: int, first: int = 0) -> list[int]:
    return [(first + at * 11) % 900 + 3 for at in range(tokens)]


def test_a_step_is_what_its_segments_compute() -> None:
    work = step_work([segment(9, 1, known=10), segment(19, 1, known=20), segment(4, 3, known=7)])
    assert (work.rows, work.kv_tokens) == (2, 30)
    assert (work.new_tokens, work.pairs) == (3, 5 + 6 + 7)


def test_a_step_that_waited_for_kv_is_not_learned() -> None:
    target = costing()
    segments = (segment(0, 8, known=8),)
    target.learn(StepPlan(1, segments, loads=(7,)), StepResult(1, (), 500.0))
    assert target.cost is not None and target.cost.n_samples == 0
    target.learn(StepPlan(2, segments), StepResult(2, (), 5.0))
    assert target.cost is not None and target.cost.n_samples == 1


def test_work_is_what_is_not_cached_of_every_prompt() -> None:
    target = costing(Cached(known=5))
    expected_ms = COST.exec_ms(30, 20) + COST.exec_ms(11, 0)
    assert target.work_ms([], [waiting(30, "known"), waiting(8, "new", emitted=3)]) == pytest.approx(expected_ms)


def test_what_lies_in_the_host_buffer_is_no_work() -> None:
    parked = SimpleNamespace(
        tokens=[5] * 22,
        known_tokens=22,
        computed_tokens=0,
        hashes=[],
        found=SimpleNamespace(first_block=0, end_block=5),
    )
    assert costing(Cached()).work_ms([parked], []) == pytest.approx(COST.exec_ms(22, 20))  # type: ignore[list-item]


@pytest.mark.parametrize(("keeps", "cached"), [(True, 20), (False, 0)])
def test_what_started_prompts_are_computing_is_cached_for_the_queued_ones_where_it_is_kept(
    keeps: bool, cached: int
) -> None:
    names = [BlockHash(bytes([number]) * 16) for number in range(9)]
    running = SimpleNamespace(tokens=[5] * 22, known_tokens=22, computed_tokens=0, hashes=names[:5], found=None)
    queued = waiting(30)
    queued.names = names[:7]
    target = Costing(StepFit(16, COST), Cached(), 4, keeps=keeps)  # type: ignore[arg-type]  # the one method that is used
    expected_ms = COST.exec_ms(22, 0) + COST.exec_ms(30, cached)
    assert target.work_ms([running], [queued]) == pytest.approx(expected_ms)  # type: ignore[list-item]  # the fields that are used


def test_a_long_queue_is_not_looked_at_one_by_one_but_counted_whole() -> None:
    pool = Cached(half=2)
    queue = [waiting(16, "half") for _ in range(500)]
    assert costing(pool).work_ms([], queue) == pytest.approx(500 * COST.exec_ms(16, 8))
    assert pool.asked < 50


def test_both_roles_report_a_cost_and_their_errors_once_they_have_computed() -> None:
    target = world()
    for role in ("prefill", "decode"):
        assert report(target, role).cost is None
    for number in range(6):
        target.send(f"r{number}", prompt(30, number), 12)
    target.settle()
    for role, kind in (("prefill", "prefill"), ("decode", "decode")):
        said = report(target, role)
        assert said.cost is not None and said.cost.n_samples == said.gauges["step_cost_samples"] > 5
        assert said.cost.chunk_tokens == 16
        assert said.gauges[f"step_prediction_error{{kind={kind}}}"] < 0.5
        assert all(parse_key(key) is not None for key in said.gauges)


def test_an_idle_worker_has_no_work_and_no_kv_to_read() -> None:
    target = world()
    target.send("r", prompt(40), 5)
    target.settle()
    for role in ("prefill", "decode"):
        queue = report(target, role).queue
        assert (queue.work_ms, queue.kv_tokens) == (0.0, 0)


def test_work_falls_as_prompts_are_computed_and_kv_grows() -> None:
    target = world()
    target.send("r", prompt(60), 5)
    target.send("s", prompt(60, 500), 5)
    prefill = target.processes["prefill"]
    target.carry((GATEWAY, prefill.peer))
    target.carry((GATEWAY, prefill.peer))
    seen = [report(target, "prefill").queue]
    for _ in range(2):
        finished = prefill.step
        while prefill.step is finished:
            target.compute(prefill)
        seen.append(report(target, "prefill").queue)
    works = [queue.work_ms for queue in seen]
    assert works[0] > 0.0 and works == sorted(works, reverse=True) and works[-1] < works[0]
    assert seen[0].kv_tokens == 0 < seen[1].kv_tokens < seen[2].kv_tokens


def test_queued_prompts_of_a_mixed_worker_are_work() -> None:
    target = world(max_running=1)
    decode = target.processes["decode"]
    for name in ("a", "b", "c"):
        whole = target.generate(name, prompt(30, ord(name)), Sampling(max_tokens=3))
        alone = Generate(request=whole.request, prompt=whole.prompt, sampling=whole.sampling, timeout_ms=10**6)
        target.post(GATEWAY, decode.peer, alone)
    works = []
    for _ in range(3):
        target.carry((GATEWAY, decode.peer))
        works.append(report(target, "decode").queue.work_ms)
    assert works[0] > 0.0 and works == pytest.approx([works[0], 2 * works[0], 3 * works[0]])
