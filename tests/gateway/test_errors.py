"""Bad requests: each a clear answer in OpenAI's shape, with nothing held (the fixture checks that at the end)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.gateway.cluster import Cluster, cluster
from tests.gateway.model import CONTEXT_TOKENS, NAME, ids


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object, after checking its shape."""
    assert response.headers["x-request-id"]
    error: dict[str, Any] = response.json()["error"]
    asked = response.request.method == "POST" and response.request.url.path.startswith("/v1/")
    assert set(error) == {"message", "type", "param", "code"} | ({"phase", "retryable"} if asked else set())
    assert error["message"]
    return error


def completion(**changes: Any) -> dict[str, Any]:
    return {"model": NAME, "prompt": "x", **changes}


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": [{"role": "user", "content": "x"}], **changes}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (completion(max_tokens=-1), "max_tokens"),
        (completion(max_tokens=0), "max_tokens"),
        (completion(max_tokens="5"), "max_tokens"),
        (completion(max_tokens=True), "max_tokens"),
        (completion(max_tokens=1.5), "max_tokens"),
        (completion(temperature=-0.1), "temperature"),
        (completion(temperature=2.1), "temperature"),
        (completion(top_p=0), "top_p"),
        (completion(top_p=1.1), "top_p"),
        (completion(top_k=-2), "top_k"),
        (completion(min_p=2), "min_p"),
        (completion(repetition_penalty=0), "repetition_penalty"),
        (completion(repetition_penalty=0.009), "repetition_penalty"),
        (completion(repetition_penalty=100.5), "repetition_penalty"),
        (chat(repetition_penalty=1e-308), "repetition_penalty"),
        (completion(presence_penalty=3), "presence_penalty"),
        (completion(seed=2**70), "seed"),
        (completion(n=0), "n"),
        (completion(n=129), "n"),
        (completion(n=65, prompt=["a", "b"]), "prompt"),
        (completion(prompt=None), "prompt"),
        (completion(prompt=""), "prompt"),
        (completion(prompt=[]), "prompt"),
        (completion(prompt=["a", [1]]), "prompt"),
        (completion(prompt=["a", 1]), "prompt"),
        (completion(prompt=[300]), "prompt"),
        (completion(prompt=[-1]), "prompt"),
        (completion(prompt=[[1], [2, 999]]), "prompt[1]"),
        (completion(prompt={"text": "x"}), "prompt"),
        (completion(stop=["a"] * 5), "stop"),
        (completion(stop=""), "stop"),
        (completion(stop=[1]), "stop[0]"),
        (completion(cache_salt=""), "cache_salt"),
        (completion(cache_salt="x" * 257), "cache_salt"),
        (completion(cache_salt=7), "cache_salt"),
        (chat(cache_salt=["x"]), "cache_salt"),
        (completion(stop_token_ids=[999]), "stop_token_ids"),
        (completion(logprobs=21), "logprobs"),
        (completion(stream_options={"include_usage": True}), "stream_options"),
        (completion(best_of=2), "best_of"),
        (completion(echo=True), "echo"),
        (completion(suffix="y"), "suffix"),
        (completion(logit_bias={"1": 5}), "logit_bias"),
        (completion(response_format={"type": "json_object"}), "response_format"),
        ({"prompt": "x"}, "model"),
        (chat(tools=[{"type": "function"}]), "tools"),
        (chat(response_format={"type": "json_schema"}), "response_format"),
        (chat(max_completion_tokens=-1), "max_completion_tokens"),
        (chat(top_logprobs=2), "top_logprobs"),
        (chat(messages=[]), "messages"),
        (chat(messages="hello"), "messages"),
        (chat(messages=[{"role": "robot", "content": "x"}]), "messages[0].role"),
        (chat(messages=[{"role": "user"}]), "messages[0].content"),
        (chat(messages=[{"content": "x"}]), "messages[0].role"),
        (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content[0].type"),
        (chat(messages=[{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]), "messages"),
    ],
)
def test_a_bad_field_is_a_400_that_names_it(up: Cluster, body: dict[str, Any], param: str) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    with up.http() as client:
        response = client.post(path, json=body)
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == param, response.text


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b'{"model": "\xff"}', b"\xff\xfe", b'{"a":' * 5000, b'{"temperature": NaN}']
)
def test_a_body_that_is_no_json_object_in_utf8_is_a_400(up: Cluster, raw: bytes) -> None:
    with up.http() as client:
        response = client.post("/v1/completions", content=raw)
    assert response.status_code == 400, response.text
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("field", ["prompt", "messages"])
def test_an_unknown_model_is_a_404(up: Cluster, field: str) -> None:
    body = {**(chat() if field == "messages" else completion()), "model": "other"}
    with up.http() as client:
        response = client.post("/v1/chat/completions" if field == "messages" else "/v1/completions", json=body)
        assert response.status_code == 404
        assert error_of(response)["code"] == "model_not_found"
        assert error_of(client.get("/v1/models/other"))["code"] == "model_not_found"


