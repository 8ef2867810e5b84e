"""A gateway for tests: speaks the real messages to real workers, and lets the test choose every worker itself."""

import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from common.ids import Incarnation, PeerId, RequestId, WorkerId, peer_id
from common.messages.base import Message
from common.messages.liveness import Hello, Member, Ping, Report, Welcome
from common.messages.requests import Cancel, Failed, FetchHint, Generate, Sampling, Timings, TokenLogprob, Tokens
from common.messages.resizing import Resize, ResizeAnswer
from common.net.sockets import Exchange

_PING_S = 0.3


@dataclass
class Outcome:
    """What a request got."""

    tokens: list[int] = field(default_factory=list)
    """Beginning with what was emitted before."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None
    failed: Failed | None = None
    cached_tokens: int | None = None
    timings: Timings | None = None

    @property
    def done(self) -> bool:
        return self.finish is not None or self.failed is not None


class Driver:
    """Use as a context manager; one thread."""

    def __init__(self, members: Sequence[Member], *, name: str = "driver") -> None:
        self._member = Member(
            id=WorkerId(f"{name}-{secrets.token_hex(3)}"),
            role="gateway",
            incarnation=Incarnation(secrets.randbits(64)),
            endpoint="",
            host="",
            pid=0,
        )
        self.exchange = Exchange(peer_id(self._member.id, self._member.incarnation), None)
        self.outcomes: dict[RequestId, Outcome] = {}
        self.reports: dict[WorkerId, Report] = {}
        self.resized: dict[int, ResizeAnswer] = {}
        self._welcomed: set[PeerId] = set()
        self._peers: dict[WorkerId, PeerId] = {}
        self._pinged_s = 0.0
        self._pings = 0
        self._numbers = itertools.count(1)
        for member in members:
            self.add(member)

    def add(self, member: Member) -> None:
        """Greet a process; of an earlier one of that name nothing is expected any more."""
        peer = peer_id(member.id, member.incarnation)
        self.remove(member.id)
        self._peers[member.id] = peer
        self.exchange.dial(peer, member.endpoint)
        self.exchange.send(peer, Hello(member=self._member))
        self.until(lambda: peer in self._welcomed, f"{member.id} welcomes us")

    def remove(self, name: str) -> None:
        """The process is gone, or about to be: expect no reports of it."""
        worker = WorkerId(name)
        if worker in self._peers:
            self.exchange.hang_up(self._peers.pop(worker))
        self.reports.pop(worker, None)

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        self.exchange.close()

    def send(
        self,
        to: str,
        prompt: Sequence[int],
        *,
        decode: str | None = None,
        timeout_ms: int = 60_000,
        request: str | None = None,
        cache_salt: str = "",
        emitted: Sequence[int] = (),
        fetch: FetchHint | None = None,
        priority: int = 0,
        **sampling: object,
    ) -> RequestId:
        """Start a request; `to` computes the prompt, `decode` (if any) the answer, which goes on behind `emitted`."""
        name = RequestId(request or f"{self._member.id}-{next(self._numbers)}")
        self.outcomes[name] = Outcome(tokens=list(emitted))
        message = Generate(
            request=name,
            prompt=tuple(prompt),
            sampling=Sampling(**sampling),  # type: ignore[arg-type]
            timeout_ms=timeout_ms,
            decode=None if decode is None else WorkerId(decode),
            cache_salt=cache_salt,
            emitted=tuple(emitted),
            fetch=fetch,
            priority=priority,
        )
        assert self.exchange.send(self._peers[WorkerId(to)], message)
        return name

    def hint(self, holder: str, n_blocks: int) -> FetchHint:
        """That this worker's device pool holds so many leading blocks."""
        return FetchHint(holder=self._peers[WorkerId(holder)], n_blocks=n_blocks)

    def tell(self, worker: str, message: Message) -> bool:
        """Send anything; False if it cannot be sent."""
        return self.exchange.send(self._peers[WorkerId(worker)], message)

    def resize(self, worker: str, device_memory_bytes: int) -> ResizeAnswer:
        """Order another size of page memory, and wait for what the worker says."""
        call = next(self._numbers)
        assert self.tell(worker, Resize(call=call, device_memory_bytes=device_memory_bytes))
        self.until(lambda: call in self.resized, f"{worker} answers the order")
        return self.resized[call]

    def cancel(self, request: RequestId, *workers: str) -> None:
        for worker in workers:
            self.exchange.send(self._peers[WorkerId(worker)], Cancel(request=request))

    def ping(self) -> int:
        """Ask everybody for a report; its number."""
        self._pings += 1
        self._pinged_s = time.monotonic()
        for peer in self._peers.values():
            self.exchange.send(peer, Ping(sequence=self._pings))
        return self._pings

    def pump(self, wait_s: float = 0.02) -> None:
        """Handle what has come; pings when due."""
        if time.monotonic() - self._pinged_s > _PING_S:
            self.ping()
        for peer, message, _ in self.exchange.receive(wait_s * 1e3):
            match message:
                case Welcome():
                    self._welcomed.add(peer)
                case Report(worker=worker) if peer == self._peers.get(worker):
                    self.reports[worker] = message
                case ResizeAnswer(call=call):
                    self.resized[call] = message
                case Failed(request=request) if request in self.outcomes:
                    self.outcomes[request].failed = self.outcomes[request].failed or message  # as a gateway: the first
                case Tokens(deltas=deltas):
                    for delta in deltas:
                        outcome = self.outcomes[delta.request]
                        assert delta.position == len(outcome.tokens), "a token was repeated or lost"
                        outcome.tokens += delta.tokens
                        outcome.logprobs += delta.logprobs
                        outcome.finish = delta.finish
                        if delta.cached_tokens is not None:
                            outcome.cached_tokens, outcome.timings = delta.cached_tokens, delta.timings

    def until(self, condition: Callable[[], bool], what: str, *, timeout_s: float = 60.0) -> None:
        """Pump until the condition holds; a named failure after the deadline."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline_s:
                raise AssertionError(f"not within {timeout_s} s: {what}; {self.reports}")
            self.pump()

    def finish(self, requests: Sequence[RequestId], *, timeout_s: float = 120.0) -> list[Outcome]:
        """Wait for all of them."""
        self.until(lambda: all(self.outcomes[r].done for r in requests), "all requests answered", timeout_s=timeout_s)
        return [self.outcomes[r] for r in requests]

    def refresh(self, *, timeout_s: float = 30.0) -> None:
        """Wait until all reports are younger than this call."""
        number = self.ping()
        self.until(
            lambda: all(w in self.reports and self.reports[w].sequence >= number for w in self._peers),
            "everybody reports",
            timeout_s=timeout_s,
        )

    def until_reported(self, condition: Callable[[], bool], what: str, *, timeout_s: float = 30.0) -> None:
        """Wait until the condition holds of reports that are all younger than this call."""
        deadline_s = time.monotonic() + timeout_s
        self.refresh(timeout_s=timeout_s)
        while not condition():
            if time.monotonic() > deadline_s:
                raise AssertionError(f"not within {timeout_s} s: {what}; {self.reports}")
            self.refresh(timeout_s=timeout_s)

    def until_all_free(self, *, timeout_s: float = 30.0) -> None:
        """Wait until everybody reports that all its pages are free, only cached or lent, nothing is parked, spilled or queued."""

        def free() -> bool:
            return all(
                r.pages.free + r.pages.cached + r.pages.lent == r.pages.total
                and not r.gauges.get("pinned_blocks", 0.0)
                and not (r.gauges.get("parked_bytes", 0.0) or r.gauges.get("open_spills", 0.0))
                and not (r.queue.waiting or r.queue.running or r.queue.handing_over)
                for r in self.reports.values()
            )

        self.until_reported(free, "all pages are free again", timeout_s=timeout_s)
