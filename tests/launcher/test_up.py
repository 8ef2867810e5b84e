"""`penstock up` with real processes: it answers, survives deaths, says what went wrong, and leaves nothing behind."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from common.ports import free_port
from tests.support.processes import lives

pytestmark = pytest.mark.system

README = Path(__file__).parents[2] / "README.md"
PENSTOCK = (sys.executable, "-m", "services.launcher.cli")
SMALL = ("--device-memory", "64MiB", "--host-memory", "64MiB", "--ready-timeout-s", "240")
_LIMIT_S = 300.0


class Up:
    """One `penstock up`, its output collected in a file."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._out = folder / "up.txt"
        (folder / "tmp").mkdir()
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
        with self._out.open("wb") as out:
            self.process = subprocess.Popen(
                [*PENSTOCK, "up", "--port", str(self.port), *SMALL, *flags],
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**clean, "TMPDIR": str(folder / "tmp")},
            )

    def text(self) -> str:
        return self._out.read_text(errors="replace")

    def wait_for(self, pattern: str) -> "re.Match[str]":
        deadline_s = time.monotonic() + _LIMIT_S
        while (found := re.search(pattern, self.text())) is None:
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline_s, self.text()
            time.sleep(0.05)
        return found

    def wait_for_worker(self, pid: int) -> None:
        """Until the gateway can use the worker of that process: it may hold its former life for alive a while."""
        deadline_s = time.monotonic() + _LIMIT_S
        while (pid, "ready") not in [(w["pid"], w["state"]) for w in httpx.get(f"{self.url}/status").json()["workers"]]:
            assert time.monotonic() < deadline_s, self.text()
            time.sleep(0.1)

    def children(self) -> dict[str, psutil.Process]:
        """Process name in the table -> process, as printed after the start."""
        rows = re.findall(r"(?m)^((?:redis|kvstore|prefill|decode|mixed|gateway)\S*)  +(\d+)  ", self.text())
        return {name: psutil.Process(int(pid)) for name, pid in rows}

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=_LIMIT_S)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: a Unix socket's may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="up-") as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def nothing_left(folder: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "killed" not in request.node.name:  # who is killed cannot clean up its files
        assert list((folder / "tmp").iterdir()) == [], "temporary files were left"


def gone(processes: dict[str, psutil.Process]) -> bool:
    return not any(lives(one) for one in processes.values())


def wait_gone(processes: dict[str, psutil.Process]) -> None:
    deadline_s = time.monotonic() + 60
    while not gone(processes):
        assert time.monotonic() < deadline_s, processes
        time.sleep(0.05)


def run_readme_examples(url: str) -> None:
    """The README's requests as a reader would paste them, but for the port."""
    text = README.read_text().replace("http://127.0.0.1:8000", url)
    (program,) = re.findall(r"(?ms)^```python\n(.*?)^```", text)
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=100).stdout
    ask, route, _ = re.findall(r"(?ms)^(curl .*?)^```", text)
    if shutil.which("curl") is not None:
        assert run_shell(ask).rstrip().endswith("data: [DONE]")
        explain, drain, _ = route.strip().splitlines()
        assert re.search(r'(?i)x-penstock-explain: .*"worker":"(prefill|decode)-0"', run_shell(explain))
        assert "draining" in run_shell(drain)
        assert "resuming" in run_shell(drain.replace("/drain", "/resume"))


def run_shell(line: str) -> str:
    return subprocess.run(line, shell=True, capture_output=True, text=True, check=True, timeout=100).stdout


