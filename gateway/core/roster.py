"""The workers that one gateway knows, without sockets or clocks.

Owns `_workers`: the current life of every worker in the membership. An entry comes with the membership and leaves in one
of three ways: the worker falls silent, a newer incarnation takes its name, or it stays refused and leaves the
membership. Being in the membership makes a worker known; only its answers to Ping keep it alive, because Redis is advice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from common.cost.step_cost import UNKNOWN_COST
from common.errors import NoWorker, UnknownWorker
from common.ids import PeerId, RequestId, WorkerId, peer_id
from common.messages import AnyMessage
from common.messages.actions import Dial, HangUp, Send
from common.messages.liveness import Drain, Hello, Member, ModelIdentity, Ping, Refused, Report, Welcome
from common.messages.resizing import Resize
from common.policy.estimates import WorkerView
from common.policy.routing import reason_not_ready
from common.units import format_bytes
from gateway.core.actions import Action, Note
from gateway.core.breaker import Breaker, BreakerState, BreakerTerms
from gateway.core.known_worker import KnownWorker, usual_cost

COMPUTING_ROLES = frozenset({"prefill", "decode", "mixed"})
DIALLED_ROLES = COMPUTING_ROLES | {"kvstore"}
PING_EVERY_MS = 500.0
_OVERSLEPT_MS = 2 * PING_EVERY_MS  # a tick so late means that this process was stopped, not that workers are silent


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One worker, for /status and /metrics."""

    member: Member
    condition: str
    """connecting, ready, draining, leaving, misfit or refused."""
    text: str
    """Why it is not ready; empty if it is."""
    alive_ms: float
    """Since its last message."""
    report: Report | None
    charged_requests: int
    """Of this gateway."""
    breaker: BreakerState = BreakerState.CLOSED
    breaker_opened_total: int = 0


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker's life is over; `text` continues the sentence 'worker x ...'."""

    peer: PeerId
    text: str
    member: Member
    drained: bool
    """It took nothing new any more: it was told to end."""


@dataclass(slots=True)
class RosterStep:
    """What one call to the roster leads to."""

    actions: list[Action] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)


