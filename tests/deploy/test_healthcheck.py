"""The container health check finds services, and only services."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def healthcheck() -> ModuleType:
    path = Path(__file__).parents[2] / "deploy/healthcheck.py"
    spec = importlib.util.spec_from_file_location("healthcheck", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def process(folder: Path, pid: int, words: list[str], state: str = "S") -> None:
    (folder / str(pid)).mkdir()
    (folder / str(pid) / "cmdline").write_bytes("\0".join(words).encode() + b"\0")
    (folder / str(pid) / "stat").write_text(f"{pid} (a (odd) name) {state} 1 1 1")


def test_a_running_service_is_found(healthcheck: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("")
    process(tmp_path, 7, ["/usr/local/bin/python3.11", "/usr/local/bin/penstock", "decode"])
    assert healthcheck.service_runs(tmp_path)


@pytest.mark.parametrize(
    ("words", "state"),
    [
        (["/sbin/docker-init", "--", "penstock", "decode"], "S"),
        (["python", "/usr/local/bin/penstock", "decode"], "Z"),
        (["python", "/usr/local/bin/penstock", "status"], "S"),
        ([""], "S"),
    ],
    ids=["the container's init", "a zombie", "another command", "a kernel thread"],
)
def test_what_is_no_service_does_not_count(
    healthcheck: ModuleType, tmp_path: Path, words: list[str], state: str
) -> None:
    process(tmp_path, 1, words, state)
    assert not healthcheck.service_runs(tmp_path)


def test_a_port_where_nobody_listens_is_unhealthy(healthcheck: ModuleType) -> None:
    assert not healthcheck.answers("http://127.0.0.1:1/health")