def test_an_empty_folder_becomes_a_system_that_answers_and_then_nothing(folder: Path) -> None:
    up = Up(folder)
    try:
        up.wait_for("Ctrl-C stops everything")
        text, children = up.text(), up.children()
        assert set(children) == {"redis", "kvstore-0", "prefill-0", "decode-0", "gateway-0"}
        assert re.search(r"prefill-0  +decode-0  +shm ", text), text
        assert re.search(r"first text after \d+ ms", text), text
        assert "KV memory: 2 x 64.0 MiB on workers + 64.0 MiB in the KV store = 192.0 MiB" in text
        assert "KV reuse: caching 3," in text
        assert f"curl -N {up.url}/v1/chat/completions" in text
        assert (folder / "models/tiny/config.json").is_file()
        status = subprocess.run(
            [*PENSTOCK, "status", "--url", up.url], capture_output=True, text=True, check=True, timeout=100
        )
        assert "decode-0" in status.stdout and "ready" in status.stdout
        run_readme_examples(up.url)
        assert up.stop() == 0, up.text()
    finally:
        up.process.kill()
    wait_gone(children)
    assert "was killed" not in up.text()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", up.port)) != 0


def test_a_process_that_dies_comes_back_and_serves_again(folder: Path) -> None:
    up = Up(folder, "--prefill", "0", "--decode", "0", "--mixed", "1")
    try:
        up.wait_for("Ctrl-C stops everything")
        children = up.children()
        children.pop("mixed-0").kill()
        up.wait_for(r"mixed-0 ended \(signal SIGKILL\); restart 1 in 0.2 s")
        pid = int(up.wait_for(r"mixed-0 started again as pid (\d+)")[1])
        children["mixed-0"] = psutil.Process(pid)
        up.wait_for_worker(pid)
        up.process.send_signal(signal.SIGUSR1)
        up.process.send_signal(signal.SIGUSR2)
        told = json.loads(up.wait_for(r'(?m)^\{.*"event": "state".*\}$')[0])
        up.wait_for("most recent call first")
        mixed = next(child for child in told["children"] if child["name"] == "mixed-0")
        assert (mixed["pid"], mixed["starts"], mixed["exit_codes"]) == (pid, 2, [-signal.SIGKILL])
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "ignore_eos": True}
        answer = httpx.post(f"{up.url}/v1/completions", json=body, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 4
        assert up.stop(signal.SIGTERM) == 0
    finally:
        up.process.kill()
    wait_gone(children)


def test_nothing_outlives_a_launcher_that_is_killed(folder: Path) -> None:
    up = Up(folder, "--prefill", "0", "--decode", "0", "--mixed", "1")
    try:
        up.wait_for("Ctrl-C stops everything")
        children = up.children()
    finally:
        up.process.kill()
    up.process.wait()
    wait_gone(children)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--model", "./nowhere"), r"--model=./nowhere: there is no such folder"),
        (("--device-memory", "plenty"), r"--device-memory='plenty': must be a size"),
        (("--redis", "redis://127.0.0.1:1/0"), r"--redis=redis://127.0.0.1:1/0: does not answer"),
        (("--host", "192.0.2.1"), r"--host|--port"),
    ],
    ids=["model", "memory", "redis", "host"],
)
def test_a_setting_that_cannot_work_stops_the_start_by_name(folder: Path, flags: tuple[str, ...], said: str) -> None:
    (folder / "models/tiny").mkdir(parents=True)
    (folder / "models/tiny/config.json").write_text("{}")
    up = Up(folder, *flags)
    assert up.process.wait(timeout=_LIMIT_S) in (1, 2)
    assert re.search(said, up.text()), up.text()


def test_a_taken_port_is_named(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        up = Up(folder, "--port", str(port))
        assert up.process.wait(timeout=_LIMIT_S) == 2
        assert f"--port={port}: 127.0.0.1:{port} is in use" in up.text()


def test_a_worker_that_cannot_start_is_named_with_its_own_words_and_stops_the_rest(folder: Path) -> None:
    (folder / "broken").mkdir()
    (folder / "broken/config.json").write_text('{"model_type": "nonsense"}')
    up = Up(folder, "--model", "broken")
    assert up.process.wait(timeout=_LIMIT_S) != 0
    assert re.search(r"\S+-0 ended during the start \(exit code \d+\)", up.text()), up.text()
    assert "nonsense" in up.text() or "broken" in up.text()
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]
