"""A KV store with a bad disk, a full disk, or that says nothing for a while: a miss, never a wrong token, never a wait."""

import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.traffic import PREFILL, STORE, Traffic, blocks_of, restart, serving
from tests.support.clients import until
from tests.support.processes import Cluster

pytestmark = pytest.mark.system

BLOCKS = 13


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def system(model: Path, disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Traffic]]:
    with serving(tmp_path_factory.mktemp("logs"), model, disk=disk) as running:
        yield running


def save_all(traffic: Traffic) -> None:
    """Every prompt is on disk."""
    driver = traffic.driver
    for number in range(len(traffic.prompts)):
        traffic.cached(number)
    driver.until_reported(
        lambda: (
            driver.reports[STORE].gauges["blocks{tier=disk}"] >= BLOCKS * len(traffic.prompts)
            and not driver.reports[STORE].gauges["waiting_disk_writes"]
        ),
        "everything is on disk",
    )


def stop_and_forget(processes: Cluster, traffic: Traffic) -> None:
    """From now on only the files of the store hold what was asked for so far."""
    traffic.driver.remove(STORE)
    assert processes.stop(STORE) == 0
    forget(traffic)


def ask_all(traffic: Traffic) -> list[int]:
    """Cached tokens by prompt; every answer is right."""
    return [traffic.cached(number) for number in range(len(traffic.prompts))]


def test_flipped_bytes_are_found_when_read(system: tuple[Cluster, Traffic], model: Path, disk: Path) -> None:
    processes, traffic = system
    save_all(traffic)
    stop_and_forget(processes, traffic)
    files = blocks_of(disk)
    asked_for = [file for file in files if depth(file) < BLOCKS]
    assert len(asked_for) == BLOCKS * len(traffic.prompts)
    bad = {file: damage(file, file.stat().st_size // 2) for file in asked_for[::5]}
    restart(processes, traffic.driver, STORE, model, disk=disk)
    until_known(traffic, len(files))
    reports = traffic.driver.reports
    before = reports[PREFILL].counters["hit_tokens_total{tier=disk}"]
    cached = ask_all(traffic)
    assert any(tokens < 208 for tokens in cached)
    assert reports[STORE].counters["load_failures_total"] == len(bad)
    assert reports[PREFILL].counters["hit_tokens_total{tier=disk}"] - before == sum(cached) > 0
    save_all(traffic)
    assert not [file for file, content in bad.items() if file.exists() and file.read_bytes() == content]


def test_torn_files_are_found_at_the_start(system: tuple[Cluster, Traffic], model: Path, disk: Path) -> None:
    processes, traffic = system
    save_all(traffic)
    stop_and_forget(processes, traffic)
    files = blocks_of(disk)
    headless, cut = files[::9], files[1::9]
    for file in headless:
        damage(file, 30)
    for file in cut:
        file.write_bytes(file.read_bytes()[:-100])
    restart(processes, traffic.driver, STORE, model, disk=disk)
    until_known(traffic, len(files) - len(cut) - len(headless))
    assert not [file for file in (*headless, *cut) if file.exists()]
    assert any(tokens < 208 for tokens in ask_all(traffic))
    assert traffic.driver.reports[STORE].counters.get("load_failures_total", 0) == 0
    traffic.finish()


def until_known(traffic: Traffic, files: int) -> None:
    reports = traffic.driver.reports
    traffic.driver.until_reported(
        lambda: reports[STORE].gauges["blocks{tier=disk}"] == files,
        f"the store has read its folder: {files} good files",
    )


def depth(file: Path) -> int:
    """Blocks before the one in this file, by its header."""
    return int(struct.unpack_from("<8sIIQ", file.read_bytes())[3])


def damage(file: Path, at: int) -> bytes:
    """Flip a bit; the new content."""
    content = bytearray(file.read_bytes())
    content[at] ^= 0x40
    file.write_bytes(content)
    return bytes(content)


def forget(traffic: Traffic) -> None:
    """Fill the workers' own memory with other prompts, of which nobody will ask again."""
    for _ in range(2 * len(traffic.prompts)):
        traffic.start_new()
        traffic.finish()


def test_a_full_disk_stops_nothing_but_the_writing(system: tuple[Cluster, Traffic], model: Path, disk: Path) -> None:
    processes, traffic = system
    traffic.finish()
    driver = traffic.driver
    driver.remove(STORE)
    assert processes.stop(STORE) == 0
    log = processes.folder / f"{STORE}.log"
    log.rename(log.with_suffix(".old"))  # a new one is shorter than the limit
    restart(processes, driver, STORE, model, disk=disk)
    process = processes.processes[STORE].pid
    before = len(blocks_of(disk))
    soft, hard = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (8192, hard))  # a file of a block is longer: writing fails
    forget(traffic)
    until(lambda: "disk_writing_paused" in processes.log(STORE), "the store says that it cannot write")
    traffic.run(40)
    traffic.finish()
    assert len(blocks_of(disk)) == before
    assert not list(disk.glob("??/*.tmp")), "half a file was left"
    resource.prlimit(process, resource.RLIMIT_FSIZE, (soft, hard))
    hits = driver.reports[PREFILL].counters["hit_tokens_total{tier=host}"]
    traffic.run(40)
    traffic.finish()
    assert driver.reports[PREFILL].counters["hit_tokens_total{tier=host}"] > hits
    traffic.driver.remove(STORE)
    assert processes.stop(STORE) == 0
    restart(processes, driver, STORE, model, disk=disk)
    forget(traffic)
    save_all(traffic)


def test_a_store_that_says_nothing_is_done_without_and_used_again_later(system: tuple[Cluster, Traffic]) -> None:
    processes, traffic = system
    traffic.finish()
    driver = traffic.driver
    member = processes.members()[STORE]
    driver.remove(STORE)
    processes.pause(STORE)
    traffic.until(lambda: len(driver.reports[PREFILL].transports) == 1, "the worker does without the store")
    traffic.run(40)
    processes.resume(STORE)
    driver.add(member)
    traffic.until(lambda: len(driver.reports[PREFILL].transports) == 2, "the worker is connected again")
    hits = driver.reports[PREFILL].counters["hit_tokens_total{tier=host}"]
    traffic.run(60)
    traffic.finish()
    assert driver.reports[PREFILL].counters["hit_tokens_total{tier=host}"] > hits
