"""Workers' parts of a request's time, where all clocks are one and messages take none: they are the whole of it, exactly.

Time goes by in fractions of two, so that sums of floats are exact.
"""

import random
from collections import deque
from collections.abc import Callable

import pytest

from common.ids import PeerId, RequestId
from common.messages.handover import Grant, KvSent
from common.messages.requests import Failed, FetchHint, Generate, Timings, Tokens
from tests.support.fake_engine import answer
from tests.support.world import World
from tests.support.world_process import LAYOUT, Process

STEPS_MS = (0.0, 0.125, 0.5, 1.0)
Link = tuple[PeerId, PeerId]


class OneClock(World):
    """Notes when things happen. `checked`: what arrived is looked at for a while, off the worker's thread."""

    def __init__(self, seed: int, *, checked: bool = False, **settings: object) -> None:
        self.checks: deque[tuple[Link, object]] | None = deque() if checked else None
        self.heard_ms: dict[str, float] = {}
        self.began_ms: dict[str, float] = {}
        self.computed_ms: dict[str, float] = {}
        self.granted_ms: dict[str, float] = {}
        self.failed_ms: dict[str, float] = {}
        self.told_ms: dict[str, list[float]] = {}
        self._requests: dict[str, str] = {}
        settings = {"prefill_pages": 200, "decode_pages": 200, "caching": 0, "more": ("mixed", "prefill-1"), **settings}
        super().__init__(random.Random(seed), **settings)  # type: ignore[arg-type]  # World's keywords
        self.greet()

    def turn(self) -> bool:
        links = [("link", link) for link in self.ready_links()]
        choices = links or self.choices() + ([("check", self.checks)] if self.checks else [])
        if not choices:
            return False
        self.now_ms += 0.0 if links else self.rng.choice(STEPS_MS)
        kind, what = self.rng.choice(choices)
        if kind == "check":
            (source, target), message = what.popleft()  # type: ignore[attr-defined]
            process = self.process(target)
            self.perform(process, process.core.on_message(source, message, self.now_ms))
        else:
            self.happen(kind, what)
        return True

    def carry(self, link: Link) -> None:
        message = self.links[link][0][0]
        if isinstance(message, Generate):
            self.heard_ms[message.request] = self.now_ms
        elif isinstance(message, Grant):
            self.granted_ms[self._requests[message.transfer]] = self.now_ms
        elif hasattr(message, "sampling"):  # GrantRequest
            self._requests[message.transfer] = message.request
        elif isinstance(message, KvSent) and self.checks is not None:
            self.checks.append((link, self.links[link].popleft()[0]))
            return
        super().carry(link)

    def hear(self, message: object) -> None:
        for delta in message.deltas if isinstance(message, Tokens) else ():
            self.told_ms.setdefault(delta.request, []).append(self.now_ms)
        if isinstance(message, Failed):
            self.failed_ms.setdefault(message.request, self.now_ms)
        super().hear(message)

    def perform(self, process: Process, *args: object) -> None:
        super().perform(process, *args)  # type: ignore[arg-type]
        for segment in process.step.segments if process.step is not None else ():
            self.began_ms.setdefault(segment.request, self.now_ms)

    def compute(self, process: Process) -> None:
        step, ends = process.step, process.layer == self.layout.layers
        for segment in step.segments if ends else ():
            if segment.sample and segment.request not in self.told_ms:
                self.computed_ms.setdefault(segment.request, self.now_ms)
        super().compute(process)

    def prompt(self, tokens: int) -> list[int]:
        return [self.rng.randrange(3, 900) for _ in range(tokens)]

    def counter(self, name: str, worker: str) -> float:
        return self.processes[worker].core.report(0, self.now_ms).counters[name]


def parts_of(told: Timings) -> tuple[float, float, float, float]:
    return told.prefill_queue_ms, told.compute_ms, told.grant_wait_ms, told.transfer_ms


