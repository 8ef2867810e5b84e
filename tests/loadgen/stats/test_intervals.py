import math
from dataclasses import replace

import numpy as np
import pytest

from loadgen.results.metrics import Slo, distribution
from loadgen.results.records import Outcome, RequestRecord
from loadgen.stats import resampling
from loadgen.stats.intervals import intervals
from loadgen.stats.measures import latencies, requests_of, throughputs
from loadgen.stats.resampling import Quantiles, Ratio, Units, alike_for, blocks, bounds, estimates
from tests.loadgen.records import record
from tests.loadgen.stats.queues import poisson_queue


@pytest.fixture(autouse=True)
def _fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "RESAMPLES", 100)


def answers(rng: np.random.Generator, n_requests: int, turns: int = 1) -> list[RequestRecord]:
    """Apart in time; exponential TTFT with a mean of one second; turns of a conversation take equally long."""
    ttft_s = np.repeat(rng.exponential(1.0, n_requests // turns), turns)
    return [
        record(
            index=i,
            conversation=i // turns,
            sent_s=9.0 * i,
            end_s=9.0 * i + ttft + 1.5,
            chunk_s=tuple(9.0 * i + ttft + later_s for later_s in (0.0, 0.5, 1.0, 1.5)),
        )
        for i, ttft in enumerate(ttft_s)
    ]


def test_percentiles_of_a_draw_are_those_of_the_drawn_samples() -> None:
    rng = np.random.default_rng(1)
    samples, unit = rng.exponential(size=50), rng.integers(7, size=50)
    asked = [0.1, 50, 90, 99]
    measure = Quantiles(["a", "b", "c", "d"], asked, samples, unit)
    for times in [np.ones(7, dtype=np.int64), *(rng.integers(4, size=7) for _ in range(20))]:
        drawn = np.repeat(samples, times[unit])
        assert measure.of(times) == pytest.approx(np.percentile(drawn, asked))
    assert all(map(math.isnan, measure.of(np.zeros(7, dtype=np.int64))))


def test_a_mean_of_a_draw_weighs_each_sample() -> None:
    measure = Ratio("mean", np.array([10.0, 1.0]), np.array([2.0, 1.0]))
    assert measure.of(np.array([1, 1])) == (11 / 3,)
    assert measure.of(np.array([0, 2])) == (1.0,)


def test_a_draw_takes_as_many_units_as_there_are() -> None:
    drawn = list(Units((5,)).draws([1]))
    assert {int(times.sum()) for times in drawn} == {5}
    assert len({tuple(times) for times in drawn}) > 50


def test_runs_are_drawn_before_their_units() -> None:
    runs_seen = {(int(times[:3].sum()), int(times[3:].sum())) for times in Units((3, 3)).draws([1])}
    assert runs_seen == {(6, 0), (3, 3), (0, 6)}


def test_a_block_holds_whole_conversations() -> None:
    rng = np.random.default_rng(2)
    records = poisson_queue(3, 0.9, 1, 300)
    records = [replace(one, conversation=i // 5) for i, one in enumerate(records)]
    found, n_blocks = blocks([records[i] for i in rng.permutation(300)])
    assert n_blocks < 60
    block_of = dict(
        zip([records[i].conversation for i in np.random.default_rng(2).permutation(300)], found, strict=True)
    )
    again, _ = blocks(records)
    assert [block_of[one.conversation] for one in records] == list(again)


def test_blocks_are_longer_the_longer_latencies_stay_alike() -> None:
    assert blocks(answers(np.random.default_rng(1), 400))[1] > 200
    assert 10 <= blocks(poisson_queue(1, 0.9, 1, 400))[1] < 60


def test_autocorrelation_time_of_a_known_process() -> None:
    rng = np.random.default_rng(5)
    values = [0.0]
    for noise in rng.normal(size=20_000):
        values.append(0.8 * values[-1] + float(noise))
    assert alike_for(values) == pytest.approx(9.0, rel=0.15)  # (1 + 0.8) / (1 - 0.8)
    assert alike_for([1.0] * 50) == 1.0


@pytest.mark.long
@pytest.mark.parametrize("turns", [1, 5])
def test_intervals_hold_the_truth_about_as_often_as_they_say(turns: int) -> None:
    held = 0
    for seed in range(60):
        requests = requests_of([answers(np.random.default_rng(seed), 60 * turns, turns)])
        mean_ttft, *_ = latencies(requests)
        _, drawn = estimates([mean_ttft], requests.units, [seed])
        found = bounds(drawn["mean_ttft_ms"], sum(requests.units.per_run))
        assert found is not None
        held += found[0] <= 1000 <= found[1]
    assert 51 <= held <= 60  # 95 % of 60 is 57; blind to conversations, five turns give about 38


def test_intervals_are_around_the_numbers_of_the_summary() -> None:
    records = answers(np.random.default_rng(1), 300)
    found, summary = intervals(records, Slo(ttft_s=1.0)), distribution(one.ttft_s for one in records)
    assert summary is not None
    assert summary.p99_s is not None
    assert found["p99_ttft_ms"].value == pytest.approx(summary.p99_s * 1e3)
    assert found["mean_ttft_ms"].value == pytest.approx(summary.mean_s * 1e3)
    for interval in found.values():
        assert interval.low <= interval.value <= interval.high
    assert found == intervals(records, Slo(ttft_s=1.0))


def test_warm_up_failed_and_rare_percentiles_have_no_interval() -> None:
    records = answers(np.random.default_rng(1), 199)
    plain = intervals(records)
    assert "p99_ttft_ms" not in plain
    assert "p95_ttft_ms" in plain
    noise = [record(index=900, conversation=900, measured=False), record(conversation=901, outcome=Outcome.CANCELLED)]
    assert intervals([*records, *noise]) == plain
    assert intervals(noise) == {}


def test_a_failed_request_has_no_latency() -> None:
    records = answers(np.random.default_rng(1), 20)
    cut = replace(records[0], index=20, conversation=20, outcome=Outcome.CUT)
    found = intervals([*records, cut])
    assert found["mean_ttft_ms"].value == intervals(records)["mean_ttft_ms"].value
    assert found["failed_share"].value == 1 / 21


def test_what_never_happened_may_still_happen() -> None:
    found = intervals(answers(np.random.default_rng(1), 100), Slo(ttft_s=99.0))
    assert (found["failed_share"].low, found["failed_share"].high) == (0.0, 0.03)
    assert (found["attainment"].low, found["attainment"].high) == (0.97, 1.0)


def test_rates_add_up_to_those_of_the_whole_run() -> None:
    records = answers(np.random.default_rng(1), 100)
    found = throughputs([records, records], None)
    assert found is not None
    measures, units = found
    duration_s = records[-1].end_s - records[0].sent_s
    requests_per_s, tokens_per_s, _ = (measure.of(units.once())[0] for measure in measures)
    assert (requests_per_s, tokens_per_s) == pytest.approx((100 / duration_s, 400 / duration_s))
    assert throughputs([records, records[:39]], None) is None


def test_a_run_without_measured_requests_is_refused() -> None:
    with pytest.raises(ValueError, match="measured"):
        requests_of([[record()], [record(measured=False)]])
    assert latencies(requests_of([[record(outcome=Outcome.CUT, chunk_s=())]])) == []
