"""SIGUSR1 asks for a dump and ends nobody; SIGUSR2 has the stacks of who cannot hear."""

import json
import os
import signal
import threading

import pytest

from common.dump_signal import DumpSignal
from common.log import Log
from common.process_facts import policies_of, software_versions
from services.worker.settings import WorkerSettings


def test_the_signal_asks_once_and_writes_the_stacks_of_all_threads_as_one_event(
    dumps: DumpSignal, capfd: pytest.CaptureFixture[str]
) -> None:
    done = threading.Event()
    other = threading.Thread(target=done.wait, name="other")
    other.start()
    assert not dumps.take()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert dumps.take() and not dumps.take()
    done.set()
    other.join()
    (line,) = capfd.readouterr().err.splitlines()
    told = json.loads(line)
    calls = {one["thread"]: one["calls"] for one in told["threads"]}
    assert (told["event"], told["pid"]) == ("stacks", os.getpid())
    assert any(call.startswith("test_the_signal_asks_once") for call in calls["MainThread"])
    assert any(call.startswith("wait ") for call in calls["other"])


def test_a_log_line_that_the_signal_interrupts_stays_whole(
    dumps: DumpSignal, capfd: pytest.CaptureFixture[str]
) -> None:
    log = Log()
    for number in range(20):
        log.event("before", number=number)
        os.kill(os.getpid(), signal.SIGUSR1)
    events = [json.loads(line)["event"] for line in capfd.readouterr().err.splitlines()]
    assert events == ["before", "stacks"] * 20
    assert dumps.take()


def test_c_code_writes_the_stacks_of_one_that_hangs_and_nobody_ends(
    dumps: DumpSignal, capfd: pytest.CaptureFixture[str]
) -> None:
    os.kill(os.getpid(), signal.SIGUSR2)
    assert "most recent call first" in capfd.readouterr().err
    assert not dumps.take()


def test_others_hear_whether_a_secret_is_set_and_never_what_it_is() -> None:
    settings = WorkerSettings(model="m", cluster_key="/secret", verify_kv=True)
    told = policies_of(settings, ("cluster_key", "faults", "verify_kv", "host_buffer_bytes", "caching"))
    assert told == {"cluster-key": "set", "faults": "off", "verify-kv": "on", "caching": "3"}


def test_what_is_not_installed_is_said_so() -> None:
    assert software_versions("no-such-package")["no-such-package"] == "not installed"
