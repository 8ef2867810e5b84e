"""What the doctor says of workers that are gone, and of what counters know though all looks well."""

from pathlib import Path
from typing import Any

import pytest

from services.launcher.counter_checks import check_counters
from services.launcher.findings import Level
from services.launcher.lost_checks import check_lost, check_prompts
from services.launcher.process_checks import Here
from services.launcher.tables import status_text
from tests.launcher.test_doctor import GOOD, status, worker

LOST = {"id": "prefill-0", "role": "prefill", "reason": "died (silent for 3.1 s)", "ago_ms": 12_000}
LOST |= {"host": "h", "pid": 7, "pid_space": "1"}
HERE, ELSEWHERE = Here("h", "1", 0, 0), Here("h", "2", 0, 0)


def proc(root: Path, state: str) -> Path:
    folder = root / "proc" / "7"
    folder.mkdir(parents=True)
    (folder / "stat").write_text(f"7 (a) name) {state} 1 7 7")
    return root


def with_lost(*workers: dict[str, Any]) -> dict[str, Any]:
    return {**status(*workers), "lost": [LOST]}


def test_a_lost_worker_is_told_and_is_a_failure_when_its_role_has_nobody_left(tmp_path: Path) -> None:
    (one,) = check_lost(with_lost(worker("prefill-1"), worker("decode-0")), ELSEWHERE, tmp_path)
    assert one.level is Level.WARN
    assert one.text == "prefill-0 was lost 12 s ago: it died (silent for 3.1 s)"
    assert "SIGCONT" in one.advice
    (one,) = check_lost(with_lost(worker("decode-0")), ELSEWHERE, tmp_path)
    assert one.level is Level.FAIL and "no prefill or mixed worker is left" in one.text


@pytest.mark.parametrize(("state", "word"), [("T", "kill -CONT 7"), ("S", "SIGCONT if it is stopped")])
def test_a_stopped_process_of_this_host_is_recognised(tmp_path: Path, state: str, word: str) -> None:
    (one,) = check_lost(with_lost(worker("decode-0")), HERE, proc(tmp_path, state))
    assert word in one.advice


def test_a_process_that_is_gone_is_not_to_be_continued(tmp_path: Path) -> None:
    (one,) = check_lost(with_lost(worker("decode-0")), HERE, tmp_path)
    assert "pid 7) is gone" in one.advice


def test_nobody_is_missed_where_nobody_was_lost() -> None:
    assert [*check_lost(GOOD, HERE), *check_prompts(GOOD), *check_counters(GOOD)] == []


def test_prompts_that_decode_workers_compute_for_want_of_a_prefill_worker_are_told() -> None:
    (one,) = check_prompts(status(worker("prefill-0", state="draining"), worker("decode-0")))
    assert one.level is Level.WARN and "decode workers compute prompts" in one.text
    assert list(check_prompts(status(worker("mixed-0"), worker("decode-0")))) == []


@pytest.mark.parametrize(
    ("series", "level", "subject", "word"),
    [
        ("kv_mismatches_total{path=handover}", Level.FAIL, "kv", "decode-0 got 3 wrong pages on the path handover"),
        ("refused_connections_total", Level.WARN, "key", "handshakes refused since the start: decode-0 3"),
        (
            "faults_injected_total{kind=drop,point=grant}",
            Level.WARN,
            "faults",
            "on purpose (--faults), 3 times so far: grant:drop",
        ),
        ("watchdog_fired_total", Level.WARN, "watchdog", "the watchdog of decode-0 fired 3 times"),
    ],
)
def test_counters_of_a_worker_that_looks_well_are_read(series: str, level: Level, subject: str, word: str) -> None:
    (one,) = check_counters(status(worker("decode-0", counters={series: 3.0, "steps_total": 9.0})))
    assert (one.level, one.subject) == (level, subject)
    assert word in one.text and one.advice


def test_who_goes_wrong_on_purpose_is_told_in_one_line_whether_it_has_yet_or_not() -> None:
    for counters in ({}, {"faults_injected_total{kind=drop,point=grant}": 2.0}):
        armed = worker("decode-0", policies={"faults": "set"}, gauges={"faults_on": 1.0}, counters=counters)
        (one,) = check_counters(status(armed))
        assert one.subject == "faults" and "decode-0 goes wrong on purpose" in one.text and one.advice


def test_counters_of_the_gateway_are_read_too_and_refusals_explain_who_cannot_be_connected() -> None:
    document = status(worker("decode-0", state="connecting"))
    document["gateway"]["routing"] = {"refused_connections_total": 2.0, "watchdog_fired_total": 1.0}
    fired, refused = check_counters(document)
    assert "lost track of 1 requests" in fired.text
    assert "decode-0 cannot be connected" in refused.text and "no cluster key, or another one" in refused.text


def test_the_status_on_the_terminal_names_who_is_lost() -> None:
    gateway = {"endpoint": "e", "ready": True, "open_requests": 0, "routing": {}, "prompt_tree": {}}
    document = {"gateway": {"id": "gateway-0", **gateway}, "workers": [], "lost": [LOST]}
    assert status_text(document).endswith("prefill-0 was lost 12 s ago: it died (silent for 3.1 s)")
