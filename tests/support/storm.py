"""Storms of aborted requests over real workers: each ends at a chosen moment, and those that go on must not notice.

What the workers send to each other tells how far a request is. A worker that is about to say something about a doomed
request, or has just said it, is held until the request was aborted: so every phase is hit, however short it is.
"""

import itertools
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from common.ids import PeerId, RequestId, TransferId
from common.messages.base import Message
from common.messages.blocks import Find, Found, Publish, Release, Reserve
from common.messages.handover import Abort, Commit, Grant, GrantRequest, HandOver, KvSent, Stop, Stopped
from common.messages.requests import Generate, Tokens
from common.net.faulty import FaultyExchange
from common.net.sockets import Exchange, Payload
from services.worker.model.make import make_model
from tests.support.driver import Driver
from tests.support.reference import Reference

PHASES = ("queue", "grant", "compute", "transfer", "handover", "answer", "commit", "decode")
"""Each begins with a message: Generate, GrantRequest, Grant, KvSent, HandOver, the first Tokens, Commit, the next Tokens."""
N_TOKENS = 12
_KEPT = (GrantRequest, Grant, KvSent, HandOver, Commit, Stop, Stopped, Abort, Reserve, Publish, Find, Found, Release)
_HELD_S = 0.5
"""A worker is held no longer, so that a storm that is slow is not a storm of silent workers."""
_LONGEST_DEADLINE_MS = 400
_ANSWER_WITHIN_S = 60.0


@dataclass(frozen=True)
class Asked:
    """A model, prompts that share beginnings, and what transformers answers."""

    model: Path
    prompts: list[list[int]]
    expected: list[list[int]]


def make_asked(folder: Path) -> Asked:
    """Some prompts are whole blocks exactly; together they are more than the workers of a storm can keep."""
    model = make_model("deep", folder / "deep", family="llama")
    reference, rng = Reference(model), random.Random(7)
    vocab = reference.model.config.vocab_size

    def some(count: int) -> list[int]:
        return [rng.randrange(8, vocab) for _ in range(count)]

    shared = some(96)
    prompts = [shared[: rng.randrange(20, 96)] + some(rng.randrange(1, 60)) for _ in range(6)]
    prompts += [shared[:80] + some(16), shared[:64], shared, some(1), some(64), some(180)]
    return Asked(model, prompts, [reference.generate(prompt, N_TOKENS) for prompt in prompts])


@dataclass
class _Doom:
    """When a request shall be aborted."""

    phase: str
    held_before: bool
    """The worker is held before it says what begins the phase; else after."""
    due: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)


class Watch:
    """How far every request is, by the messages about it; any thread. `doomed` requests hold whoever speaks of them."""

    def __init__(self, driver: threading.Thread) -> None:
        """`driver`: the thread that aborts, which is never held."""
        self._driver = driver
        self._request_of: dict[TransferId, RequestId] = {}
        self.phase_of: dict[RequestId, str] = {}
        self.said: deque[Message] = deque(maxlen=10_000)
        """Messages of hand-overs and about blocks, in the order in which they were sent."""
        self.doomed: dict[RequestId, _Doom] = {}

    def before(self, message: Message) -> list[_Doom]:
        """Somebody is about to send it; the dooms to be met after it was sent."""
        later: list[_Doom] = []
        if isinstance(message, _KEPT):
            self.said.append(message)
        for request, phase in self._steps(message):
            known = self.phase_of.get(request)
            if known is not None and PHASES.index(phase) <= PHASES.index(known):
                continue
            self.phase_of[request] = phase
            doom = self.doomed.get(request)
            if doom is None or doom.phase != phase:
                continue
            if doom.held_before:
                self.meet([doom])
            else:
                later.append(doom)
        return later

    def meet(self, dooms: Sequence[_Doom]) -> None:
        """Wait until these requests were aborted."""
        for doom in dooms:
            doom.due.set()
            if threading.current_thread() is not self._driver:
                doom.over.wait(_HELD_S)

    def _steps(self, message: Message) -> list[tuple[RequestId, str]]:
        match message:
            case Generate(request=request):
                return [(request, "queue")]
            case GrantRequest(transfer=transfer, request=request):
                self._request_of[transfer] = request
                return [(request, "grant")]
            case Grant() | KvSent() | HandOver() | Commit():
                phases = {Grant: "compute", KvSent: "transfer", HandOver: "handover", Commit: "commit"}
                of = self._request_of.get(message.transfer)
                return [] if of is None else [(of, phases[type(message)])]
            case Tokens(deltas=deltas):
                return [(delta.request, "decode" if delta.position else "answer") for delta in deltas]
            case _:
                return []


@contextmanager
def watching() -> Iterator[Watch]:
    """See every message that this process sends from now on. The calling thread is the one that aborts."""
    watch = Watch(threading.current_thread())

    def watched(inner: Callable[..., bool]) -> Callable[..., bool]:
        def send(self: Exchange, peer: PeerId, message: Message, payloads: Sequence[Payload] = ()) -> bool:
            later = watch.before(message)
            sent = inner(self, peer, message, payloads)
            watch.meet(later)
            return sent

        return send

    with (
        patch.object(Exchange, "send", watched(Exchange.send)),
        patch.object(FaultyExchange, "send", watched(FaultyExchange.send)),
    ):
        yield watch


@dataclass(frozen=True)
class Mix:
    """What a storm is made of."""

    phases: Sequence[str] = PHASES
    """Of those that are cancelled."""
    cancel_share: float = 0.5
    deadline_share: float = 0.15
    """Requests that get less time than they may need."""
    at_once: int = 8


