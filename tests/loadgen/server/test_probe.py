import asyncio
import json
from collections.abc import Mapping

import pytest

from common.errors import ConfigError
from loadgen.server.api import ServerApi
from loadgen.server.models import choose_model
from loadgen.server.probe import Probe, probe
from tests.loadgen.fake_server import fake_server, steady
from tests.loadgen.server.pages import status, vllm, worker


def ask(pages: Mapping[str, bytes | int], model: str = "fake") -> Probe:
    async def talk() -> Probe:
        async with fake_server(steady()) as fake:
            fake.pages = {path: lambda page=page: page for path, page in pages.items()}
            async with ServerApi(f"{fake.url}/v1", {}) as api:
                return await probe(api, model)

    return asyncio.run(talk())


def test_penstock_is_known_by_its_status() -> None:
    found = ask({"/status": status(worker("m", "mixed")), "/metrics": b"vllm:x 1\n"})
    assert (found.is_penstock, found.told) == (True, "/status of Penstock")


def test_other_servers_are_known_by_their_metrics() -> None:
    found = ask({"/status": b'{"status": "ok"}', "/metrics": vllm(0, 0, 0.0)})
    assert (found.is_penstock, found.told) == (False, "/metrics of vLLM")
    assert found.source is not None


def test_of_a_server_that_tells_nothing_it_is_said_why() -> None:
    found = ask({"/status": 401, "/metrics": b"up 1\n"})
    assert found.source is None
    assert "GET /status: HTTP 401" in found.told and "GET /metrics: not of vLLM" in found.told


@pytest.mark.parametrize(
    ("card", "tokens"),
    [
        ({"max_model_len": 4096}, 4096),
        ({"context_length": 8192}, 8192),
        ({}, None),
        ({"max_model_len": None}, None),
        ({"max_model_len": "many"}, None),
        ({"max_model_len": -1}, None),
        ({"max_model_len": 10**30}, None),
    ],
)
def test_the_context_is_what_the_models_card_says(card: dict[str, object], tokens: int | None) -> None:
    async def talk() -> int | None:
        async with fake_server(steady()) as fake:
            cards = [{"id": "other", "max_model_len": 1}, {"id": "fake", **card}]
            fake.pages["/v1/models"] = lambda: json.dumps({"data": cards}).encode()
            async with ServerApi(fake.url, {}) as api:
                return (await probe(api, "fake")).context_tokens

    assert asyncio.run(talk()) == tokens


def test_a_server_that_is_gone_is_no_error() -> None:
    async def talk() -> Probe:
        async with ServerApi("http://127.0.0.1:1", {}) as api:
            return await probe(api, "m")

    found = asyncio.run(talk())
    assert (found.source, found.context_tokens) == (None, None)


def test_the_clients_headers_go_along() -> None:
    async def talk() -> list[tuple[str, dict[str, str]]]:
        async with fake_server(steady()) as fake:
            async with ServerApi(fake.url, {"authorization": "Bearer k"}) as api:
                await probe(api, "fake")
            return fake.asked

    asked = asyncio.run(talk())
    assert [path for path, _ in asked][:2] == ["/status", "/metrics"]
    assert {headers["authorization"] for _, headers in asked} == {"Bearer k"}


@pytest.mark.parametrize(
    ("pages", "failing"),
    [
        ({}, ""),
        ({"/status": 405, "/metrics": b"up 1\n"}, ""),
        ({"/status": b'{"status": "ok"}'}, ""),
        ({"/status": 500}, "GET /status: HTTP 500: no body"),
        ({"/status": 401, "/metrics": 503}, "GET /status: HTTP 401: no body; GET /metrics: HTTP 503: no body"),
        ({"/status": 500, "/metrics": vllm(0, 0, 0.0)}, ""),
    ],
)
def test_a_page_that_fails_is_told_apart_from_one_that_is_not_there(
    pages: Mapping[str, bytes | int], failing: str
) -> None:
    assert ask(pages).failing == failing


DEEP = b'{"data": [], "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def test_models_nested_too_deep_are_no_context() -> None:
    assert ask({"/v1/models": DEEP}).context_tokens is None


def model(page: bytes, named: str | None) -> str:
    async def talk() -> str:
        async with fake_server(steady()) as fake, ServerApi(fake.url, {}) as api:
            fake.pages["/v1/models"] = lambda: page
            return await choose_model(api, fake.url, named)

    return asyncio.run(talk())


def test_models_nested_too_deep_are_not_listed() -> None:
    assert model(DEEP, "mine") == "mine"
    with pytest.raises(ConfigError, match="does not list its models"):
        model(DEEP, None)


@pytest.mark.parametrize("named", [None, "mine"])
def test_names_of_models_reach_no_terminal_as_commands(named: str | None) -> None:
    page = json.dumps({"data": [{"id": "\x1b[31mred"}, {"id": "two"}]}).encode()
    with pytest.raises(ConfigError) as refused:
        model(page, named)
    assert "\\x1b[31mred, two" in str(refused.value)