def require_whole(world: OneClock) -> None:
    """Of every request: parts up to its first token, and those up to the second one of a handed-over request."""
    world.settle()
    for request, seen in world.answers.items():
        assert seen.finish is not None and seen.tokens == answer(seen.prompt, seen.max_tokens)
        first, *later = seen.deltas
        heard_ms, (first_ms, *later_ms) = world.heard_ms[request], world.told_ms[request]
        parts = parts_of(first.timings)
        assert min(parts) >= 0 and sum(parts) == first_ms - heard_ms, f"{request}: {parts} of {first_ms - heard_ms}"
        if not world.ahead:
            assert parts == expected(world, request), request
        handed_over = request in world.granted_ms
        assert [delta.timings is not None for delta in later] == [handed_over and n == 0 for n in range(len(later))]
        if handed_over and later:
            second = (later[0].timings.decode_queue_ms, later[0].timings.first_step_ms)
            assert (
                min(second) >= 0
                and sum(second) == later_ms[0] - first_ms
                and parts_of(later[0].timings) == (0, 0, 0, 0)
            )


def expected(world: OneClock, request: str) -> tuple[float, float, float, float]:
    """As an onlooker saw it."""
    heard_ms, began_ms = world.heard_ms[request], world.began_ms[request]
    first_ms, computed_ms = world.told_ms[request][0], world.computed_ms[request]
    if request not in world.granted_ms:
        return began_ms - heard_ms, first_ms - began_ms, 0.0, 0.0
    granted_ms = max(computed_ms, world.granted_ms[request])
    return began_ms - heard_ms, computed_ms - began_ms, granted_ms - computed_ms, first_ms - granted_ms


def ask_many(world: OneClock, to: str, **more: object) -> None:
    for number in range(6):
        world.send(f"r{number}", world.prompt(world.rng.choice([1, 6, 17, 40])), 4, to=to, **more)
        world.turn()


def handed_over(seed: int, **settings: object) -> OneClock:
    """The decode worker has room for some of them."""
    world = OneClock(seed, decode_pages=60, **settings)
    ask_many(world, "prefill")
    return world


def local(seed: int, to: str = "decode", **settings: object) -> OneClock:
    world = OneClock(seed, **settings)
    ask_many(world, to)
    return world


def cached(seed: int, to: str = "prefill", store_blocks: int = 0) -> OneClock:
    """The same prompt again; with a store after the worker has forgotten it."""
    world = OneClock(seed, caching=2, store_blocks=store_blocks, spill="write-through")
    prompt = world.prompt(33)
    world.send("before", prompt, 3, to=to)
    world.settle()
    if store_blocks:
        world.processes[to].core.pool.evict(100)
    for number in range(3):
        world.send(f"again{number}", [*prompt, *world.prompt(number)], 3, to=to)
    world.settle()
    tier = "host" if store_blocks else "device"
    assert world.counter(f"hit_tokens_total{{tier={tier}}}", to) >= 32
    return world


def peer_fetch(seed: int) -> OneClock:
    world = OneClock(seed, caching=2)
    prompt = world.prompt(33)
    world.send("before", prompt, 3, to="prefill-1")
    world.settle()
    world.send("r", prompt, 3, to="prefill", fetch=FetchHint(holder=world.processes["prefill-1"].peer, n_blocks=8))
    world.settle()
    assert world.counter("hit_tokens_total{tier=peer}", "prefill") == 32
    return world


def parked(seed: int, to: str) -> OneClock:
    """Some give way before their second token."""
    world = OneClock(seed, decode_pages=28, host_pages=200)
    for number in range(6):
        world.send(f"r{number}", world.prompt(12), 24, to=to)
    world.settle()
    core = world.processes["mixed" if to == "mixed" else "decode"].core
    assert core._scheduler.parking.restored_total > 0
    return world


def layer_streams(seed: int) -> OneClock:
    world = OneClock(seed, layers=6, prefill_pages=48, decode_pages=360, layer_offload="auto", more=())
    for number in range(3):
        world.send(f"r{number}", world.prompt(64), 3)
    world.settle()
    assert world.counter("layerwise_prompts_total", "prefill") > 0
    return world


def replayed(seed: int, to: str) -> OneClock:
    world = OneClock(seed)
    prompt = world.prompt(20)
    for cut in (1, 3, 7):
        world.send(f"r{cut}", prompt, 8, to=to, emitted=tuple(answer(prompt, 8)[:cut]))
    return world


