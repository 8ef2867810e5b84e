"""Laws of what is told about routing, and of who may give orders."""

import json
from pathlib import Path

import msgspec

from common.policy.routing import Router
from gateway.api_keys import read_api_keys
from gateway.core.actions import Routed
from gateway.explain import explain_headers, route_fields
from tests.gateway.core.builders import dispatch, order

ROUTER = Router(prefill="least-load", decode="least-load", local_prefill_tokens=0)
MOST_BYTES = 16_384  # what common proxies take of all headers together


def routes(n_workers: int, n_prompts: int) -> list[Routed]:
    names = [f"{role}-{n}" for role in ("prefill", "decode") for n in range(n_workers)]
    core = dispatch(*names, router=ROUTER)
    actions = core.submit([order(f"r{n}", 400, explain=True) for n in range(n_prompts)], 0.0)
    return [action for action in actions if isinstance(action, Routed)]


def test_explanations_stay_small_however_many_prompts_and_workers_there_are() -> None:
    found = explain_headers(routes(n_workers=32, n_prompts=64))
    assert sum(len(name) + len(value) for name, value in found) < MOST_BYTES
    assert [msgspec.json.decode(value) for _, value in found] == [
        json.loads(msgspec.json.encode(route_fields(one))) for one in routes(32, 64)[: len(found)]
    ]


def test_the_chosen_worker_is_among_the_few_that_are_told() -> None:
    for one in routes(n_workers=32, n_prompts=64):
        told = route_fields(one)["prefill"]
        assert told["candidates"][0]["worker"] == told["worker"] == one.placed.entry_worker


def test_a_key_that_is_only_called_like_the_operators_gives_no_orders(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"keys": [{"key": "tenant", "name": "default"}]}))
    named = read_api_keys(None, str(file), None)
    assert (named.name_of(b"tenant"), named.is_admin(b"tenant"), named.is_admin(b"")) == ("default", False, False)
    assert [read_api_keys("own", None, None).is_admin(given) for given in (b"own", b"other")] == [True, False]
    assert [read_api_keys("own", None, "boss").is_admin(given) for given in (b"own", b"boss")] == [False, True]
    assert not read_api_keys(None, None, None).is_admin(b""), "on an address that others reach"
    assert read_api_keys(None, None, None, open_admin=True).is_admin(b""), "without any key, on a loopback address"
    assert not read_api_keys("own", None, None, open_admin=True).is_admin(b"")
