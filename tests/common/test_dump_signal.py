"""SIGUSR1 asks for a dump and ends nobody."""

import os
import signal

import pytest

from common.dump_signal import DumpSignal
from common.process_facts import policies_of, software_versions
from services.worker.settings import WorkerSettings


def test_the_signal_asks_once_and_writes_the_stacks_of_all_threads(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        dumps = DumpSignal()
        assert not dumps.take()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert dumps.take() and not dumps.take()
        assert "most recent call first" in capfd.readouterr().err
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_others_hear_whether_a_secret_is_set_and_never_what_it_is() -> None:
    settings = WorkerSettings(model="m", cluster_key="/secret", verify_kv=True)
    told = policies_of(settings, ("cluster_key", "faults", "verify_kv", "host_buffer_bytes", "caching"))
    assert told == {"cluster-key": "set", "faults": "off", "verify-kv": "on", "caching": "3"}


def test_what_is_not_installed_is_said_so() -> None:
    assert software_versions("no-such-package")["no-such-package"] == "not installed"
