"""What the doctor finds in a running system: each fault made once in a status document, and said with what to change."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.launcher import cluster_checks as checks
from services.launcher.doctor import as_json
from services.launcher.findings import Finding, Level
from services.launcher.process_checks import check_processes, limits_of
from services.launcher.redis_checks import judge, look_at_redis
from services.launcher.tables import policies_text
from tests.support.redis import redis_server

VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}


def link(to: str, kind: str = "shm", reason: str = "") -> dict[str, Any]:
    return {"peer": f"{to}@1", "kind": kind, "gib_per_s": 2.0, "reason": reason}


def worker(name: str, *links: dict[str, Any], **more: object) -> dict[str, Any]:
    role = name.partition("-")[0]
    fields = {"id": name, "role": role, "state": "ready", "reason": "", "pid": 7, "host": "h", "model": {"name": "m"}}
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
    gateway = {"id": "gateway-0", "host": "h", "pid": 1, "unix_ms": 1_000_000, "versions": VERSIONS, "policies": {}}
    return {"gateway": gateway, "workers": list(workers)}


GOOD = status(worker("prefill-0", link("decode-0")), worker("decode-0"))
ALL = (checks.check_workers, checks.check_links, checks.check_versions, checks.check_openness)


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
        (checks.check_openness, {"policies": {"faults": "set"}}, "faults", "on purpose"),
    ],
)
def test_each_fault_is_found_and_told_with_what_to_change(check: Any, prefill: dict, subject: str, word: str) -> None:
    (found,) = warned(
        check(status(worker("prefill-0", **{"transports": [link("decode-0")], **prefill}), worker("decode-0")))
    )
    assert found.subject == subject and word in found.text and found.advice


def test_a_pair_that_differs_by_direction_is_told_once() -> None:
    pair = status(worker("prefill-0", link("prefill-1")), worker("prefill-1", link("prefill-0", "tcp"), host="other"))
    assert [one.text for one in warned(checks.check_links(pair))] == [
        "prefill-0 -> prefill-1 is shm, but back it is tcp"
    ]


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
    levels = [next(iter(checks.check_plans(status(cpu, gpu), "h", total))).level for total in (79, 80, 100)]
    assert levels == [Level.FAIL, Level.WARN, Level.OK]
    assert list(checks.check_plans(status(cpu), "another host", 1)) == []


def test_who_is_listed_and_does_not_answer_is_named() -> None:
    assert [one.subject for one in checks.check_gone(GOOD, ["decode-0", "decode-9"])] == ["members"]


def test_limits_of_each_local_process_are_read_and_the_dead_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "proc/7"
    folder.mkdir(parents=True)
    rows = "Max open files            256                  4096                 files     \n"
    (folder / "limits").write_text(
        "Limit                     Soft Limit           Hard Limit           Units     \n" + rows
    )
    assert limits_of((folder / "limits").read_text()) == {"Max open files": 256}
    found = warned(check_processes(status(worker("decode-0"), worker("decode-1", host="other")), "h", tmp_path))
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
