"""Records for tests, one argument changed at a time."""

from dataclasses import replace
from typing import Any

from loadgen.results.records import Outcome, RequestRecord

PLAIN = RequestRecord(
    index=0,
    request_id="r-0",
    planned_s=1.0,
    sent_s=1.0,
    end_s=3.5,
    outcome=Outcome.OK,
    asked_input_tokens=10,
    asked_output_tokens=4,
    input_tokens=10,
    output_tokens=4,
    counted_by="usage",
    chunk_s=(2.0, 2.5, 3.0, 3.5),
    chunk_tokens=(1, 1, 1, 1),
)
"""Four tokens, first after 1 s, then one every 0.5 s."""


def record(**changes: Any) -> RequestRecord:
    return replace(PLAIN, **changes)
