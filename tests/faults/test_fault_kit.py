"""The fault kit against real processes: armed and disarmed through a file while they serve."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.clients import Stream, all_free, random_prompt, ready, status, until
from tests.support.processes import Cluster, cluster
from tests.support.reference import Reference

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen2")


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rules") / "rules"


@pytest.fixture(scope="module")
def system(model: Path, rules: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    faults = {"debug_faults": "true", "faults": f"@{rules}", "model": model, "served_model_name": "m"}
    with cluster(tmp_path_factory.mktemp("logs")) as processes:
        for role in ("decode", "prefill"):
            processes.start(role, f"{role}-0", dtype="float32", device_memory="64MiB", **faults)
        processes.start("gateway", "gateway-0", port=0, retry_wait_s=3, **faults)
        processes.await_members("decode-0", "prefill-0", "gateway-0")
        until(lambda: ready(url(processes), "decode-0", "prefill-0"), "the system is ready")
        yield processes


def url(processes: Cluster) -> str:
    return processes.members()["gateway-0"].endpoint


def test_a_decode_worker_that_stops_itself_at_a_grant_and_goes_on_answers_right(
    system: Cluster, rules: Path, model: Path
) -> None:
    rules.write_text("decode-0/grant: stop side=heard times=1")
    until(lambda: '"faults_armed", "process": "decode-0", "rules": 1' in system.log("decode-0"), "armed")
    prompt = random_prompt(random.Random(1), 50)
    stream = Stream(url(system), prompt, 12)
    until(lambda: is_stopped(system, "decode-0"), "decode-0 has stopped itself")
    fault = '"event": "fault", "process": "decode-0", "point": "grant", "kind": "stop", "side": "heard", "hit": 1'
    assert fault in system.log("decode-0")  # told before it acts
    system.resume("decode-0")
    stream.wait(30)
    assert stream.error is None
    assert stream.tokens == Reference(model).generate(prompt, 12)
    rules.unlink()
    until(lambda: all_free(url(system), "prefill-0", "decode-0"), f"all pages free: {status(url(system))}")
    counted = "faults_injected_total{point=grant,kind=stop}"  # in the first report after the stop
    until(lambda: status(url(system))["decode-0"]["counters"].get(counted) == 1.0, "the fault is reported")
    assert status(url(system))["decode-0"]["gauges"]["faults_on"] == 1.0
    page = httpx.get(f"{url(system)}/metrics", timeout=10).text
    assert 'penstock_worker_faults_injected_total{kind="stop",point="grant",worker="decode-0"} 1.0' in page
    assert "penstock_gateway_faults_on 1.0" in page


def is_stopped(system: Cluster, name: str) -> bool:
    state = Path(f"/proc/{system.processes[name].pid}/stat").read_text()
    return state.rpartition(")")[2].split()[0] == "T"
