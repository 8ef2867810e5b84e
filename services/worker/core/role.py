"""What prefill and decode cores have in common: the events a shell brings, and the parts every worker is made of."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from common.ids import PeerId, RequestId, TransferId
from common.messages import AnyMessage
from common.messages.actions import Send
from common.messages.base import Message
from common.messages.handover import KvSpan
from common.messages.liveness import Hello, Member, Ping, Report, TransportReport
from common.messages.requests import Failed, Tokens
from kvstore.index.ledger import Ledger
from services.worker.core.actions import Action
from services.worker.core.callers import Callers
from services.worker.core.plan import StepPlan, StepResult
from services.worker.core.reporting import Reporter
from services.worker.core.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Parts:
    """What every worker has; each part owns its own state."""

    ledger: Ledger
    scheduler: Scheduler
    callers: Callers


class WorkerRole(ABC):
    """Messages, results and time in, actions out. An event that means nothing to a role changes nothing."""

    def __init__(self, mine: Member, parts: Parts, *, max_queued: int) -> None:
        self._mine, self._max_queued = mine, max_queued
        self._ledger, self._scheduler, self._callers = parts.ledger, parts.scheduler, parts.callers
        self._reporter = Reporter(mine, parts.ledger, parts.scheduler)
        self._owed: dict[PeerId, list[Failed]] = {}  # until their gateway pings, or falls silent

    @abstractmethod
    def on_message(self, peer: PeerId, message: AnyMessage, now_ms: float) -> list[Action]:
        """A message came. Raises ProtocolViolation for one that has no business here."""

    @abstractmethod
    def on_step(self, result: StepResult, now_ms: float) -> list[Action]:
        """The engine finished a step."""

    @abstractmethod
    def on_peer_dead(self, peer: PeerId, now_ms: float) -> list[Action]:
        """The kernel reported the death of a peer that memory was shared with."""

    @abstractmethod
    def on_tick(self, now_ms: float) -> list[Action]:
        """Time passed: deadlines, leases, pings, silence."""

    @abstractmethod
    def report(self, sequence: int) -> Report:
        """State for whoever pinged."""

    @property
    @abstractmethod
    def idle(self) -> bool:
        """No request is here in any phase."""

    @abstractmethod
    def check(self) -> None:
        """Conservation laws. Raises RuntimeError with the numbers."""

    @abstractmethod
    def abandon(self) -> list[Action]:
        """The drain time is over: tell every gateway that still waits."""

    def _end_unheard(self, request: RequestId) -> None:
        """Its gateway did not get what was sent: there is no use in going on."""

    def on_unsent(self, peer: PeerId, message: Message) -> None:
        """A message could not be sent. Requests whose tokens are lost fail, as soon as their gateway is heard again."""
        requests: tuple[RequestId, ...] = ()
        if isinstance(message, Tokens):
            requests = tuple(delta.request for delta in message.deltas)
        elif isinstance(message, Failed):
            requests = (message.request,)
        for request in requests:
            self._end_unheard(request)
            text = f"{self._mine.id} could not reach the gateway for a while"
            failed = Failed(request=request, code="peer_failed", phase="decode", text=text, retryable=True)
            self._owed.setdefault(peer, []).append(failed)

    def on_layer(self, layer: int, now_ms: float) -> list[Action]:
        """The engine wrote one layer's K and V of the step it computes."""
        return []

    def on_copied(
        self, transfer: TransferId, span: KvSpan, *, ok: bool, elapsed_ms: float, now_ms: float
    ) -> list[Action]:
        """A copy ended, well or not."""
        return []

    def on_channel(self, report: TransportReport, now_ms: float) -> list[Action]:
        """A way to move KV to a peer was found."""
        return []

    def on_channel_failed(self, peer: PeerId, text: str) -> list[Action]:
        """No allowed way to a peer works."""
        return []

    def on_peer_joined(self, peer: PeerId) -> list[Action]:
        """A peer maps our memory from now on: it is alive."""
        return []

    def on_members(self, members: list[Member], now_ms: float) -> list[Action]:
        """The membership as Redis has it."""
        return []

    def wants_payloads(self, transfer: TransferId) -> bool:
        """Whether KvSent of this transfer must bring the bytes along."""
        return False

    def plan(self) -> StepPlan | None:
        """The next step to compute, if the engine is free and there is work."""
        return self._scheduler.plan()

    def drain(self) -> None:
        """Finish what is here, take nothing new; reports say so from now on."""
        self._reporter.draining = True

    @property
    def has_callers(self) -> bool:
        """Whether somebody is there who may still believe that this worker takes requests."""
        return self._callers.n_callers > 0

    def _gone_silent(self, now_ms: float) -> list[PeerId]:
        gone = self._callers.gone_silent(now_ms)
        for peer in [peer for peer in self._owed if not self._callers.knows(peer)]:
            del self._owed[peer]
        return gone

    def _answer(self, peer: PeerId, message: Ping | Hello) -> list[Action]:
        if isinstance(message, Ping):
            owed = [Send(peer, failed) for failed in self._owed.pop(peer, ())]
            return [Send(peer, self.report(message.sequence)), *owed]
        return [self._callers.greet(peer, message)]
