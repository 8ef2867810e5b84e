import contextlib

import pytest

from loadgen.server.prometheus import OTHER_SERVERS, PrometheusMetrics
from tests.loadgen.server.pages import vllm

BY_NAME = {one.server: one for one in OTHER_SERVERS}
PAGES = {
    "vLLM": vllm(3, 4, 0.5),
    "SGLang": b"""# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="m"} 3.0
sglang:num_queue_reqs{model_name="m"} 4.0
sglang:token_usage{model_name="m"} 0.5
""",
    "llama.cpp": b"""# TYPE llamacpp:kv_cache_usage_ratio gauge
llamacpp:kv_cache_usage_ratio 0.5
llamacpp:requests_processing 3
llamacpp:requests_deferred 4
""",
    "text-generation-inference": b"tgi_batch_current_size 3\ntgi_queue_size 4\n",
}


def only(page: bytes) -> PrometheusMetrics:
    (found,) = [one for one in OTHER_SERVERS if one.speaks(page)]
    return found


@pytest.mark.parametrize("server", PAGES)
def test_every_known_server_is_told_by_its_metrics(server: str) -> None:
    assert only(PAGES[server]).server == server
    found = only(PAGES[server]).sample(PAGES[server], 2.0)
    kv_used = None if server == "text-generation-inference" else 0.5
    assert (found.at_s, found.running, found.waiting, found.kv_used) == (2.0, 3, 4, kv_used)


def test_other_pages_are_of_no_known_server() -> None:
    page = b"# HELP vllm:x in a comment\npython_info 1\nprocess_cpu_seconds_total 2\n"
    assert not [one for one in OTHER_SERVERS if one.speaks(page)]


def test_engines_are_added_up_and_their_memory_is_averaged() -> None:
    page = b"".join(vllm(n, 1, n / 4).replace(b'engine="0"', f'engine="{n}"'.encode()) for n in (1, 2))
    found = BY_NAME["vLLM"].sample(page, 0.0)
    assert (found.running, found.waiting, found.kv_used) == (3, 2, 0.375)


def test_ranks_of_one_engine_and_its_priorities_count_once() -> None:
    page = b"""sglang:num_running_reqs{tp_rank="0",priority=""} 5.0
sglang:num_running_reqs{tp_rank="0",priority="1"} 2.0
sglang:num_running_reqs{tp_rank="1",priority=""} 5.0
"""
    assert BY_NAME["SGLang"].sample(page, 0.0).running == 5


def test_older_names_of_kv_memory_are_known() -> None:
    page = vllm(1, 1, 0.25).replace(b"kv_cache_usage_perc", b"gpu_cache_usage_perc")
    assert BY_NAME["vLLM"].sample(page, 0.0).kv_used == 0.25


def test_gauges_that_are_not_there_yet_read_as_nothing() -> None:
    page = b"sglang:prompt_tokens_total 0\n"
    found = only(page).sample(page, 0.0)
    assert (found.running, found.waiting, found.kv_used) == (0, 0, None)


def test_requests_are_held_and_memory_is_not() -> None:
    assert BY_NAME["vLLM"].held(vllm(3, 4, 0.9)) == {"running requests": 3, "waiting requests": 4}


def test_a_broken_page_is_a_value_error() -> None:
    with pytest.raises(ValueError):
        BY_NAME["vLLM"].sample(b"vllm:num_requests_running{ oops\n", 0.0)


@pytest.mark.parametrize("number", ["+Inf", "-Inf", "NaN", "1e400", "1e300"])
def test_a_number_beyond_all_sense_counts_as_not_told(number: str) -> None:
    page = vllm(3, 4, 0.5).replace(b" 3.0", f" {number}".encode()).replace(b" 0.5", f" {number}".encode())
    found = BY_NAME["vLLM"].sample(page, 0.0)
    assert (found.running, found.waiting, found.kv_used) == (0, 4, None)


@pytest.mark.parametrize(
    "line", ["{", '{a="b", ="d"} 3', ' 1\re# {x=""} 3', '{"a"="b"} 3', " x", "{}", ' 3{a="b"} 3.0']
)
def test_a_broken_line_is_a_value_error_or_skipped(line: str) -> None:
    with contextlib.suppress(ValueError):
        BY_NAME["vLLM"].sample(f"vllm:num_requests_running{line}\n".encode(), 0.0)
