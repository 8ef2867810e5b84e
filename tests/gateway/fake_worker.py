"""A worker that says what the test tells it to: a thread with a real Exchange, and no model."""

import queue
import secrets
import threading
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import msgspec

from common.ids import Incarnation, PeerId, RequestId, WorkerId, peer_id
from common.messages import AnyMessage
from common.messages.base import Message
from common.messages.liveness import (
    Drain,
    Hello,
    Member,
    MemoryPart,
    ModelIdentity,
    PageCounts,
    Ping,
    QueueCounts,
    Report,
    Welcome,
)
from common.messages.requests import (
    AskAbout,
    Cancel,
    Generate,
    NotHere,
    StillHere,
    Timings,
    TokenDelta,
    TokenLogprob,
    Tokens,
)
from common.messages.resizing import Resize
from common.net.redis import Membership
from common.net.sockets import Exchange

PATIENCE_S = 20.0
M = TypeVar("M", bound=Message)

MEMORY = (
    MemoryPart(owner="weights", tier="device", n_bytes=7000),
    MemoryPart(owner="kv_free", tier="device", n_bytes=9000),
    MemoryPart(owner="parked", tier="host", n_bytes=300),
)


class FakeWorker:
    """Answers Hello and Ping by itself, and that what an earlier test cancelled is not here; everything else it hears waits in `heard` for the test."""

    def __init__(self, name: str, role: str, model: ModelIdentity | None) -> None:
        self.member = Member(
            id=WorkerId(name),
            role=role,
            incarnation=Incarnation(secrets.randbits(64)),
            endpoint="",
            host="h",
            pid=1,
            model=model,
        )
        self.peer = peer_id(self.member.id, self.member.incarnation)
        self._exchange = Exchange(self.peer, "tcp://127.0.0.1:0")
        self.member = msgspec.structs.replace(self.member, endpoint=self._exchange.endpoint)
        self.heard: queue.Queue[tuple[PeerId, AnyMessage]] = queue.Queue()
        self.pinged = threading.Event()
        self.silent = False
        """True: plays dead."""
        self.draining = False
        self.gauges = {"oldest_pin_ms": 12.5}
        self.on_generate: Callable[[PeerId, Generate], None] | None = None
        """Runs in this worker's thread instead of putting the message into `heard`."""
        self.on_resize: Callable[[PeerId, Resize], None] | None = None
        """As `on_generate`."""
        self.on_drain: Callable[[Drain], object] = lambda message: None
        self._told: set[RequestId] = set()
        self._over: set[RequestId] = set()
        self._outbox: deque[tuple[PeerId, Message]] = deque()
        self._stopping = False
        self._membership: Membership | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def join(self, url: str, cluster: str) -> "FakeWorker":
        """Enter the membership."""
        self._membership = Membership(url, cluster, self.member, lambda members: None)
        self._membership.join()
        return self

    def say(self, to: PeerId, message: Message) -> None:
        """Send; any thread."""
        self._outbox.append((to, message))
        self._exchange.wake()

    def hear(self, kind: type[M]) -> tuple[PeerId, M]:
        """The next message, which must be of this kind."""
        sender, message = self.heard.get(timeout=PATIENCE_S)
        assert isinstance(message, kind), message
        if isinstance(message, Cancel):
            self._told.add(message.request)
        return sender, message

    def forget(self) -> None:
        """What was heard and not taken is gone, and requests that were cancelled are not here any more."""
        while not self.heard.empty():
            _, message = self.heard.get_nowait()
            if isinstance(message, Cancel):
                self._told.add(message.request)
        self._over, self._told = self._over | self._told, set()

    def stop(self) -> None:
        """Leave the membership, end the thread and close the sockets."""
        if self._membership is not None:
            self._membership.stop()
        self._stopping = True
        if self._thread.is_alive():
            self._exchange.wake()
            self._thread.join(timeout=PATIENCE_S)

    def _run(self) -> None:
        while not self._stopping:
            while self._outbox:
                self._exchange.send(*self._outbox.popleft())
            for sender, message, _ in self._exchange.receive(100):
                self._take(sender, message)
        self._exchange.close()

    def _take(self, sender: PeerId, message: AnyMessage) -> None:
        if isinstance(message, Generate):
            self._over.discard(message.request)
        match message:
            case Hello() if not self.silent:
                self._exchange.send(sender, Welcome(member=self.member))
            case Ping(sequence=sequence) if not self.silent:
                self._exchange.send(sender, self._report(sequence))
                self.pinged.set()
            case Generate() if self.on_generate is not None:
                self.on_generate(sender, message)
            case Resize() if self.on_resize is not None:
                self.on_resize(sender, message)
            case Cancel(request=request) if request in self._over:
                pass  # said again to an earlier test
            case AskAbout(requests=requests) if not self.silent:
                for one in requests:
                    answer = NotHere if one in self._over else StillHere
                    self._exchange.send(sender, answer(requests=(one,)))
            case Generate() | Cancel() | Resize():
                self.heard.put((sender, message))
            case Drain(on=on):
                self.draining = on
                self.on_drain(message)

    def _report(self, sequence: int) -> Report:
        return Report(
            worker=self.member.id,
            role=self.member.role,
            incarnation=self.member.incarnation,
            sequence=sequence,
            pages=PageCounts(total=100, free=90, active=10),
            queue=QueueCounts(),
            counters={"generated_tokens_total": 7.0, "hit_tokens_total{tier=host}": 64.0},
            gauges=self.gauges,
            memory=MEMORY,
            draining=self.draining,
        )


def tokens(
    request: RequestId,
    position: int,
    new: tuple[int, ...],
    finish: str | None = None,
    logprobs: tuple[TokenLogprob, ...] = (),
) -> Tokens:
    """One step's message about one request."""
    first = position == 0
    delta = TokenDelta(
        request=request,
        position=position,
        tokens=new,
        finish=finish,
        logprobs=logprobs,
        cached_tokens=3 if first else None,
        timings=Timings(compute_ms=1.0) if first else None,
    )
    return Tokens(deltas=(delta,))
