"""Mappings that fail while workers lend page memory to steps and to the system: answers stay right, and all comes back."""

from pathlib import Path

import pytest

from tests.support.driver import Driver
from tests.support.storm import Asked, make_asked
from tests.support.threads import thread_cluster

pytestmark = pytest.mark.system

PREFILL, DECODE = "prefill-0", "decode-0"


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return make_asked(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_workers_whose_mappings_fail_answer_right_and_hold_nothing_afterwards(
    share: float, asked: Asked, tmp_path: Path
) -> None:
    rules = tmp_path / "rules"
    flags = {"model": asked.model, "dtype": "float32", "max_context_tokens": 1024, "kvstore": "off"}
    flags |= {"elastic": "full", "spare_memory": "release", "device_memory": "12MiB", "kv_layout": "virtual"}
    flags |= {"debug_faults": True, "faults": f"@{rules}"}
    with thread_cluster(tmp_path) as workers:
        members = [workers.start(name.partition("-")[0], name, **flags) for name in (DECODE, PREFILL)]
        with Driver(members) as driver:
            driver.until_reported(lambda: bool(driver.reports[PREFILL].transports), "they are connected")
            rules.write_text(f"memory:fail share={share}")
            driver.until_reported(lambda: all(r.gauges["fault_rules"] for r in driver.reports.values()), "armed")
            for _ in range(3):
                requests = [driver.send(PREFILL, prompt, decode=DECODE, max_tokens=12) for prompt in asked.prompts]
                for outcome, expected in zip(driver.finish(requests, timeout_s=60.0), asked.expected, strict=True):
                    assert outcome.failed is None
                    assert outcome.tokens == expected
            if share == 1.0:  # of fewer, chance may let all calls pass that move chunks
                driver.until_reported(lambda: any(failed(driver, name) for name in (PREFILL, DECODE)), "some failed")
            rules.unlink()
            driver.until_all_free()


def failed(driver: Driver, name: str) -> float:
    """Chunks of pages that were to serve something else, or to be pages again."""
    counters = driver.reports[name].counters
    return counters["scratch_refused_chunks_total"] + counters["spare_kept_chunks_total"]
