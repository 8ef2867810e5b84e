"""What clients and operators see of routing: headers, rules, retries, keys, drain. Over HTTP, with fake workers."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from common.messages.liveness import Drain
from common.messages.requests import Failed, Generate
from gateway.api_keys import read_api_keys
from gateway.timeline import FIRST_TOKEN_PARTS, WORKER_PARTS
from tests.gateway.cluster import Cluster, cluster
from tests.gateway.fake_worker import PATIENCE_S, FakeWorker, tokens
from tests.gateway.model import NAME, identity, ids

BODY: dict[str, Any] = {"model": NAME, "prompt": "hello", "max_tokens": 2}


def ask(up: Cluster, headers: dict[str, str] | None = None, **body: Any):
    with up.http(headers=headers or {}) as client:
        return client.post("/v1/completions", json={**BODY, **body})


@pytest.fixture
def up(redis_url: str, model: Path):
    with cluster(redis_url, model) as one:
        one.answer(ids("ab"))
        yield one


@pytest.mark.parametrize("stream", [False, True])
def test_who_asks_is_told_where_it_went_and_why(up: Cluster, stream: bool) -> None:
    answer = ask(up, {"x-penstock-explain": "1"}, stream=stream)
    assert answer.status_code == 200
    told = json.loads(answer.headers["x-penstock-explain"])
    assert (told["prefill"]["worker"], told["decode"]["worker"]) == ("prefill-0", "decode-0")
    assert told["prefill"]["rule"] == "predicted-time"
    assert told["prefill"]["candidates"][0].keys() >= {"queued_ms", "own_ms", "hit_tokens"}
    assert (told["attempt"], told["local"]) == (1, None)
    assert "x-penstock-explain" not in ask(up, stream=stream).headers


def require_phases(told: dict[str, Any]) -> None:
    """All parts in their order, the worker's as it said, and at least the whole: fake workers did not take their time."""
    parts_ms = told["phases_ms"]
    assert tuple(parts_ms) == FIRST_TOKEN_PARTS
    workers_ms = {part: parts_ms[part] for part in WORKER_PARTS}
    assert workers_ms == {"prefill_queue": 0.0, "compute": 1.0, "grant_wait": 0.0, "transfer": 0.0}
    if parts_ms["wire"] > 0:
        assert sum(parts_ms.values()) == pytest.approx(told["ttft_ms"], abs=0.05)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_whole_answer_tells_phases_and_workers_to_who_asked(up: Cluster, path: str) -> None:
    prompt = BODY if path == "/v1/completions" else {**BODY, "messages": [{"role": "user", "content": "hello"}]}
    body = {name: value for name, value in prompt.items() if (name == "prompt") <= (path == "/v1/completions")}
    with up.http() as client:
        told = client.post(path, json=body, headers={"x-penstock-explain": "1"}).json()
        untold = client.post(path, json=body).json()
    assert told["penstock"]["workers"] == {"prefill": "prefill-0", "decode": "decode-0"}
    require_phases(told["penstock"])
    assert "penstock" not in untold
    assert told.keys() - {"penstock"} == untold.keys()


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_tells_phases_and_workers_in_one_last_chunk_without_choices(up: Cluster, usage: bool) -> None:
    options = {"stream": True, **({"stream_options": {"include_usage": True}} if usage else {})}
    last = chunks(ask(up, {"x-penstock-explain": "1"}, **options).text)[-1]
    assert last["choices"] == []
    assert last["penstock"]["workers"] == {"prefill": "prefill-0", "decode": "decode-0"}
    require_phases(last["penstock"])
    assert ("usage" in last) == usage
    untold = chunks(ask(up, **options).text)
    assert not [chunk for chunk in untold if "penstock" in chunk]
    assert (untold[-1]["choices"] == []) == usage


def chunks(text: str) -> list[dict[str, Any]]:
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_after_a_replay_the_workers_told_are_those_that_served_in_the_end(redis_url: str, model: Path) -> None:
    with cluster(redis_url, model, attempts=3) as up:
        decode = {"decode-0": up.decode, "decode-1": FakeWorker("decode-1", "decode", identity())}
        up.workers.append(decode["decode-1"].join(up.redis, up.name))
        assert decode["decode-1"].pinged.wait(PATIENCE_S)
        answer = up.in_background(lambda: ask(up, {"x-penstock-explain": "1"}))
        gateway, first = up.accept()
        loser = decode[str(first.decode)]
        loser.say(gateway, tokens(first.request, 0, ids("a")))
        loser.say(gateway, Failed(request=first.request, code="peer_failed", phase="decode", text="", retryable=True))
        up.prefill.heard.get(timeout=PATIENCE_S)  # the Cancel
        gateway, second = up.accept()
        assert second.decode != first.decode
        decode[str(second.decode)].say(gateway, tokens(second.request, 1, ids("b"), "length"))
        told = answer.result(PATIENCE_S).json()["penstock"]
        assert told["workers"] == {"prefill": "prefill-0", "decode": second.decode}
        require_phases(told)  # of the first token, which the first attempt gave


