"""`penstock up --cluster-key`: the system answers, and a worker that has another key is not heard; both sides say why."""

import os
import signal
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from common.net.cluster_key import make_cluster_key
from services.worker.model.make import make_model
from tests.launcher.test_up import PENSTOCK, Up, folder  # noqa: F401
from tests.support.redis import redis_server

pytestmark = pytest.mark.system
_LIMIT_S = 60.0


def test_a_system_with_a_key_answers_and_refuses_who_has_another(folder: Path) -> None:  # noqa: F811
    model = make_model("tiny", folder / "tiny")
    for name in ("right", "wrong"):
        make_cluster_key(str(folder / name))
    with redis_server() as redis:
        up = Up(
            folder,
            "--model",
            str(model),
            "--redis",
            redis,
            "--cluster-key",
            str(folder / "right"),
            "--run-dir",
            str(folder / "run"),
        )
        try:
            up.wait_for("API: ")
            body = {"model": "tiny", "prompt": "ab", "max_tokens": 3, "ignore_eos": True}
            answer = httpx.post(f"{up.url}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 3
            log = stranger(folder, model, redis)
            for text in (log, logs(folder)):
                lines = [line for line in text.splitlines() if '"connection_refused"' in line]
                assert lines and all("--cluster-key" in line for line in lines), text[-3000:]
            states = {w["id"]: w["state"] for w in httpx.get(f"{up.url}/status").json()["workers"]}
            assert states.pop("decode-9", "gone") != "ready"
            assert set(states.values()) == {"ready"}
            secret = (folder / "right").read_text().strip()
            assert secret not in up.text() + logs(folder) + log
            assert up.stop() == 0
        finally:
            if up.process.poll() is None:
                up.stop(signal.SIGKILL)


def logs(folder: Path) -> str:  # noqa: F811
    """Of all processes of the system."""
    return "".join(path.read_text(errors="replace") for path in (folder / "run/logs").iterdir())


def stranger(folder: Path, model: Path, redis: str) -> str:  # noqa: F811
    """A worker with another key, until both sides have said that they refuse each other; its log."""
    path = folder / "stranger.txt"
    flags = ["--id", "decode-9", "--model", str(model), "--redis", redis, "--cluster-key", str(folder / "wrong")]
    flags += ["--device-memory", "16MiB", "--threads", "1", "--run-dir", str(folder / "tmp")]
    with path.open("wb") as out:
        process = subprocess.Popen([*PENSTOCK, "decode", *flags], stdout=out, stderr=subprocess.STDOUT, env=os.environ)
    try:
        deadline_s = time.monotonic() + _LIMIT_S
        while not all("connection_refused" in text for text in (path.read_text(), logs(folder))):
            assert process.poll() is None and time.monotonic() < deadline_s, path.read_text()[-3000:]
            time.sleep(0.1)
    finally:
        process.terminate()
        process.wait(timeout=30)
    return path.read_text()
