"""The pure world with links that keep order and lose nothing, and a gateway that asks and remembers what it was answered.

The end of a process is noticed at once. A real gateway core, and links that fail: tests.support.world_faults.
"""

import random
from collections import deque
from dataclasses import dataclass, field

import msgspec

from common.ids import Incarnation, PeerId, RequestId, WorkerId
from common.messages.liveness import Hello, Member, Ping, TransportReport
from common.messages.requests import Cancel, Failed, Generate, Sampling, TokenDelta, Tokens
from common.messages.resizing import Resize, ResizeAnswer
from tests.support.world_cluster import Cluster, Link
from tests.support.world_copies import Copies
from tests.support.world_memory import Page
from tests.support.world_process import Process

GATEWAY = PeerId("gateway@1")
SILENT_MS = 3_000.0


@dataclass
class Answer:
    """What the gateway saw of one request."""

    prompt: list[int]
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    """Beginning with what was emitted before."""
    finish: str | None = None
    failed: Failed | None = None
    cancelled: bool = False
    deltas: list[TokenDelta] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.cancelled or self.finish is not None or self.failed is not None


class World(Cluster):
    """Owns what was asked and answered. Everything in `links` is (message, payloads)."""

    def __init__(self, rng: random.Random, **settings: object) -> None:
        """`settings`: of a Cluster."""
        super().__init__(rng, **settings)  # type: ignore[arg-type]  # a test's keywords
        self.copies = Copies(self)
        self.lost: list[tuple[PeerId, object]] = []
        self.resized: list[ResizeAnswer] = []
        self.answers: dict[RequestId, Answer] = {}
        self.start_all()

    # -- lives

    def tell_members(self) -> None:
        for process in self.processes.values():
            if process.alive:
                self.perform(process, process.core.on_members(self.members, self.now_ms, self.now_ms))

    def kill(self, name: str) -> None:
        """kill -9, seen at once by the kernel's end-of-file on the other side; messages on the way are lost."""
        victim = self.processes[name]
        victim.alive = False
        for answer in self.answers.values():  # the gateway notices by silence
            if not answer.done:
                answer.failed = Failed(request=RequestId(""), code="peer_failed", phase="?", text="", retryable=True)
        self.bury(victim.peer)
        for request in self.answers:
            self.cancel(request)
        if self.store is not None:
            self.store.core.on_peer_dead(victim.peer)

    def kill_store(self) -> None:
        """The same for the KV store. Its memory stays as long as somebody maps it, but nobody will."""
        assert self.store is not None
        peer, self.store = self.store.peer, None
        self.bury(peer)

    def bury(self, peer: PeerId) -> None:
        for link in [link for link in self.links if peer in link]:
            del self.links[link]
        for process in self.processes.values():
            if process.alive:
                process.break_moves(peer)
                self.perform(process, process.core.on_peer_dead(peer, self.now_ms))

    # -- the gateway

    def send(
        self,
        name: str,
        prompt: list[int],
        max_tokens: int,
        *,
        timeout_ms: int = 10**6,
        stop_token_ids: tuple[int, ...] = (),
        cache_salt: str = "",
        to: str = "prefill",
        **more: object,
    ) -> None:
        """`to`: a decode or mixed worker answers by itself. `more`: fields of Generate."""
        sampling = Sampling(max_tokens=max_tokens, stop_token_ids=stop_token_ids)
        message = self.generate(name, prompt, sampling, timeout_ms=timeout_ms)
        decode = message.decode if to.startswith("prefill") else None
        message = msgspec.structs.replace(message, cache_salt=cache_salt, decode=decode, **more)
        self.answers[message.request].tokens += message.emitted
        self.post(GATEWAY, self.processes[to].peer, message)

    def generate(
        self, name: str, prompt: list[int], sampling: Sampling, *, decode: str = "decode-0", timeout_ms: int = 10**6
    ) -> Generate:
        request = RequestId(name)
        self.answers[request] = Answer(prompt, sampling.max_tokens)
        return Generate(
            request=request, prompt=tuple(prompt), sampling=sampling, timeout_ms=timeout_ms, decode=WorkerId(decode)
        )

    def resize(self, name: str, n_pages: int, *, call: int = 0) -> None:
        """An operator's word; answers are in `resized`."""
        message = Resize(call=call, device_memory_bytes=n_pages * self.layout.page_bytes)
        self.post(GATEWAY, self.processes[name].peer, message)

    def cancel(self, request: RequestId) -> None:
        self.answers[request].cancelled = True
        for process in self.processes.values():
            self.post(GATEWAY, process.peer, Cancel(request=request))

    def hear(self, message: object) -> None:
        match message:
            case Tokens(deltas=deltas):
                for delta in deltas:
                    answer = self.answers[delta.request]
                    assert answer.done or delta.position == len(answer.tokens)
                    answer.deltas.append(delta)
                    answer.tokens += delta.tokens
                    answer.finish = delta.finish
            case ResizeAnswer():
                self.resized.append(message)
            case Failed(request=request):
                if not self.answers[request].done:
                    self.answers[request].failed = message

    # -- links

    def post(self, source: PeerId, target: PeerId, message: object, payloads: list[list[Page]] | None = None) -> None:
        self.links.setdefault((source, target), deque()).append((message, payloads or []))

    def unheard(self, peer: PeerId) -> list[object]:
        """Messages to somebody who is not there."""
        return [message for target, message in self.lost if target == peer]

    def carry(self, link: Link) -> None:
        message, payloads = self.links[link].popleft()
        source, target = link
        if target == GATEWAY:
            self.hear(message)
            return
        if self.store is not None and target == self.store.peer:
            for answer, frames in self.store.hear(source, message, payloads, self.now_ms):
                self.post(target, source, answer, frames)
            return
        process = self.process(target)
        if process is None:
            self.lost.append((target, message))
        else:
            self.perform(process, process.core.on_message(source, message, self.now_ms), payloads)

    def open_channel(self, process: Process, peer: PeerId) -> None:
        if self.transport == "shm":
            self._join(process.peer, peer)
        report = TransportReport(peer=peer, kind=self.transport, gib_per_s=1.0)
        self.perform(process, process.core.on_channel(report, self.now_ms))

    def _join(self, guest: PeerId, host: PeerId) -> None:
        """The guest maps the host's memory."""
        if self.store is not None and host == self.store.peer:
            self.store.core.on_peer_joined(guest, self.now_ms)
        for process in self.processes.values():
            if process.alive and process.peer == host:
                self.perform(process, process.core.on_peer_joined(guest))

    # -- time

    def pass_time(self, ms: float) -> None:
        """Everybody pings and ticks."""
        self.now_ms += ms
        if self.store is not None:
            self.store.core.on_tick(self.now_ms)
        for process in self.processes.values():
            if process.alive:
                self.post(GATEWAY, process.peer, Ping(sequence=1))
                self.perform(process, process.core.on_tick(self.now_ms))

    def settle(self) -> None:
        """Run until nothing is in flight and everybody is idle."""
        for _ in range(400):
            while self.turn():
                pass
            if all(p.core.idle for p in self.processes.values() if p.alive):
                return
            self.pass_time(400.0)
        raise AssertionError(f"never idle: {self.answers}")

    def greet(self) -> None:
        """The gateway's Hello, and time for the cores to find each other."""
        mine = Member(id=WorkerId("gateway"), role="gateway", incarnation=Incarnation(1), endpoint="", host="", pid=1)
        for process in self.processes.values():
            self.post(GATEWAY, process.peer, Hello(member=mine))
        self.pass_time(1.0)
        while self.turn():
            pass
