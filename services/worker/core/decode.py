"""The core of a decode or mixed worker. Pure: messages and step results in, actions out.

A decode worker takes prompts over from prefill workers and draws their answers. Asked directly (Generate without a
decode worker) it computes the prompt too: that is all a mixed worker does.
"""

from dataclasses import dataclass

import msgspec

from common.errors import LoadFailed, ProtocolViolation, Stuck
from common.ids import PeerId, RequestId, TransferId
from common.kv_layout import KvLayout
from common.messages import AnyMessage
from common.messages.actions import Send
from common.messages.base import Message
from common.messages.handover import Abort, Grant, GrantRefused, GrantRequest, HandOver, KvSent, Renew, Stopped
from common.messages.liveness import Member, Report
from common.messages.requests import Cancel, Failed, Generate
from common.policy.admission import AdmissionGate
from common.policy.buffer_scaling import BufferScaling
from services.worker.core.actions import Action
from services.worker.core.generation import Generation
from services.worker.core.incoming import Incoming
from services.worker.core.local import LocalPrompts
from services.worker.core.parts import Parts
from services.worker.core.plan import StepResult
from services.worker.core.preparation import Preparation
from services.worker.core.role import DRAINED, WorkerRole
from services.worker.core.slo import PromptGate
from services.worker.core.waits import answers_subject
from services.worker.core.wire import too_large

_TOMBSTONE_MS = 60_000.0
_ENDING = "the decode worker was told to stop and takes no more prompts over"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTerms:
    """What does not change while a decode or mixed worker lives."""

    max_queued: int
    layout: KvLayout
    admission: AdmissionGate
    """When a prompt that has room may start beside answers."""
    returns_answers: bool = False
    """Offer the KV of answers to the prefill workers of their prompts."""
    fail_lost_loads: bool = False
    """A prompt whose KV could not be fetched fails, instead of being computed."""
    buffer_scaling: BufferScaling | None = None
    """How much of the host buffer may be used; None: all of it, always."""


