"""Every point is struck by real workers and a real store: they are joined as in a process, only without one each."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from common.faults.points import MESSAGES, Point
from tests.faults.traffic import PREFILL, STORE
from tests.support.clients import random_prompt
from tests.support.driver import Driver
from tests.support.reference import Reference
from tests.support.threads import thread_cluster

pytestmark = pytest.mark.system

DECODE = "decode-0"
N_TOKENS = 40
WORK = [point for point in Point if point not in MESSAGES and point not in (Point.CLOCK, Point.PREFILL_QUEUE)]
RULES = (
    ";".join(["*:delay ms=0.1", "prefill_queue:delay ms=0.1", "clock:jump ms=0.0001"])
    + ";"
    + ";".join(f"{point}:delay ms=0.1" for point in WORK)
)


def test_every_point_is_struck_and_answers_stay_right(
    tiny_model: Callable[[str], Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, rng = tiny_model("llama"), random.Random(4)
    reference = Reference(model)
    prompts = [random_prompt(rng, rng.randrange(220, 340)) for _ in range(16)]
    expected = [reference.generate(prompt, N_TOKENS) for prompt in prompts]
    faults = {"debug_faults": "true", "faults": RULES}
    common = {"model": model, "dtype": "float32", "device_memory": "2MiB", "fetch": "always", **faults}
    with thread_cluster(tmp_path_factory.mktemp("logs")) as processes:
        processes.start("kvstore", STORE, host_memory="2MiB", disk=tmp_path, **faults)
        processes.start("decode", DECODE, host_buffer="8MiB", **common)
        processes.start("prefill", PREFILL, **common)
        names = (STORE, DECODE, PREFILL)
        with Driver([processes.members()[name] for name in names]) as driver:
            driver.until(lambda: bool(driver.reports.get(PREFILL) and driver.reports[PREFILL].transports), "up")
            for _ in range(2):
                requests = [driver.send(PREFILL, prompt, decode=DECODE, max_tokens=N_TOKENS) for prompt in prompts]
                for outcome, tokens in zip(driver.finish(requests), expected, strict=True):
                    assert outcome.failed is None and outcome.tokens == tokens
            left = driver.send(PREFILL, prompts[0], decode=DECODE, max_tokens=400)
            driver.until(lambda: bool(driver.outcomes[left].tokens), "it runs")
            driver.cancel(left, PREFILL, DECODE)
            driver.until_all_free()
            series = {key for report in driver.reports.values() for key in report.counters}
    struck = {point for point in Point if any(f"point={point}," in key for key in series)}
    assert set(Point) - struck <= {Point.STOP_WRITING}  # only where a transfer was given up in the middle
