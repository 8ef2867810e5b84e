"""Laws of the processes that the launcher keeps alive."""

import time
from pathlib import Path

import pytest

from common.errors import EXIT_SUCCEEDED, ServingError
from services.launcher.plan import ProcessPlan
from services.launcher.system import NameTaken, System

WAIT_S = 20.0


def wait_ended(system: System) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while any(child.poll() is None for child in system.children):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_who_cannot_join_without_redis_is_started_when_it_is_back_and_not_given_up(tmp_path: Path) -> None:
    said: list[str] = []
    redis = {"answers": False}
    with System({}, tmp_path, said.append) as system:
        system.watch_redis(lambda: redis["answers"])
        system.start(ProcessPlan("decode-0", "decode", ("sh", "-c", "exit 1")))
        wait_ended(system)
        for now_s in range(100):
            system.revive(float(now_s))
        assert [line for line in said if "restart" in line or "again" in line] == []
        assert "while Redis does not answer" in said[0] and len(said) == 1
        redis["answers"] = True
        system.revive(200.0)
        assert "decode-0 started again" in said[-1]
        with pytest.raises(ServingError, match="died 6 times"):
            for now_s in range(300, 350):
                wait_ended(system)
                system.revive(float(now_s))


def test_who_lost_its_name_to_another_system_is_not_started_again_and_the_operator_hears_what_to_do(
    tmp_path: Path,
) -> None:
    with System({}, tmp_path, print) as system:
        system.watch_redis(lambda: False)
        child = system.start(ProcessPlan("decode-0", "decode", ("sh", "-c", f"exit {EXIT_SUCCEEDED}")))
        wait_ended(system)
        pid = child.pid
        for look in (system.raise_if_ended, lambda: system.revive(0.0), lambda: system.revive(100.0)):
            with pytest.raises(NameTaken, match=r"decode-0 ended: another system .* start it with a --cluster NAME"):
                look()
        assert child.pid == pid


def test_who_needs_a_setting_changed_is_quoted_tried_slowly_and_not_given_up(tmp_path: Path) -> None:
    said: list[str] = []
    with System({}, tmp_path, said.append) as system:
        system.start(ProcessPlan("decode-0", "decode", ("sh", "-c", "echo before; echo --model=/m: is gone; exit 2")))
        for now_s in range(0, 700, 10):
            wait_ended(system)
            system.revive(float(now_s))
    quoted = [line for line in said if "tried again" in line]
    assert quoted[0] == "decode-0 needs a setting changed: --model=/m: is gone; tried again in 5 s"
    assert quoted[-1].endswith("tried again in 60 s")
    assert 10 < len(quoted) < 16, "slowly, and for ever"
