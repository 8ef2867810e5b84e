"""The core of a prefill worker. Pure: messages, layer and step results in, actions out.

Owns the queue of prompts and one Prompt per request until its KV is handed over, it failed, or it was cancelled.
Pages belong to the Scheduler; while a copy may read them they are held, and the Sender says when that is over.
"""

from collections import deque

from common.errors import ProtocolViolation
from common.ids import PeerId, RequestId, TransferId
from common.kv_layout import KvLayout
from common.messages import AnyMessage
from common.messages.actions import Send
from common.messages.handover import Commit, Grant, GrantRefused, GrantRequest, KvSpan, Stop
from common.messages.liveness import Hello, Member, Ping, QueueCounts, Refused, Report, TransportReport, Welcome
from common.messages.requests import Cancel, Generate, Timings
from kvstore.handover.actions import GaveUp, Granted, HandedOver, PostCopy, Release, SenderAction
from kvstore.handover.outgoing import FirstToken
from kvstore.handover.sender import Sender
from services.worker.core.actions import Action, Copy
from services.worker.core.neighbours import Neighbours
from services.worker.core.plan import Segment, StepResult
from services.worker.core.prompt import Prompt
from services.worker.core.reporting import CopyTotals
from services.worker.core.role import Parts, WorkerRole
from services.worker.core.scheduler import NewToken

_ASK_AHEAD = 2
"""Transfers that may wait for one decode worker's grant: the prompt being computed and the one after it."""
_CONNECT_GRACE_MS = 2_000.0
"""How long a prompt waits for a decode worker that is only just being connected."""