@dataclass
class Tally:
    """What became of the requests of a storm."""

    aborted: Counter[str] = field(default_factory=Counter)
    """Phase -> requests aborted in it; `deadline`: those whose time was up."""
    finished: int = 0
    cached: int = 0
    """Of them, requests that found some of their KV."""
    checked_pages: int = 0
    """Pages whose checksums were compared, by everybody; 0 mismatches, or the storm has failed."""
    slowest_s: float = 0.0
    """From Generate to the last token, of those that finished."""
    freed_s: float = 0.0
    """From the last abort or answer until every page was free and nothing held."""

    @property
    def aborts(self) -> int:
        return self.aborted.total()


@dataclass
class _Open:
    prompt: int
    sent_s: float
    by_deadline: bool
    workers: list[str]


class Storm:
    """Requests over some routes, of which about two thirds are aborted; every answer that ends is compared."""

    def __init__(
        self, driver: Driver, watch: Watch, asked: Asked, routes: Sequence[tuple[str, str | None]], seed: int
    ) -> None:
        """`routes`: worker that computes the prompt, and the one that answers (None: the same)."""
        self._driver, self._watch, self._asked, self._routes = driver, watch, asked, routes
        self._rng, self._seed = random.Random(seed), seed
        self._open: dict[RequestId, _Open] = {}
        self._numbers = itertools.count()
        self.tally = Tally()

    def run(self, aborts: int, mix: Mix = Mix()) -> Tally:
        """Until so many were aborted, everything is answered, and nothing is held anywhere.

        Raises AssertionError for a wrong token, an error that nobody asked for, a wait without end, or what stays behind.
        """
        goal, phases = self.tally.aborts + aborts, itertools.cycle(mix.phases)
        while self._open or self.tally.aborts < goal:
            while len(self._open) < mix.at_once and self.tally.aborts < goal:
                self._start(mix, phases)
            self._driver.pump(0.002)
            for request in list(self._open):
                self._look_at(request)
        began_s = time.monotonic()
        self._driver.until_all_free()
        self.tally.freed_s = max(self.tally.freed_s, time.monotonic() - began_s)
        require_nothing_held(self._driver)
        self.tally.checked_pages = checked_pages(self._driver)
        return self.tally

    def _start(self, mix: Mix, phases: Iterator[str]) -> None:
        rng, number = self._rng, self._rng.randrange(len(self._asked.prompts))
        to, decode = rng.choice(self._routes)
        chance = rng.random()
        by_deadline = chance < mix.deadline_share
        name = RequestId(f"storm-{self._seed}-{next(self._numbers)}")
        if mix.deadline_share <= chance < mix.deadline_share + mix.cancel_share:
            phase = next(phases) if decode is not None else rng.choice(("queue", "answer", "decode"))
            self._watch.doomed[name] = _Doom(phase, held_before=rng.random() < 0.5)
        workers = [to] if decode is None else rng.sample([to, decode], 2)
        self._open[name] = _Open(number, time.monotonic(), by_deadline, workers)
        self._driver.send(
            to,
            self._asked.prompts[number],
            decode=decode,
            request=name,
            max_tokens=rng.choice((1, 2, N_TOKENS, N_TOKENS)),
            timeout_ms=rng.randrange(1, _LONGEST_DEADLINE_MS) if by_deadline else 60_000,
        )

    def _look_at(self, request: RequestId) -> None:
        one, outcome, doom = self._open[request], self._driver.outcomes[request], self._watch.doomed.get(request)
        if outcome.done:
            self._end(request, one)
        elif doom is not None and doom.due.is_set():
            self.tally.aborted[self._watch.phase_of[request]] += 1
            self._driver.cancel(request, *one.workers)
            self._forget(request)
        else:
            age_s = time.monotonic() - one.sent_s
            assert age_s < _ANSWER_WITHIN_S, f"{request}, in {self._watch.phase_of.get(request)}, has no answer"

    def _end(self, request: RequestId, one: _Open) -> None:
        outcome = self._driver.outcomes[request]
        expected = self._asked.expected[one.prompt][: len(outcome.tokens)]
        assert outcome.tokens == expected, f"{request} got {outcome.tokens}, transformers says {expected}"
        if outcome.failed is not None:
            assert one.by_deadline and outcome.failed.code == "deadline_exceeded", outcome.failed
            self.tally.aborted["deadline"] += 1
        else:
            self.tally.finished += 1
            self.tally.cached += bool(outcome.cached_tokens)
            self.tally.slowest_s = max(self.tally.slowest_s, time.monotonic() - one.sent_s)
        self._forget(request)

    def _forget(self, request: RequestId) -> None:
        del self._open[request]
        doom = self._watch.doomed.pop(request, None)
        if doom is not None:
            doom.over.set()


def checked_pages(driver: Driver) -> int:
    """By all workers and stores since their start."""
    counters = [named for report in driver.reports.values() for named in report.counters.items()]
    return int(sum(count for name, count in counters if name.startswith("kv_checked_pages_total")))


_HELD = ("pinned_blocks", "parked_bytes", "leases", "oldest_pin_ms", "open_loads")
"""Gauges of what is held for somebody."""


def require_nothing_held(driver: Driver) -> None:
    """No page, block, lease or slot of any worker or store is held, and no page was wrong. Raises AssertionError."""
    for worker, report in driver.reports.items():
        pages = report.pages
        held = {name: value for name, value in report.gauges.items() if value and name.startswith(_HELD)}
        assert not held, f"{worker} holds {held}"
        assert pages.free + pages.cached + pages.lent == pages.total, f"{worker}: {pages}"
        wrong = {name: n for name, n in report.counters.items() if name.startswith("kv_mismatches_total") and n}
        assert not wrong, f"{worker} got pages that were not what was sent: {wrong}"
