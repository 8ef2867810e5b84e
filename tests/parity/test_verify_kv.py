"""With `--verify-kv` tokens stay transformers' own, every page is checked, and one wrong byte on any path reaches nobody."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.messages.requests import Failed
from services.worker.model.make import make_model
from tests.parity import flipped as ways
from tests.parity.caching import DECODE, DEVICE_MEMORY, HOST_MEMORY, N_TOKENS, STORE, Answers, Rig
from tests.parity.flipped import Flip, Way, flipped
from tests.support.driver import Driver, Outcome
from tests.support.reference import Reference
from tests.support.threads import thread_cluster

pytestmark = pytest.mark.system

SHM, TCP, HELD_BLOCKS = "prefill-shm", "prefill-tcp", 6
PARK_PROMPTS, PARK_TOKENS = 15, 60
ACCUSED_RIGHT = "kv_accused_blocks_total{here=right}"


def totals(driver: Driver, name: str) -> float:
    """Of all processes, over all labels."""
    driver.refresh()
    return sum(
        value for report in driver.reports.values() for key, value in report.counters.items() if key.startswith(name)
    )


def mismatches(driver: Driver) -> dict[str, float]:
    """By path, where there are any."""
    driver.refresh()
    found: dict[str, float] = {}
    for report in driver.reports.values():
        for key, value in report.counters.items():
            if key.startswith("kv_mismatches_total") and value:
                path = key.partition("path=")[2].rstrip("}")
                found[path] = found.get(path, 0.0) + value
    return found


@pytest.fixture(scope="module")
def answers(tiny_model: Callable[[str], Path]) -> Answers:
    return Answers(tiny_model("llama"))


@contextmanager
def checked(folder: Path, answers: Answers, **unchecked: dict[str, str]) -> Iterator[Rig]:
    """A store with a disk, a decode worker, and a prefill worker for each transport, all at caching level 3."""
    with thread_cluster(folder) as processes:
        flags = {"model": answers.folder, "dtype": "float32", "caching": 3, "fetch": "always", "verify_kv": "true"}
        store = {"host_memory": HOST_MEMORY, "disk": folder / "disk", "disk_size": "64MiB", "verify_kv": "true"}
        processes.start("kvstore", STORE, **{**store, **unchecked.get("kvstore", {})})
        processes.start("decode", DECODE, **{**flags, "device_memory": "64MiB", **unchecked.get("decode", {})})
        for name, transport in ((SHM, "auto"), (TCP, "tcp")):
            more = {"device_memory": DEVICE_MEMORY, "transport": transport, **unchecked.get("prefill", {})}
            processes.start("prefill", name, **{**flags, **more})
        names = (STORE, DECODE, SHM, TCP)
        processes.await_members(*names)
        with Driver([processes.members()[name] for name in names]) as driver:
            wanted = {DECODE: 1, SHM: 3, TCP: 3}
            driver.until_reported(
                lambda: all(len(driver.reports[name].transports) == n for name, n in wanted.items()),
                "all are connected",
            )
            yield Rig(3, driver, answers)


@pytest.fixture(scope="module")
def rig(answers: Answers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with checked(tmp_path_factory.mktemp("checked"), answers) as made:
        yield made


def test_everything_that_moves_is_checked_and_right(rig: Rig) -> None:
    for worker in (SHM, TCP):
        prompt = rig.answers.prompt(100, "all paths", worker)
        rig.ask_and_save(worker, prompt)  # handed over, returned, spilled
        rig.churn(worker, "once")
        assert rig.ask(worker, prompt).cached_tokens == 96  # fetched from the store's memory
    rig.churn(TCP, "twice", "thrice")
    rig.ask(TCP, prompt)  # fetched from its disk
    assert rig.hits(TCP).keys() >= {"host", "disk"}
    for to, holder in ((TCP, SHM), (SHM, TCP), (SHM, DECODE)):
        prompt = rig.answers.prompt(100, "peer", to, holder)
        rig.ask(SHM if holder == DECODE else holder, prompt)
        hint = rig.driver.hint(holder, HELD_BLOCKS)
        assert rig.ask(to, prompt, fetch=hint).cached_tokens == HELD_BLOCKS * 16
    assert mismatches(rig.driver) == {}
    assert totals(rig.driver, "kv_unchecked_pages_total") == 0
    for name in (STORE, DECODE, SHM, TCP):
        assert rig.counter(name, "kv_checked_pages_total") > 0, name


def asked(rig: Rig, worker: str, prompt: Sequence[int], **more: object) -> Outcome:
    """As a gateway would: asked again if the answer was that it may be."""
    for _ in range(2):
        sent = rig.driver.send(worker, prompt, decode=DECODE, max_tokens=N_TOKENS, **more)  # type: ignore[arg-type]
        outcome = rig.driver.finish([sent])[0]
        rig.driver.until_all_free()
        if outcome.failed is None:
            break
        assert may_try_again(outcome.failed)
    return outcome


def may_try_again(failed: Failed) -> bool:
    return (failed.code, failed.phase, failed.retryable) == ("kv_corrupt", "transfer", True)


def gained(rig: Rig, before: dict[str, float]) -> dict[str, float]:
    """Mismatches since, by path."""
    now = mismatches(rig.driver)
    return {path: n - before.get(path, 0.0) for path, n in now.items() if n != before.get(path, 0.0)}


@pytest.mark.parametrize(("worker", "way"), [(SHM, ways.handover_shm), (TCP, ways.handover_tcp)])
def test_a_wrong_byte_of_a_hand_over_ends_the_transfer_and_the_next_try_is_right(
    rig: Rig, worker: str, way: Way
) -> None:
    prompt, before = rig.answers.prompt(90, "hand-over", worker), mismatches(rig.driver)
    with flipped(way) as flip:
        first = rig.driver.finish([rig.driver.send(worker, prompt, decode=DECODE, max_tokens=N_TOKENS)])[0]
    assert flip.done and first.failed is not None and may_try_again(first.failed)
    assert first.tokens == []
    assert asked(rig, worker, prompt).tokens == rig.answers.to(prompt)
    assert gained(rig, before) == {"handover": 1}


@pytest.mark.parametrize(("worker", "way"), [(SHM, ways.spill_shm), (TCP, ways.spill_tcp)])
def test_a_wrong_byte_of_a_spill_is_not_kept(rig: Rig, worker: str, way: Way) -> None:
    prompt, before = rig.answers.prompt(90, "spill", worker), mismatches(rig.driver)
    with flipped(way) as flip:
        assert asked(rig, worker, prompt).tokens == rig.answers.to(prompt)
        rig.driver.until_reported(lambda: flip.done and gained(rig, before) != {}, "the store refused it")
    assert gained(rig, before) == {"spill": 1}
    rig.churn(worker, "after spill")
    assert asked(rig, worker, prompt).tokens == rig.answers.to(prompt)


@pytest.mark.parametrize(("worker", "way"), [(SHM, ways.fetch_store), (TCP, ways.fetch_tcp)])
def test_a_wrong_byte_of_a_fetch_from_the_store_costs_a_recomputation(rig: Rig, worker: str, way: Way) -> None:
    prompt = rig.answers.prompt(90, "fetch", worker)
    rig.ask_and_save(worker, prompt)
    rig.churn(worker, "before fetch")
    before, right = mismatches(rig.driver), rig.counter(STORE, ACCUSED_RIGHT)
    with flipped(way) as flip:
        assert asked(rig, worker, prompt).tokens == rig.answers.to(prompt)
    assert flip.done and gained(rig, before) == {"fetch": 1}
    rig.until(lambda: rig.counter(STORE, ACCUSED_RIGHT) > right, "the store heard of it, and judged")
    assert rig.counter(STORE, ACCUSED_RIGHT) == right + 1


@pytest.mark.parametrize("worker", [SHM, TCP])
def test_a_block_that_went_wrong_in_the_stores_memory_costs_one_reader_a_recomputation_and_is_gone(
    rig: Rig, worker: str
) -> None:
    prompt = rig.answers.prompt(90, "lying", worker)
    rig.ask_and_save(worker, prompt)
    rig.churn(worker, "before lying")
    before, dropped = mismatches(rig.driver), rig.counter(STORE, "corrupt_blocks_total")
    with flipped(ways.lying) as flip:
        assert asked(rig, worker, prompt).tokens == rig.answers.to(prompt)
    assert flip.done and gained(rig, before) == {"fetch": 1}
    rig.until(lambda: rig.counter(STORE, "corrupt_blocks_total") == dropped + 1, "the block is gone")
    rig.churn(worker, "after lying")
    assert rig.ask(worker, prompt).cached_tokens == 80  # from its file
    assert gained(rig, before) == {"fetch": 1}


@pytest.mark.parametrize(("worker", "way"), [(SHM, ways.fetch_peer), (TCP, ways.fetch_tcp)])
def test_a_wrong_byte_of_an_answer_that_comes_back_is_not_kept(rig: Rig, worker: str, way: Way) -> None:
    prompt, before = rig.answers.prompt(90, "return", worker), mismatches(rig.driver)
    with flipped(way) as flip:
        tokens = asked(rig, worker, prompt).tokens
        rig.until(lambda: flip.done and gained(rig, before) != {}, "the answer's KV came, and came wrong")
    assert tokens == rig.answers.to(prompt) and gained(rig, before) == {"fetch": 1}
    longer = [*prompt, *tokens, 9]
    assert asked(rig, worker, longer).tokens == rig.answers.to(longer)


@pytest.mark.parametrize(("worker", "way"), [(SHM, ways.fetch_peer), (TCP, ways.fetch_tcp)])
def test_a_wrong_byte_of_another_workers_kv_costs_a_recomputation(rig: Rig, worker: str, way: Way) -> None:
    prompt = rig.answers.prompt(100, "wrong peer", worker)
    rig.ask(TCP if worker == SHM else SHM, prompt)
    before = mismatches(rig.driver)
    with flipped(way) as flip:
        hint = rig.driver.hint(TCP if worker == SHM else SHM, HELD_BLOCKS)
        assert asked(rig, worker, prompt, fetch=hint).tokens == rig.answers.to(prompt)
    assert flip.done and gained(rig, before) == {"fetch": 1}


def test_a_worker_that_makes_no_checksums_is_served_and_counted(answers: Answers, tmp_path: Path) -> None:
    with checked(tmp_path, answers, prefill={"verify_kv": "false"}) as rig:
        for worker in (SHM, TCP):
            rig.ask_and_save(worker, answers.prompt(50, "unchecked", worker))
        assert mismatches(rig.driver) == {}
        assert rig.counter(DECODE, "kv_unchecked_pages_total") > 0
        assert rig.counter(SHM, "kv_checked_pages_total") == 0


@pytest.fixture(scope="module")
def parked(answers: Answers) -> list[tuple[list[int], list[int]]]:
    """Prompts that fit together when they begin and not when they have grown, and their answers."""
    reference, rng = Reference(answers.folder), random.Random(4)
    prompts = [[rng.randrange(8, answers.vocab_tokens) for _ in range(256)] for _ in range(PARK_PROMPTS)]
    return [(prompt, reference.generate(prompt, PARK_TOKENS)) for prompt in prompts]


def test_parked_requests_are_checked_when_they_come_back(
    parked: list[tuple[list[int], list[int]]], answers: Answers, tmp_path: Path
) -> None:
    with thread_cluster(tmp_path) as processes:
        flags = {"model": answers.folder, "dtype": "float32", "max_step_tokens": 128, "verify_kv": "true"}
        mixed = processes.start("mixed", "mixed-0", caching=0, device_memory="2MiB", host_buffer="8MiB", **flags)
        with Driver([mixed]) as driver, flipped(ways.fetch_parked) as flip:
            sent = [driver.send("mixed-0", prompt, max_tokens=PARK_TOKENS) for prompt, _ in parked]
            assert [outcome.tokens for outcome in driver.finish(sent)] == [tokens for _, tokens in parked]
            driver.until_all_free()
            counters = driver.reports["mixed-0"].counters
            assert counters["restored_total"] > 0 and counters["kv_checked_pages_total"] > 0
            assert flip.done and mismatches(driver) == {"park": 1.0}


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_layers_that_are_streamed_are_checked(transport: str, tmp_path: Path) -> None:
    model, rng = make_model("deep", tmp_path / "deep", family="llama"), random.Random(11)
    reference = Reference(model)
    prompts = [[rng.randrange(8, reference.model.config.vocab_size) for _ in range(600)] for _ in range(2)]
    with thread_cluster(tmp_path) as processes:
        flags = {"model": model, "dtype": "float32", "max_context_tokens": 1024, "transport": transport}
        flags |= {"max_step_tokens": 128, "verify_kv": "true", "device_memory": "16MiB"}
        members = [
            processes.start("decode", DECODE, **flags),
            processes.start("prefill", SHM, **{**flags, "device_memory": "2MiB", "layer_offload": "auto"}),
        ]
        with Driver(members) as driver, flipped(getattr(ways, f"handover_{transport}")) as flip:
            driver.until_reported(lambda: len(driver.reports[SHM].transports) == 1, "they are connected")
            rig = Rig(0, driver, Answers(model))
            for prompt in prompts:
                assert asked(rig, SHM, prompt).tokens == reference.generate(prompt, N_TOKENS)
            assert driver.reports[SHM].counters["layerwise_prompts_total"] >= 2
            assert flip.done and mismatches(driver) == {"handover": 1.0}


def test_a_flip_turns_over_one_bit_once() -> None:
    flip, buffer = Flip(), bytearray(2)
    flip.byte(buffer)
    flip.byte(buffer)
    assert buffer == b"\x01\x00"
