"""The official client against a gateway, for completions and chat."""

import json

import pytest

from common.ids import PeerId
from common.messages.requests import Generate, TokenDelta, TokenLogprob, Tokens
from tests.gateway.cluster import Cluster
from tests.gateway.fake_worker import PATIENCE_S, tokens
from tests.gateway.model import END_ID, NAME, ids


def test_a_text_prompt_is_answered_with_text_and_usage(up: Cluster) -> None:
    up.answer(ids("world"))
    found = up.client().completions.create(model=NAME, prompt="hello", max_tokens=5)
    assert found.choices[0].text == "world"
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None and found.usage.prompt_tokens_details is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (5, 5, 10)
    assert found.usage.prompt_tokens_details.cached_tokens == 3


def test_the_end_token_is_counted_but_not_shown(up: Cluster) -> None:
    up.answer((*ids("ok"), END_ID), finish="stop")
    found = up.client().completions.create(model=NAME, prompt="hello", extra_body={"return_token_ids": True})
    assert found.choices[0].text == "ok"
    assert found.choices[0].finish_reason == "stop"
    assert found.choices[0].model_extra is not None
    assert found.choices[0].model_extra["token_ids"] == [*ids("ok"), END_ID]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [(97, 98)]),
        (["ab", "c"], [(97, 98), (99,)]),
        ([97, 98], [(97, 98)]),
        ([[97, 98], [99]], [(97, 98), (99,)]),
    ],
)
def test_every_form_of_prompt_reaches_the_worker_as_token_ids(
    up: Cluster, prompt: object, expected: list[tuple[int, ...]]
) -> None:
    seen = []

    def answer(gateway, generate):  # type: ignore[no-untyped-def]
        seen.append(generate.prompt)
        up.decode.say(gateway, tokens(generate.request, 0, ids("x"), "length"))

    up.prefill.on_generate = answer
    found = up.client().completions.create(model=NAME, prompt=prompt, max_tokens=1)  # type: ignore[call-overload]
    assert seen == expected
    assert [choice.index for choice in found.choices] == list(range(len(expected)))


def test_n_choices_get_seeds_of_their_own_and_the_prompt_counts_once(up: Cluster) -> None:
    seeds = set()

    def answer(gateway, generate):  # type: ignore[no-untyped-def]
        seeds.add(generate.sampling.seed)
        up.decode.say(gateway, tokens(generate.request, 0, ids("x"), "length"))

    up.prefill.on_generate = answer
    found = up.client().completions.create(model=NAME, prompt="abc", max_tokens=1, n=3)
    assert len(found.choices) == len(seeds) == 3
    assert found.usage is not None and found.usage.prompt_tokens == 3


def test_choices_of_a_seeded_request_count_up_from_its_seed(up: Cluster) -> None:
    seeds: list[int] = []

    def answer(gateway, generate):  # type: ignore[no-untyped-def]
        seeds.append(generate.sampling.seed)
        up.decode.say(gateway, tokens(generate.request, 0, ids("x"), "length"))

    up.prefill.on_generate = answer
    up.client().completions.create(model=NAME, prompt="abc", max_tokens=1, n=3, seed=7)
    assert sorted(seeds) == [7, 8, 9]


def test_chat_goes_through_the_models_template(up: Cluster) -> None:
    up.answer(ids("hi"))
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": parts}]
    seen = []
    scripted = up.prefill.on_generate
    assert scripted is not None
    up.prefill.on_generate = lambda gateway, generate: (seen.append(generate), scripted(gateway, generate))[1]
    found = up.client().chat.completions.create(model=NAME, messages=messages, max_tokens=2)  # type: ignore[arg-type]
    assert seen[0].prompt == ids("system: be\nuser: a\nb\nassistant: ")
    assert seen[0].sampling.stop_token_ids == (END_ID,)
    assert found.choices[0].message.content == "hi"
    assert found.choices[0].message.role == "assistant"


