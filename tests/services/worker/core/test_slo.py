"""Who is in time, and who is held for whose sake: the watch against judging afterwards, and the gate on the real core."""

import random
from types import SimpleNamespace

import pytest

from benchmarks._virtual_worker import Ask, Timed, VirtualWorker
from common.cost.step_cost import StepCost
from common.ids import RequestId
from common.kv_layout import KvLayout
from common.policy.admission import Drawing, FirstComeFirstServed
from common.policy.output_length import LengthPredictor
from services.worker.core.slo import Pace, PromptGate, Slo, SloWatch, StepMisses
from services.worker.settings import WorkerSettings
from tests.support.fake_engine import answer
from tests.support.world import World

SLO = Slo(ttft_ms=1000.0, tpot_ms=200.0)
R = RequestId("r")
LAYOUT = KvLayout(layers=1, kv_heads=1, head_dim=8, dtype="float32", block_tokens=16)
COST = StepCost(base_ms=20.0, token_ms=1.0, pair_ms=0.0, row_ms=1.0, kv_ms=0.0, chunk_tokens=4096)


def watch() -> SloWatch:
    return SloWatch(SLO, LengthPredictor(1.0))


def sequence(generated: int, *, request: str = "r", limit: int = 10**6) -> SimpleNamespace:
    tokens = [5] * (8 + generated)
    return SimpleNamespace(
        request=RequestId(request), generated_tokens=generated, tokens=tokens, limit_tokens=8 + limit
    )


def pace(**places: int) -> Pace:
    by_request = {RequestId(name): place for name, place in places.items()}
    return Pace(step_ms=30.0, least_tpot_ms=20.0, stepping=5, places=by_request)


def draw_all(target: SloWatch, times_ms: list[float], request: str = "r") -> None:
    for count, at_ms in enumerate(times_ms, 1):
        target.drawn(sequence(count, request=request), at_ms)  # type: ignore[arg-type]  # what is read of it


def totals(target: SloWatch) -> tuple[float, ...]:
    counters = target.counters()
    return tuple(counters[f"slo_{name}_total"] for name in ("ttft_missed", "tpot_missed", "attained"))


def test_totals_are_what_judging_each_finished_answer_afterwards_gives() -> None:
    draw, target = random.Random(8), watch()
    firsts = others = good = 0
    for number in range(500):
        times_ms = [draw.uniform(0.0, 2000.0)]
        times_ms += [times_ms[0] + draw.uniform(0.0, 400.0) * count for count in range(1, draw.randrange(1, 6))]
        times_ms.sort()
        target.arrived(RequestId(str(number)), 0.0)
        draw_all(target, times_ms, str(number))
        target.finished(RequestId(str(number)))
        late_first = times_ms[0] > 1000.0
        late = len(times_ms) > 1 and (times_ms[-1] - times_ms[0]) / (len(times_ms) - 1) > 200.0
        firsts, others, good = firsts + late_first, others + late, good + (not late and not late_first)
    assert totals(target) == (firsts, others, good)
    assert min(firsts, others, good) > 50
    assert len(target) == target.n_drawing == 0


def test_a_first_token_that_does_not_come_is_missed_once_as_soon_as_its_time_is_up() -> None:
    target = watch()
    target.arrived(R, 50.0)
    assert [target.end_step(at_ms).ttft for at_ms in (0.0, 1050.0, 1051.0, 1200.0)] == [False, False, True, False]
    draw_all(target, [1300.0])
    assert not target.end_step(1300.0).ttft and totals(target) == (1.0, 0.0, 0.0)


def test_a_repeated_arrival_does_not_turn_the_clock_back() -> None:
    target = watch()
    target.arrived(R, 0.0)
    target.arrived(R, 900.0)
    assert target.end_step(1001.0).ttft


def test_a_step_misses_if_a_late_answer_gets_later_not_if_it_catches_up() -> None:
    target = watch()
    target.arrived(R, 0.0)
    found = []
    for count, at_ms in enumerate([0.0, 10.0, 260.0, 700.0, 860.0, 1100.0], 1):
        target.drawn(sequence(count), at_ms)  # type: ignore[arg-type]
        found.append(target.end_step(at_ms))
    late = [False, False, False, True, False, True]  # gaps 10, 250, 440, 160, 240; means 10, 130, 233, 215, 220
    assert found == [StepMisses(ttft=False, tpot=missed) for missed in late]


