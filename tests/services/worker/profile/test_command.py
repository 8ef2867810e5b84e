"""`penstock profile` as it is typed."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from services.launcher.cli import main
from services.worker.model.identity import inspect_model
from services.worker.profile.file import read_profile
from services.worker.profile.settings import ProfileSettings
from services.worker.settings import WorkerSettings


@pytest.mark.system
def test_the_command_measures_a_model_and_workers_can_start_from_its_file(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model, out = checkpoint("qwen2"), tmp_path / "p.json"
    command = [sys.executable, "-m", "services.launcher.cli", "profile", "--model", str(model), "--out", str(out)]
    limits = ["--quick", "--threads", "1", "--device-memory", "64MiB", "--max-running", "8"]
    ended = subprocess.run([*command, *limits], capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    profile = read_profile(str(out), inspect_model(model).identity, "cpu")
    assert profile.engine.threads == 1 and profile.cost.n_samples > 20
    assert {bool(point.rows) for point in profile.points} == {True, False}
    assert max(point.rows for point in profile.points) == 8
    rows = [line for line in ended.stdout.splitlines() if line.startswith(("prefill ", "decode "))]
    assert len(rows) == len(profile.points)
    assert "median error" in ended.stdout and str(out) in ended.stdout


@pytest.mark.parametrize("out", ["/nowhere/at/all/p.json", "."])
def test_a_place_that_cannot_hold_the_file_is_refused_before_anything_is_measured(
    out: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    monkeypatch.setattr(os, "environ", clean)
    assert main(["profile", "--model", "no-such-model", "--out", out]) == 2
    assert f"--out={out}" in capsys.readouterr().err


def test_limits_that_are_not_given_are_those_of_a_worker() -> None:
    profile, worker = ProfileSettings(model="m"), WorkerSettings(model="m")
    for field in ("device", "device_memory", "dtype", "threads", "max_running", "max_step_tokens"):
        assert getattr(profile, field) == getattr(worker, field)
