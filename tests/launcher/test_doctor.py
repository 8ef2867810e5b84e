"""What the doctor finds in a running system: each fault made once in a status document, and said with what to change."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.launcher import cluster_checks as checks
from services.launcher.doctor import as_json, machine, running
from services.launcher.findings import Finding, Level
from services.launcher.process_checks import (
    Here,
    check_plans,
    check_processes,
    limits_of,
    machine_bytes,
    memory_limit_bytes,
)
from services.launcher.redis_checks import RedisFound, check_told, judge, look_at_redis
from services.launcher.settings import DoctorSettings
from services.launcher.status import main as show_status
from services.launcher.tables import policies_text
from tests.support.control_groups import group, system
from tests.support.redis import redis_server

VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}


def link(to: str, kind: str = "shm", reason: str = "") -> dict[str, Any]:
    return {"peer": f"{to}@1", "kind": kind, "gib_per_s": 2.0, "reason": reason}


def worker(name: str, *links: dict[str, Any], **more: object) -> dict[str, Any]:
    role = name.partition("-")[0]
    fields = {"id": name, "role": role, "state": "ready", "reason": "", "pid": 7, "host": "h", "model": {"name": "m"}}
    fields |= {"pid_space": "here"}
    fields |= {
        "endpoint": "tcp://127.0.0.1:5",
        "policies": {"cluster-key": "off", "caching": "3"},
        "versions": VERSIONS,
    }
    fields |= {
        "transports": list(links),
        "gauges": {},
        "counters": {},
        "alive_ms": 0,
        "degraded": "",
        "breaker": "closed",
    }
    return {**fields, **more}


def status(*workers: dict[str, Any]) -> dict[str, Any]:
    gateway = {
        "id": "gateway-0",
        "host": "h",
        "pid": 1,
        "pid_space": "here",
        "unix_ms": 1_000_000,
        "versions": VERSIONS,
        "policies": {},
    }
    return {"gateway": gateway, "workers": list(workers)}


GOOD = status(worker("prefill-0", link("decode-0")), worker("decode-0"))
ALL = (checks.check_workers, checks.check_links, checks.check_versions, checks.check_openness)


def here(total_bytes: int) -> Here:
    return Here("h", "here", total_bytes, total_bytes)


def warned(findings: object) -> list[Finding]:
    return [one for one in findings if one.level is not Level.OK]  # type: ignore[attr-defined]


def test_a_healthy_cluster_has_no_fault() -> None:
    assert [warned(check(GOOD)) for check in ALL] == [[]] * len(ALL)
    assert warned(checks.check_clocks(GOOD, {"redis": 3.0})) == []


@pytest.mark.parametrize(
    ("check", "prefill", "subject", "word"),
    [
        (checks.check_workers, {"degraded": "it stood still"}, "worker", "it stood still"),
        (checks.check_workers, {"state": "leaving", "reason": "gone"}, "worker", "leaving"),
        (checks.check_workers, {"gauges": {"stalled_ms": 20_000.0}}, "worker", "nothing moved for 20 s"),
        (checks.check_links, {"transports": []}, "transport", "no way to move KV"),
        (checks.check_links, {"transports": [link("decode-0", "tcp", "no socket")]}, "transport", "tcp"),
        (
            checks.check_versions,
            {"versions": {"torch": "2.4.0"}},
            "versions",
            "torch 2.13.0 on gateway-0, decode-0; 2.4.0",
        ),
        (checks.check_openness, {"endpoint": "tcp://10.0.0.5:5"}, "network", "without a key"),
        (checks.check_openness, {"endpoint": "tcp://10.0.0.5:5", "policies": {}}, "network", "does not tell"),
        (checks.check_openness, {"endpoint": "tcp://[::1"}, "network", "no address"),
        (checks.check_keys, {"policies": {"cluster-key": "set"}}, "network", "off on decode-0; set on prefill-0"),
    ],
)
def test_each_fault_is_found_and_told_with_what_to_change(check: Any, prefill: dict, subject: str, word: str) -> None:
    (found,) = warned(
        check(status(worker("prefill-0", **{"transports": [link("decode-0")], **prefill}), worker("decode-0")))
    )
    assert found.subject == subject and word in found.text and found.advice


@pytest.mark.parametrize(
    ("state", "advised"),
    [("connecting", "--cluster-key"), ("draining", "/admin/workers/prefill-0/resume"), ("leaving", "--redis")],
)
def test_each_state_has_its_own_advice(state: str, advised: str) -> None:
    (found,) = warned(checks.check_workers(status(worker("prefill-0", state=state))))
    assert advised in found.advice


@pytest.mark.parametrize("name", ["stalled_ms", "unix_ms", "watchdog_fired_total"])
def test_a_figure_that_is_no_number_is_one_that_was_not_told(name: str) -> None:
    odd = status(worker("prefill-0", gauges={name: None}, counters={name: None}, alive_ms=None))
    assert [warned(check(odd)) for check in (checks.check_workers, checks.check_openness)] == [[], []]
    assert warned(checks.check_clocks(odd, {})) == []


def answer(code: int, content: bytes, kind: str = "application/json") -> type[BaseHTTPRequestHandler]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.send_header("content-type", kind)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Answer


@pytest.mark.parametrize(
    ("served", "says", "advised"),
    [
        (answer(401, b"{}"), "asks for a key: give it with --api-key", "key"),
        (answer(500, b"no"), "answered 500: no", "log"),
        (answer(200, b"<html>", "text/html"), "/status is text/html", "correct --url"),
        (answer(200, b"[1]"), "no JSON object", "correct --url"),
        (answer(200, b"\xff"), "no JSON object", "correct --url"),
        (answer(200, b"{}"), "names neither", "correct --url"),
        (answer(200, b'{"gateway": 1, "workers": []}'), "names neither", "correct --url"),
    ],
)
def test_a_server_that_is_no_gateway_or_wants_a_key_is_told_as_such(
    served: type[BaseHTTPRequestHandler], says: str, advised: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), served) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        (found,) = running(url, None, RedisFound([]))
        assert show_status(["--url", url]) == 1
        server.shutdown()
    assert found.level is Level.FAIL and says in found.text and advised in found.advice
    assert says in capsys.readouterr().err


def test_nobody_at_the_address_is_told_as_such() -> None:
    (found,) = running("http://127.0.0.1:9", None, RedisFound([]))
    assert "does not answer" in found.text and "start it" in found.advice


@pytest.mark.parametrize("url", ["redis://h/0?nosuch=1", "redis://h:port", "http://h", "redis://:own/secret@h/0"])
def test_an_address_of_redis_that_is_none_is_a_finding(url: str) -> None:
    (found,) = look_at_redis(url, "test").findings
    assert found.level is Level.FAIL and "is no address" in found.text and "secret" not in found.text


def test_a_pair_that_differs_by_direction_is_told_once() -> None:
    pair = status(worker("prefill-0", link("prefill-1")), worker("prefill-1", link("prefill-0", "tcp"), host="other"))
    assert [one.text for one in warned(checks.check_links(pair))] == [
        "prefill-0 -> prefill-1 is shm, but back it is tcp"
    ]


def test_a_links_rate_says_when_it_was_measured() -> None:
    def told(*joined_ago_s: float) -> str:
        pair = [worker(f"mixed-{n}", joined_unix_ms=1_000_000 - ago_s * 1e3) for n, ago_s in enumerate(joined_ago_s)]
        return next(iter(checks.check_links(status({**pair[0], "transports": [link("mixed-1")]}, *pair[1:])))).text

    assert told(700.0, 60.0) == "mixed-0 -> mixed-1: shm, 2.0 GiB/s when they connected, at most 60 s ago"
    assert told(600.0, 700.0).endswith("when they connected, at most 10 min ago")
    assert told(600.0).endswith("when they connected")


def with_redis(members_s: float | None, tree_s: float | None, synced: float = 1.0) -> dict[str, Any]:
    document = status()
    told = {"address": "redis://h/0", "membership_lost_s": members_s, "prompt_tree_lost_s": tree_s}
    told |= {"membership_error": "ConnectionError: refused", "prompt_tree_error": "OutOfMemoryError: OOM"}
    document["gateway"] |= {"redis": told, "prompt_tree": {"tree_synced": synced, "tree_connected": synced}}
    return document


@pytest.mark.parametrize(
    ("lost", "texts"),
    [
        ((4.0, None), ["for 4 s (ConnectionError: refused): nobody can join"]),
        ((None, 3.0), ["for 3 s (OutOfMemoryError: OOM): prompts go by an old picture"]),
        ((4.0, 3.0), ["for 4 s (ConnectionError", "for 3 s (OutOfMemory"]),
    ],
)
def test_a_redis_that_the_gateway_lost_is_a_failure_with_what_it_said_and_what_is_lost_by_it(
    lost: tuple[float | None, float | None], texts: list[str]
) -> None:
    found = list(check_told(with_redis(*lost)))
    for one, text in zip(found, texts, strict=True):
        assert one.level is Level.FAIL and f"redis://h/0 has not answered gateway-0 {text}" in one.text
        assert "kill -CONT" in one.advice and "memory" in one.advice


def test_a_redis_that_answers_the_gateway_is_fine_and_a_tree_that_lags_is_told() -> None:
    assert [one.level for one in check_told(with_redis(None, None))] == [Level.OK]
    assert [one.level for one in check_told(with_redis(None, None, 0.0))] == [Level.OK, Level.WARN]


def test_a_gateway_that_does_not_tell_of_redis_is_judged_by_its_tree() -> None:
    document = with_redis(None, None, 0.0)
    del document["gateway"]["redis"]
    assert [one.level for one in check_told(document)] == [Level.WARN]
    assert list(check_told(GOOD)) == []


def test_what_concerns_a_system_to_be_started_is_left_out_beside_a_running_one_also_where_the_environment_tells_of_it() -> (
    None
):
    to_start = {"memory", "device", "open files", "port"}

    def subjects(**flags: Any) -> set[str]:
        return {one.subject for one in machine(DoctorSettings(**flags))}

    assert to_start < subjects() and "redis" in subjects()
    assert not (to_start | {"redis"}) & subjects(url="http://h", device_memory=2**60, device="cuda")


def test_a_key_closes_an_open_address() -> None:
    closed = worker("decode-0", endpoint="tcp://10.0.0.5:5", policies={"cluster-key": "set"})
    assert warned(checks.check_openness(status(closed))) == []


def test_a_clock_that_is_off_is_named_with_its_direction() -> None:
    late = worker("decode-0", gauges={"unix_ms": 990_000.0})
    (found,) = warned(checks.check_clocks(status(late), {}))
    assert found.text == "decode-0 is 10.0 s behind the gateway"


def test_plans_count_the_host_only_and_pages_on_a_gpu_do_not() -> None:
    memory = [{"tier": "device", "owner": "kv_free", "bytes": 60}, {"tier": "host", "owner": "parked", "bytes": 10}]
    cpu, gpu = worker("decode-0", memory=memory), worker("decode-1", memory=memory, policies={"device": "cuda:0"})
    levels = [next(iter(check_plans(status(cpu, gpu), here(total)))).level for total in (79, 80, 100)]
    assert levels == [Level.FAIL, Level.WARN, Level.OK]
    assert list(check_plans(status(cpu), Here("another host", "here", 1, 1))) == []


def test_plans_of_other_containers_count_for_the_host_and_not_for_the_doctors_own_limit() -> None:
    memory = [{"tier": "host", "owner": "kv", "bytes": 60}]
    own, other = (worker(f"decode-{n}", memory=memory, pid_space=space) for n, space in enumerate(("here", "there")))
    found = list(check_plans(status(own, other), Here("h", "here", 200, 100)))
    assert [(one.level, "host has" in one.text, "decode-1" in one.text) for one in found] == [
        (Level.OK, True, True),
        (Level.OK, False, False),
    ]
    assert [one.level for one in check_plans(status(own, other), Here("h", "here", 100, 100))] == [Level.FAIL]
    assert [one.level for one in check_plans(status(own), Here("h", "here", 200, 50))] == [Level.OK, Level.FAIL]


def test_the_doctors_own_limit_is_that_of_its_tightest_group_or_all_that_the_machine_has(tmp_path: Path) -> None:
    assert memory_limit_bytes(system(tmp_path, {})) == machine_bytes()
    files = {"proc/self/cgroup": "0::/a/b\n", **group("sys/fs/cgroup/a", str(64 * 2**20), 2**20)}
    assert memory_limit_bytes(system(tmp_path, files)) == 64 * 2**20


def test_who_is_listed_and_does_not_answer_is_named() -> None:
    assert [one.subject for one in checks.check_gone(GOOD, ["decode-0", "decode-9"])] == ["members"]


def test_a_pid_of_another_container_is_not_taken_for_one_of_ours(tmp_path: Path) -> None:
    for space in ("there", ""):
        other = status(worker("decode-0", pid_space=space))
        other["gateway"]["host"] = "elsewhere"
        assert list(check_processes(other, here(1), tmp_path)) == []


def test_limits_of_each_local_process_are_read_and_the_dead_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "proc/7"
    folder.mkdir(parents=True)
    rows = "Max open files            256                  4096                 files     \n"
    (folder / "limits").write_text(
        "Limit                     Soft Limit           Hard Limit           Units     \n" + rows
    )
    assert limits_of((folder / "limits").read_text()) == {"Max open files": 256}
    found = warned(check_processes(status(worker("decode-0"), worker("decode-1", host="other")), here(1), tmp_path))
    assert [(one.subject, one.text.partition(" ")[0]) for one in found] == [
        ("process", "gateway-0"),
        ("ulimits", "decode-0:"),
    ]


def test_a_redis_that_may_forget_members_is_told_and_one_that_answers_is_fine() -> None:
    with redis_server() as url:
        found = look_at_redis(url, "test")
    assert [one.level for one in found.findings] == [Level.OK] and found.members == ()
    assert found.skew_ms is not None and abs(found.skew_ms) < 1_000.0
    assert [one.level for one in look_at_redis(url, "test").findings] == [Level.FAIL]
    evicting = judge(url, {"maxmemory": 100, "maxmemory_policy": "allkeys-lru"}, 1.0)
    assert "noeviction" in warned(evicting)[0].advice


def test_json_says_the_same_for_machines() -> None:
    told = msgspec.json.decode(as_json([Finding(Level.OK, "a", "b"), Finding(Level.FAIL, "c", "d", "e")]))
    assert told["worst"] == "fail" and told["findings"][1] == {
        "level": "fail",
        "subject": "c",
        "text": "d",
        "advice": "e",
    }


def test_policies_that_are_alike_stand_together() -> None:
    rows = policies_text(GOOD).splitlines()
    assert rows[1:] == ["prefill-0, decode-0  cluster-key=off caching=3"]
