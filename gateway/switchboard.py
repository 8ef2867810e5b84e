"""The gateway's shell: performs what the cores decide, on the event loop's thread.

Owns the Exchange (its sockets are watched by the event loop itself, so that a token costs no thread switch) and the
table that leads from a request to its inbox.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from common.clock import Clock
from common.errors import DeadlineExceeded, PeerFailed, ProtocolViolation, Stuck
from common.ids import PeerId, RequestId, WorkerId
from common.log import Log
from common.messages.actions import Dial, HangUp, Send
from common.messages.liveness import Member
from common.messages.requests import Generate
from common.messages.resizing import Resize, ResizeAnswer
from common.net.sockets import Exchange
from common.net.violations import Violations
from gateway.core.actions import Action, Deliver, End, Note, Resized, Routed
from gateway.core.dispatch import Dispatch
from gateway.core.lost_workers import LostWorker
from gateway.core.order import Order
from gateway.core.roster import WorkerState
from gateway.inbox import Inbox, News, Sent
from gateway.resizes import Resizes

_TICK_S = 0.05  # no retry waits much longer than its backoff
_WATCH_MS = 1_000.0
_RESIZE_S = 30.0  # gigabytes of host memory are cleared in that time


class Switchboard:
    """Started and stopped on the event loop; everything but `on_members` is called there too."""

    def __init__(
        self,
        dispatch: Dispatch,
        exchange: Exchange,
        clock: Clock,
        log: Log,
        on_holders: Callable[[list[Member]], None],
    ) -> None:
        """`on_holders`: told whose caches count, whenever that may have changed."""
        self._dispatch, self._exchange, self._clock, self._log = dispatch, exchange, clock, log
        self._on_holders, self._unsent = on_holders, Violations("send_refused", log)
        self._inboxes: dict[RequestId, tuple[Inbox, int]] = {}
        self._fds: dict[PeerId, int] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tick_timer: asyncio.TimerHandle | None = None
        self._draining = False
        self._resizes = Resizes()
        self._watched_ms = 0.0

    def start(self) -> None:
        """Begin to tick. Call on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._tick()

    def end_all(self, text: str) -> None:
        """The time to finish is over: everybody who still waits is told."""
        for request, (inbox, index) in list(self._inboxes.items()):
            phase = self._dispatch.phase_of(request)
            self.cancel(request)
            inbox.put(index, PeerFailed(text).in_phase(phase))

    def stop(self) -> None:
        """Cancel what is still open and close all connections."""
        for request in list(self._inboxes):
            self.cancel(request)
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        for peer in list(self._fds):
            self._hang_up(peer)
        self._loop = None
        self._exchange.close()

    def on_members(self, members: list[Member]) -> None:
        """The membership was read. Any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._take_members, members)

    def _take_members(self, members: list[Member]) -> None:
        if self._loop is not None:
            self._perform(self._dispatch.on_members(members, self._clock.now_ms()))
            self._on_holders(self._dispatch.members())

    def submit(self, orders: Sequence[Order]) -> Inbox:
        """Start all prompts of one HTTP request, or none. Raises Busy, RateLimited, NoWorker or InvalidRequest."""
        inbox = Inbox()
        actions = self._dispatch.submit(orders, self._clock.now_ms())
        for index, order in enumerate(orders):
            self._inboxes[order.request] = (inbox, index)
        self._perform(actions)
        return inbox

    def cancel(self, request: RequestId) -> None:
        """Nobody wants this answer any more; unknown requests are ignored."""
        if self._inboxes.pop(request, None) is not None:
            self._perform(self._dispatch.cancel(request, self._clock.now_ms()))

    def drain(self, worker: WorkerId, *, on: bool) -> None:
        """An operator's order to a worker. Raises UnknownWorker."""
        self._perform(self._dispatch.drain(worker, on=on))

    async def resize(self, worker: WorkerId, device_memory_bytes: int) -> ResizeAnswer:
        """An operator's order to a worker, and what it says. Raises UnknownWorker, NoWorker, PeerFailed, DeadlineExceeded."""
        call, answer = self._resizes.begin(self._dispatch.peer_of(worker))
        self._perform(self._dispatch.resize(worker, device_memory_bytes, call))
        try:
            return await asyncio.wait_for(answer, _RESIZE_S)
        except TimeoutError:
            raise DeadlineExceeded(f"{worker} is still at it after {_RESIZE_S:g} s; /status shows how far") from None

    def _tick(self) -> None:
        if self._loop is None:
            return
        self._tick_timer = self._loop.call_later(_TICK_S, self._tick)
        self._drain()  # what has arrived already must not look like silence
        now_ms = self._clock.now_ms()
        self._perform(self._dispatch.on_tick(now_ms))
        if now_ms - self._watched_ms >= _WATCH_MS:
            self._watched_ms = now_ms
            self._end_stuck(now_ms)

    def _end_stuck(self, now_ms: float) -> None:
        """Answer whoever would wait for ever. That there is anybody is our own bug, so the log gets all that is known."""
        stuck = self._dispatch.stuck(self._inboxes, now_ms)
        if stuck:
            told = {one.request: one.text for one in stuck}
            self._log.event("stuck", ends=told, **self._dispatch.state(now_ms))
        for one in stuck:
            inbox, index = self._inboxes[one.request]
            self.cancel(one.request)
            inbox.put(index, Stuck(f"the gateway lost track of the request: {one.text}"))

    def write_state(self) -> None:
        """One log event with what every request waits for, for whoever asked."""
        self._log.event("state", **self._dispatch.state(self._clock.now_ms()))

    def _drain_soon(self) -> None:
        if not self._draining and self._loop is not None:
            self._draining = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._draining = False
        if self._loop is None:
            return
        received = self._exchange.receive(0)
        if not received:
            return
        now_ms = self._clock.now_ms()
        for sender, message, _ in received:
            self._perform(self._dispatch.on_message(sender, message, now_ms))
        self._drain_soon()  # until nothing is left, with other work of the loop in between

    def _perform(self, actions: Sequence[Action]) -> None:
        """All of them, and then what follows from those that could not be sent: one after the other, never nested."""
        waiting = deque(actions)
        while waiting:
            action = waiting.popleft()
            match action:
                case Deliver(request, delta):
                    self._tell(request, delta, last=delta.finish is not None)
                case Send(peer, message):
                    sent_ms = self._clock.now_ms()  # before: whoever gets it may begin while this loop has no processor
                    if self._exchange.send(peer, message):
                        self._drain_soon()  # sending may swallow the socket's signal that something arrived
                        if isinstance(message, Generate):
                            self._tell_sent(message.request, sent_ms)
                    else:
                        self._unsent.note(peer, type(message).__name__)
                        if isinstance(message, Resize):
                            self._resizes.lost(peer)
                        waiting.extend(self._dispatch.on_unsent(peer, message, self._clock.now_ms()))
                case Routed(request):
                    self._tell(request, action, last=False)
                case End(request, error):
                    self._log.event(
                        "request_failed", request=request, code=error.code, phase=error.phase, text=str(error)
                    )
                    self._tell(request, error, last=True)
                case Dial(peer, endpoint):
                    self._dial(peer, endpoint)
                case HangUp(peer):
                    self._hang_up(peer)
                case Resized(worker, answer):
                    self._resizes.answered(worker, answer)
                case Note(event, worker, text):
                    self._log.event(event, worker=worker, text=text)

    def _tell_sent(self, wire: RequestId, sent_ms: float) -> None:
        if (begun := self._dispatch.begun(wire)) is not None:
            self._tell(begun.request, Sent(begun, sent_ms), last=False)

    def _tell(self, request: RequestId, news: News, *, last: bool) -> None:
        """Nobody may be there any more: the request can have ended between a decision and its turn here."""
        entry = self._inboxes.pop(request, None) if last else self._inboxes.get(request)
        if entry is not None:
            entry[0].put(entry[1], news)

    def _dial(self, peer: PeerId, endpoint: str) -> None:
        if self._loop is None:
            return
        try:
            self._exchange.dial(peer, endpoint)
        except ProtocolViolation as error:  # its silence will end it
            self._log.event("worker_address_refused", worker=peer, text=str(error))
            return
        self._fds[peer] = self._exchange.dialled_fd(peer)
        self._loop.add_reader(self._fds[peer], self._drain_soon)

    def _hang_up(self, peer: PeerId) -> None:
        fd = self._fds.pop(peer, None)
        if fd is not None and self._loop is not None:
            self._loop.remove_reader(fd)  # before the socket closes it
        self._exchange.hang_up(peer)
        self._resizes.lost(peer)
        self._on_holders(self._dispatch.members())

    @property
    def open_requests(self) -> int:
        """Prompts without an answer yet."""
        return self._dispatch.open_requests

    @property
    def waiting_requests(self) -> int:
        """Those of them that wait for a place in this gateway."""
        return self._dispatch.waiting_requests

    def counters(self) -> dict[str, float]:
        """What became of routing decisions."""
        return {
            **self._dispatch.counters(),
            **self._exchange.counters(),
            "send_refused_total": float(self._unsent.total),
        }

    def gauges(self) -> dict[str, float]:
        """Present values of the exchange, by series."""
        return self._exchange.gauges()

    @property
    def repeated_tokens_total(self) -> int:
        """Tokens that came twice and were dropped."""
        return self._dispatch.repeated_tokens_total

    def not_ready_reason(self) -> str | None:
        """Why no request can be served now; None if one can."""
        return self._dispatch.not_ready_reason(self._clock.now_ms())

    def context_tokens(self) -> int | None:
        """What every ready worker can take, prompt plus answer; None if nobody is ready."""
        return self._dispatch.context_tokens(self._clock.now_ms())

    def workers(self) -> list[WorkerState]:
        """Everybody known, by id."""
        return self._dispatch.workers(self._clock.now_ms())

    def lost(self) -> list[tuple[LostWorker, float]]:
        """Who was lost lately and is not back, each with the milliseconds since then."""
        now_ms = self._clock.now_ms()
        return [(one, now_ms - one.lost_ms) for one in self._dispatch.lost(now_ms)]

    def check(self) -> None:
        """Conservation laws. Raises AssertionError."""
        self._dispatch.check()
        assert self.open_requests == len(self._inboxes), (self.open_requests, len(self._inboxes))
