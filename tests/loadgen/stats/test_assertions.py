import pytest

from loadgen.stats.assertions import Assertion, check, numbers, parse

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
    with pytest.raises(ValueError, match="did you mean p99_ttft_ms"):
        check(parse("p99_tttf_ms<5"), VALUES)


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
