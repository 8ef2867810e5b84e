"""Starting a gateway, or saying why not."""

import asyncio
import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
import uvloop

from common.dump_signal import DumpSignal
from common.net.redis import Registry
from gateway.__main__ import _run, main
from gateway.process import Gateway
from tests.gateway.model import NAME


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PENSTOCK_")]:
        monkeypatch.delenv(name)


def test_the_gateway_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import gateway.__main__; assert 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--model"),
        (["--modle", "x"], "did you mean --model"),
        (["--model", "/no/such/folder"], "must be an existing folder or a hub id"),
        (["--model", "{model}", "--port", "http"], "--port='http': must be a whole number"),
        (["--model", "{model}", "--port", "70000"], "must be 0 to 65535"),
        (["--model", "{model}", "--port", "{taken}"], "cannot listen on"),
        (["--model", "{model}", "--route-prefill", "best"], "round-robin or least-load"),
        (["--model", "{model}", "--max-body", "much"], "512MiB"),
        (["--model", "{model}", "--max-inflight", "0"], "must be 1 or more"),
        (["--model", "{model}", "--port", "0", "--redis", "redis://127.0.0.1:1/0"], "redis"),
    ],
)
def test_a_setting_that_cannot_work_ends_the_start_with_code_2(
    model: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main([flag.format(model=model, taken=port) for flag in flags]) == 2
    assert words in capsys.readouterr().err


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "--api-key" in out
    assert "PENSTOCK_REQUEST_TIMEOUT_S" in out


class Stuck:
    """A gateway whose loop is held by one callback while somebody asks what it does."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd, self.switchboard, self.steps = capfd, self, list[str]()
        self._wrote = asyncio.Event()

    def ask_to_stop(self) -> None:
        """Nobody does."""

    def write_state(self) -> None:
        self.steps.append("state")
        self._wrote.set()

    async def run(self) -> None:
        self._in_one_callback()
        await self._wrote.wait()

    def _in_one_callback(self) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        self.steps.append("stacks" if "_in_one_callback" in self._capfd.readouterr().err else "nothing")


def test_stacks_of_a_stuck_loop_are_written_at_once_and_its_state_when_it_goes_on(
    capfd: pytest.CaptureFixture[str],
) -> None:
    stuck = Stuck(capfd)
    before = signal.getsignal(signal.SIGUSR1)
    try:
        uvloop.run(_run(cast(Gateway, stuck), DumpSignal()))
        assert stuck.steps == ["stacks", "state"]
        os.kill(os.getpid(), signal.SIGUSR1)
        assert "stacks" in capfd.readouterr().err, "after the loop has closed as well"
    finally:
        signal.signal(signal.SIGUSR1, before)
        faulthandler.unregister(signal.SIGUSR2)


@pytest.mark.system
def test_a_gateway_tells_what_it_does_and_lives_on(model: Path, redis_url: str) -> None:
    flags = ["--model", str(model), "--redis", redis_url, "--cluster", "dumps", "--port", "0", "--id", "gateway-0"]
    process = subprocess.Popen([sys.executable, "-m", "gateway", *flags], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert any('"listening"' in line for line in process.stderr)
        for _ in range(2):
            process.send_signal(signal.SIGUSR1)
            events = [json.loads(next(process.stderr))["event"] for _ in range(2)]
            assert events == ["stacks", "state"]
        process.terminate()
        process.communicate(timeout=30)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.system
def test_sigterm_ends_the_process_and_its_membership(model: Path, redis_url: str) -> None:
    flags = ["--model", str(model), "--redis", redis_url, "--cluster", "sigterm", "--port", "0", "--id", "gateway-0"]
    process = subprocess.Popen([sys.executable, "-m", "gateway", *flags], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert any('"listening"' in line and NAME in line for line in process.stderr)
        registry = Registry(redis_url, "sigterm")
        assert [member.id for member in registry.members()] == ["gateway-0"]
        process.terminate()
        process.communicate(timeout=30)
        assert process.returncode == 0
        assert registry.members() == []
        registry.close()
    finally:
        process.kill()
        process.wait()
