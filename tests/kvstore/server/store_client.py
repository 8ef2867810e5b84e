"""Speaks to a KV store as workers do, one call after the other, each with its answer."""

from collections.abc import Sequence
from typing import TypeVar

from common.clock import Clock
from common.errors import PeerFailed
from common.ids import PeerId
from common.messages.base import Message
from common.messages.blocks import BlockName, Find, Found, Publish, Put, Release, Reserve, Reserved, Stored
from common.messages.liveness import Hello, Member, Ping, Refused, Report, Welcome
from common.net.sockets import Exchange, Payload
from kvstore.transport.pages import rows_of
from kvstore.transport.shared_pages import SharedPages

_PUT_BATCH_BYTES = 16 * 2**20
_LEASE_MS = 10_000
A = TypeVar("A", Welcome, Stored, Reserved, Found, Report)
Block = tuple[BlockName, Payload]


class KvStoreClient:
    """Calls to one store from the thread that owns `exchange`, which nobody else speaks to.

    Every call raises PeerFailed if the store does not answer in time, is gone or refuses.
    """

    def __init__(self, exchange: Exchange, store: PeerId, clock: Clock, timeout_ms: float) -> None:
        self._exchange, self._store, self._clock, self._timeout_ms = exchange, store, clock, timeout_ms
        self._calls = 0

    def connect(self, mine: Member, endpoint: str) -> Member:
        """Dial and introduce this process; returns the store's own record."""
        self._exchange.dial(self._store, endpoint)
        welcome, _ = self._ask(Hello(member=mine), (), Welcome, None)
        return welcome.member

    def close(self) -> None:
        """Hang up."""
        self._exchange.hang_up(self._store)

    # -- over the socket

    def put(self, blocks: Sequence[Block]) -> int:
        """Keep these blocks, in the order of their chain; returns how many the store holds now.

        Long puts travel in batches, the end of the chain first: what the store must evict is then the end.
        """
        held = 0
        for batch in reversed(_batches(blocks)):
            call = self._next_call()
            put = Put(call=call, blocks=tuple(name for name, _ in batch))
            stored, _ = self._ask(put, [frame for _, frame in batch], Stored, call)
            if stored.text:
                raise PeerFailed(f"KV store {self._store} refused {len(batch)} blocks: {stored.text}")
            held += stored.n_blocks
        return held

    def fetch(self, blocks: Sequence[bytes]) -> list[Payload]:
        """Bytes of the leading run of these blocks that the store holds, in order; empty if it lacks the first."""
        payloads: list[Payload] = []
        more = bool(blocks)
        while more:
            call = self._next_call()
            find = Find(call=call, blocks=tuple(blocks[len(payloads) :]), lease_ms=0, payloads=True)
            found, frames = self._ask(find, (), Found, call)
            if found.n_blocks != len(frames):
                raise PeerFailed(f"KV store {self._store} announced {found.n_blocks} blocks and sent {len(frames)}")
            payloads += frames
            more = found.more
        return payloads

    # -- by shared memory

    def put_shared(self, shared: SharedPages, blocks: Sequence[Block]) -> int:
        """As `put`, but the bytes are copied into the store's memory by this process."""
        call = self._next_call()
        try:
            reserved, _ = self._ask(Reserve(call=call, blocks=tuple(name for name, _ in blocks)), (), Reserved, call)
            if len(reserved.pages) != len(blocks):
                raise PeerFailed(
                    f"KV store {self._store} answered {len(reserved.pages)} places for {len(blocks)} blocks"
                )
            for pages, (_, payload) in zip(reserved.pages, blocks, strict=True):
                if pages:
                    shared.write(pages, rows_of(payload, shared.description.page_bytes), range(len(pages)))
        except BaseException:
            self._exchange.send(self._store, Publish(call=call, ok=False))  # nothing is being written any more
            raise
        if not any(reserved.pages):
            if reserved.text:
                raise PeerFailed(f"KV store {self._store} took none of {len(blocks)} blocks: {reserved.text}")
            return len(blocks)
        stored, _ = self._ask(Publish(call=call, ok=True), (), Stored, call)
        return stored.n_blocks

    def fetch_shared(self, shared: SharedPages, blocks: Sequence[bytes], lease_ms: int = _LEASE_MS) -> list[Payload]:
        """As `fetch`, but copied out of the store's memory by this process. Raises PeerFailed if the lease was too short."""
        call, sent_ms = self._next_call(), self._clock.now_ms()
        try:
            found, _ = self._ask(Find(call=call, blocks=tuple(blocks), lease_ms=lease_ms), (), Found, call)
            payloads: list[Payload] = [shared.read(pages).tobytes() for pages in found.pages]
            elapsed_ms = self._clock.now_ms() - sent_ms
        finally:
            self._exchange.send(self._store, Release(call=call))
        if payloads and elapsed_ms >= found.lease_ms:
            raise PeerFailed(
                f"reading {len(payloads)} blocks took {elapsed_ms:g} ms, the lease was {found.lease_ms} ms"
            )
        return payloads

    def report(self) -> Report:
        """State of the store now."""
        call = self._next_call()
        return self._ask(Ping(sequence=call), (), Report, call)[0]

    def _next_call(self) -> int:
        self._calls += 1
        return self._calls

    def _ask(
        self, message: Message, payloads: Sequence[Payload], kind: type[A], call: int | None
    ) -> tuple[A, list[Payload]]:
        """Send, and wait for the answer of `kind` to `call` (None: to a Hello)."""
        asked = type(message).__name__
        if not self._exchange.send(self._store, message, payloads):
            raise PeerFailed(f"cannot send {asked} to KV store {self._store}: not connected, or its queue is full")
        deadline_ms = self._clock.now_ms() + self._timeout_ms
        while (wait_ms := deadline_ms - self._clock.now_ms()) > 0:
            answers: list[tuple[A, list[Payload]]] = []
            refusal = ""
            for _, answer, frames in self._exchange.receive(wait_ms):
                if isinstance(answer, Refused):
                    refusal = answer.text
                elif isinstance(answer, kind) and _call_of(answer) == call:
                    answers.append((answer, frames))  # anything else is a late answer to a call that was given up
            if refusal:
                raise PeerFailed(f"KV store {self._store} refused this process: {refusal}")
            if answers:
                return answers[0]
        raise PeerFailed(f"KV store {self._store} did not answer {asked} within {self._timeout_ms:g} ms")


def _call_of(answer: Welcome | Stored | Reserved | Found | Report) -> int | None:
    match answer:
        case Stored(call=call) | Reserved(call=call) | Found(call=call) | Report(sequence=call):
            return call
        case Welcome():
            return None


def _batches(blocks: Sequence[Block]) -> list[list[Block]]:
    """Runs of at most _PUT_BATCH_BYTES, and never empty ones."""
    batches: list[list[Block]] = []
    room_bytes = 0
    for block in blocks:
        if not batches or len(block[1]) > room_bytes:
            batches.append([])
            room_bytes = _PUT_BATCH_BYTES
        batches[-1].append(block)
        room_bytes -= len(block[1])
    return batches
