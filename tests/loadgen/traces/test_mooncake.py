import json

import pytest

from common.errors import ConfigError
from loadgen.traces.mooncake import read_mooncake


def line(timestamp: int = 0, isl: int = 600, osl: int = 5, ids: tuple[int, ...] = (1, 2)) -> str:
    return json.dumps({"timestamp": timestamp, "input_length": isl, "output_length": osl, "hash_ids": ids})


def test_times_are_milliseconds_from_the_first_request_and_lines_need_no_order() -> None:
    trace = read_mooncake([line(3500), line(1000), ""], "f")
    assert [session.requests[0].at_s for session in trace.sessions] == [0.0, 2.5]
    assert trace.has_times


def test_lines_without_prompt_or_answer_are_left_out_and_counted() -> None:
    trace = read_mooncake([line(isl=0, ids=()), line(), line(osl=0)], "f")
    assert trace.n_requests == 1
    assert trace.left_out == {"without prompt or answer": 2}


@pytest.mark.parametrize("text", ["{", '{"timestamp": 1}', line().replace("600", '"x"'), "5"])
def test_a_broken_line_is_named_by_file_and_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^f\.jsonl:2: "):
        read_mooncake([line(), text], "f.jsonl")


@pytest.mark.parametrize(
    ("isl", "n_ids", "said"),
    [
        (160, 10, "blocks of 16 would fit: set --block"),
        (72, 5, "blocks of 16 would fit"),
        (5000, 2, "blocks of 4096 would fit"),
        (1000, 6, "blocks of 167 to 199 would fit"),
        (5000, 1, "blocks of 8192 or more would fit"),
    ],
)
def test_ids_that_do_not_fit_the_block_size_say_which_would(isl: int, n_ids: int, said: str) -> None:
    text = line(isl=isl, ids=tuple(range(n_ids)))
    with pytest.raises(ConfigError, match=said):
        read_mooncake([text], "f")
    block_tokens = int(next(word for word in said.split() if word.isdecimal()))
    assert read_mooncake([text], "f", block_tokens).n_requests == 1
