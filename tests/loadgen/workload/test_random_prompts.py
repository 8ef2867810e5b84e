import json
from dataclasses import replace
from typing import Any

from loadgen.workload.lengths import Fixed, Uniform
from loadgen.workload.random_prompts import Workload, plan_requests

COMPLETIONS = Workload(
    endpoint="completions", model="m", seed=1, input_lengths=Uniform(5, 50), output_lengths=Uniform(2, 9)
)


def bodies(workload: Workload, n: int = 20, part: str = "run") -> list[dict[str, Any]]:
    return [json.loads(request.body) for request in plan_requests(workload, n, part)]


def test_equal_seeds_plan_equal_requests() -> None:
    assert plan_requests(COMPLETIONS, 20) == plan_requests(COMPLETIONS, 20)


def test_another_seed_sends_other_prompts() -> None:
    one = {tuple(body["prompt"][:5]) for body in bodies(COMPLETIONS)}
    other = {tuple(body["prompt"][:5]) for body in bodies(replace(COMPLETIONS, seed=2))}
    assert len(one) == 20
    assert not one & other


def test_warm_up_prompts_are_not_sent_again() -> None:
    warmup = {tuple(body["prompt"][:5]) for body in bodies(COMPLETIONS, part="warmup")}
    assert not warmup & {tuple(body["prompt"][:5]) for body in bodies(COMPLETIONS)}


def test_a_prompt_has_the_planned_number_of_ids_from_the_range() -> None:
    for request in plan_requests(replace(COMPLETIONS, first_token_id=100, last_token_id=103), 20):
        body = json.loads(request.body)
        assert len(body["prompt"]) == request.input_tokens
        assert set(body["prompt"]) <= {100, 101, 102, 103}
        assert body["max_tokens"] == request.output_tokens


def test_chat_sends_one_word_per_token_asked_for() -> None:
    chat = replace(COMPLETIONS, endpoint="chat", input_lengths=Fixed(7))
    for body in bodies(chat):
        (message,) = body["messages"]
        assert message["role"] == "user"
        assert len(message["content"].split()) == 7


def test_a_usage_is_always_asked_for_and_extensions_only_when_wanted() -> None:
    (body,) = bodies(COMPLETIONS, 1)
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert body["ignore_eos"] is True
    assert body["return_token_ids"] is True
    (plain,) = bodies(replace(COMPLETIONS, ignore_eos=False, token_ids=False), 1)
    assert not {"ignore_eos", "return_token_ids"} & set(plain)


def test_extra_fields_win_over_ours() -> None:
    (body,) = bodies(replace(COMPLETIONS, extra_body={"temperature": 0.7, "user": "u"}), 1)
    assert (body["temperature"], body["user"]) == (0.7, "u")


def test_cancellations_follow_the_rate_and_fall_within_the_answer() -> None:
    planned = plan_requests(replace(COMPLETIONS, cancel_rate=0.2), 1000)
    cancelled = [request for request in planned if request.cancel_after_tokens is not None]
    assert 150 < len(cancelled) < 250
    assert all(0 <= (request.cancel_after_tokens or 0) < request.output_tokens for request in cancelled)
    assert not any(request.cancel_after_tokens is not None for request in plan_requests(COMPLETIONS, 100))
