"""The core of a decode or mixed worker. Pure: messages and step results in, actions out.

A decode worker takes prompts over from prefill workers and draws their answers. Asked directly (Generate without a
decode worker) it computes the prompt too: that is all a mixed worker does.
"""

import msgspec

from common.errors import ProtocolViolation
from common.ids import PeerId, RequestId, TransferId
from common.messages import AnyMessage
from common.messages.actions import Send
from common.messages.handover import Abort, GrantRefused, GrantRequest, HandOver, KvSent, Renew, Stopped
from common.messages.liveness import Hello, Member, Ping, Report
from common.messages.requests import Cancel, Failed, Generate
from services.worker.core.actions import Action
from services.worker.core.generation import Generation
from services.worker.core.incoming import Incoming
from services.worker.core.plan import StepResult
from services.worker.core.role import Parts, WorkerRole

_TOMBSTONE_MS = 60_000.0


class DecodeCore(WorkerRole):
    """Routes events to the parts; itself it owns only the memory of cancelled requests, each for a minute."""

    def __init__(
        self, mine: Member, parts: Parts, generation: Generation, incoming: Incoming, *, max_queued: int
    ) -> None:
        super().__init__(mine, parts, max_queued=max_queued)
        self._generation, self._incoming = generation, incoming
        self._cancelled: dict[RequestId, float] = {}  # -> when to forget it

    def on_message(self, peer: PeerId, message: AnyMessage, now_ms: float) -> list[Action]:
        """Handle one message. Raises ProtocolViolation for one that has no business here."""
        self._callers.heard(peer, now_ms)
        match message:
            case Ping() | Hello():
                return self._answer(peer, message)
            case Generate():
                return self._on_generate(peer, message, now_ms)
            case GrantRequest():
                return self._on_grant_request(peer, message, now_ms)
            case KvSent() | HandOver() | Abort() | Stopped() | Renew():
                return self._incoming.on_message(peer, message, now_ms)
            case Cancel(request=request):
                return self._on_cancel(request, now_ms)
            case _:
                raise ProtocolViolation(f"{self._mine.id} got {type(message).__name__} from {peer}")

    def _on_generate(self, gateway: PeerId, message: Generate, now_ms: float) -> list[Action]:
        if message.request in self._generation or message.request in self._cancelled:
            return []  # a repeat, or cancelled before it came
        if self._reporter.draining:
            text = f"{self._mine.id} is draining and takes nothing new"
            return [_failed(gateway, message.request, "no_worker", text, retryable=True)]
        tokens, max_tokens = len(message.prompt), message.sampling.max_tokens
        if not self._scheduler.fits_pool(tokens, max_tokens):
            pages = self._scheduler.pool_pages_for(tokens, max_tokens)
            text = f"the request needs up to {pages} pages; this worker has {self._ledger.total_pages} in all"
            return [_failed(gateway, message.request, "out_of_pages", text, retryable=False)]
        if self._scheduler.n_waiting >= self._max_queued:
            text = f"{self._scheduler.n_waiting} requests are waiting on {self._mine.id} already"
            return [_failed(gateway, message.request, "busy", text, retryable=True)]
        self._generation.start(message, gateway, now_ms)
        return []

    def _on_grant_request(self, sender: PeerId, message: GrantRequest, now_ms: float) -> list[Action]:
        if message.request in self._cancelled:
            code, text = "cancelled", "the request was cancelled"
        elif self._callers.is_refused(sender):
            code, text = "config", f"{sender} does not fit {self._mine.id}"
        elif message.request in self._generation:
            code, text = "protocol_violation", "the request is being generated here already"
        else:
            return self._incoming.on_message(sender, message, now_ms)
        refusal = GrantRefused(transfer=message.transfer, code=code, text=text, retryable=False)
        return [Send(sender, refusal)]

    def _on_cancel(self, request: RequestId, now_ms: float) -> list[Action]:
        self._cancelled[request] = now_ms + _TOMBSTONE_MS
        self._generation.forget(request)
        return self._incoming.cancel(request, "cancelled", now_ms) + self._incoming.pump(now_ms)

    def abandon(self) -> list[Action]:
        """The drain time is over: tell every gateway that still waits."""
        return self._generation.abandon() + self._incoming.abandon()

    def _end_unheard(self, request: RequestId) -> None:
        self._generation.forget(request)

    def on_step(self, result: StepResult, now_ms: float) -> list[Action]:
        """The engine finished a step."""
        actions = self._generation.on_tokens(self._scheduler.complete(result), now_ms)
        return actions + self._incoming.pump(now_ms)

    def wants_payloads(self, transfer: TransferId) -> bool:
        """Whether KvSent of this transfer must bring the bytes along."""
        return self._incoming.wants_payloads(transfer)

    def on_peer_dead(self, peer: PeerId, now_ms: float) -> list[Action]:
        """The kernel reported the death of a process that had our memory mapped."""
        return self._incoming.on_sender_dead(peer, now_ms)

    def on_peer_joined(self, peer: PeerId) -> list[Action]:
        """A prefill worker maps our pages (again): it is alive."""
        self._incoming.on_sender_joined(peer)
        return []

    def on_tick(self, now_ms: float) -> list[Action]:
        """Deadlines, leases, silence."""
        for request in [r for r, until in self._cancelled.items() if now_ms >= until]:
            del self._cancelled[request]
        actions: list[Action] = []
        for peer in self._gone_silent(now_ms):
            actions += self._generation.forget_gateway(peer)
            actions += self._incoming.forget_gateway(peer, now_ms)
            actions += self._incoming.on_sender_silent(peer, now_ms)
        return actions + self._generation.on_tick(now_ms) + self._incoming.on_tick(now_ms)

    def report(self, sequence: int) -> Report:
        """State for whoever pinged."""
        queue = msgspec.structs.replace(self._scheduler.queue(), handing_over=self._incoming.n_open)
        counters = {
            "generated_tokens_total": float(self._generation.generated_tokens_total),
            "finished_requests_total": float(self._generation.finished_total),
        }
        return self._reporter.report(sequence, queue, counters)

    @property
    def idle(self) -> bool:
        """No request is here in any phase."""
        return self._scheduler.idle and self._incoming.n_open == 0

    def check(self) -> None:
        """Conservation laws. Raises AssertionError with the numbers."""
        self._ledger.check()
        self._incoming.check()


def _failed(gateway: PeerId, request: RequestId, code: str, text: str, *, retryable: bool) -> Send:
    failed = Failed(request=request, code=code, phase="prefill_queue", text=text, retryable=retryable)
    return Send(gateway, failed)
