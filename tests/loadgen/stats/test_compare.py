from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from loadgen.results.health import generator_health
from loadgen.results.metrics import Slo, summarize
from loadgen.results.records import Outcome, RequestRecord
from loadgen.results.result import Result, RunFacts
from loadgen.results.timeline import ServerView
from loadgen.stats import resampling
from loadgen.stats.compare import Comparison, Row, Verdict, compare
from tests.loadgen.records import record

FACTS = RunFacts(
    date="2026-01-01T00:00:00+00:00",
    command=("penstock", "bench"),
    url="http://a:1",
    endpoint="completions",
    model="m",
    num_prompts=100,
    request_rate=1.0,
    arrival="poisson",
    burstiness=1.0,
    max_concurrency=None,
    seed=1,
    settings={"isl": "128", "url": "http://a:1"},
    host={},
)


@pytest.fixture(autouse=True)
def _fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "RESAMPLES", 100)


def run(draw: int, ttft_s: float = 0.5, n_requests: int = 100, failed: int = 0, **facts: Any) -> Result:
    rng = np.random.default_rng(draw)
    records = []
    for index, (at_s, first_s) in enumerate(
        zip(np.cumsum(rng.exponential(1.0, n_requests)), ttft_s * rng.gamma(4.0, 0.25, n_requests), strict=True)
    ):
        chunk_s = tuple(float(at_s + first_s + later_s) for later_s in (0.0, 0.1, 0.2, 0.3))
        outcome = Outcome.CUT if index < failed else Outcome.OK
        records.append(
            record(index=index, conversation=index, sent_s=at_s, end_s=chunk_s[-1], chunk_s=chunk_s, outcome=outcome)
        )
    return result_of(records, **facts)


def result_of(records: list[RequestRecord], **facts: Any) -> Result:
    health = generator_health(records, 1.0, cpu_s=(0.1,), wall_s=10.0)
    return Result(replace(FACTS, **facts), summarize(records), health, records, ServerView(source="-"), None)


def row(found: Comparison, name: str) -> Row:
    (only,) = [one for one in found.rows if one.name == name]
    return only


def test_a_slower_side_is_higher_and_the_ratio_holds_the_truth() -> None:
    found = row(compare([run(1)], [run(2, ttft_s=1.0)]), "mean_ttft_ms")
    assert found.verdict is Verdict.HIGHER
    assert found.ratio is not None
    assert found.ratio.low < 2.0 < found.ratio.high
    back = row(compare([run(2, ttft_s=1.0)], [run(1)]), "mean_ttft_ms")
    assert back.verdict is Verdict.LOWER


@pytest.mark.long
def test_equal_systems_are_seldom_called_different() -> None:
    called = [
        row(compare([run(2 * seed)], [run(2 * seed + 1)]), "mean_ttft_ms").verdict is not Verdict.NOT_SHOWN
        for seed in range(12)
    ]
    assert sum(called) <= 2


def test_a_run_does_not_differ_from_itself() -> None:
    found = compare([run(1)], [run(1)], Slo(ttft_s=0.6))
    assert {one.verdict for one in found.rows} == {Verdict.NOT_SHOWN, Verdict.UNKNOWN}
    assert found.not_the_same_work == ()
    ratio = row(found, "mean_ttft_ms").ratio
    assert ratio is not None
    assert ratio.low < 0.98 < 1.02 < ratio.high  # that both sides are one run is not known to the draws


def test_failures_count_although_their_ratio_to_none_does_not_exist() -> None:
    found = row(compare([run(1)], [run(2, failed=30)]), "failed_share")
    assert (found.base, found.other, found.ratio, found.verdict) == (0.0, 0.3, None, Verdict.HIGHER)


def test_targets_bring_goodput_and_attainment() -> None:
    found = compare([run(1)], [run(2, ttft_s=1.0)], Slo(ttft_s=0.5))
    assert row(found, "attainment").verdict is Verdict.LOWER
    assert row(found, "request_goodput").verdict is Verdict.LOWER
    assert "attainment" not in {one.name for one in compare([run(1)], [run(2)]).rows}


def test_too_few_samples_are_no_verdict() -> None:
    found = row(compare([run(1)], [run(2)]), "p99_ttft_ms")
    assert (found.base, found.verdict) == (None, Verdict.UNKNOWN)


def test_runs_that_differ_among_themselves_widen_the_interval() -> None:
    alike = row(compare([run(1), run(2)], [run(3), run(4)]), "mean_ttft_ms")
    apart = row(compare([run(1), run(2, ttft_s=0.7)], [run(3), run(4, ttft_s=0.7)]), "mean_ttft_ms")
    assert alike.ratio is not None
    assert apart.ratio is not None
    assert apart.ratio.high - apart.ratio.low > 1.5 * (alike.ratio.high - alike.ratio.low)


def test_a_single_run_says_what_its_interval_leaves_out() -> None:
    assert any("one run" in note for note in compare([run(1)], [run(2), run(3)]).notes)
    assert not any("one run" in note for note in compare([run(1), run(4)], [run(2), run(3)]).notes)


def test_what_was_not_the_same_work_is_listed() -> None:
    other = run(2, seed=7, request_rate=2.0, url="http://b:1", settings={"isl": "256", "url": "http://b:1"})
    found = compare([run(1)], [other])
    assert found.not_the_same_work == ("seed: 1 | 7", "request_rate: 1 | 2", "isl: 128 | 256")


def test_seeds_may_differ_within_a_side_and_nothing_else_may() -> None:
    base, other = [run(1, seed=1), run(2, seed=2)], [run(3, seed=2), run(4, seed=1)]
    assert compare(base, other).not_the_same_work == ()
    mixed = [run(3, seed=2, num_prompts=5), run(4, seed=1)]
    assert compare(base, mixed).not_the_same_work == ("num_prompts: 100 | 5, 100",)
    assert compare(mixed, mixed).not_the_same_work == ("num_prompts: 5, 100 | 5, 100",)


def test_a_side_without_a_run_is_refused() -> None:
    with pytest.raises(ValueError, match="each side"):
        compare([], [run(1)])