def test_a_drawing_says_what_was_taken_and_what_lengths_seen_before_foretell() -> None:
    target = watch()
    for name, times_ms in (("old", [0.0] * 9), ("r", [100.0, 150.0, 260.0])):
        target.arrived(RequestId(name), 0.0)
        draw_all(target, times_ms, name)
        if name == "old":
            target.finished(RequestId(name))
    target.arrived(RequestId("waits"), 0.0)
    assert target.drawings(300.0, pace(), 300.0) == [Drawing(2, 200.0, 6, 30.0, 20.0, 10**6 - 3)]
    assert target.drawings(300.0, pace(r=2), 300.0)[0].tpot_ms == 30.0 * (
        1 + 2 / 5
    )  # two of five who step must end first
    assert target.is_drawing(R) and not target.is_drawing(RequestId("waits"))
    target.drawn(sequence(4, limit=6), 300.0)  # type: ignore[arg-type]
    assert target.drawings(300.0, pace(), 300.0)[0].future_tokens == 2  # it may have no more


def test_who_draws_can_spare_what_the_slo_leaves_it_and_others_nothing() -> None:
    target = watch()
    target.arrived(R, 0.0)
    assert target.slack_ms(R, 30.0) == target.slack_ms(RequestId("stranger"), 30.0) == 0.0
    target.drawn(sequence(1, limit=6), 100.0)  # type: ignore[arg-type]
    target.drawn(sequence(2, limit=6), 350.0)  # type: ignore[arg-type]
    assert target.slack_ms(R, 30.0) == (200.0 - 250.0) + 4 * (200.0 - 30.0)


def test_who_failed_or_was_cancelled_counts_for_nothing() -> None:
    target = watch()
    target.arrived(R, 0.0)
    draw_all(target, [100.0, 200.0])
    target.forget(R)
    target.forget(R)
    assert (len(target), target.n_drawing, totals(target)) == (0, 0, (0.0, 0.0, 0.0))
    assert target.drawings(300.0, pace(), 300.0) == []


def served(asks: list[Ask], *, n_pages: int = 10_000, **settings: object) -> tuple[list[Timed], dict[str, float]]:
    chosen = {"caching": 0, "max_step_tokens": 4096, **settings}
    made = VirtualWorker(WorkerSettings(model="m", **chosen), COST, LAYOUT, n_pages)  # type: ignore[arg-type]  # a test's
    timed = made.run(asks, most_events=20_000)
    made.core.check()
    return timed, dict(made.core.report(0, made.now_ms).counters)


def load(seed: int, *, n: int = 25, every_ms: float = 150.0, max_tokens: int = 12) -> list[Ask]:
    draw, at_ms, asks = random.Random(seed), 0.0, []
    for _ in range(n):
        at_ms += draw.expovariate(1 / every_ms)
        asks.append(Ask(at_ms, tuple(draw.randrange(10**6) for _ in range(draw.randrange(20, 300))), max_tokens))
    return asks


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_held_all_work_ends(seed: int) -> None:
    draw = random.Random(seed)
    slo_tpot_ms, n_pages = draw.choice([1.0, 25.0, 45.0, 400.0]), draw.choice([25, 60, 1000])
    asks = load(seed, every_ms=draw.choice([10.0, 200.0]), max_tokens=draw.randrange(1, 30))
    timed, _ = served(asks, n_pages=n_pages, admission="slo", slo_tpot_ms=slo_tpot_ms)
    assert all(one.failed == "" and len(one.token_ms) == ask.max_tokens for one, ask in zip(timed, asks, strict=True))


def test_once_lengths_are_known_the_gate_keeps_the_mean_time_per_token_that_no_gate_breaks() -> None:
    asks = load(9, n=60, every_ms=250.0)
    gated, counters = served(asks, admission="slo", slo_tpot_ms=60.0)
    free, free_counters = served(asks, admission="fcfs", slo_tpot_ms=60.0)
    assert sum(one.tpot_ms > 60.0 for one in free) > 20
    assert sum(one.tpot_ms > 60.0 for one in gated) == 0
    assert len(asks) >= counters["gate_held_total"] > 0 == free_counters["gate_held_total"]
    for found, timed in ((counters, gated), (free_counters, free)):
        assert found["slo_tpot_missed_total"] == sum(one.tpot_ms > 60.0 for one in timed)


