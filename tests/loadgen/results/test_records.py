import pytest

from loadgen.results.records import Outcome
from tests.loadgen.records import record


def test_the_latencies_of_a_plain_request() -> None:
    plain = record()
    assert (plain.ttft_s, plain.ttst_s, plain.e2e_s, plain.tpot_s) == (1.0, 1.5, 2.5, 0.5)
    assert plain.token_gaps_s() == plain.chunk_gaps_s() == [0.5, 0.5, 0.5]


def test_e2e_ends_with_the_last_chunk_and_not_with_the_connection() -> None:
    assert record(end_s=9.0).e2e_s == 2.5


def test_a_chunk_of_k_tokens_counts_k_times_its_share_of_the_gap() -> None:
    several = record(chunk_s=(2.0, 3.0, 3.5), chunk_tokens=(2, 4, 1), output_tokens=7)
    assert several.token_gaps_s() == [0.25, 0.25, 0.25, 0.25, 0.5]
    assert several.chunk_gaps_s() == [1.0, 0.5]
    assert several.tpot_s == 0.25


def test_a_first_chunk_of_two_tokens_holds_the_second() -> None:
    assert record(chunk_tokens=(2, 1, 1, 1)).ttst_s == 1.0


def test_unknown_tokens_per_chunk_are_spread_evenly_over_the_later_chunks() -> None:
    unknown = record(chunk_s=(2.0, 3.0, 5.0), chunk_tokens=None, output_tokens=9)
    assert unknown.token_gaps_s() == [0.25, 0.5]


def test_fewer_tokens_than_chunks_never_stretch_a_gap() -> None:
    assert record(chunk_tokens=None, output_tokens=2).token_gaps_s() == [0.5, 0.5, 0.5]


def test_one_token_has_no_tpot_and_no_second_token() -> None:
    single = record(chunk_s=(2.0,), chunk_tokens=(1,), output_tokens=1)
    assert single.tpot_s is None
    assert single.ttst_s is None
    assert single.token_gaps_s() == []
    assert single.e2e_s == single.ttft_s == 1.0


def test_no_token_has_no_latency() -> None:
    empty = record(chunk_s=(), chunk_tokens=(), output_tokens=0)
    assert (empty.ttft_s, empty.ttst_s, empty.e2e_s, empty.tpot_s) == (None, None, None, None)


def test_send_lag_is_actual_minus_planned() -> None:
    assert record(planned_s=0.75).send_lag_s == 0.25


@pytest.mark.parametrize("outcome", list(Outcome))
def test_only_answered_and_cancelled_requests_are_no_failures(outcome: Outcome) -> None:
    assert outcome.failed == (outcome not in (Outcome.OK, Outcome.CANCELLED))