class PrefillCore(WorkerRole):
    """Computes prompts and hands their KV to decode workers, layer by layer."""

    def __init__(
        self, mine: Member, parts: Parts, sender: Sender, neighbours: Neighbours, layout: KvLayout, *, max_queued: int
    ) -> None:
        super().__init__(mine, parts, max_queued=max_queued)
        self._sender, self._neighbours, self._layout = sender, neighbours, layout
        self._queue: deque[Prompt] = deque()
        self._prompts: dict[RequestId, Prompt] = {}
        self._requests: dict[TransferId, RequestId] = {}
        self._transfers = 0
        self._totals = CopyTotals()

    # -- events

    def on_message(self, peer: PeerId, message: AnyMessage, now_ms: float) -> list[Action]:
        """Handle one message. Raises ProtocolViolation for one that has no business here."""
        match message:
            case Welcome() | Refused() | Report():
                return self._neighbours.on_message(peer, message, now_ms)
            case Grant() | GrantRefused() | Stop() | Commit():
                return self._carry_out(self._sender.on_message(peer, message, now_ms), now_ms)
        self._callers.heard(peer, now_ms)
        match message:
            case Ping() | Hello():
                return self._answer(peer, message)
            case Generate():
                return self._on_generate(peer, message, now_ms)
            case Cancel(request=request):
                return self._on_cancel(request, now_ms)
            case _:
                raise ProtocolViolation(f"{self._mine.id} got {type(message).__name__} from {peer}")

    def _on_generate(self, gateway: PeerId, message: Generate, now_ms: float) -> list[Action]:
        if message.request in self._prompts:
            return []  # a repeat
        prompt = Prompt(message, gateway, now_ms, now_ms + message.timeout_ms)
        if self._reporter.draining:
            return [*prompt.tell("no_worker", f"{self._mine.id} is draining and takes nothing new", retryable=True)]
        if message.decode is None:
            return [*prompt.tell("protocol_violation", f"{self._mine.id} only prefills; no decode worker was named")]
        if not self._scheduler.fits_pool(len(message.prompt), 1):
            pages = self._scheduler.pool_pages_for(len(message.prompt), 1)
            text = f"the prompt needs {pages} pages; {self._mine.id} has {self._ledger.total_pages} in all"
            return [*prompt.tell("out_of_pages", text)]
        if len(self._queue) >= self._max_queued:
            text = f"{len(self._queue)} requests are waiting on {self._mine.id} already"
            return [*prompt.tell("busy", text, retryable=True)]
        self._prompts[message.request] = prompt
        self._queue.append(prompt)
        return self._pump(now_ms)

    def _on_cancel(self, request: RequestId, now_ms: float) -> list[Action]:
        prompt = self._prompts.get(request)
        if prompt is None:
            return []
        prompt.told = True
        return self._end(prompt, "cancelled", now_ms)

    def on_layer(self, layer: int, now_ms: float) -> list[Action]:
        """The engine wrote one layer's K and V of the step it computes."""
        step = self._scheduler.step
        actions: list[Action] = []
        for segment in step.segments if step is not None else ():
            prompt, span = self._prompts.get(segment.request), finished_span(segment, layer, self._layout)
            if prompt is not None and prompt.transfer is not None and span is not None:
                actions += self._carry_out(self._sender.computed(prompt.transfer, span), now_ms)
        return actions

    def on_step(self, result: StepResult, now_ms: float) -> list[Action]:
        """The engine finished a step."""
        actions: list[Action] = []
        for new in self._scheduler.complete(result):
            actions += self._on_prompt_done(new, now_ms)
        return actions + self._pump(now_ms)

    def _on_prompt_done(self, new: NewToken, now_ms: float) -> list[Action]:
        prompt = self._prompts[new.sequence.request]
        assert prompt.transfer is not None
        self._scheduler.park(new.sequence.request)
        prompt.computed_ms = now_ms
        timings = Timings(prefill_queue_ms=prompt.asked_ms - prompt.arrived_ms, compute_ms=now_ms - prompt.asked_ms)
        first = FirstToken(token=new.token, logprob=new.logprob, timings=timings)
        return self._carry_out(self._sender.finished(prompt.transfer, first, now_ms), now_ms)

    def on_copied(
        self, transfer: TransferId, span: KvSpan, *, ok: bool, elapsed_ms: float, now_ms: float
    ) -> list[Action]:
        """A copy ended, well or not."""
        self._totals.copies += 1
        self._totals.copy_ms += elapsed_ms
        self._totals.copied_bytes += span.n_blocks * self._layout.page_bytes if ok else 0
        return self._carry_out(self._sender.copied(transfer, span, now_ms, ok=ok), now_ms)

    def on_channel(self, report: TransportReport, now_ms: float) -> list[Action]:
        """A decode worker can be reached."""
        self._neighbours.on_channel(report)
        return self._pump(now_ms)

    def on_channel_failed(self, peer: PeerId, text: str) -> list[Action]:
        """A decode worker cannot be reached by the transport that was asked for."""
        self._neighbours.on_channel_failed(peer, text)
        return []

    def on_members(self, members: list[Member], now_ms: float) -> list[Action]:
        """The membership as Redis has it."""
        actions, replaced = self._neighbours.on_members(members, now_ms)
        return actions + [action for peer in replaced for action in self.on_peer_dead(peer, now_ms)]

    def on_peer_dead(self, peer: PeerId, now_ms: float) -> list[Action]:
        """A decode worker died (the kernel or its silence said so)."""
        forgotten = self._neighbours.forget(peer)  # first, or the room that its prompts leave starts more for it
        return self._carry_out(self._sender.on_peer_dead(peer), now_ms) + forgotten

    def on_tick(self, now_ms: float) -> list[Action]:
        """Pings, deadlines, renewals, silence."""
        actions, silent = self._neighbours.on_tick(now_ms)
        for peer in silent:
            actions += self.on_peer_dead(peer, now_ms)
        for gateway in self._gone_silent(now_ms):
            unheard = [p for p in self._prompts.values() if p.gateway == gateway]
            actions += self._end_all(unheard, "peer_failed", f"gateway {gateway} was silent for too long", now_ms)
        late = [p for p in self._prompts.values() if now_ms >= p.deadline_ms and not p.told]
        actions += self._end_all(late, "deadline_exceeded", "the request's time ran out", now_ms)
        actions += self._carry_out(self._sender.on_tick(now_ms), now_ms)
        return actions + self._pump(now_ms)

    # -- the way of one prompt

    def _pump(self, now_ms: float) -> list[Action]:
        """Start prompts, first come first served, while there are pages and not too many wait for their grant.

        A prompt whose decode worker is not connected yet lets others pass for a moment, then fails.
        """
        actions: list[Action] = []
        for prompt in list(self._queue):
            worker = prompt.message.decode
            assert worker is not None
            decode = self._neighbours.ready(worker)
            if decode is None and now_ms - prompt.arrived_ms < _CONNECT_GRACE_MS:
                continue
            if decode is None:
                text = f"{self._mine.id} cannot reach decode worker {worker}: {self._neighbours.why_not(worker)}"
                actions += prompt.tell("no_worker", text, retryable=True)
                actions += self._end(prompt, "no_worker", now_ms)
                continue
            if not self._scheduler.has_room(len(prompt.message.prompt)):
                break
            if self._n_asking(decode) >= _ASK_AHEAD:
                continue  # that decode worker is full; others may not be
            self._queue.remove(prompt)
            actions += self._start(prompt, decode, now_ms)
        return actions

    def _n_asking(self, decode: PeerId) -> int:
        return sum(p.decode == decode and p.granted_ms is None for p in self._prompts.values())

    def _start(self, prompt: Prompt, decode: PeerId, now_ms: float) -> list[Action]:
        message = prompt.message
        self._transfers += 1
        transfer = TransferId(f"{self._mine.id}@{self._mine.incarnation:016x}/{self._transfers}")
        prompt.transfer, prompt.decode, prompt.asked_ms = transfer, decode, now_ms
        prompt.sequence = self._scheduler.submit(message.request, message.prompt, message.sampling, streamed=True)
        self._scheduler.hold(message.request)
        self._requests[transfer] = message.request
        request = GrantRequest(
            transfer=transfer,
            request=message.request,
            gateway=prompt.gateway,
            prompt=message.prompt,
            sampling=message.sampling,
            timeout_ms=max(1, round(prompt.deadline_ms - now_ms)),
            transport=self._neighbours.transport(decode),
        )
        n_blocks = self._layout.blocks_for(len(message.prompt))
        asked = self._sender.ask(decode, request, n_blocks, now_ms, prompt.deadline_ms)
        return self._carry_out(asked, now_ms)

    def _carry_out(self, steps: list[SenderAction], now_ms: float) -> list[Action]:
        actions: list[Action] = []
        for step in steps:
            match step:
                case Send():
                    actions.append(step)
                case PostCopy(transfer=transfer, span=span):
                    prompt = self._prompts[self._requests[transfer]]
                    actions.append(Copy(step, prompt.source_pages(span)))
                case Granted(transfer=transfer):
                    self._prompts[self._requests[transfer]].granted_ms = now_ms
                    actions += self._pump(now_ms)
                case HandedOver():
                    self._totals.handed_over += 1
                case GaveUp(transfer=transfer):
                    prompt = self._prompts[self._requests[transfer]]
                    actions += prompt.tell(step.code, step.text, phase=step.phase, retryable=step.retryable)
                    self._scheduler.drop(prompt.message.request)
                case Release(transfer=transfer):
                    request = self._requests.pop(transfer)
                    del self._prompts[request]
                    self._scheduler.drop(request)
                    self._scheduler.unhold(request)
                    actions += self._pump(now_ms)
        return actions

    def _end_all(self, prompts: list[Prompt], code: str, text: str, now_ms: float) -> list[Action]:
        """End queued prompts first, or the room that the others leave would start them."""
        actions: list[Action] = []
        for prompt in sorted(prompts, key=lambda p: p.transfer is not None):
            if self._prompts.get(prompt.message.request) is prompt:
                actions += prompt.tell(code, f"{text} (phase {prompt.phase})", retryable=code == "peer_failed")
                actions += self._end(prompt, code, now_ms)
        return actions

    def abandon(self) -> list[Action]:
        """The drain time is over: tell every gateway that still waits."""
        text = "the worker was told to stop, and its time to drain is over"
        return [a for p in self._prompts.values() for a in p.tell("peer_failed", text, retryable=True)]

    def _end(self, prompt: Prompt, code: str, now_ms: float) -> list[Action]:
        """Stop working on a prompt whose gateway needs no word of it any more."""
        if prompt.transfer is None:
            self._queue.remove(prompt)
            del self._prompts[prompt.message.request]
            return []
        self._scheduler.drop(prompt.message.request)
        return self._carry_out(self._sender.cancel(prompt.transfer, code, now_ms), now_ms)

    # -- state for others

    def report(self, sequence: int) -> Report:
        """State for whoever pinged."""
        computing = self._scheduler.queue()
        queue = QueueCounts(
            waiting=len(self._queue) + computing.waiting,
            running=computing.running,
            handing_over=sum(1 for p in self._prompts.values() if p.computed_ms is not None),
            waiting_tokens=computing.waiting_tokens + sum(len(p.message.prompt) for p in self._queue),
        )
        return self._reporter.report(sequence, queue, self._totals.counters(), self._neighbours.transports)

    @property
    def idle(self) -> bool:
        """No request is here in any phase."""
        return not self._prompts and self._scheduler.idle

    def check(self) -> None:
        """Conservation laws. Raises AssertionError with the numbers."""
        self._ledger.check()
        self._sender.check()


def finished_span(segment: Segment, layer: int, layout: KvLayout) -> KvSpan | None:
    """The blocks that a step completes; a last, partly filled one counts when the prompt ends in it."""
    first = segment.start // layout.block_tokens
    end_tokens = segment.start + segment.count
    end = layout.blocks_for(end_tokens) if segment.sample else end_tokens // layout.block_tokens
    return KvSpan(layer, first, end - first) if end > first else None
