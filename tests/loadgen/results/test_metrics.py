import pytest

from loadgen.results.metrics import Slo, distribution, summarize
from loadgen.results.records import Outcome
from tests.loadgen.records import record


def test_a_distribution_interpolates_and_ignores_what_is_missing() -> None:
    found = distribution([4.0, None, 1.0, 2.0, 3.0])
    assert found is not None
    assert (found.samples, found.mean_s, found.p50_s, found.max_s) == (4, 2.5, 2.5, 4.0)
    assert found.p90_s == pytest.approx(3.7)
    assert found.std_s == pytest.approx(1.25**0.5)


def test_p99_needs_two_hundred_samples() -> None:
    few, enough = distribution([1.0] * 199), distribution([1.0] * 200)
    assert few is not None
    assert few.p99_s is None
    assert enough is not None
    assert enough.p99_s == 1.0


def test_no_sample_has_no_distribution() -> None:
    assert distribution([]) is None
    assert distribution([None]) is None


def test_throughput_spans_from_the_first_send_to_the_last_end() -> None:
    found = summarize([record(), record(index=1, sent_s=2.0, end_s=5.0, output_tokens=8, input_tokens=30)])
    assert found.duration_s == 4.0
    assert found.requests_per_s == 0.5
    assert (found.input_tokens, found.output_tokens) == (40, 12)
    assert (found.output_tokens_per_s, found.total_tokens_per_s) == (3.0, 13.0)


@pytest.mark.parametrize("outcome", [Outcome.CANCELLED, Outcome.CUT, Outcome.TIMEOUT])
def test_a_request_that_was_not_answered_has_no_part_in_latency_or_throughput(outcome: Outcome) -> None:
    slow = record(index=1, outcome=outcome, chunk_s=(3.4, 3.5), chunk_tokens=(1, 1), output_tokens=2)
    found, alone = summarize([record(), slow]), summarize([record()])
    assert (found.ttft, found.itl, found.tpot, found.e2e) == (alone.ttft, alone.itl, alone.tpot, alone.e2e)
    assert (found.output_tokens, found.input_tokens, found.completed) == (4, 10, 1)
    assert found.outcomes == {"ok": 1, outcome.value: 1}


def test_failed_and_cancelled_are_counted_apart() -> None:
    ends = [Outcome.OK, Outcome.CANCELLED, Outcome.REJECTED, Outcome.CUT, Outcome.CUT]
    found = summarize([record(index=index, outcome=outcome) for index, outcome in enumerate(ends)])
    assert (found.completed, found.failed, found.cancelled) == (1, 3, 1)


def test_goodput_counts_requests_that_meet_every_target() -> None:
    slow_start = record(sent_s=0.5)
    slow_tokens = record(chunk_s=(2.0, 5.0, 5.5, 6.0))
    failed = record(outcome=Outcome.TIMEOUT)
    slo = Slo(ttft_s=1.2, tpot_s=0.6)
    found = summarize([record(), slow_start, slow_tokens, failed], slo)
    assert found.goodput_per_s == 1 / found.duration_s
    assert summarize([record()]).goodput_per_s is None


def test_a_single_token_meets_any_tpot_target() -> None:
    assert Slo(tpot_s=0.001).met_by(record(chunk_s=(2.0,), chunk_tokens=(1,), output_tokens=1))


def test_peaks_count_tokens_per_second_bin_and_overlapping_requests() -> None:
    other = record(index=1, sent_s=3.5, end_s=5.0, chunk_s=(4.2, 4.9), chunk_tokens=(1, 9))
    found = summarize([record(), other])
    assert found.peak_output_tokens_per_s == 10.0
    assert found.peak_concurrent == 1
    assert summarize([record(), record(index=1, sent_s=3.4)]).peak_concurrent == 2


def test_lengths_that_differ_from_what_was_asked_for_are_counted() -> None:
    found = summarize([record(), record(output_tokens=3), record(input_tokens=11), record(input_tokens=None)])
    assert (found.wrong_output_lengths, found.wrong_input_lengths) == (1, 1)
    assert found.input_tokens == 41


def test_cached_tokens_are_unknown_until_a_server_tells() -> None:
    assert summarize([record()]).cached_tokens is None
    assert summarize([record(), record(cached_tokens=0)]).cached_tokens == 0
    assert summarize([record(cached_tokens=4), record(cached_tokens=3)]).cached_tokens == 7


def test_a_run_without_requests_is_refused() -> None:
    with pytest.raises(ValueError, match="without requests"):
        summarize([])
