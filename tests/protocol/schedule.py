"""One schedule: a cluster of real cores, what is done to it, and the laws that it must keep.

Laws, after every event: each core's `check()`; tokens that clients get are those of the truth, in order, once; nobody
writes where its permission has ended, or reads what nobody keeps for it; no lease ends that its writer could have renewed
and has not. At the end, when all faults are over:

- every request is answered, QUIET_MS after the last fault at the latest, whichever of its messages were lost;
- within IDLE_MS of that every page, pin, lease, call, slot and charge is back on every core that lives.
"""

import random
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Concatenate, ParamSpec

from common.faults.points import MESSAGES, Kind, Point, Side
from common.faults.rules import Rule
from common.ids import RequestId
from tests.support.world_faults import FaultyWorld
from tests.support.world_process import Process

QUIET_MS = 40_000.0
"""A transfer that nobody commits costs 8 s, a silent peer 3, a lookup 2.5; a request has four attempts."""
IDLE_MS = 35_000.0
"""A grant that nobody renews ends after 30 s, the longest lease of a reader after 10, a hand-over without Commit after 8."""
LEASE_MS = 8_000
"""Of grants, in some systems: copies that are late last longer, so that a lease must be renewed."""
SYSTEMS: dict[str, dict[str, object]] = {
    "pd-shm": {"transport": "shm", "prefill_pages": 60, "decode_pages": 24, "lease_ms": LEASE_MS},
    "pd-tcp": {"transport": "tcp", "prefill_pages": 60, "decode_pages": 24},
    "pd2-shm-store": {
        "transport": "shm",
        "prefill_pages": 28,
        "decode_pages": 44,
        "store_blocks": 30,
        "more": ("prefill-1",),
        "caching": 3,
    },
    "pd2-tcp-store": {
        "transport": "tcp",
        "prefill_pages": 28,
        "decode_pages": 44,
        "store_blocks": 30,
        "more": ("decode-1",),
        "caching": 3,
        "lease_ms": LEASE_MS,
    },
    "pd2-shm-hints": {
        "transport": "shm",
        "prefill_pages": 28,
        "decode_pages": 44,
        "more": ("prefill-1",),
        "caching": 3,
        "hints": True,
    },
    "pd-shm-returns": {
        "transport": "shm",
        "prefill_pages": 40,
        "decode_pages": 34,
        "caching": 3,
        "kvstore": "off",
        "lease_ms": LEASE_MS,
    },
    "mixed-shm-store": {
        "transport": "shm",
        "prefill_pages": 40,
        "decode_pages": 30,
        "store_blocks": 30,
        "more": ("mixed",),
        "host_pages": 60,
        "spill": "write-back",
    },
}


P = ParamSpec("P")
_TRACED = "rules: "


