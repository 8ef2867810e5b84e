"""Random work for workers whose memory is too small for it, with everything about memory on, and how it goes on.

Laws: all work ends with the right tokens, or with an error that has a code and a phase; when nothing moves but time, no
sequence that has its pages and its KV waits for anybody else; and the whole takes no more engine steps than its tokens,
times a stated factor, and no more waiting than the lookups and leases that it may have to wait for.
"""

import random
from dataclasses import dataclass

from common.ids import RequestId
from common.messages.requests import FetchHint
from common.policy.elastic import ArenaTerms
from tests.support.fake_engine import answer
from tests.support.world import World
from tests.support.world_cluster import Happens
from tests.support.world_process import CHUNK_PAGES, LAYOUT, Process

CONTEXT_TOKENS = 100
STEPS_PER_TOKEN, STEPS_ALWAYS = 3.0, 60
"""A sequence that gives way may be computed anew, in a step of its own."""
WAIT_MS, MOST_WAITS_MS = 100.0, 60_000.0
REASONS = frozenset({"out_of_pages", "busy", "deadline_exceeded", "peer_failed", "no_worker", "invalid_request"})


@dataclass(frozen=True, slots=True)
class ScratchTerms:
    """Scratch that grows with rows and keys."""

    def needs_bytes(self, rows: int, longest_keys: int) -> int:
        return 64 + rows * 64 + self.gathers_bytes(rows, longest_keys)

    def gathers_bytes(self, rows: int, longest_keys: int) -> int:
        del rows
        return longest_keys * 8

    def rows_within(self, n_bytes: int, longest_keys: int) -> int:
        return max(0, n_bytes - self.needs_bytes(0, longest_keys)) // 64


@dataclass(frozen=True, slots=True)
class Progress:
    """One run."""

    requests: int
    failed: int
    tokens: int
    """Prompt and output tokens of all requests."""
    steps: int
    """Of all engines."""
    waits_ms: float
    """Virtual time in which nothing happened but that it passed."""


class ProgressWorld(World):
    """Counts the steps of its engines."""

    steps = 0

    def happen(self, kind: str, what: Happens) -> None:
        if kind == "step" and isinstance(what, Process) and what.layer == self.layout.layers:
            self.steps += 1
        super().happen(kind, what)