def test_a_chat_stream_opens_with_the_role_and_closes_with_usage(up: Cluster) -> None:
    up.answer(ids("héllo"))
    stream = up.client().chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "x"}], stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "héllo"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 6
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_batch_streams_every_choice_under_its_index(up: Cluster) -> None:
    up.answer(ids("abc"))
    stream = up.client().completions.create(model=NAME, prompt=["x", "y", "z"], stream=True)
    texts = {0: "", 1: "", 2: ""}
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {0: "abc", 1: "abc", 2: "abc"}


def test_repeated_tokens_are_dropped(up: Cluster) -> None:
    answer = up.in_background(lambda: up.client().completions.create(model=NAME, prompt="x"))
    gateway, generate = up.accept()
    up.decode.say(gateway, tokens(generate.request, 0, ids("ab")))
    up.decode.say(gateway, tokens(generate.request, 1, ids("bcd")))
    up.decode.say(gateway, tokens(generate.request, 4, ids("e"), "length"))
    assert answer.result(PATIENCE_S).choices[0].text == "abcde"


def test_a_stop_string_over_token_borders_ends_the_answer_and_cancels_the_workers(up: Cluster) -> None:
    up.answer(ids("one END two"), finish=None)
    found = up.client().completions.create(model=NAME, prompt="x", stop=["END", "nothing"])
    assert found.choices[0].text == "one "
    assert found.choices[0].finish_reason == "stop"
    assert found.usage is not None and found.usage.completion_tokens == len("one END")
    assert len(up.cancelled()) == 1


def test_a_choice_that_reached_its_stop_string_is_cancelled_while_others_run_on(up: Cluster) -> None:
    answer = up.in_background(lambda: up.client().completions.create(model=NAME, prompt=["x", "y"], stop="!"))
    gateway, first = up.accept()
    _, second = up.accept()
    up.decode.say(gateway, tokens(first.request, 0, ids("a!b")))
    assert up.cancelled() == {first.request}
    up.decode.say(gateway, tokens(second.request, 0, ids("cd"), "length"))
    assert [choice.text for choice in answer.result(PATIENCE_S).choices] == ["a", "cd"]


def test_a_clients_stop_token_has_no_text_and_is_the_stop_reason(up: Cluster) -> None:
    up.answer(ids("ok!"), finish="stop")
    choice = up.client().completions.create(model=NAME, prompt="x", extra_body={"stop_token_ids": [33]}).choices[0]
    assert (choice.text, choice.finish_reason) == ("ok", "stop")
    assert (choice.model_extra or {})["stop_reason"] == 33


def test_text_that_only_looked_like_a_stop_string_is_delivered_at_the_end(up: Cluster) -> None:
    up.answer(ids("one EN"))
    stream = up.client().completions.create(model=NAME, prompt="x", stop="END", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "one EN"


def test_a_character_cut_by_the_end_shows_as_a_replacement(up: Cluster) -> None:
    up.answer((*ids("a"), 0xC3))
    assert up.client().completions.create(model=NAME, prompt="x").choices[0].text == "a\ufffd"


def test_logprobs_in_the_form_of_completions(up: Cluster) -> None:
    entries = (TokenLogprob(97, -0.5, ((98, -0.1), (97, -0.5))), TokenLogprob(99, float("-inf")))
    up.prefill.on_generate = lambda gateway, generate: up.decode.say(
        gateway, tokens(generate.request, 0, (97, 99), "length", entries)
    )
    logprobs = up.client().completions.create(model=NAME, prompt="x", logprobs=2).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "c"]
    assert logprobs.token_logprobs == [-0.5, -9999.0]
    assert logprobs.top_logprobs == [{"b": -0.1, "a": -0.5}, {"c": -9999.0}]
    assert logprobs.text_offset == [0, 1]


