import pytest

from common.errors import ConfigError
from loadgen.traces.tables import read_azure, read_burstgpt
from loadgen.traces.trace import Trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"
SIX = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
EIGHT = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"


def rows(trace: Trace) -> list[tuple[float | None, int, int]]:
    firsts = [session.requests[0] for session in trace.sessions]
    return [(request.at_s, request.added_tokens, request.output_tokens) for request in firsts]


def test_azure_times_are_wall_clock_to_seven_decimals() -> None:
    lines = [AZURE, "2023-11-16 23:59:59.9951690,396,109", "2023-11-17 00:00:01.4951690,879,55"]
    (first, second) = rows(read_azure(lines, "f"))
    assert first == (0.0, 396, 109)
    assert second[0] == pytest.approx(1.5, abs=1e-5)


def test_azure_times_of_2024_have_a_zone() -> None:
    lines = [AZURE, "2024-05-10 00:00:00.009930+00:00,2162,5", "2024-05-10 00:00:02.009930+00:00,2399,6"]
    assert rows(read_azure(lines, "f"))[1][0] == pytest.approx(2.0)


def test_azure_rows_without_prompt_or_answer_are_left_out_and_counted() -> None:
    lines = [AZURE, "2023-11-16 18:00:00.0,0,5", "2023-11-16 18:00:01.0,5,0", "2023-11-16 18:00:02.0,5,5"]
    trace = read_azure(lines, "f")
    assert rows(trace) == [(0.0, 5, 5)]
    assert trace.left_out == {"without prompt": 1, "without answer (failed requests)": 1}


@pytest.mark.parametrize(
    "lines",
    [
        [SIX, "5,ChatGPT,472,18,490,Conversation log", "45,GPT-4,1087,230,1317,API log"],
        [EIGHT, "5,a,1.5,ChatGPT,472,18,490,Conversation log", "45,b,2,GPT-4,1087,230,1317,API log"],
    ],
)
def test_burstgpt_is_read_with_six_and_with_eight_columns(lines: list[str]) -> None:
    assert rows(read_burstgpt(lines, "f")) == [(0.0, 472, 18), (40.0, 1087, 230)]


def test_burstgpt_failures_are_left_out_and_counted() -> None:
    trace = read_burstgpt([SIX, "5,GPT-4,472,0,472,API log", "6,GPT-4,1,1,2,API log"], "f")
    assert trace.n_requests == 1
    assert trace.left_out == {"without answer (failed requests)": 1}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([AZURE, "2023-11-16 18:00:00.0,ten,5"], r"^f:2: ContextTokens .*'ten'"),
        ([AZURE, "2023-11-16 18:00:00.0,5,5", "yesterday,5,5"], r"^f:3: TIMESTAMP .*'yesterday'"),
        ([AZURE, "2023-11-16 18:00:00.0,-1,5"], r"^f:2: ContextTokens"),
        ([AZURE, "2023-11-16 18:00:00.0,5"], r"^f:2: GeneratedTokens"),
        (["a,b", "1,2"], r"^f:1: no column TIMESTAMP"),
    ],
)
def test_a_broken_row_is_named_by_file_line_and_column(lines: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_azure(lines, "f")
