"""The gateway's cores as one: what its shell tells them, and what they want done."""

from collections.abc import Collection, Sequence

from common.ids import PeerId, RequestId, WorkerId
from common.messages import AnyMessage
from common.messages.actions import HangUp
from common.messages.base import Message
from common.messages.liveness import Member
from common.messages.requests import Failed, NotHere, StillHere, Tokens
from common.messages.resizing import ResizeAnswer
from common.policy.routing import reason_not_ready
from gateway.core.actions import Action, Begun, Resized
from gateway.core.inflight import Inflight, Parts
from gateway.core.lost_workers import LostWorker, LostWorkers
from gateway.core.order import Order
from gateway.core.roster import RosterStep, WorkerState
from gateway.core.terms import Terms
from gateway.core.watchdog import RequestWatch, StuckRequest, request_fields, worker_fields

_MOST_LISTED = 64  # of one dump; the log line must stay readable


class Dispatch:
    """Passes news to the roster first and to the requests second, so that requests see workers as they are now."""

    def __init__(self, parts: Parts, terms: Terms, *, fallback: bool = True) -> None:
        """`fallback`: whether decode workers alone are enough to serve, as in Router."""
        self._roster, self._totals, self._fallback = parts.roster, parts.totals, fallback
        self._placement = parts.placement
        self._inflight = Inflight(parts, terms)
        self._watch = RequestWatch()
        self._lost = LostWorkers()

    @property
    def open_requests(self) -> int:
        """Requests without an answer yet."""
        return len(self._inflight)

    @property
    def waiting_requests(self) -> int:
        """Requests that wait for a place in this gateway."""
        return self._inflight.n_waiting

    @property
    def repeated_tokens_total(self) -> int:
        """Tokens that came twice and were dropped."""
        return self._inflight.repeated_tokens_total

    def counters(self) -> dict[str, float]:
        """What became of routing decisions."""
        return self._totals.counters()

    def submit(self, orders: Sequence[Order], now_ms: float) -> list[Action]:
        """Start the prompts of one HTTP request, or let them wait. Raises what Inflight.submit does, and then holds none."""
        return self._inflight.submit(orders, now_ms)

    def begun(self, wire: RequestId) -> Begun | None:
        """The attempt of that name on the wire, if it goes on."""
        return self._inflight.begun(wire)

    def phase_of(self, request: RequestId) -> str:
        """Where a request is, for the error that ends it from outside."""
        return self._inflight.phase_of(request)

    def cancel(self, request: RequestId, now_ms: float) -> list[Action]:
        """End a request whose client is gone or has enough; unknown ones are ignored."""
        return self._inflight.cancel(request, now_ms)

    def drain(self, worker: WorkerId, *, on: bool) -> list[Action]:
        """An operator wants a worker to take nothing new, or to work again. Raises UnknownWorker."""
        return self._roster.drain(worker, on=on)

    def peer_of(self, worker: WorkerId) -> PeerId:
        """Whom `resize` tells. Raises UnknownWorker, NoWorker."""
        return self._roster.peer_of(worker)

    def resize(self, worker: WorkerId, device_memory_bytes: int, call: int) -> list[Action]:
        """An operator wants a worker to have so much page memory. Raises UnknownWorker, NoWorker."""
        return self._roster.resize(worker, device_memory_bytes, call)

    def on_members(self, members: Sequence[Member], now_ms: float) -> list[Action]:
        """The membership was read."""
        return self._settle(self._roster.on_members(members, now_ms), now_ms)

    def on_message(self, sender: PeerId, message: AnyMessage, now_ms: float) -> list[Action]:
        """A worker spoke. Messages that no worker should send to a gateway are only a sign of life."""
        actions = self._roster.on_message(sender, message, now_ms)
        if isinstance(message, Tokens | Failed | StillHere | NotHere):
            actions += self._inflight.on_message(sender, message, now_ms)
        if isinstance(message, ResizeAnswer):
            actions.append(Resized(sender, message))
        return actions

    def on_unsent(self, peer: PeerId, message: Message, now_ms: float) -> list[Action]:
        """A message could not be queued."""
        return self._inflight.on_unsent(peer, message, now_ms)

    def on_tick(self, now_ms: float) -> list[Action]:
        """Time passed: Pings, deaths, retries, deadlines."""
        return self._settle(self._roster.on_tick(now_ms), now_ms) + self._inflight.on_tick(now_ms)

    def _settle(self, step: RosterStep, now_ms: float) -> list[Action]:
        actions = step.actions
        for action in actions:
            if isinstance(action, HangUp):
                self._placement.forget(action.peer)
        for lost in step.lost:
            actions += self._inflight.on_lost(lost, now_ms)
            if not lost.drained:
                self._totals.add(f"workers_lost_total{{role={lost.member.role}}}")
                self._lost.add(lost.member, lost.text, now_ms)
        return actions

    def stuck(self, waiting: Collection[RequestId], now_ms: float) -> list[StuckRequest]:
        """Requests that no rule will ever end, our own bug: to be answered and cancelled. `waiting`: whose clients wait."""
        found = self._watch.look(waiting, self._inflight, now_ms)
        for _ in found:
            self._totals.add("watchdog_fired_total")
        return found

    def state(self, now_ms: float) -> dict[str, object]:
        """What every request waits for, and how the workers are; JSON."""
        oldest = sorted(self._inflight, key=lambda one: one.arrived_ms)[:_MOST_LISTED]
        return {
            "open_requests": len(self._inflight),
            "waiting_requests": self._inflight.n_waiting,
            "unanswered_cancels": self._inflight.n_unanswered_cancels,
            "requests": [request_fields(one, now_ms) for one in oldest],
            "workers": [worker_fields(one) for one in self._roster.states(now_ms)],
        }

    def not_ready_reason(self, now_ms: float) -> str | None:
        """Why no request can be served now; None if one can."""
        return reason_not_ready(self._roster.views(now_ms), fallback=self._fallback)

    def context_tokens(self, now_ms: float) -> int | None:
        """What every ready worker can take, prompt plus answer; None if nobody is ready."""
        return self._roster.context_tokens(now_ms)

    def members(self) -> list[Member]:
        """Whose caches count: everybody who is listed, or was lately and still answers."""
        return self._roster.members()

    def workers(self, now_ms: float) -> list[WorkerState]:
        """Everybody known, by id."""
        return self._roster.states(now_ms)

    def lost(self, now_ms: float) -> list[LostWorker]:
        """Who was lost lately without having been drained, and is not back."""
        states = self._roster.states(now_ms)
        return self._lost.missing({one.member.id for one in states if one.condition != "connecting"}, now_ms)

    def check(self) -> None:
        """Workers and keys are charged with just what is in flight, always. Raises AssertionError with the tables."""
        self._inflight.check()