@pytest.mark.parametrize(
    "body",
    [
        completion(prompt=[1] * CONTEXT_TOKENS),
        completion(prompt=[1] * (CONTEXT_TOKENS - 3), max_tokens=4),
        chat(messages=[{"role": "user", "content": "x" * 100_000}]),
    ],
)
def test_a_prompt_beyond_the_context_is_a_400_with_the_numbers(up: Cluster, body: dict[str, Any]) -> None:
    with up.http() as client:
        response = client.post("/v1/chat/completions" if "messages" in body else "/v1/completions", json=body)
    assert response.status_code == 400
    error = error_of(response)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == ("messages" if "messages" in body else "prompt")
    assert str(CONTEXT_TOKENS) in error["message"]


def test_a_body_of_5_mb_is_a_413_whether_announced_or_streamed(up: Cluster) -> None:
    body = json.dumps(completion(prompt="x" * 5_000_000)).encode()

    def streamed() -> Iterator[bytes]:
        for start in range(0, len(body), 1 << 16):
            yield body[start : start + (1 << 16)]

    with up.http() as client:
        for content in (body, streamed()):
            response = client.post("/v1/completions", content=content)
            assert response.status_code == 413
            assert error_of(response)["code"] == "body_too_large"


def test_an_unknown_path_is_a_404_and_a_wrong_method_a_405(up: Cluster) -> None:
    with up.http() as client:
        assert error_of(client.get("/v1/nothing"))["code"] == "not_found"
        response = client.get("/v1/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert error_of(response)["code"] == "method_not_allowed"


def test_unknown_fields_and_neutral_values_are_ignored(up: Cluster) -> None:
    up.answer(ids("x"))
    neutral = {"logit_bias": {}, "best_of": 1, "echo": False, "suffix": None, "foo": {"bar": 1}, "user": "me"}
    with up.http() as client:
        assert client.post("/v1/completions", json=completion(**neutral)).status_code == 200
        neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "n": None, "seed": None}
        assert client.post("/v1/chat/completions", json=chat(**neutral)).status_code == 200


def test_the_request_id_comes_back_and_a_bad_one_is_refused(up: Cluster) -> None:
    up.answer(ids("x"))
    with up.http() as client:
        response = client.post("/v1/completions", json=completion(), headers={"x-request-id": "mine-1"})
        assert response.headers["x-request-id"] == "mine-1"
        assert response.json()["id"] == "cmpl-mine-1"
        for bad in ("a b", "x" * 129, "é".encode()):
            response = client.post("/v1/completions", json=completion(), headers=[(b"x-request-id", _raw(bad))])
            assert response.status_code == 400
            assert error_of(response)["param"] == "x-request-id"


def _raw(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


def test_the_api_key_guards_the_api_but_not_the_probes(redis_url: str, model: Path) -> None:
    with cluster(redis_url, model, api_key="sesame") as up:
        up.answer(ids("x"))
        with pytest.raises(openai.AuthenticationError) as caught:
            up.client(api_key="wrong").models.list()
        assert caught.value.status_code == 401
        assert up.client(api_key="sesame").completions.create(model=NAME, prompt="x").choices[0].text == "x"
        with up.http() as client:
            for path in ("/status", "/status/memory"):
                assert error_of(client.get(path))["code"] == "invalid_api_key"
            assert [client.get(path).status_code for path in ("/health", "/ready", "/metrics")] == [200, 200, 200]


def test_without_workers_requests_get_503_with_retry_after(redis_url: str, model: Path) -> None:
    with cluster(redis_url, model, workers=False) as up, up.http() as client:
        response = client.post("/v1/completions", json=completion())
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert error_of(response)["code"] == "no_worker"
        ready = client.get("/ready")
        assert ready.status_code == 503
        assert "decode" in error_of(ready)["message"]
        assert client.get("/health").status_code == 200


def test_more_requests_than_allowed_are_busy(redis_url: str, model: Path) -> None:
    with cluster(redis_url, model, max_inflight=1) as up, up.http() as client:
        response = client.post("/v1/completions", json=completion(prompt=["a", "b"]))
        assert response.status_code == 503
        assert error_of(response)["code"] == "busy"
