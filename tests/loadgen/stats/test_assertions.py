from dataclasses import replace

import pytest

from common.errors import ConfigError
from loadgen.output.result_json import to_json
from loadgen.results.metrics import summarize
from loadgen.stats.assertions import Assertion, check, judge_all, numbers, parse, parse_all
from loadgen.stats.measured_names import known_names
from tests.loadgen.synthetic import SLO, Shape, run

VALUES = {"p99_ttft_ms": 700.0, "p50_ttft_ms": 90.0, "failed": 0, "p99_tpot_ms": None, "request_goodput": None}


@pytest.mark.parametrize(
    ("text", "name", "sign", "limit", "of_base"),
    [
        ("p99_ttft_ms<800", "p99_ttft_ms", "<", 800.0, False),
        (" failed == 0 ", "failed", "==", 0.0, False),
        ("p50_itl_ms<=1.1x", "p50_itl_ms", "<=", 1.1, True),
        ("send_lag_ms.p99>=-1e-3", "send_lag_ms.p99", ">=", -1e-3, False),
    ],
)
def test_a_gate_is_a_name_a_sign_and_a_number(text: str, name: str, sign: str, limit: float, of_base: bool) -> None:
    assert parse(text) == Assertion(text=text.strip(), name=name, operator=sign, limit=limit, of_base=of_base)


@pytest.mark.parametrize("text", ["", "p99", "<5", "a=5", "a<", "a<5ms", "a<1.2.3", "a<5 b<6", "a!=5", "a<x"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="must be like p99_ttft_ms<800"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("p99_ttft_ms<700", False),
        ("p99_ttft_ms<=700", True),
        ("p99_ttft_ms>700", False),
        ("p99_ttft_ms>=700", True),
        ("failed==0", True),
        ("p50_ttft_ms<0.8x", False),
        ("p50_ttft_ms<=0.9x", True),
    ],
)
def test_each_sign_means_what_it_says(text: str, holds: bool) -> None:
    verdict = check(parse(text), VALUES, {"p50_ttft_ms": 100.0})
    assert verdict.holds is holds
    assert ("holds" in verdict.why) is holds


def test_a_typing_error_is_answered_with_names_that_are_close() -> None:
    with pytest.raises(ValueError, match=r"did you mean .*p99_ttft_ms"):
        parse("p99_tttf_ms<5")


def test_a_number_that_is_not_there_fails_with_the_reason() -> None:
    few, unmeasured = check(parse("p99_tpot_ms>0"), VALUES), check(parse("request_goodput>0"), VALUES)
    assert (few.holds, unmeasured.holds) == (False, False)
    assert "200 samples" in few.why
    assert "not measured" in unmeasured.why
    assert "of the base" in check(parse("p50_ttft_ms<2x"), VALUES, {}).why


def test_a_multiple_needs_a_base() -> None:
    with pytest.raises(ValueError, match="needs a base run"):
        check(parse("p50_ttft_ms<2x"), VALUES)


def test_numbers_of_a_result_are_flat_and_leave_out_what_is_no_number() -> None:
    found = numbers({"a": 1, "b": {"p50": 2.5, "c": {"d": None}}, "flag": True, "text": "inf", "list": [1]})
    assert found == {"a": 1, "b.p50": 2.5, "b.c.d": None}


def test_what_no_run_can_decide_is_refused_before_one() -> None:
    with pytest.raises(ConfigError, match="--assert 'failed<1x': a limit with x needs a base run"):
        parse_all(["failed==0", "failed<1x"], with_base=False)
    with pytest.raises(ConfigError, match=r"has to be in --percentiles, such as 50,99,99\.9"):
        parse_all(["p99.9_ttft_ms<5"], with_base=False, percentiles=(50.0,))
    with pytest.raises(ConfigError, match=r"no number 'settings\.rate'"):
        parse_all(["settings.rate<5"], with_base=True)
    with pytest.raises(ConfigError, match="no number 'p00_ttft_ms'"):
        parse_all(["p00_ttft_ms<5"], with_base=True)
    assert len(parse_all(["failed<1x", "p99.9_ttft_ms<5"], with_base=True)) == 2
    assert len(parse_all(["p99.9_ttft_ms<5"], with_base=False, percentiles=(99.9,))) == 1


def test_known_names_are_the_measured_numbers_of_a_result() -> None:
    rich = run(Shape(n_requests=80, turns=1))
    first, *others = rich.records
    records = [replace(first, held_s=1.0), *others]
    found = numbers(to_json(replace(rich, records=records, summary=summarize(records, replace(SLO, e2e_s=9.0)))))
    said = {"schema_version", "seed", "burstiness", "max_concurrency", "request_rate"}
    measured = {
        name for name in found if name not in said and not name.startswith(("settings.", "host.", "counted_by."))
    }
    known = {name for name in known_names() if not name.startswith("outcomes.")}
    assert {name for name in measured if not name.startswith("outcomes.")} == known
    assert {name for name in measured if name.startswith("outcomes.")} <= known_names()


def test_an_outcome_that_did_not_occur_occurred_no_time() -> None:
    gates = parse_all(["outcomes.timeout==0", "outcomes.cut==1.5"], with_base=False)
    runs = [{"outcomes": {"cut": 3}}, {"outcomes": {"ok": 5}}]
    assert [verdict.holds for verdict in judge_all(gates, runs)] == [True, True]


def test_a_percentile_of_few_samples_fails_and_says_how_many_it_needs() -> None:
    found = to_json(run(Shape(n_requests=19, failures=0)))
    gates = parse_all(["p95_ttft_ms>0", "p90_ttft_ms>0", "median_ttft_ms>0"], with_base=False)
    p95, p90, median = judge_all(gates, [found])
    assert (p95.holds, p90.holds, median.holds) == (False, False, True)
    assert "needs 40 samples" in p95.why
    assert "needs 20 samples" in p90.why


def test_a_value_that_one_of_several_runs_lacks_is_no_mean() -> None:
    gates = parse_all(["attainment>0"], with_base=True)
    assert not judge_all(gates, [{"attainment": 1.0}, {"attainment": None}])[0].holds
    assert judge_all(gates, [{"attainment": 1.0}, {"attainment": 0.5}])[0].holds