def test_rules_can_be_named_per_request_and_bad_ones_are_refused_by_name(up: Cluster) -> None:
    headers = {"x-penstock-explain": "1", "x-penstock-route-prefill": "session", "x-session-id": "s"}
    told = json.loads(ask(up, headers).headers["x-penstock-explain"])
    assert (told["prefill"]["rule"], told["decode"]["rule"]) == ("session", "predicted-time")
    pinned = ask(up, {"x-penstock-explain": "1", "x-penstock-route-decode": "worker=decode-0"})
    assert json.loads(pinned.headers["x-penstock-explain"])["decode"]["rule"] == "worker=decode-0"
    bad = ask(up, {"x-penstock-route-decode": "best"})
    assert bad.status_code == 400
    assert bad.json()["error"]["param"] == "x-penstock-route-decode"
    assert "predicted-time" in bad.json()["error"]["message"]
    nobody = ask(up, {"x-penstock-route-decode": "worker=decode-9"})
    assert (nobody.status_code, "decode-9" in nobody.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    ("headers", "body"),
    [({"x-penstock-explain": "yes"}, {}), ({"x-session-id": "s" * 300}, {}), ({}, {"priority": 10**6})],
)
def test_bad_wishes_are_refused_before_anything_starts(
    up: Cluster, headers: dict[str, str], body: dict[str, Any]
) -> None:
    assert ask(up, headers, **body).status_code == 400
    up.check_idle()


def test_a_failed_attempt_is_tried_again_and_a_broken_stream_goes_on(redis_url: str, model: Path) -> None:
    with cluster(redis_url, model, attempts=4) as up:
        answer = up.in_background(lambda: ask(up, {"x-penstock-explain": "1"}, max_tokens=3))
        gateway, first = up.accept()
        busy = Failed(request=first.request, code="busy", phase="grant", text="full", retryable=True)
        up.prefill.say(gateway, busy)
        up.decode.heard.get(timeout=PATIENCE_S)  # the Cancel
        gateway, second = up.accept()
        up.decode.say(gateway, tokens(second.request, 0, ids("a")))
        broken = Failed(request=second.request, code="peer_failed", phase="decode", text="", retryable=True)
        up.decode.say(gateway, broken)
        up.prefill.heard.get(timeout=PATIENCE_S)
        gateway, third = up.accept()
        assert third.emitted == ids("a")
        assert len({first.request, second.request, third.request}) == 3
        up.decode.say(gateway, tokens(third.request, 1, ids("bc"), "length"))
        got = answer.result(PATIENCE_S)
        assert got.json()["choices"][0]["text"] == "abc"
        assert json.loads(got.headers["x-penstock-explain"])["attempt"] == 3
        assert got.json()["usage"]["completion_tokens"] == 3


def test_a_worker_is_drained_and_resumed_over_http(up: Cluster) -> None:
    heard: list[Drain] = []
    up.prefill.on_drain = lambda message: heard.append(message)
    with up.http() as client:
        answer = client.post("/admin/workers/prefill-0/drain")
        assert (answer.status_code, answer.json()["state"]) == (202, "draining")
        (state,) = [w for w in client.get("/status").json()["workers"] if w["id"] == "prefill-0"]
        assert state["state"] == "draining"
        assert client.get("/ready").status_code == 503
        assert ask(up).status_code == 503
        assert client.post("/admin/workers/prefill-0/resume").status_code == 202
        while client.get("/ready").status_code != 200:
            continue
        assert ask(up).status_code == 200
        assert [client.post(f"/admin/workers/nobody-{n}/drain").status_code for n in range(3)] == [404] * 3
        assert client.get("/metrics").text.count('path="/admin/workers/') == 3, "by answer, not by id"
    assert heard[0] == Drain(on=True) and heard[-1] == Drain(on=False)


