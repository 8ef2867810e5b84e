"""kill -9 of workers and of the KV store while KV is on its way between them: no wrong token, no page lost, no wait."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.traffic import DECODE, PREFILL, STORE, Traffic, catch, pages_in, restart, serving
from tests.support.driver import Driver
from tests.support.processes import Cluster

pytestmark = pytest.mark.system

BEFORE_ANY_LEASE_ENDS_S = 4.0


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def system(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Traffic]]:
    with serving(tmp_path_factory.mktemp("logs"), model) as running:
        yield running


@pytest.fixture
def warm(system: tuple[Cluster, Traffic]) -> tuple[Cluster, Traffic]:
    """Every prompt is in the store, and more than the workers can keep."""
    _, traffic = system
    traffic.finish()
    for number in range(len(traffic.prompts)):
        traffic.cached(number)
    return system


def until_only_cached(processes: Cluster, name: str) -> None:
    with Driver([processes.members()[name]], name="looker") as looker:
        looker.until_all_free(timeout_s=BEFORE_ANY_LEASE_ENDS_S)


MOMENTS = {
    "writes to the store": (STORE, lambda report: pages_in(report, "reserved", "quarantined") > 0),
    "reads from the store": (STORE, lambda report: report.gauges["pinned_blocks"] > 0),
    "pulls an answer": (DECODE, lambda report: report.gauges["oldest_pin_ms"] > 0),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_a_killed_prefill_worker_held_is_free_at_once(
    moment: str, warm: tuple[Cluster, Traffic], model: Path
) -> None:
    processes, traffic = warm
    holder, condition = MOMENTS[moment]
    catch(processes, traffic, PREFILL, holder, condition)
    traffic.driver.remove(PREFILL)
    processes.kill(PREFILL)
    traffic.abandon()
    until_only_cached(processes, holder)
    restart(processes, traffic.driver, PREFILL, model)
    hits = [traffic.cached(number) for number in range(3)]
    assert hits == [208, 208, 208], "what was published is there for the next worker"
    traffic.run(40)
    traffic.finish()


def test_a_killed_decode_worker_leaves_nothing_behind_at_the_one_that_reads_from_it(
    warm: tuple[Cluster, Traffic], model: Path
) -> None:
    processes, traffic = warm
    catch(processes, traffic, PREFILL, DECODE, MOMENTS["pulls an answer"][1])
    traffic.driver.remove(DECODE)
    processes.kill(DECODE)
    processes.resume(PREFILL)
    traffic.abandon()
    traffic.driver.until_all_free()
    restart(processes, traffic.driver, DECODE, model)
    traffic.run(40)
    traffic.finish()


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "with calls unanswered"])
def test_without_the_store_every_request_is_answered_and_the_next_store_is_used(
    stopped: bool, warm: tuple[Cluster, Traffic], model: Path
) -> None:
    processes, traffic = warm
    traffic.run(20)
    if stopped:
        processes.pause(STORE)
        driver = traffic.driver
        traffic.until(lambda: driver.reports[PREFILL].gauges["pinned_blocks"] > 0, "a call to the store is under way")
        traffic.run(1)
    traffic.driver.remove(STORE)
    processes.kill(STORE)
    traffic.run(40)
    restart(processes, traffic.driver, STORE, model)
    traffic.run(20)
    for _ in range(2):
        for number in range(len(traffic.prompts)):
            cached = traffic.cached(number)
    assert cached == 208
    report = traffic.driver.reports[STORE]
    assert report.counters["hit_tokens_total{tier=host}"] > 0
