"""What result.json says of a run and of its parts, and what it leaves out."""

import pytest

from loadgen.output.result_json import to_json
from tests.loadgen.synthetic import Shape, run

RICH, FEW = (to_json(run(Shape(n_requests=n_requests, failures=0))) for n_requests in (80, 19))
PARTS = ("by_turn", "by_input_length", "by_group", "by_worker")


def test_parts_of_a_run_add_up_to_it() -> None:
    assert [sum(part["completed"] for part in RICH[name]) for name in PARTS] == [80, 80, 80, 2 * 80]
    of_turns = sum(part["mean_ttft_ms"] * part["completed"] for part in RICH["by_turn"]) / 80
    assert of_turns == pytest.approx(RICH["mean_ttft_ms"])


def test_parts_say_what_they_are() -> None:
    assert [part["turn"] for part in RICH["by_turn"]] == [0, 1, 2, 3]
    assert [part["group"] for part in RICH["by_group"]] == ["chat", "document"]
    assert [(part["phase"], part["worker"]) for part in RICH["by_worker"]] == [
        ("prefill", "prefill-0"), ("prefill", "prefill-1"), ("decode", "decode-0"), ("decode", "decode-1")
    ]  # fmt: skip
    ranges = [(part["min_input_tokens"], part["max_input_tokens"]) for part in RICH["by_input_length"]]
    assert ranges == sorted(ranges)
    assert (513, 1024) in ranges
    assert (RICH["by_turn"][0]["p90_ttft_ms"] is None, RICH["by_turn"][0]["p99_ttft_ms"]) == (False, None)


def test_a_run_of_one_part_has_no_parts() -> None:
    plain = to_json(run(Shape(n_requests=1, told=False)))
    assert not set(PARTS) & set(plain)


def test_percentiles_are_null_below_the_samples_that_they_need() -> None:
    names = ("median_ttft_ms", "p50_ttft_ms", "p90_ttft_ms", "p95_ttft_ms", "p99_ttft_ms")
    assert [FEW[name] is None for name in names] == [False, False, True, True, True]
    assert [RICH[name] is None for name in names] == [False, False, False, False, True]
    assert FEW["max_ttft_ms"] is not None