def test_an_slo_that_nobody_can_break_holds_nobody() -> None:
    asks = load(10)
    gated, counters = served(asks, admission="slo", slo_tpot_ms=1e9)
    free, _ = served(asks, admission="fcfs")
    assert [one.token_ms for one in gated] == [one.token_ms for one in free]
    assert counters["gate_held_total"] == 0


@pytest.mark.parametrize("slo_tpot_ms", [0.5, 1.5, 20.0])
def test_prompts_that_are_held_beside_answers_handed_over_are_answered_too(slo_tpot_ms: float) -> None:
    target = World(random.Random(11), prefill_pages=80, decode_pages=50, admission="slo", slo_tpot_ms=slo_tpot_ms)
    target.greet()
    for number in range(24):
        prompt = [(number * 37 + at * 11) % 900 + 3 for at in range(10 + number)]
        target.send(f"r{number}", prompt, 9, to="decode" if number % 2 else "prefill")
    target.settle()
    assert all(seen.tokens == answer(seen.prompt, 9) for seen in target.answers.values())
    target.processes["decode"].core.check()
    counters = target.processes["decode"].core.report(0, target.now_ms).counters
    assert counters["slo_tpot_missed_total"] + counters["slo_attained_total"] == 24
    assert (counters["gate_held_total"] > 0) is (slo_tpot_ms == 1.5), (
        "below it all are hopeless, above it all are in time"
    )


def test_who_draws_with_pages_is_not_waited_for_although_more_than_a_token_of_it_is_missing() -> None:
    """A sequence that was restored computes the last part of a block again: it draws in the next step, like any other."""

    def pace_with(n_blocks: int) -> Pace:
        target = watch()
        target.arrived(R, 0.0)
        draw_all(target, [1.0])
        restored = SimpleNamespace(request=R, has_pages=n_blocks > 0, uncomputed_tokens=3)
        scheduler = SimpleNamespace(queue=lambda: SimpleNamespace(kv_tokens=0))
        gate = PromptGate(FirstComeFirstServed(), target, SimpleNamespace(costing=None, scheduler=scheduler))  # type: ignore[arg-type]
        new = SimpleNamespace(tokens=(5,) * 9, message=SimpleNamespace(request=RequestId("new")))
        return gate._pace([restored], new, COST)  # type: ignore[arg-type, list-item]

    assert pace_with(2).places == {} and pace_with(2).stepping == 2
    assert pace_with(0).places == {R: 1, RequestId("new"): 2}


def test_a_held_prompt_starts_though_answers_are_handed_over_for_ever() -> None:
    target = World(
        random.Random(0),
        prefill_pages=2000,
        decode_pages=2000,
        admission="slo",
        slo_tpot_ms=20.0,
        kvstore="off",
        caching=0,
        max_step_tokens=64,
        max_running=16,
    )
    target.greet()
    target.send("first", list(range(3, 23)), 8, to="decode")
    target.settle()  # lengths are known now
    core = target.processes["decode"].core
    cost = StepCost(base_ms=1.0, token_ms=1.0, pair_ms=0.0, row_ms=0.0, kv_ms=0.0, chunk_tokens=64)
    core._costing._fit = SimpleNamespace(cost=cost, learn=lambda *_: None)
    handed, local = list[str](), None
    while local is None or not target.answers[local].tokens:
        assert len(handed) < 60, "it waits for those who came after it"
        if sum(not target.answers[RequestId(one)].done for one in handed) < 6:
            handed.append(f"h{len(handed)}")
            target.send(handed[-1], [len(handed) + 3] * 4, 20)
        if local is None and core._generation.watch.n_drawing:
            local = RequestId("local")
            target.send(local, list(range(3, 503)), 5, to="decode")
        if not target.turn():
            target.pass_time(1.0)
    assert core._generation.watch.n_drawing, "others draw all the while"
    assert core._local.held_total == 1