def _told(step: Callable[Concatenate["Schedule", P], None]) -> Callable[Concatenate["Schedule", P], None]:
    """A step whose failure tells what led to it."""

    @wraps(step)
    def told(self: "Schedule", *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            step(self, *args, **kwargs)
        except Exception as error:
            self.unbroken = False
            if _TRACED not in str(error):
                error.add_note(f"at {self.world.now_ms:.1f} ms\n{self.world.trace.about(last=60)}")
            raise

    return told


class Schedule:
    """What can be done to a cluster; each method is one step."""

    def __init__(self, seed: int, system: str, *, timeout_ms: float = 30_000.0, ahead: bool = False) -> None:
        self.rng = random.Random(seed)
        self.prefix = tuple(self.rng.randrange(3, 900) for _ in range(24))
        self.world = FaultyWorld(self.rng, timeout_ms=timeout_ms, ahead=ahead, **SYSTEMS[system])
        self.world.run(600.0)
        self._asked, self.unbroken = 0, True

    # -- steps

    @_told
    def ask(self, prompt_tokens: int, max_tokens: int, shared: bool = False, priority: int = 0) -> None:
        if self.world.gateway is None:
            return
        head = self.prefix[: prompt_tokens - 1] if shared else ()
        prompt = (*head, *(self.rng.randrange(3, 900) for _ in range(prompt_tokens - len(head))))
        name, self._asked = f"r{self._asked}", self._asked + 1
        self.world.gateway.submit(name, prompt, max_tokens, priority, self.world.now_ms)

    @_told
    def ask_on(self, which: int, tokens: int, max_tokens: int) -> None:
        """The next turn of a conversation: what was asked, what was answered, and something new."""
        gateway = self.world.gateway
        over = [] if gateway is None else [client for client in gateway.clients.values() if client.finish is not None]
        if gateway is None or not over:
            return
        client = over[which % len(over)]
        new = tuple(self.rng.randrange(3, 900) for _ in range(tokens))
        name, self._asked = f"r{self._asked}", self._asked + 1
        prompt = (
            (*client.prompt, *client.truth, *new)[-40:]
            if len(client.prompt) > 30
            else (*client.prompt, *client.truth, *new)
        )
        gateway.submit(name, prompt, max_tokens, 0, self.world.now_ms)

    @_told
    def leave(self, which: int) -> None:
        """A client goes away."""
        gateway = self.world.gateway
        there = [] if gateway is None else [r for r, c in gateway.clients.items() if not c.done]
        if gateway is not None and there:
            gateway.cancel(there[which % len(there)], self.world.now_ms)

    @_told
    def events(self, n: int) -> None:
        for _ in range(n):
            self.world.turn()

    @_told
    def time(self, ms: float) -> None:
        self.world.run(ms)

    @_told
    def faults(self, rules: Sequence[Rule]) -> None:
        """Rules from now on, in place of those before."""
        self.world.wires.arm(rules)
        self.world.say("", "", "all rules are gone" if not rules else f"rules: {'; '.join(map(rule_text, rules))}")

    @_told
    def slow_copy(self, late_ms: float) -> None:
        """A prompt whose first copy to its decode worker takes so long, over a link that loses nothing."""
        late = Rule(point=Point.TRANSFER, kind=Kind.DELAY, process="prefill", side=Side.WORK, ms=late_ms, times=1)
        self.faults([late])
        self.ask(12, 6)
        self.time(300.0)

    @_told
    def cut(self, one: int, other: int) -> None:
        """Nothing that two processes say to each other arrives; memory that they share stays shared."""
        names = [peer.partition("@")[0] for peer in self.world.everybody()] or ["nobody"]
        pair = names[one % len(names)], names[other % len(names)]
        both = (pair, pair[::-1])
        self.faults([Rule(point=p, kind=Kind.CUT, process=a, peer=b) for p in MESSAGES for a, b in both])

    @_told
    def kill(self, which: int) -> None:
        if peers := self.world.everybody():
            self.world.die(peers[which % len(peers)])

    @_told
    def stop(self, which: int) -> None:
        if peers := self.world.everybody():
            self.world.kernel.stop(peers[which % len(peers)])

    @_told
    def go_on(self) -> None:
        for peer in self.world.everybody():
            if self.world.kernel.standing[peer].stopped:
                self.world.kernel.go_on(peer)

    @_told
    def restart(self, which: int, same_address: bool = False, unseen_ms: float = 0.0) -> None:
        """A new life under an old name; the old one may be there still, if it is stopped.

        At the same address, if that is free, it hears what was meant for the old one. `unseen_ms`: how long nobody reads of
        it in the membership.
        """
        world, registry = self.world, self.world.registry
        registry.blind_until_ms = max(registry.blind_until_ms, world.now_ms + unseen_ms)
        if names := world.workers_down():
            world.start(names[which % len(names)], same_address=same_address)
        elif world.gateway is None:
            world.start_gateway()
        elif world.store is None and world.store_blocks:
            world.start_store(same_address=same_address)

    # -- the end

    @_told
    def end(self) -> None:
        """All faults are over: wait, and look at what is left."""
        self.faults(())
        self.go_on()
        world = self.world
        world.run(QUIET_MS, until=lambda: not self.open_requests())
        self.require_answers()
        world.run(IDLE_MS, until=lambda: not self.left_over())
        left = self.left_over()
        if left:
            raise world.violation(
                f"not given back {IDLE_MS / 1000:g} s after the last answer: {left}", self._named(left)
            )

    def open_requests(self) -> list[RequestId]:
        gateway = self.world.gateway
        return [] if gateway is None else [request for request, client in gateway.clients.items() if not client.done]

    def require_answers(self) -> None:
        if self.open_requests():
            text = f"{self.open_requests()} have no answer {QUIET_MS / 1000:g} s after the last fault"
            raise self.world.violation(text, self.open_requests())

    def left_over(self) -> list[str]:
        """What is not as at the start, in words."""
        world, found = self.world, list[str]()
        for process in world.processes.values():
            if process.alive:
                found += _left_on(process)
        if world.store is not None:
            shelves = world.store.core._shelves
            counts = shelves.pool.ledger.counts()
            held = counts.reserved + counts.granted + counts.active + counts.quarantined
            if held or shelves.pool.cache.n_pinned:
                owners = [o for o in shelves.pool.ledger.owners() if not str(o).startswith("cache")]
                found.append(f"store: {held} pages, {shelves.pool.cache.n_pinned} pins, {owners}")
        if world.gateway is not None:
            charged = {worker: n for worker, n in world.gateway.core._roster.charged().items() if n}
            if charged or world.gateway.core.open_requests:
                found.append(f"gateway: {world.gateway.core.open_requests} open, charged {charged}")
            world.gateway.keys.check({})
        return found

    def _named(self, left: list[str]) -> list[str]:
        names = {*self.world.trace.request_of, *self.world.trace.request_of.values()}
        return [name for name in names if any(name in words for words in left)]


def _left_on(process: Process) -> list[str]:
    core, found = process.core, list[str]()
    counts, pool = process.ledger.counts(), process.core.pool
    core.check()
    if not core.idle:
        found.append(f"{process.peer}: not idle")
    if pool.available_pages + counts.lent != counts.total:
        owners = [owner for owner in process.ledger.owners() if not str(owner).startswith("cache")]
        found.append(f"{process.peer}: {pool.available_pages} of {counts.total} pages are free or cached, {owners}")
    if pool.cache.n_pinned:
        found.append(f"{process.peer}: {pool.cache.n_pinned} blocks pinned")
    parked = core._scheduler.parking.buffer.used_pages
    if parked or process.rings or process.steps:
        found.append(f"{process.peer}: {parked} pages parked, rings {process.rings}, {len(process.steps)} steps")
    return found


def rule_text(rule: Rule) -> str:
    """As in PENSTOCK_FAULTS."""
    keys = {"share": (rule.share, 1.0), "after": (rule.after, 0), "times": (rule.times, None), "ms": (rule.ms, 0.0)}
    keys |= {"peer": (rule.peer, ""), "seed": (rule.seed, 0)}
    words = [
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, (value, d) in keys.items()
        if value != d
    ]
    who = f"{rule.process}/" if rule.process else ""
    return " ".join([f"{who}{rule.point}:{rule.kind}", *words])


MESSAGE_POINTS = tuple(point for point in MESSAGES if point is not Point.LIVENESS)
MESSAGE_KINDS = (Kind.DROP, Kind.DELAY, Kind.REORDER, Kind.DUPLICATE)


def lossy_rules(rng: random.Random, n: int) -> list[Rule]:
    """Rules as random schedules use them."""
    rules = []
    for _ in range(n):
        share, times, seed = rng.choice((0.1, 0.5, 1.0)), rng.choice((1, 3, 30)), rng.randrange(1000)
        if rng.random() < 0.4:
            point = rng.choice((Point.TRANSFER, Point.FETCH, Point.SPILL))
            kind = rng.choice((Kind.DELAY, Kind.DELAY, Kind.FAIL))
        else:
            point = rng.choice((*MESSAGE_POINTS, Point.STOP_WRITING, Point.STOP_WRITING, Point.HANDOVER, Point.COMMIT))
            kind = rng.choice((*MESSAGE_KINDS, Kind.DROP))
        ms = rng.choice((20.0, 700.0, 4_000.0, 12_000.0)) if kind is Kind.DELAY else 0.0
        rules.append(Rule(point=point, kind=kind, share=share, times=times, ms=ms, seed=seed))
    return rules


def random_schedule(seed: int, *, steps: int = 30, more: bool = True) -> Schedule:
    """A whole schedule from one number, to its end. `more`: as in `step`."""
    rng = random.Random(f"schedule {seed}")
    schedule = Schedule(
        seed, rng.choice(list(SYSTEMS)), timeout_ms=rng.choice((4_000.0, 120_000.0)), ahead=rng.random() < 0.5
    )
    schedule.faults(lossy_rules(rng, rng.randrange(4)))
    also = random.Random(f"more {seed}") if more else None
    for _ in range(steps):
        step(schedule, rng, also)
    schedule.end()
    return schedule


def step(schedule: Schedule, rng: random.Random, more: random.Random | None = None) -> None:
    """One random step. `more`: draws where new lives listen, who dies and is back at once, and slow copies; None: none of
    these."""
    if more is not None and more.random() < 0.06:
        schedule.slow_copy(more.choice((6_000.0, 1.5 * LEASE_MS, 2.5 * LEASE_MS)))
    chance = rng.random()
    if chance < 0.15:
        schedule.ask_on(rng.randrange(8), rng.choice((1, 5)), rng.choice((1, 5, 12)))
        schedule.events(rng.choice((0, 3, 20)))
    elif chance < 0.40:
        schedule.ask(
            rng.choice((1, 4, 5, 12, 30)), rng.choice((1, 2, 6, 12)), rng.random() < 0.5, rng.choice((0, 0, 1))
        )
        schedule.events(rng.choice((0, 3, 20)))
    elif chance < 0.55:
        schedule.events(rng.choice((2, 8, 60)))
    elif chance < 0.65:
        schedule.time(rng.choice((5.0, 150.0, 900.0, 3_500.0)))
    elif chance < 0.76:
        schedule.leave(rng.randrange(8))
    elif chance < 0.86:
        schedule.faults(lossy_rules(rng, rng.randrange(1, 6)))
    elif chance < 0.88:
        schedule.cut(rng.randrange(8), rng.randrange(8))
    elif chance < 0.91:
        schedule.stop(rng.randrange(8))
    elif chance < 0.94:
        schedule.go_on()
    elif chance < 0.96:
        schedule.kill(rng.randrange(8))
    else:
        which = rng.randrange(8)
        if more is None or more.random() < 0.3:
            schedule.restart(which)
            return
        if more.random() < 0.6:
            schedule.kill(which)
        schedule.restart(which, True, more.choice((0.0, 1.0, 300.0, 5_000.0)))