def test_only_operators_drain_and_their_key_opens_the_pages_of_state(redis_url: str, model: Path) -> None:
    with cluster(redis_url, model, api_key="user", admin_key="boss") as up:
        for key, drained, looked in ((None, 403, 401), ("user", 403, 200), ("boss", 202, 200)):
            with up.http(headers={} if key is None else {"authorization": f"Bearer {key}"}) as client:
                assert client.post("/admin/workers/decode-0/drain").status_code == drained
                assert [client.get(f"/status{page}").status_code for page in ("", "/memory")] == [looked, looked]


def test_keys_have_limits_of_their_own(redis_url: str, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(
        json.dumps({"keys": [{"key": "k1", "name": "slow", "requests_per_minute": 1}, {"key": "k2", "name": "free"}]})
    )
    with cluster(redis_url, model, api_keys=str(file)) as up:
        up.answer(ids("ab"))
        assert ask(up, {"authorization": "Bearer k3"}).status_code == 401
        assert ask(up, {"authorization": "Bearer k1"}).status_code == 200
        refused = ask(up, {"authorization": "Bearer k1"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert ask(up, {"authorization": "Bearer k2"}).status_code == 200


@pytest.mark.parametrize(
    "text",
    [
        '{"keys": []}',
        "{}",
        "no",
        '{"keys": [{"key": "a", "name": "x"}, {"key": "b", "name": "x"}]}',
        '{"keys": [{"key": "", "name": "x"}]}',
    ],
)
def test_a_file_of_keys_that_would_open_the_gateway_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"--api-keys=.*keys\.json"):
        read_api_keys(None, str(file), None)


def test_who_does_not_fit_waits_and_who_waits_too_long_is_told(redis_url: str, model: Path) -> None:
    with cluster(redis_url, model, max_inflight=1, max_waiting=1, max_wait_s=0.3) as up:
        first = up.in_background(lambda: ask(up))
        gateway, generate = up.accept()
        second = up.in_background(lambda: ask(up))
        late = second.result(PATIENCE_S)
        assert (late.status_code, late.headers["retry-after"]) == (503, "1")
        third = up.in_background(lambda: ask(up))
        up.decode.say(gateway, tokens(generate.request, 0, ids("ab"), "length"))
        assert first.result(PATIENCE_S).status_code == 200
        gateway, generate = up.accept()
        up.decode.say(gateway, tokens(generate.request, 0, ids("ab"), "length"))
        assert third.result(PATIENCE_S).status_code == 200


@pytest.mark.system  # it waits for a silent worker
def test_without_prefill_workers_the_decode_worker_computes_and_it_is_counted(redis_url: str, model: Path) -> None:
    with cluster(redis_url, model, prefill_fallback="allow") as up:
        up.prefill.stop()
        up.workers.remove(up.prefill)
        up.decode.on_generate = lambda gateway, g: up.decode.say(gateway, tokens(g.request, 0, ids("ab"), "length"))
        with up.http() as client:
            while {w["id"]: w["state"] for w in client.get("/status").json()["workers"]}.get("prefill-0") == "ready":
                continue
            told = json.loads(ask(up, {"x-penstock-explain": "1"}).headers["x-penstock-explain"])
            assert (told["local"], told["answers"]) == ("no-prefill-worker", "decode-0")
            assert 'local_prefills_total{reason="no-prefill-worker"} 1.0' in client.get("/metrics").text


@pytest.mark.system  # seconds each: too long for `make check`
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_cold_requests_are_spread_evenly_on_every_endpoint(
    redis_url: str, model: Path, path: str, stream: bool
) -> None:
    with cluster(redis_url, model, workers=False) as up:
        counts = {f"mixed-{n}": 0 for n in range(4)}

        def serve(worker: FakeWorker) -> None:
            def on_generate(gateway: Any, generate: Generate) -> None:
                counts[worker.member.id] += 1
                worker.say(gateway, tokens(generate.request, 0, ids("ab"), "length"))

            worker.on_generate = on_generate

        for name in counts:
            worker = FakeWorker(name, "mixed", identity())
            serve(worker)
            up.workers.append(worker.join(up.redis, up.name))
        assert all(worker.pinged.wait(PATIENCE_S) for worker in up.workers[2:])
        body = {"model": NAME, "max_tokens": 2, "stream": stream}
        with up.http() as client:
            for n in range(600):
                text = f"{n:04d} is a prompt of its own"
                prompt = (
                    {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
                )
                assert client.post(path, json={**body, **prompt}).status_code == 200
        assert max(counts.values()) < 1.4 * 150, counts