class DecodeCore(WorkerRole):
    """Routes events to the parts; itself it owns only the memory of cancelled requests, each for a minute."""

    def __init__(
        self, mine: Member, parts: Parts, generation: Generation, incoming: Incoming, terms: DecodeTerms
    ) -> None:
        super().__init__(mine, parts, max_queued=terms.max_queued)
        self._generation, self._incoming = generation, incoming
        self._layout, self._fail_lost_loads = terms.layout, terms.fail_lost_loads
        self._returns_answers = terms.returns_answers
        gate = PromptGate(terms.admission, generation.watch, parts)
        self._local = LocalPrompts(generation, parts.cache, Preparation(parts), gate, terms.layout.block_tokens)
        self._buffer, self._scaling = parts.scheduler.parking.buffer, terms.buffer_scaling
        parts.scheduler.giving_way.slack_ms = gate.slack_ms
        self._cancelled: dict[RequestId, float] = {}  # -> when to forget it
        watched = answers_subject(parts, self._local, generation, incoming, lambda: self.idle, self._end_stuck)
        self.overseer.attend(watched)

    def _on_request(self, peer: PeerId, message: AnyMessage, now_ms: float) -> list[Action]:
        match message:
            case Generate():
                return self._on_generate(peer, message, now_ms)
            case GrantRequest():
                return self._on_grant_request(peer, message, now_ms)
            case KvSent() | HandOver() | Abort() | Stopped() | Renew():
                return self._incoming.on_message(peer, message, now_ms) + self._offer_finished(now_ms)
            case Cancel(request=request):
                return self._on_cancel(request, now_ms)
            case _:
                raise ProtocolViolation(f"{self._mine.id} got {type(message).__name__} from {peer}")

    def _on_generate(self, gateway: PeerId, message: Generate, now_ms: float) -> list[Action]:
        known = message.request in self._generation or message.request in self._local
        if known or message.request in self._cancelled:
            return []  # a repeat, or cancelled before it came
        if self._reporter.draining:
            text = f"{self._mine.id} is draining and takes nothing new"
            return [_failed(gateway, message.request, "no_worker", text, retryable=True)]
        if refusal := self._refusal(message):
            return [_failed(gateway, message.request, "invalid_request", refusal, retryable=False)]
        pages = self._layout.pages_at_most(len(message.prompt), message.sampling.max_tokens)
        if text := too_large(pages, self._pool.usable_pages):
            return [_failed(gateway, message.request, "out_of_pages", text, retryable=False)]
        waiting = self._scheduler.n_waiting + len(self._local)
        if waiting >= self._max_queued:
            text = f"{waiting} requests are waiting on {self._mine.id} already"
            return [_failed(gateway, message.request, "busy", text, retryable=True)]
        root = self._root(message.cache_salt)
        self._local.add(message, gateway, root, now_ms)
        return self._after_cache(now_ms)

    def _has(self, request: RequestId) -> bool:
        return request in self._generation or request in self._local or self._incoming.expects(request)

    def _end_too_large(self, now_ms: float) -> list[Action]:
        total = self._pool.usable_pages
        ended = self._local.end_too_large(self._layout, total, now_ms)
        return (
            ended + self._generation.end_too_large(self._layout, total, now_ms) + self._incoming.end_too_large(now_ms)
        )

    def _after_cache(self, now_ms: float) -> list[Action]:
        """Requests may start or go on."""
        actions: list[Action] = []
        self._cache.prefetch.take_filled()  # nobody else waits for them
        for request in self._cache.prefetch.take_failed():
            if self._fail_lost_loads and request in self._generation:
                text = "KV that was to be reused could not be fetched"
                actions += self._generation.fail(request, LoadFailed.code, text, now_ms=now_ms)
        return actions + self._local.pump(now_ms) + self._incoming.pump(now_ms)

    def _on_grant_request(self, sender: PeerId, message: GrantRequest, now_ms: float) -> list[Action]:
        if message.request in self._cancelled:
            code, text = "cancelled", "the request was cancelled"
        elif self._callers.is_refused(sender):
            code, text = "config", f"{sender} does not fit {self._mine.id}"
        elif message.request in self._generation:
            code, text = "protocol_violation", "the request is being generated here already"
        elif not self._callers.is_welcome("prefill", sender):
            code, text = "no_worker", f"{self._mine.id} has not welcomed {sender} as a prefill worker"
        elif self._ending and not self._incoming.knows(message.transfer):
            code, text = "no_worker", _ENDING
        else:
            return self._incoming.on_message(sender, message, now_ms)
        refusal = GrantRefused(transfer=message.transfer, code=code, text=text, retryable=code == "no_worker")
        return [Send(sender, refusal)]

    def _on_cancel(self, request: RequestId, now_ms: float) -> list[Action]:
        self._cancelled[request] = now_ms + _TOMBSTONE_MS
        self._generation.forget(request)
        forgotten = self._local.cancel(request) + self._incoming.cancel(request, "cancelled", now_ms)
        return forgotten + self._after_cache(now_ms)

    def _end_stuck(self, request: RequestId, text: str, now_ms: float) -> list[Action]:
        self._note_began(now_ms)
        if request in self._generation:
            ended = self._generation.fail(request, Stuck.code, text, now_ms=now_ms)
        else:
            ended = self._incoming.give_up(request, Stuck.code, text, now_ms)
        return ended + self._after_cache(now_ms)

    def _note_began(self, now_ms: float) -> float:
        """When the step began that runs, or has just ended; prompts whose first one it is began with it."""
        began_ms = self._times.began_ms(self._scheduler.step, now_ms)
        self._generation.note_began(self._scheduler.step, began_ms)
        return began_ms

    def abandon(self) -> list[Action]:
        """The drain time is over: tell every gateway that still waits."""
        return self._local.abandon(DRAINED) + self._generation.abandon() + self._incoming.abandon()

    def _wanted_pages(self) -> int:
        return super()._wanted_pages() + sum(self._layout.pages_for(len(one.tokens)) for one in self._local.prompts)

    def _end_unheard(self, request: RequestId) -> None:
        self._generation.forget(request)

    def on_unsent(self, peer: PeerId, message: Message, now_ms: float) -> None:
        """A message could not be sent. Of a Grant's pages nobody may know then."""
        if isinstance(message, Grant):
            self._incoming.on_unsent(message, now_ms)
        super().on_unsent(peer, message, now_ms)

    def on_step(self, result: StepResult, now_ms: float) -> list[Action]:
        """The engine finished a step."""
        self._costing.learn(self._scheduler.step, result)
        began_ms = self._note_began(now_ms)
        tokens = self._generation.on_tokens(self._scheduler.complete(result), now_ms, began_ms)
        self._times.note(self._scheduler.step, now_ms)
        self._scale_buffer(now_ms)
        return self._offer_finished(now_ms) + tokens + self._after_cache(now_ms) + self._cache.pump(now_ms)

    def _scale_buffer(self, now_ms: float) -> None:
        """How much of the host buffer may be used follows from which SLOs the step missed."""
        misses = self._generation.watch.end_step(now_ms)
        if self._scaling is not None:
            logical_bytes = self._scaling.after_step(misses.ttft, misses.tpot)
            self._buffer.logical_pages = logical_bytes // self._buffer.page_bytes

    def _offer_finished(self, now_ms: float) -> list[Action]:
        """Level 3: the KV of answers goes back to whoever will compute the next turn's prompt."""
        finished = self._generation.take_finished()
        if not self._returns_answers:
            return []
        return [action for one in finished for action in self._cache.offer(one.sequence, one.origin, now_ms)]

    def wants_payloads(self, transfer: TransferId) -> bool:
        """Whether KvSent of this transfer must bring the bytes along."""
        return self._incoming.wants_payloads(transfer)

    def grant_of(self, transfer: TransferId, sender: PeerId) -> Grant | None:
        """What this sender may fill for a transfer, if it still may."""
        return self._incoming.grant_of(transfer, sender)

    def on_corrupt(self, transfer: TransferId, text: str, now_ms: float) -> list[Action]:
        """What came of a transfer is not what was sent."""
        return self._incoming.on_corrupt(transfer, text, now_ms) + self._after_cache(now_ms)

    def on_peer_dead(self, peer: PeerId, now_ms: float) -> list[Action]:
        """The kernel says that a process has our memory mapped no more."""
        return self._incoming.on_sender_dead(peer, now_ms) + super().on_peer_dead(peer, now_ms)

    def on_peer_lost(self, peer: PeerId, now_ms: float) -> list[Action]:
        """A KV store, or a mixed worker, is silent or gone: it gives us nothing."""
        forgotten = self._neighbours.forget(peer) + self._cache.on_peer_lost(peer, now_ms)
        return forgotten + self._after_cache(now_ms)

    def on_peer_joined(self, peer: PeerId) -> list[Action]:
        """A prefill worker maps our pages (again): it is alive."""
        self._incoming.on_sender_joined(peer)
        return []

    def on_tick(self, now_ms: float) -> list[Action]:
        """Deadlines, leases, silence."""
        for request in [r for r, until in self._cancelled.items() if now_ms >= until]:
            del self._cancelled[request]
        self._note_began(now_ms)  # for those whose time is up
        actions = self._tick_neighbours(now_ms)
        for peer in self._gone_silent(now_ms):
            actions += self._local.forget_gateway(peer, now_ms)
            actions += self._generation.forget_gateway(peer, now_ms)
            actions += self._incoming.forget_gateway(peer, now_ms)
            actions += self._incoming.on_sender_silent(peer, now_ms)
        actions += self._local.on_tick(now_ms) + self._generation.on_tick(now_ms) + self._incoming.on_tick(now_ms)
        return actions + self._after_cache(now_ms)

    def report(self, sequence: int, now_ms: float) -> Report:
        """State for whoever pinged."""
        queue, local = self._scheduler.queue(), self._local
        queue = msgspec.structs.replace(
            queue,
            waiting=queue.waiting + len(local),
            waiting_tokens=queue.waiting_tokens + local.waiting_tokens,
            handing_over=self._incoming.n_open,
        )
        counters = {
            "generated_tokens_total": float(self._generation.generated_tokens_total),
            "finished_requests_total": float(self._generation.finished_total),
            "gate_held_total": float(local.held_total),
            **self._generation.watch.counters(),
        }
        return self._reporter.report(sequence, queue, counters, now_ms, local.prompts)

    @property
    def idle(self) -> bool:
        """No request is here in any phase."""
        busy = len(self._local) or self._incoming.n_open
        return self._scheduler.idle and not busy and self._cache.idle

    def check(self) -> None:
        """Conservation laws. Raises RuntimeError with the numbers."""
        super().check()
        self._incoming.check()
        if len(self._generation.watch) != len(self._local) + len(self._generation):
            raise RuntimeError(
                f"{len(self._generation.watch)} requests are watched for their SLO, but {len(self._local)} wait and "
                f"{len(self._generation)} are answered"
            )


def _failed(gateway: PeerId, request: RequestId, code: str, text: str, *, retryable: bool) -> Send:
    failed = Failed(request=request, code=code, phase="prefill_queue", text=text, retryable=retryable)
    return Send(gateway, failed)
