"""Warm-up, targets, percentiles, speeds and buckets: what counts where."""

import pytest

from loadgen.results.buckets import by_group, by_input_length, by_turn, by_worker, phases_served
from loadgen.results.metrics import Slo, distribution, parse_percentiles, samples_needed, summarize
from loadgen.results.records import Outcome, RequestRecord
from loadgen.results.throughput import peak_tokens_per_s, tokens_of_chunks
from tests.loadgen.records import record


def shifted(by_s: float, **changes: object) -> RequestRecord:
    """The plain record, later."""
    chunk_s = tuple(at_s + by_s for at_s in (2.0, 2.5, 3.0, 3.5))
    return record(planned_s=1.0 + by_s, sent_s=1.0 + by_s, end_s=3.5 + by_s, chunk_s=chunk_s, **changes)


def test_warm_up_counts_in_throughput_and_not_in_latency() -> None:
    warm_up = record(index=1, measured=False, chunk_s=(3.4, 3.5), chunk_tokens=(1, 1), output_tokens=2)
    found, alone = summarize([record(), warm_up], Slo(ttft_s=2.0)), summarize([record()], Slo(ttft_s=2.0))
    assert (found.ttft, found.itl, found.tpot, found.e2e) == (alone.ttft, alone.itl, alone.tpot, alone.e2e)
    assert (found.completed, found.output_tokens, found.measured) == (2, 6, 1)
    assert found.attainment == 1.0


def test_attainment_leaves_cancelled_out_and_counts_failed_as_missed() -> None:
    ends = [Outcome.OK, Outcome.OK, Outcome.TIMEOUT, Outcome.CANCELLED, Outcome.REJECTED]
    records = [record(index=index, outcome=outcome) for index, outcome in enumerate(ends)]
    found = summarize([*records, record(sent_s=0.0)], Slo(ttft_s=1.5, e2e_s=9.0))
    assert found.attainment == 2 / 5
    assert found.attainment_by_target == {"ttft": 2 / 5, "e2el": 3 / 5}
    assert (found.measured, found.failed, found.rejected) == (5, 2, 1)
    assert summarize(records).attainment is None


def test_steady_throughput_ends_with_the_last_measured_send() -> None:
    records = [shifted(0.0), shifted(1.0), shifted(5.0)]  # sent at 1, 2 and 6; ended at 3.5, 4.5 and 8.5
    found = summarize(records, Slo(ttft_s=1.0)).steady
    assert found is not None
    assert (found.window_s, found.requests_per_s, found.output_tokens_per_s) == (5.0, 2 / 5, 8 / 5)
    assert (found.total_tokens_per_s, found.goodput_per_s) == (28 / 5, 2 / 5)
    late_warm_up = shifted(50.0, measured=False)
    assert summarize([*records, late_warm_up], Slo(ttft_s=1.0)).steady == found


def test_a_window_shorter_than_an_answer_has_no_steady_throughput() -> None:
    assert summarize([shifted(0.0), shifted(2.4)]).steady is None
    assert summarize([shifted(0.0), shifted(2.6)]).steady is not None


def test_tokens_in_the_window_are_estimated_where_chunks_do_not_tell() -> None:
    told = [shifted(0.0), shifted(3.0)]
    untold = [shifted(0.0, chunk_tokens=None, output_tokens=8), shifted(3.0, chunk_tokens=None, output_tokens=8)]
    few, many = summarize(told).steady, summarize(untold).steady
    assert few is not None
    assert many is not None
    assert many.output_tokens_per_s == 2 * few.output_tokens_per_s


def test_the_hit_ratio_is_over_answers_that_told() -> None:
    told, silent = record(cached_tokens=5, input_tokens=20), record(cached_tokens=None, input_tokens=1000)
    warm_up = record(cached_tokens=900, input_tokens=1000, measured=False)
    assert summarize([told, silent, warm_up]).cache_hit_ratio == 0.25
    assert summarize([silent]).cache_hit_ratio is None


def test_speeds_are_tokens_over_the_time_they_took() -> None:
    found = summarize([record(input_tokens=30), record(input_tokens=30, output_tokens=1)])
    assert found.prefill_tokens_per_s is not None
    assert found.prefill_tokens_per_s.p50_per_s == 30.0  # TTFT is 1 s
    assert found.user_tokens_per_s is not None
    assert (found.user_tokens_per_s.samples, found.user_tokens_per_s.p10_per_s) == (1, 2.0)


