"""What /openapi.json says is what is there: every route, every status, every field, and answers that are as described."""

import json
import random
import re
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.routing import Route

from common.errors import ConfigError, ServingError
from gateway.api_keys import ApiKeys, read_api_keys
from gateway.core.failure import WorkerFailed
from gateway.errors import MethodNotAllowed, NotFound
from gateway.openai_schema import ChatRequest, CompletionRequest
from gateway.openapi import describe
from tests.gateway.cluster import Cluster
from tests.gateway.model import NAME
from tests.hostile.http_fuzz import answer_everything, fuzz

OPEN = ApiKeys({}, {}, None, open_admin=True)
METHODS = {"get", "head", "post", "put", "delete", "patch"}


def operations(description: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(path, method): one for path, item in description["paths"].items() for method, one in item.items()}


def test_every_route_is_described_and_nothing_else(shared: Cluster) -> None:
    app: Any = shared.gateway._server.config.app
    while not isinstance(app, FastAPI):
        app = app._app
    there = {
        (re.sub(r":\w+}", "}", route.path), method.lower())
        for route in app.routes
        if isinstance(route, Route)
        for method in route.methods or ()
    }
    assert set(operations(describe(OPEN))) == there


def error_classes() -> set[type[ServingError]]:
    found, waiting = set(), [ServingError]
    while waiting:
        kind = waiting.pop()
        found.add(kind)
        waiting += kind.__subclasses__()
    return {kind for kind in found if kind.__module__.partition(".")[0] in ("common", "gateway")}


def test_every_status_of_every_error_of_a_request_is_described() -> None:
    description = describe(read_api_keys("key", None, "admin"))
    statuses = {int(status) for one in operations(description).values() for status in one["responses"]}
    nobody_asks = {NotFound, MethodNotAllowed, ConfigError, WorkerFailed}  # no such route, no request, another's status
    missing = {kind for kind in error_classes() - nobody_asks if kind.http_status not in statuses}
    assert not missing


@pytest.mark.parametrize(("name", "kind"), [("CompletionRequest", CompletionRequest), ("ChatRequest", ChatRequest)])
def test_every_field_of_a_body_is_described(name: str, kind: Any) -> None:
    assert set(describe(OPEN)["components"]["schemas"][name]["properties"]) == set(kind.__struct_fields__)


@pytest.mark.parametrize(
    ("keys", "serving", "orders"),
    [
        (OPEN, set(), set()),
        (ApiKeys({}, {}, None), set(), {403}),
        (read_api_keys("key", None, None), {401}, {403}),
        (read_api_keys(None, None, "admin"), set(), {403}),
    ],
    ids=["open", "no-operators", "one-key", "operators"],
)
def test_what_a_key_is_needed_for_is_described(keys: ApiKeys, serving: set[int], orders: set[int]) -> None:
    found = operations(describe(keys))
    for (path, _), one in found.items():
        refusals = {int(status) for status in one["responses"]} & {401, 403}
        if path.startswith("/v1"):
            assert refusals == serving and bool(one["security"]) == bool(serving)
        elif path.startswith("/admin"):
            assert refusals >= orders - {403} and bool(one["security"]) == bool(orders)


ABSURD: tuple[Any, ...] = (
    *(None, True, "", "x", "\0", -1, 0, 1.5, -(2**63), 2**63 - 1, 2**64, 10**400, 1e308, [], [[]], [None], {}),
    *({"type": "text"}, [1] * 300, "y" * 10_000, [{"role": "user", "content": None}], [[[[[1]]]]]),
)


def test_any_value_in_any_field_is_taken_or_refused_by_the_name_of_the_field(shared: Cluster) -> None:
    shared.forget_script()
    answer_everything(shared)
    chance = random.Random(8)
    bodies = {
        "/v1/completions": (CompletionRequest, {"model": NAME, "prompt": "ab", "max_tokens": 1}),
        "/v1/chat/completions": (
            ChatRequest,
            {"model": NAME, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
        ),
    }
    tries = [
        (path, name, value) for path, (kind, _) in bodies.items() for name in kind.__struct_fields__ for value in ABSURD
    ]
    with shared.http() as client:
        for path, name, value in chance.sample(tries, 300):
            answer = client.post(path, content=json.dumps({**bodies[path][1], name: value}))
            assert answer.status_code in (200, 400, 404), (name, value, answer.text)
            error = answer.json().get("error")
            assert (error is None) == (answer.status_code == 200)
            if answer.status_code == 400 and error["code"] != "context_length_exceeded":
                told = error["param"] or ""
                also = {"stream": "stream_options", "user": "x-session-id", "prompt_cache_key": "x-session-id"}
                assert told.startswith((name, also.get(name, name), "prompt")), (name, value, error)
    shared.check_idle()
    shared.forget_script()


@pytest.mark.system
def test_fuzzed_requests_are_answered_as_described(shared: Cluster) -> None:
    """No 500, no hang, no leak; whoever sends rubbish hears which field it is in."""
    shared.forget_script()
    answer_everything(shared)
    try:
        counts = fuzz(shared, 8, only_bodies=True)
        assert {200, 400} <= set(counts.by_status) and not counts.by_status[500]
        with shared.http() as client:
            assert client.get("/status").json()["gateway"]["open_requests"] == 0
        shared.check_idle()
    finally:
        for worker in (shared.prefill, shared.decode):
            worker.on_resize = None
        shared.forget_script()