KINDS: dict[str, Callable[[int], OneClock]] = {
    "shared memory": handed_over,
    "shared memory, checked": lambda seed: handed_over(seed, checked=True),
    "shared memory, steps planned ahead": lambda seed: handed_over(seed, ahead=True),
    "tcp": lambda seed: handed_over(seed, transport="tcp"),
    "whole requests": lambda seed: handed_over(seed, transfer="aggregated"),
    "local": local,
    "mixed": lambda seed: local(seed, "mixed"),
    "mixed, steps planned ahead": lambda seed: local(seed, "mixed", ahead=True),
    "cached": cached,
    "cached, mixed": lambda seed: cached(seed, "mixed"),
    "fetched from a store": lambda seed: cached(seed, store_blocks=200),
    "fetched from a store, mixed": lambda seed: cached(seed, "mixed", store_blocks=200),
    "fetched from a peer": peer_fetch,
    "parked": lambda seed: parked(seed, "mixed"),
    "parked after a hand-over": lambda seed: parked(seed, "prefill"),
    "layer streams": layer_streams,
    "replayed": lambda seed: replayed(seed, "prefill"),
    "replayed, mixed": lambda seed: replayed(seed, "mixed"),
}


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer takes several."""
    monkeypatch.setattr("services.worker.build_core._COPY_BYTES", 4 * LAYOUT.page_bytes)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_what_workers_tell_of_their_time_is_all_of_it_in_order_and_nothing_twice(kind: str) -> None:
    for seed in range(4):
        require_whole(KINDS[kind](seed))


def test_what_waits_for_pages_or_for_its_last_pages_is_told_as_that() -> None:
    """The kinds above do not pass for want of anything to tell."""
    world = handed_over(0, checked=True)
    world.settle()
    told = [parts_of(seen.deltas[0].timings) for seen in world.answers.values()]
    assert all(max(parts[of] for parts in told) > 1 for of in range(4))


def failure(world: OneClock, name: str) -> tuple[str, tuple[float, float, float, float]]:
    """Where it ended, and parts that are the whole time up to then."""
    while (failed := world.answers[RequestId(name)].failed) is None:
        if not world.turn():
            world.pass_time(64.0)
    assert failed.timings is not None
    parts = parts_of(failed.timings)
    assert min(parts) >= 0 and sum(parts) == world.failed_ms[name] - world.heard_ms[name]
    return failed.phase, parts


@pytest.mark.parametrize("to", ["prefill", "mixed"])
def test_who_ends_in_its_first_step_waited_no_longer_than_until_that_began(to: str) -> None:
    world = OneClock(0)
    world.send("r", world.prompt(40), 2, to=to, timeout_ms=300)
    while "r" not in world.began_ms:
        assert world.turn()
    world.pass_time(512.0)
    phase, parts = failure(world, "r")
    assert (phase, parts[0], parts[1] >= 512.0) == ("prefill", world.began_ms["r"] - world.heard_ms["r"], True)


def handing_over(seed: int) -> OneClock:
    """Everything was sent, and the decode worker's thread still looks at the last pages."""
    world = OneClock(seed, checked=True)
    world.send("r", world.prompt(40), 2, timeout_ms=10_000)
    decode = world.processes["decode"].core
    while not (one := next(iter(decode._incoming._transfers.values()), None)) or one.handed_ms is None:
        assert world.turn(), seed
    return world


def test_a_hand_over_that_fails_at_the_decode_worker_says_what_the_prefill_worker_took() -> None:
    world = handing_over(0)
    world.now_ms += 2.0
    decode = world.processes["decode"]
    (transfer,) = decode.core._incoming._transfers
    world.perform(decode, decode.core.on_corrupt(transfer, "wrong bytes", world.now_ms))
    phase, parts = failure(world, "r")
    assert phase == "transfer" and parts[1] > 0 and parts[3] >= 2.0


@pytest.mark.parametrize("to", ["mixed", "prefill"])
def test_who_loses_its_gateway_is_told_where_the_time_went(to: str) -> None:
    """If that only paused, it wants to know."""
    world = handing_over(0) if to == "prefill" else OneClock(0)
    if to == "mixed":
        world.send("r", world.prompt(40), 200, to=to)
        while "r" not in world.began_ms:
            assert world.turn()
    worker = world.processes["mixed" if to == "mixed" else "decode"]
    world.now_ms += 4_096.0
    world.perform(worker, worker.core.on_tick(world.now_ms))
    _, parts = failure(world, "r")
    assert sum(parts) >= 4_096.0