class Roster:
    """Decides; never performs."""

    def __init__(
        self,
        *,
        this: Member,
        silent_ms: float,
        fit: "Fit",
        breaker: BreakerTerms | None = None,
        fallback: bool = True,
    ) -> None:
        """`this`: the gateway's own record, sent with every Hello. `silent_ms`: silence that counts as death.

        `fallback`: whether decode workers alone can serve, as in Router.
        """
        self._this, self._silent_ms, self._fit = this, silent_ms, fit
        self._breaker, self._fallback = breaker or BreakerTerms(), fallback
        self._ticked_ms: float | None = None
        self._workers: dict[WorkerId, KnownWorker] = {}
        self._by_peer: dict[PeerId, KnownWorker] = {}

    def on_members(self, members: Sequence[Member], now_ms: float) -> RosterStep:
        """The membership was read: dial who is new, replace who was restarted, remember who is missing."""
        step = RosterStep()
        listed = {member.id: member for member in members if member.role in DIALLED_ROLES}
        for worker in list(self._workers.values()):
            member = listed.get(worker.member.id)
            if member is None:
                worker.unlisted_ms = now_ms if worker.unlisted_ms is None else worker.unlisted_ms
                if worker.refusal:
                    self._drop(worker, step)
            elif member.incarnation != worker.member.incarnation:
                self._drop(worker, step, "was restarted")
            else:
                worker.unlisted_ms = None
        for member in listed.values():
            if member.id not in self._workers:
                self._dial(member, now_ms, step)
        return step

    def _dial(self, member: Member, now_ms: float, step: RosterStep) -> None:
        peer = peer_id(member.id, member.incarnation)
        worker = KnownWorker(
            member,
            peer,
            self._fit.misfit(member),
            heard_ms=now_ms,
            pinged_ms=now_ms,
            breaker=Breaker(self._breaker),
        )
        self._workers[member.id] = self._by_peer[peer] = worker
        step.actions += [Dial(peer, member.endpoint), Send(peer, Hello(member=self._this))]
        if worker.misfit:
            step.actions.append(Note("worker_misfit", member.id, worker.misfit))

    def _drop(self, worker: KnownWorker, step: RosterStep, lost: str | None = None) -> None:
        del self._workers[worker.member.id], self._by_peer[worker.peer]
        step.actions.append(HangUp(worker.peer))
        if len(worker.charges) or (lost is not None and worker.welcomed):
            text = lost or "refuses this gateway and has left"
            step.actions.append(Note("worker_lost", worker.member.id, text))
            step.lost.append(Lost(worker.peer, text, worker.member, worker.draining))

    def on_message(self, sender: PeerId, message: AnyMessage, now_ms: float) -> list[Action]:
        """Every message of a known worker is a sign of life; the roster's own ones are understood."""
        worker = self._by_peer.get(sender)
        if worker is None:
            return []
        worker.heard_ms = now_ms
        match message:
            case Welcome():
                worker.welcomed, worker.refusal = True, ""
                return [Note("worker_ready", worker.member.id, worker.member.role), self._ping(worker, now_ms)]
            case Refused(text=text):
                worker.welcomed, worker.refusal = False, text
                return [Note("worker_refused_us", worker.member.id, text)]
            case Report():
                worker.take_report(message, now_ms)
        return []

    def on_tick(self, now_ms: float) -> RosterStep:
        """Ping everybody in turn; give up on the silent."""
        step = RosterStep()
        slept_ms = 0.0 if self._ticked_ms is None else now_ms - self._ticked_ms
        self._ticked_ms = now_ms
        for worker in list(self._workers.values()):
            if slept_ms > _OVERSLEPT_MS:
                worker.heard_ms += slept_ms  # we did not ask, so nobody could answer
            silent_ms = now_ms - worker.heard_ms
            if silent_ms > self._silent_ms and not worker.refusal:
                self._drop(worker, step, f"died (silent for {silent_ms / 1000:.1f} s)")
            elif worker.welcomed and now_ms - worker.pinged_ms >= PING_EVERY_MS:
                if worker.drain_wish is not None:  # said again until a report shows it: a reset loses messages
                    step.actions.append(Send(worker.peer, Drain(on=worker.drain_wish)))
                step.actions.append(self._ping(worker, now_ms))
        return step

    def _ping(self, worker: KnownWorker, now_ms: float) -> Send:
        worker.pinged_ms = now_ms
        worker.sequence += 1
        return Send(worker.peer, Ping(sequence=worker.sequence))

    def knows(self, peer: PeerId) -> bool:
        """Whether this life of a worker is connected."""
        return peer in self._by_peer

    def drain(self, name: WorkerId, *, on: bool) -> list[Action]:
        """Tell a worker to take nothing new, or to take requests again; here it counts at once. Raises UnknownWorker."""
        worker = self._named(name)
        worker.drain_wish = on
        event = "drain_asked" if on else "resume_asked"
        return [Send(worker.peer, Drain(on=on)), Note(event, name, "by an operator")]

    def peer_of(self, name: WorkerId) -> PeerId:
        """Whom to give an order that is answered. Raises UnknownWorker; NoWorker while it is being connected."""
        worker = self._named(name)
        if not worker.welcomed:
            raise NoWorker(f"{name} cannot be told now: {worker.refusal or 'it has not answered yet'}")
        return worker.peer

    def resize(self, name: WorkerId, device_memory_bytes: int, call: int) -> list[Action]:
        """Tell a worker to have so much page memory; its answer repeats `call`. Raises as `peer_of`."""
        peer = self.peer_of(name)
        order = Resize(call=call, device_memory_bytes=device_memory_bytes)
        return [Send(peer, order), Note("resize_asked", name, f"to {format_bytes(device_memory_bytes)} by an operator")]

    def _named(self, name: WorkerId) -> KnownWorker:
        worker = self._workers.get(name)
        if worker is None or worker.member.role not in COMPUTING_ROLES:
            known = [w for w, one in self._workers.items() if one.member.role in COMPUTING_ROLES]
            raise UnknownWorker(f"no worker {name!r} is here; there are {', '.join(sorted(known)) or 'none'}")
        return worker

    # -- load and faults of workers

    def charge(self, peer: PeerId, request: RequestId, *, work_ms: float, tokens: int, now_ms: float) -> None:
        """Count a request that is sent there now. A worker that is gone takes its charges along."""
        if (worker := self._by_peer.get(peer)) is not None:
            worker.charges.add(request, sequence=worker.sequence, work_ms=work_ms, tokens=tokens)
            worker.breaker.on_sent(now_ms)

    def promise(self, peer: PeerId, request: RequestId, *, tokens: int, now_ms: float) -> None:
        """Count a request that another worker will hand over there; its reports show it some time after `arrived`."""
        if (worker := self._by_peer.get(peer)) is not None:
            worker.charges.add(request, sequence=None, work_ms=0.0, tokens=tokens)
            worker.breaker.on_sent(now_ms)

    def arrived(self, peer: PeerId, request: RequestId) -> None:
        """A promised request is there."""
        if (worker := self._by_peer.get(peer)) is not None:
            worker.charges.arrived(request, sequence=worker.sequence)

    def computed(self, peer: PeerId, request: RequestId) -> None:
        """The request's prompt is computed there."""
        if peer in self._by_peer:
            self._by_peer[peer].charges.computed(request)

    def release(self, peer: PeerId, request: RequestId) -> None:
        """The request has left the worker; once more changes nothing."""
        if peer in self._by_peer:
            self._by_peer[peer].charges.remove(request)

    def on_success(self, peer: PeerId) -> None:
        """A worker did its part of a request."""
        if peer in self._by_peer:
            self._by_peer[peer].breaker.on_success()

    def on_failure(self, peer: PeerId, now_ms: float) -> None:
        """A worker failed a request by its own fault."""
        if peer in self._by_peer:
            self._by_peer[peer].breaker.on_failure(now_ms)

    def charged(self) -> dict[WorkerId, int]:
        """Requests now charged to each worker; all zero when nothing is in flight."""
        return {name: len(worker.charges) for name, worker in self._workers.items()}

    def check(self, left_ms: Mapping[PeerId, Mapping[RequestId, float]]) -> None:
        """Every worker is charged with just these requests and the work left of each. Raises AssertionError."""
        assert left_ms.keys() <= self._by_peer.keys(), f"waits for the dead: {left_ms.keys() - self._by_peer.keys()}"
        for peer, worker in self._by_peer.items():
            worker.charges.check(left_ms.get(peer, {}))

    # -- state for others

    def views(self, now_ms: float) -> list[WorkerView]:
        """Everybody, as the routing policy sees them. Where those that are trusted cannot serve, all count."""
        ready = {w.peer for w in self._ready(now_ms)}
        trusted = {w.peer for w in self._workers.values() if w.peer in ready and w.is_trusted(now_ms)}
        views = self._views(trusted, ready, now_ms)
        if trusted != ready and reason_not_ready(views, fallback=self._fallback) is not None:
            views = self._views(ready, ready, now_ms)
        return views

    def _views(self, accepting: set[PeerId], ready: set[PeerId], now_ms: float) -> list[WorkerView]:
        workers = self._workers.values()
        stores = [w.peer for w in workers if w.peer in ready and w.member.role == "kvstore"]
        guesses = {role: usual_cost(role, workers, now_ms) for role in COMPUTING_ROLES}
        return [
            w.view(
                accepting=w.peer in accepting,
                store=w.store_among(stores) if stores else None,
                guess=guesses.get(w.member.role, UNKNOWN_COST),
                now_ms=now_ms,
            )
            for w in workers
        ]

    def _ready(self, now_ms: float) -> list[KnownWorker]:
        return [w for w in self._workers.values() if w.condition(now_ms)[0] == "ready"]

    def has_larger(self, small: frozenset[WorkerId], now_ms: float) -> bool:
        """Whether a worker that takes requests has more pages in all than each of these that has its role."""
        ready = self._ready(now_ms)
        most = dict[str, int]()
        for one in ready:
            if one.member.id in small:
                most[one.member.role] = max(most.get(one.member.role, 0), one.total_pages)
        return any(one.total_pages > most.get(one.member.role, one.total_pages) for one in ready)

    def context_tokens(self, now_ms: float) -> int | None:
        """What every ready worker can take, prompt plus answer; None if nobody is ready."""
        members = [w.member for w in self._ready(now_ms)]
        return min((m.takes_tokens for m in members if m.role in COMPUTING_ROLES), default=None)

    def members(self) -> list[Member]:
        """Everybody, in the order of joining."""
        return [worker.member for worker in self._workers.values()]

    def states(self, now_ms: float) -> list[WorkerState]:
        """Everybody, by id."""
        found = []
        for name in sorted(self._workers):
            worker = self._workers[name]
            condition, text = worker.condition(now_ms)
            alive_ms = now_ms - worker.heard_ms
            found.append(
                WorkerState(
                    worker.member,
                    condition,
                    text,
                    alive_ms,
                    worker.report,
                    len(worker.charges),
                    worker.breaker.state(now_ms),
                    worker.breaker.opened_total,
                )
            )
        return found


@dataclass(frozen=True, slots=True)
class Fit:
    """What a worker's model must be for this gateway to understand its tokens."""

    name: str
    vocab_tokens: int

    def misfit(self, member: Member) -> str:
        """The difference, readable; empty if it fits or runs no model at all."""
        model: ModelIdentity | None = member.model
        if model is None:
            return "" if member.role == "kvstore" else "it names no model"
        if model.name != self.name:
            return f"it serves {model.name!r}, this gateway serves {self.name!r}"
        if model.vocab_tokens != self.vocab_tokens:
            return f"its model has {model.vocab_tokens} token ids, this gateway's has {self.vocab_tokens}"
        return ""