def tiny_world(rng: random.Random) -> ProgressWorld:
    """A worker of each kind; pools of a few sequences, all of which can hold the longest."""
    layers, max_step, offload = rng.choice((2, 4)), rng.choice((16, 24)), rng.choice(("auto", "off", "most"))
    arena = ArenaTerms(
        step=ScratchTerms(),
        chunk_bytes=CHUNK_PAGES * LAYOUT.page_bytes,
        chunk_pages=CHUNK_PAGES,
        max_rows=max_step,
        least_rows=5 + LAYOUT.block_tokens,
        max_keys=CONTEXT_TOKENS,
    )
    elastic = rng.choice(("off", "kv", "full") if offload != "off" else ("off", "kv"))
    lasting = arena.lasting_chunks(elastic) if elastic != "off" else 0
    pages = (rng.choice((26, 28, 32)) * layers // CHUNK_PAGES + lasting + layers) * CHUNK_PAGES
    return ProgressWorld(
        rng,
        layers=layers,
        prefill_pages=pages,
        decode_pages=pages,
        host_pages=rng.choice((30 * layers, 200 * layers) if offload != "off" else (0, 30 * layers)),
        store_blocks=rng.choice((0, 8, 40)),
        context_tokens=dict.fromkeys(("prefill", "decode", "mixed"), CONTEXT_TOKENS),
        more=("mixed", "mixed-1"),
        transport=rng.choice(("tcp", "shm")),
        flaky=rng.choice((0.0, 0.0, 0.3, 1.0)),
        ahead=rng.random() < 0.5,
        **({"arena": arena, "elastic": elastic} if elastic != "off" else {}),
        layer_offload=layers if offload == "most" else offload,
        spare_memory=rng.choice(("keep", "release")),
        admission=rng.choice(("fcfs", "slo")),
        caching=rng.choice((0, 2, 3)),
        max_step_tokens=max_step,
        max_running=rng.choice((2, 5)),
        spill=rng.choice(("write-through", "write-back")),
        fetch=rng.choice(("always", "auto")),
    )


def run(seed: int) -> Progress:
    """One random schedule. Raises AssertionError for a law that was broken."""
    rng = random.Random(f"progress {seed}")
    world = tiny_world(rng)
    world.greet()
    tokens, n_requests = 0, rng.randrange(3, 9)
    shared = [rng.randrange(3, 900) for _ in range(40)]
    for number in range(n_requests):
        prompt = shared[: rng.choice((0, 0, 8, 21, 40))] + [
            rng.randrange(3, 900) for _ in range(rng.choice((1, 7, 24, 50)))
        ]
        most = rng.choice((1, 3, 9, CONTEXT_TOKENS - len(prompt)))
        to, holder = rng.choice(("mixed", "mixed", "mixed-1", "prefill", "decode")), rng.choice(("mixed", "mixed-1"))
        hinted = to.startswith("mixed") and to != holder and rng.random() < 0.4
        hint = FetchHint(holder=world.processes[holder].peer, n_blocks=len(prompt) // 4) if hinted else None
        world.send(f"r{number}", prompt, most, to=to, priority=rng.choice((0, 0, 5)), fetch=hint)
        tokens += len(prompt) + most
        for _ in range(rng.choice((0, 0, 5, 60))):
            world.turn()
    return _finish(world, tokens)


def _finish(world: ProgressWorld, tokens: int) -> Progress:
    waits_ms, most_steps = 0.0, STEPS_PER_TOKEN * tokens + STEPS_ALWAYS
    while True:
        while world.turn():
            assert world.steps <= most_steps, f"{world.steps} steps for {tokens} tokens, and no end"
        for process in world.processes.values():
            require_no_idle_kv(process)
        if all(process.core.idle for process in world.processes.values()):
            break
        assert waits_ms < MOST_WAITS_MS, f"after {waits_ms} ms of waiting: {open_requests(world)}"
        waits_ms += WAIT_MS
        world.pass_time(WAIT_MS)
    failed = [require_outcome(world, request) for request in world.answers]
    for process in world.processes.values():
        process.core.check()
    return Progress(len(world.answers), sum(failed), tokens, world.steps, waits_ms)


def require_no_idle_kv(process: Process) -> None:
    """Nothing moves: whoever has its KV, and a page for its next token, is in a step."""
    if process.steps:
        return
    scheduler, layout = process.core._scheduler, process.core._pool
    for one in scheduler._lineup.running:
        room = one.table.n_blocks * LAYOUT.block_tokens > len(one.tokens) - 1
        assert one.is_barred or not room, (
            f"{one.request} on {process.peer} has {one.table.n_blocks} blocks for {len(one.tokens)} tokens, "
            f"{one.computed_tokens} of them computed, and no step computes it; {layout.available_pages} pages are free"
        )


def require_outcome(world: World, request: RequestId) -> bool:
    """Whether it failed: the right tokens, or an error that says where and why."""
    seen = world.answers[request]
    assert seen.done, f"{request} was never answered"
    if seen.failed is None:
        assert seen.tokens == answer(seen.prompt, seen.max_tokens), request
        return False
    assert seen.failed.code in REASONS and seen.failed.phase and seen.failed.text, seen.failed
    return True


def open_requests(world: World) -> str:
    """What is left, in words."""
    left = [request for request, seen in world.answers.items() if not seen.done]
    busy = [process.peer for process in world.processes.values() if not process.core.idle]
    return f"no answer for {left}; busy are {busy}"
