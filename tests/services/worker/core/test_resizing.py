"""Pools that grow and shrink while they are used: tokens stay right, pages that are held stay, what is free goes at once."""

import random

import pytest

from common.errors import ProtocolViolation
from common.ids import RequestId
from common.messages.requests import Failed
from common.messages.resizing import Resize, ResizeAnswer
from tests.services.worker.core.test_caching import check_end
from tests.support.fake_engine import answer
from tests.support.world import GATEWAY, World
from tests.support.world_process import CHUNK_PAGES, LAYOUT, Process

PROMPT = [(at * 11) % 900 + 3 for at in range(41)]


def world(**more: object) -> World:
    made = World(random.Random(2), **{"prefill_pages": 200, "decode_pages": 200, **more})  # type: ignore[arg-type]  # a test's keywords
    made.greet()
    return made


def gauges(target: World, process: Process) -> tuple[int, int, int]:
    """Pages that there is memory for, that there shall be, and that are to leave."""
    found = process.core.report(0, target.now_ms).gauges
    page_bytes = LAYOUT.page_bytes
    return (
        int(found["pool_bytes"]) // page_bytes,
        int(found["pool_target_bytes"]) // page_bytes,
        int(found["pool_leaving_pages"]),
    )


def resize(target: World, name: str, n_pages: int) -> ResizeAnswer:
    """Ask, and go on until there is an answer."""
    before = len(target.resized)
    target.resize(name, n_pages, call=before + 1)
    while len(target.resized) == before:
        assert target.turn()
    assert target.resized[-1].call == before + 1
    return target.resized[-1]


def failure(target: World, name: str) -> Failed:
    failed = target.answers[RequestId(name)].failed
    assert failed is not None
    return failed


def check_memory(target: World) -> None:
    """Memory is what it shall be, as nothing is in use."""
    for process in target.processes.values():
        if process.alive:
            there, wanted, leaving = gauges(target, process)
            assert (there, leaving) == (wanted, 0)
            assert there == process.memory.n_pages
            assert process.ledger.total_pages == there - there % LAYOUT.layers


@pytest.mark.parametrize("name", ["prefill", "decode"])
@pytest.mark.parametrize("n_pages", [40, 400])
def test_an_idle_pool_has_what_was_asked_for_when_the_answer_comes(name: str, n_pages: int) -> None:
    target = world()
    said = resize(target, name, n_pages + 3)
    assert (said.problem, said.pages, said.leaving_pages) == ("", n_pages, 0)
    assert said.device_memory_bytes == said.target_bytes == n_pages * LAYOUT.page_bytes
    check_memory(target)


def test_pages_in_use_stay_until_they_are_released_and_leave_unasked() -> None:
    target = world()
    decode = target.processes["decode"]
    target.send("lower", [token + 1 for token in PROMPT], 16)
    target.send("r", PROMPT, 16)
    while not target.answers[RequestId("r")].tokens:
        target.turn()
    target.cancel(RequestId("lower"))
    said = resize(target, "decode", 32)
    assert said.leaving_pages > 0 and said.pages == 32
    assert said.target_bytes < said.device_memory_bytes < 200 * LAYOUT.page_bytes, "the free end has left already"
    target.settle()
    target.pass_time(50.0)
    target.settle()
    assert target.answers[RequestId("r")].tokens == answer(PROMPT, 16)
    assert gauges(target, decode) == (32, 32, 0)
    check_end(target)


def test_new_pages_are_not_used_before_everybody_has_them() -> None:
    target = world(decode_pages=40)
    decode = target.processes["decode"]
    target.resize("decode", 80)
    while not decode.resizes:
        target.turn()
    assert decode.ledger.total_pages == 40
    target.happen("resize", decode)
    assert decode.ledger.total_pages == 80


def test_what_the_machine_has_not_is_refused_with_the_reason_and_what_is_there_is_kept() -> None:
    target = world()
    target.machine_pages = 300
    said = resize(target, "decode", 400)
    assert said.problem == "the machine has no more"
    assert said.device_memory_bytes == said.target_bytes == 300 * LAYOUT.page_bytes
    check_memory(target)


def test_less_than_a_request_needs_is_refused_with_what_it_needs() -> None:
    target = world()
    said = resize(target, "decode", 1)
    assert "at least 1.0 KiB" in said.problem and CHUNK_PAGES * LAYOUT.page_bytes == 1024
    assert (said.pages, said.device_memory_bytes) == (200, 200 * LAYOUT.page_bytes)


def test_a_request_that_arrives_after_the_shrinking_is_refused_as_at_a_small_start() -> None:
    target, small = world(), world(decode_pages=40)
    resize(target, "decode", 40)
    for one in (target, small):
        one.send("r", PROMPT, 60)
        one.settle()
    assert failure(target, "r").text == failure(small, "r").text
    assert failure(target, "r").code == "out_of_pages"


