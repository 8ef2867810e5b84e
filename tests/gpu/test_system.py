"""The whole system on one GPU: prefill and decode in separate processes give transformers' tokens, whatever the way
KV takes between them, and nothing is left behind when one of them is killed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.parity.prompts import CHUNK_TOKENS, twenty
from tests.support.driver import Driver
from tests.support.processes import Cluster, cluster
from tests.support.reference import Reference

pytestmark = [pytest.mark.system, pytest.mark.gpu]

N_TOKENS = 24
FAMILIES = ("qwen3", "gemma3")
PREFILLS = {"cuda_ipc": "prefill-ipc", "tcp": "prefill-tcp"}
NAMES = ("decode-0", "prefill-ipc", "prefill-tcp", "mixed-0", "kvstore-0")


def start_all(processes: Cluster, folder: Path) -> None:
    common = {
        "model": folder,
        "dtype": "float32",
        "device": "cuda",
        "device_memory": "64MiB",
        "max_step_tokens": CHUNK_TOKENS,
        "threads": 2,
    }
    processes.start("kvstore", "kvstore-0", host_memory="256MiB")
    processes.start("decode", "decode-0", **common)
    processes.start("prefill", "prefill-ipc", transport="cuda_ipc", **common)
    processes.start("prefill", "prefill-tcp", transport="tcp", **common)
    processes.start("mixed", "mixed-0", **common)


@pytest.fixture(scope="module", params=FAMILIES)
def served(
    request: pytest.FixtureRequest, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Driver, list[list[int]], list[list[int]], Cluster]]:
    folder = tiny_model(request.param)
    with cluster(tmp_path_factory.mktemp("logs")) as processes:
        start_all(processes, folder)
        reference = Reference(folder)
        prompts = twenty(reference.model.config.vocab_size)
        expected = [reference.generate(prompt, N_TOKENS) for prompt in prompts]
        processes.await_members(*NAMES)
        workers = [name for name in NAMES if name != "kvstore-0"]
        with Driver([processes.members()[name] for name in workers]) as driver:
            driver.until(
                lambda: all(n in driver.reports and driver.reports[n].transports for n in PREFILLS.values()),
                "both prefill workers probed their way to the decode worker",
            )
            yield driver, prompts, expected, processes


@pytest.mark.parametrize("kind", [*PREFILLS, "mixed"])
def test_twenty_requests_at_once_give_transformers_tokens(served, kind: str) -> None:
    driver, prompts, expected, _ = served
    to, decode = (PREFILLS[kind], "decode-0") if kind in PREFILLS else ("mixed-0", None)
    for repeat in range(2):  # the second time from what is cached
        requests = [driver.send(to, prompt, decode=decode, max_tokens=N_TOKENS) for prompt in prompts]
        for outcome, tokens in zip(driver.finish(requests), expected, strict=True):
            assert outcome.failed is None, repeat
            assert outcome.tokens == tokens, repeat
    driver.until_all_free()


def test_the_transports_are_the_ones_asked_for(served) -> None:
    driver, _, _, _ = served
    for kind, name in PREFILLS.items():
        found = {transport.peer: transport.kind for transport in driver.reports[name].transports}
        assert kind in {of for peer, of in found.items() if str(peer).startswith("decode-0")}


@pytest.mark.parametrize("victim", ["decode-0", "prefill-ipc"])
def test_after_a_kill_the_other_side_serves_on_and_holds_nothing(
    victim: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model("qwen2")
    common = {"model": folder, "dtype": "float32", "device": "cuda", "device_memory": "64MiB", "threads": 2}
    with cluster(tmp_path) as processes:
        for name in ("decode-0", "prefill-ipc"):
            processes.start(name.split("-")[0], name, transport="cuda_ipc", **common)
        processes.await_members("decode-0", "prefill-ipc")
        prompt, reference = list(range(8, 108)), Reference(folder)
        expected = reference.generate(prompt, N_TOKENS)
        old = processes.members()
        with Driver(list(old.values())) as driver:
            long = [driver.send("prefill-ipc", prompt, decode="decode-0", max_tokens=1500) for _ in range(4)]
            driver.until(lambda: all(len(driver.outcomes[one].tokens) > 3 for one in long), "streams run")
            driver.remove(victim)
            processes.kill(victim)
            if victim == "prefill-ipc":  # the answers are the decode worker's by now
                assert all(outcome.failed is None for outcome in driver.finish(long))
            processes.start(victim.split("-")[0], victim, transport="cuda_ipc", **common)
            processes.await_members(victim, besides=old)
            driver.add(processes.members()[victim])
            driver.until(
                lambda: "prefill-ipc" in driver.reports and driver.reports["prefill-ipc"].transports,
                "the new process is connected",
            )
            outcome = driver.finish([driver.send("prefill-ipc", prompt, decode="decode-0", max_tokens=N_TOKENS)])[0]
            assert outcome.failed is None
            assert outcome.tokens == expected
            driver.until_all_free()


def test_a_share_of_the_device_counts_what_else_the_worker_takes(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    folder = tiny_model("qwen2")
    with cluster(tmp_path) as processes:
        processes.start(
            "mixed", "mixed-0", model=folder, dtype="float32", device="cuda", device_memory="10%", threads=2
        )
        processes.await_members("mixed-0")
        prompt = list(range(8, 108))
        with Driver([processes.members()["mixed-0"]]) as driver:
            outcome = driver.finish([driver.send("mixed-0", prompt, max_tokens=N_TOKENS)])[0]
            assert outcome.tokens == Reference(folder).generate(prompt, N_TOKENS)
            driver.until(lambda: "mixed-0" in driver.reports, "it reports")
            pool_bytes = driver.reports["mixed-0"].gauges["pool_bytes"]
        assert 0.05 * total_bytes < pool_bytes < 0.1 * total_bytes