def test_logprobs_in_the_form_of_chat_have_exact_bytes(up: Cluster) -> None:
    entries = (TokenLogprob(0xC3, -0.5, ((98, -0.1),)), TokenLogprob(0xA9, -0.25, ((99, -0.2),)))
    up.prefill.on_generate = lambda gateway, generate: up.decode.say(
        gateway, tokens(generate.request, 0, (0xC3, 0xA9), "length", entries)
    )
    found = up.client().chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=1
    )
    choice = found.choices[0]
    assert choice.message.content == "é"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [one.bytes for one in choice.logprobs.content] == [[0xC3], [0xA9]]
    assert [one.logprob for one in choice.logprobs.content] == [-0.5, -0.25]
    assert [one.top_logprobs[0].token for one in choice.logprobs.content] == ["b", "c"]


def test_streamed_token_ids_join_to_the_whole_answer(up: Cluster) -> None:
    up.answer((*ids("aé"), END_ID), finish="stop")
    stream = up.client().completions.create(
        model=NAME, prompt="x", stream=True, extra_body={"return_token_ids": True, "ignore_eos": False}
    )
    chunks = [chunk.choices[0] for chunk in stream]
    assert [token for choice in chunks for token in (choice.model_extra or {})["token_ids"]] == [*ids("aé"), END_ID]
    assert "".join(choice.text for choice in chunks) == "aé"


def test_parameters_reach_the_worker(up: Cluster) -> None:
    up.answer(ids("x"))
    seen = []
    scripted = up.prefill.on_generate
    assert scripted is not None
    up.prefill.on_generate = lambda gateway, generate: (seen.append(generate.sampling), scripted(gateway, generate))[1]
    up.client().completions.create(
        model=NAME,
        prompt="x",
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        seed=11,
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        logprobs=1,
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "stop_token_ids": [5], "ignore_eos": True},
    )
    sampling = seen[0]
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (7, 0.5, 0.9, 11)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.1, -0.2)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty, sampling.logprobs) == (5, 0.1, 1.2, 1)
    assert sampling.stop_token_ids == (5,)


def test_models_lists_the_served_one(up: Cluster) -> None:
    client = up.client()
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME


def answer_with_cache(up: Cluster, cached_tokens: int) -> list[Generate]:
    """Every request is answered with one token and that many cached tokens; returns the requests as they come."""
    seen: list[Generate] = []

    def answer(gateway: PeerId, generate: Generate) -> None:
        seen.append(generate)
        delta = TokenDelta(generate.request, 0, ids("x"), "length", cached_tokens=cached_tokens)
        up.decode.say(gateway, Tokens(deltas=(delta,)))

    up.prefill.on_generate = answer
    return seen


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("n", [1, 3])
def test_cached_tokens_of_each_prompt_are_in_the_usage_once(up: Cluster, path: str, stream: bool, n: int) -> None:
    answer_with_cache(up, 16)
    body = {"model": NAME, "n": n, "stream": stream, "max_tokens": 1}
    body |= {"messages": [{"role": "user", "content": "x"}]} if path.startswith("chat") else {"prompt": ["ab", "c"]}
    body |= {"stream_options": {"include_usage": True}} if stream else {}
    with up.http() as client:
        answer = client.post(f"/v1/{path}", json=body).text
    if stream:
        events = [line.removeprefix("data: ") for line in answer.splitlines() if line]
        assert events[-1] == "[DONE]"
        answer = events[-2]
    usage = json.loads(answer)["usage"]
    prompts = 1 if path.startswith("chat") else 2
    assert usage["prompt_tokens_details"] == {"cached_tokens": 16 * prompts}
    assert usage["completion_tokens"] == n * prompts


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_the_cache_salt_reaches_the_worker(up: Cluster, path: str) -> None:
    seen = answer_with_cache(up, 0)
    messages = [{"role": "user", "content": "x"}]
    body = {"model": NAME, "max_tokens": 1, "n": 2, "prompt": "x", "messages": messages}
    with up.http() as client:
        for salt in ({}, {"cache_salt": None}, {"cache_salt": "tenant é"}, {"cache_salt": "x" * 256}):
            assert client.post(f"/v1/{path}", json={**body, **salt}).status_code == 200
    assert [generate.cache_salt for generate in seen] == ["", "", "", "", *["tenant é"] * 2, *["x" * 256] * 2]