def test_requests_delayed_by_a_cap_are_counted_with_their_delay() -> None:
    found = summarize([record(), record(held_s=1.0), record(held_s=3.0)]).held
    assert found is not None
    assert (found.requests, found.mean_s, found.max_s) == (2, 2.0, 3.0)
    assert summarize([record()]).held is None


@pytest.mark.parametrize(("percentile", "least"), [(50, 4), (90, 20), (95, 40), (99, 200), (99.9, 2000), (10, 20)])
def test_a_percentile_needs_two_samples_beyond_it(percentile: float, least: int) -> None:
    assert samples_needed(percentile) == least
    enough, few = distribution([1.0] * least, [percentile]), distribution([1.0] * (least - 1), [percentile])
    assert enough is not None
    assert few is not None
    assert (enough.percentiles, few.percentiles) == ({percentile: 1.0}, {percentile: None})


def test_percentiles_of_a_run_are_those_asked_for() -> None:
    found = summarize([record()] * 20, percentiles=parse_percentiles("90,10"))
    assert found.e2e is not None
    assert found.e2e.percentiles == {10.0: 2.5, 90.0: 2.5}
    for bad in ("0", "100", "p50", "", "nan"):
        with pytest.raises(ValueError, match="above 0 and below 100"):
            parse_percentiles(bad)


def test_buckets_leave_out_warm_up_and_cancelled_and_count_failed() -> None:
    records = [
        record(turn=10, cached_tokens=5),
        record(turn=10, outcome=Outcome.CUT),
        record(turn=2, outcome=Outcome.CANCELLED),
        record(turn=3, measured=False),
        record(turn=9, sent_s=0.5),
    ]
    nine, ten = by_turn(records)
    assert (nine.key, nine.answered, nine.failed, nine.cached_share) == (9, 1, 0, None)
    assert (ten.key, ten.answered, ten.failed, ten.cached_share) == (10, 1, 1, 0.5)
    assert nine.ttft is not None
    assert nine.ttft.mean_s == 1.5
    assert ten.mean_input_tokens == 10


def test_prompt_lengths_end_at_powers_of_two() -> None:
    lengths = [0, 1, 2, 3, 4, 5, 1000, 1024, 1025]
    found = by_input_length([record(input_tokens=length) for length in lengths])
    assert [(part.key, part.answered) for part in found] == [
        ((0, 0), 1), ((1, 1), 1), ((2, 2), 1), ((3, 4), 2), ((5, 8), 1), ((513, 1024), 2), ((1025, 2048), 1)
    ]  # fmt: skip


def test_groups_and_workers_have_their_own_rows() -> None:
    records = [record(group="chat"), record(), record(group="chat", workers={"prefill": "p1", "decode": "d0"})]
    assert [(part.key, part.answered) for part in by_group(records)] == [("", 1), ("chat", 2)]
    assert [part.key for part in by_worker(records, "decode")] == ["d0"]
    assert by_worker(records, "transfer") == []
    assert phases_served(records) == ["prefill", "decode"]


def test_a_percentile_is_trusted_from_the_samples_on_that_it_needs() -> None:
    few, enough = (distribution([1.0] * n, [25.0]) for n in (39, 40))
    assert few is not None
    assert enough is not None
    assert [few.trusted_s(percent) for percent in (25.0, 90.0, 95.0, 99.0)] == [1.0, 1.0, None, None]
    assert enough.trusted_s(95.0) == 1.0


def test_the_peak_is_of_tokens_even_where_chunks_do_not_tell() -> None:
    """Four chunks of ten tokens, two in each second."""
    told = record(chunk_tokens=(10, 10, 10, 10), output_tokens=40)
    untold = record(chunk_tokens=None, output_tokens=40)
    assert peak_tokens_per_s([told], 2.5) == peak_tokens_per_s([untold], 2.5) == 20.0


def test_the_peak_is_no_less_than_the_mean_of_a_run_shorter_than_a_second() -> None:
    quick = record(sent_s=0.0, chunk_s=(0.1, 0.2, 0.3, 0.4), end_s=0.5)
    assert peak_tokens_per_s([quick], 0.5) == pytest.approx(8.0)


def test_a_request_without_chunks_has_no_tokens_to_place() -> None:
    assert list(tokens_of_chunks(record(chunk_s=(), chunk_tokens=None, output_tokens=4))) == []