@pytest.mark.parametrize("to", ["prefill", "decode"])
def test_a_request_that_waits_and_fits_no_longer_is_told_so(to: str) -> None:
    """It waits for pages that another one holds; that one goes on."""
    target = world(prefill_pages=40, decode_pages=40 if to == "decode" else 100)
    process = target.processes[to]
    target.send("first", PROMPT, 3, to=to)
    while not process.core.pool.ledger.counts().reserved:
        target.turn()
    target.send("second", [token + 1 for token in PROMPT], 3, to=to)
    while any(link[1] == process.peer and queue for link, queue in target.links.items()):
        target.turn()
    resize(target, to, 20)
    target.settle()
    assert failure(target, "second").code == "out_of_pages"
    assert "20" in failure(target, "second").text
    first = target.answers[RequestId("first")]
    assert first.failed is None and first.tokens == answer(PROMPT, 3)
    check_end(target)


def test_a_queued_hand_over_that_fits_no_longer_is_refused() -> None:
    target = world(decode_pages=60)
    target.send("first", PROMPT, 8)
    target.send("second", [token + 1 for token in PROMPT], 8)
    target.send("third", [token + 2 for token in PROMPT], 8)
    while target.processes["decode"].core.report(0, 0.0).queue.handing_over < 2:
        target.turn()
    resize(target, "decode", 20)
    target.settle()
    assert "out_of_pages" in {seen.failed.code for seen in target.answers.values() if seen.failed is not None}
    target.pass_time(50.0)
    check_end(target)
    check_memory(target)


def test_an_answer_that_cannot_get_its_pages_any_more_ends_instead_of_waiting_for_ever() -> None:
    target = world(decode_pages=200)
    target.send("r", PROMPT, 200, to="decode")
    while len(target.answers[RequestId("r")].tokens) < 3:
        target.turn()
    resize(target, "decode", 8)
    target.settle()
    assert failure(target, "r").code == "out_of_pages"
    target.pass_time(50.0)
    target.settle()
    check_end(target)
    check_memory(target)


def test_the_last_word_counts_when_words_come_faster_than_memory() -> None:
    target = world()
    for n_pages in (400, 40, 300, 100):
        target.resize("decode", n_pages)
    target.settle()
    *overtaken, last = target.resized
    assert len(overtaken) == 3 and all("later order" in said.problem for said in overtaken)
    assert (last.problem, last.target_bytes) == ("", 100 * LAYOUT.page_bytes)
    check_memory(target)


def test_nobody_but_a_gateway_can_resize() -> None:
    target = world()
    prefill, decode = target.processes["prefill"], target.processes["decode"]
    with pytest.raises(ProtocolViolation):
        decode.core.on_message(prefill.peer, Resize(call=1, device_memory_bytes=2**20), target.now_ms)
    assert GATEWAY not in (prefill.peer, decode.peer)


@pytest.mark.parametrize("seed", range(24))
def test_whatever_is_resized_when_tokens_are_right_and_memory_follows(seed: int) -> None:
    rng = random.Random(seed)
    target = World(
        rng,
        prefill_pages=rng.choice([40, 60, 120]),
        decode_pages=rng.choice([40, 60, 140]),
        transport=rng.choice(["shm", "tcp"]),
        store_blocks=rng.choice([0, 12, 200]),
        caching=rng.randrange(4),
        spill=rng.choice(["write-through", "write-back", "selective"]),
        ahead=seed % 2 == 1,
        more=rng.choice([(), ("prefill-1",), ("mixed",)]),
    )
    target.machine_pages = 200
    target.greet()
    known = [[rng.randrange(3, 900) for _ in range(n)] for n in (8, 17, 30)]
    for number in range(14):
        tail = [rng.randrange(3, 900) for _ in range(rng.randrange(1, 12))]
        to = rng.choice([name for name in target.processes if name != "decode"])
        target.send(f"r{number}", rng.choice([[], *known]) + tail, rng.randrange(1, 12), to=to)
        for _ in range(rng.randrange(60)):
            target.turn()
        if rng.random() < 0.6:
            target.resize(rng.choice(list(target.processes)), rng.randrange(1, 240))
        if rng.random() < 0.1:
            target.cancel(RequestId(f"r{rng.randrange(number + 1)}"))
        if rng.random() < 0.2:
            target.pass_time(rng.choice([50.0, 400.0, 1_000.0]))
    target.settle()
    target.pass_time(20_000.0)
    target.settle()
    check_end(target)
    check_memory(target)
    codes = {seen.failed.code for seen in target.answers.values() if seen.failed is not None}
    assert codes <= {"out_of_pages", "cancelled"}
