"""What `penstock up` says of itself when it is asked with a signal."""

import json
import os
import signal
from pathlib import Path

import pytest

from common.dump_signal import DumpSignal
from services.launcher.plan import ProcessPlan
from services.launcher.state import write_state
from services.launcher.system import System
from tests.launcher.test_system import wait_ended


def test_the_launcher_writes_its_stacks_its_children_and_what_it_waits_for_and_goes_on(
    dumps: DumpSignal, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with System({}, tmp_path, print) as system:
        dumps.call(lambda: write_state(system))
        dead = system.start(ProcessPlan("decode-0", "decode", ("sh", "-c", "exit 7")))
        wait_ended(system)
        system.revive(0.0)
        system.revive(100.0)  # its second life
        wait_ended(system)
        alive = system.start(ProcessPlan("redis", "redis", ("sleep", "100")))
        system.stage = "Redis to answer"
        os.kill(os.getpid(), signal.SIGUSR1)
        stacks, told = (json.loads(line) for line in capfd.readouterr().err.splitlines())
    assert (stacks["event"], told["event"], told["process"]) == ("stacks", "state", "up")
    assert told["waits_for"] == "Redis to answer"
    first, second = told["children"]
    assert (first["name"], first["role"], first["pid"]) == ("decode-0", "decode", dead.pid)
    assert (first["exit_codes"], first["starts"], first["running_s"]) == ([7, 7], 2, None)
    assert (second["pid"], second["exit_codes"], second["restart_in_s"]) == (alive.pid, [], None)
    assert 0 <= second["running_s"] < 100


def test_when_a_child_is_to_be_started_again_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with System({}, tmp_path, print) as system:
        system.start(ProcessPlan("decode-0", "decode", ("sh", "-c", "exit 2")))
        wait_ended(system)
        system.revive(1e9)
        write_state(system)
    (child,) = json.loads(capfd.readouterr().err)["children"]
    assert child["restart_in_s"] > 0
