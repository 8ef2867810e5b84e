"""The core of a prefill worker. Pure: messages, layer and step results in, actions out.

Owns one Prompt per request until its KV is handed over, it failed, or it was cancelled; which of them have not started,
and in what order they do, is prompt_queue's. Pages belong to the Scheduler; while a copy may read them they are held, and
the Sender says when that is over.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from common.block_hash import hash_blocks
from common.errors import LoadFailed, ProtocolViolation, Stuck
from common.ids import PeerId, RequestId, TransferId
from common.kv_layout import KvLayout
from common.messages import AnyMessage
from common.messages.actions import Send
from common.messages.handover import Commit, Grant, GrantPending, GrantRefused, KvSpan, Stop
from common.messages.liveness import Member, QueueCounts, Report
from common.messages.requests import Cancel, Generate
from kvstore.handover.actions import GaveUp, Granted, HandedOver, PostCopy, Release, SenderAction
from kvstore.handover.sender import Sender
from services.worker.core.actions import Action, Copy, Moved
from services.worker.core.asking import Asking
from services.worker.core.found import Started
from services.worker.core.layer_streams import LayerStreams
from services.worker.core.parts import Parts
from services.worker.core.plan import Segment, StepPlan, StepResult
from services.worker.core.prompt import Prompt
from services.worker.core.prompt_queue import PromptQueue
from services.worker.core.reporting import CopyTotals
from services.worker.core.role import DRAINED, WorkerRole
from services.worker.core.scheduler import NewToken
from services.worker.core.waits import prompts_subject

_RETRYABLE = ("peer_failed", "no_worker", "busy", Stuck.code)
_SCRATCH_GRACE_MS = 1_000.0
"""How long a prompt that has its grant waits for scratch while all others wait for grants that may come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTerms:
    """What does not change while a prefill worker lives."""

    layout: KvLayout
    max_queued: int
    transfer: str = "auto"
    """A setting of common.policy.transfer."""
    fail_lost_loads: bool = False
    """A prompt whose KV could not be fetched fails, instead of being computed."""


class PrefillCore(WorkerRole):
    """Computes prompts and hands their KV to decode workers."""

    def __init__(self, mine: Member, parts: Parts, sender: Sender, terms: PrefillTerms) -> None:
        super().__init__(mine, parts, max_queued=terms.max_queued)
        self._sender, self._layout, self._terms = sender, terms.layout, terms
        assert isinstance(parts.scheduler.offload, LayerStreams), (
            "layers of a prefill worker's prompts go to decode workers"
        )
        self._streams = parts.scheduler.offload
        self._queue = PromptQueue(parts, self._streams)
        self._prompts: dict[RequestId, Prompt] = {}
        self._requests: dict[TransferId, RequestId] = {}
        self._asking, self._totals = Asking(mine, sender, self._neighbours, terms.layout, terms.transfer), CopyTotals()
        self.overseer.attend(
            prompts_subject(parts, self._prompts, self._totals, sender, lambda: self.idle, self._end_all)
        )

    def _on_request(self, peer: PeerId, message: AnyMessage, now_ms: float) -> list[Action]:
        match message:
            case Grant() | GrantPending() | GrantRefused() | Stop() | Commit():
                return self._carry_out(self._sender.on_message(peer, message, now_ms), now_ms)
            case Generate():
                return self._on_generate(peer, message, now_ms)
            case Cancel(request=request):
                return self._on_cancel(request, now_ms)
            case _:
                raise ProtocolViolation(f"{self._mine.id} got {type(message).__name__} from {peer}")

    def _on_generate(self, gateway: PeerId, message: Generate, now_ms: float) -> list[Action]:
        if message.request in self._prompts:
            return []  # a repeat
        prompt = Prompt(message, gateway, now_ms, now_ms + message.timeout_ms, self._root(message.cache_salt))
        if self._reporter.draining:
            return [*prompt.tell("no_worker", f"{self._mine.id} is draining and takes nothing new", retryable=True)]
        if refusal := self._refusal(message):
            return [*prompt.tell("invalid_request", refusal)]
        if message.decode is None:
            return [*prompt.tell("protocol_violation", f"{self._mine.id} only prefills; no decode worker was named")]
        if refusal := _too_large(prompt, self._layout, self._streams, self._mine):
            return [*prompt.tell("out_of_pages", refusal)]
        if len(self._queue) >= self._max_queued:
            text = f"{len(self._queue)} requests are waiting on {self._mine.id} already"
            return [*prompt.tell("busy", text, retryable=True)]
        prompt.names = hash_blocks(prompt.tokens[:-1], prompt.root, self._layout.block_tokens)
        self._prompts[message.request] = prompt
        self._queue.add(prompt)
        return self._pump(now_ms)

    def _has(self, request: RequestId) -> bool:
        prompt = self._prompts.get(request)
        return prompt is not None and not prompt.told

    def _end_too_large(self, now_ms: float) -> list[Action]:
        waiting = [p for p in self._prompts.values() if p.waits and not p.told]
        refused = [(p, text) for p in waiting if (text := _too_large(p, self._layout, self._streams, self._mine))]
        return [a for p, text in refused for a in self._end_all([p], "out_of_pages", text, now_ms)]

    def _on_cancel(self, request: RequestId, now_ms: float) -> list[Action]:
        prompt = self._prompts.get(request)
        if prompt is None:
            return []
        prompt.told = True
        return self._end(prompt, "cancelled", now_ms) + self._pump(now_ms)

    def on_layer(self, layer: int, now_ms: float, n_layers: int = 1) -> list[Action]:
        """The engine wrote K and V of `n_layers` layers, from `layer` on, of the step it computes."""
        step, actions = self._scheduler.step, list[Action]()
        for segment in step.segments if step is not None else ():
            prompt, span = self._prompts.get(segment.request), finished_span(segment, layer, n_layers, self._layout)
            if prompt is None or prompt.sequence is None or prompt.sequence.lost:
                continue  # what is computed on lost KV will be computed again
            if prompt.transfer is not None and span is not None:
                actions += self._carry_out(self._sender.computed(prompt.transfer, span), now_ms)
        return actions

    def on_step(self, result: StepResult, now_ms: float) -> list[Action]:
        """The engine finished a step."""
        self._costing.learn(step := self._scheduler.step, result)
        _note_began(step, self._prompts, self._times.began_ms(step, now_ms))
        done = [action for new in self._scheduler.complete(result) for action in self._on_prompt_done(new, now_ms)]
        self._times.note(self._scheduler.step, now_ms)
        return done + self._pump(now_ms) + self._cache.pump(now_ms)

    def _on_prompt_done(self, new: NewToken, now_ms: float) -> list[Action]:
        prompt = self._prompts[new.sequence.request]
        assert prompt.transfer is not None
        self._scheduler.halt(new.sequence.request)
        return self._carry_out(self._sender.finished(prompt.transfer, prompt.finish(new, now_ms), now_ms), now_ms)

    def on_copied(self, transfer: TransferId, span: KvSpan, moved: Moved, now_ms: float) -> list[Action]:
        """A copy ended, well or not."""
        prompt = self._prompts[self._requests[transfer]]
        self._totals.add(prompt.mode, moved)
        prompt.copied += 1
        opened = self._streams.copied(prompt.sequence, span) if moved.ok else []
        return opened + self._carry_out(self._sender.copied(transfer, span, now_ms, ok=moved.ok), now_ms)

    def on_layer_fetched(self, call: int, layer: int, *, ok: bool, now_ms: float) -> list[Action]:
        """A layer that was fetched may go to the decode worker at once."""
        load = self._cache.load(call)
        if not ok or load is None:
            return super().on_layer_fetched(call, layer, ok=ok, now_ms=now_ms)
        return self._on_loaded(load.request, KvSpan(layer, load.first_block, load.n_blocks), now_ms)

    def _on_loaded(self, request: RequestId, span: KvSpan, now_ms: float) -> list[Action]:
        prompt = self._prompts.get(request)
        if prompt is None or prompt.transfer is None:
            return []
        return self._carry_out(self._sender.computed(prompt.transfer, span), now_ms)

    def _after_cache(self, now_ms: float) -> list[Action]:
        actions: list[Action] = []
        for load in self._cache.prefetch.take_filled():
            span = KvSpan(0, load.first_block, load.n_blocks, self._layout.layers)
            actions += self._on_loaded(load.request, span, now_ms)
        for request in self._cache.prefetch.take_failed():
            prompt = self._prompts.get(request)
            if self._terms.fail_lost_loads and prompt is not None:
                text = "KV that was to be reused could not be fetched (--on-load-failure=fail)"
                actions += prompt.tell(LoadFailed.code, text, now_ms=now_ms, retryable=LoadFailed.retryable)
                actions += self._end(prompt, LoadFailed.code, now_ms)
        return actions + self._pump(now_ms)

    def on_peer_lost(self, peer: PeerId, now_ms: float) -> list[Action]:
        """A worker or a KV store is silent or gone: its transfers end, and what it would have given."""
        forgotten = self._neighbours.forget(peer)  # first, or the room that its prompts leave starts more for it
        forgotten += self._cache.on_peer_lost(peer, now_ms)
        return self._carry_out(self._sender.on_peer_dead(peer), now_ms) + forgotten + self._after_cache(now_ms)

    def on_tick(self, now_ms: float) -> list[Action]:
        """Pings, deadlines, renewals, silence."""
        step = self._scheduler.step
        _note_began(step, self._prompts, self._times.began_ms(step, now_ms))  # for those whose time is up
        actions = self._tick_neighbours(now_ms)
        for gateway in self._gone_silent(now_ms):
            unheard = [p for p in self._prompts.values() if p.gateway == gateway]
            actions += self._end_all(unheard, "peer_failed", f"gateway {gateway} was silent for too long", now_ms)
        late = [p for p in self._prompts.values() if now_ms >= p.deadline_ms and not p.told]
        actions += self._end_all(late, "deadline_exceeded", "the request's time ran out", now_ms)
        actions += self._carry_out(self._sender.on_tick(now_ms), now_ms)
        started = [self._prompts[request] for request in self._requests.values()]
        stuck = _stuck([p for p in started if self._streams.is_starved(p.sequence)], started, now_ms)
        actions += self._end_all(stuck[-1:], "busy", "there is no scratch for its one step", now_ms)
        return actions + self._after_cache(now_ms)

    def _pump(self, now_ms: float) -> list[Action]:
        """Start what may start."""
        actions: list[Action] = []
        for prompt, text in self._queue.unreachable(now_ms):
            actions += self._end_all([prompt], "no_worker", text, now_ms)
        asking = Counter(p.decode for p in self._prompts.values() if p.decode is not None and p.granted_ms is None)
        return actions + self._queue.advance(asking, self._start, now_ms)

    def _start(self, prompt: Prompt, decode: PeerId, now_ms: float) -> list[Action]:
        request = prompt.message.request
        asking = self._asking.ask(prompt, decode, (self._prompts.values(), len(self._queue)), now_ms)
        # what was found elsewhere is whole blocks, for which there is no room then
        unused = self._cache.forget(request) if prompt.layer_wise else []
        prompt.sequence = self._scheduler.submit(prompt.sequence_for(self._cache.take(request)))
        self._scheduler.sequences.hold(request)
        assert prompt.transfer is not None
        self._requests[prompt.transfer] = request
        return unused + self._carry_out(asking, now_ms)

    def _on_started(self, started: Started, now_ms: float) -> list[Action]:
        """What is cached here may go to the decode worker at once."""
        actions = super()._on_started(started, now_ms)
        if started.cached_blocks:
            span = KvSpan(0, 0, started.cached_blocks, self._layout.layers)
            actions += self._on_loaded(started.request, span, now_ms)
        return actions

    def _wanted_pages(self) -> int:
        return super()._wanted_pages() + sum(self._layout.pages_for(len(p.tokens)) for p in self._queue)

    def _carry_out(self, steps: list[SenderAction], now_ms: float) -> list[Action]:
        actions: list[Action] = []
        for step in steps:
            match step:
                case Send():
                    actions.append(step)
                case PostCopy(transfer=transfer, span=span):
                    prompt = self._prompts[self._requests[transfer]]
                    actions.append(Copy(step, prompt.source_pages(span)))
                case Granted(transfer=transfer, first_block=first_block):
                    self._prompts[self._requests[transfer]].note_grant(first_block, now_ms)
                    actions += self._pump(now_ms)
                case HandedOver():
                    self._totals.handed_over += 1
                case GaveUp(transfer=transfer):
                    prompt = self._prompts[self._requests[transfer]]
                    actions += prompt.tell_gave_up(step, now_ms)
                    self._scheduler.drop(prompt.message.request)
                    if step.unanswered and prompt.decode is not None:  # the next ones would wait as long, two by two
                        actions += self._end_all(self._queue.meant_for(prompt.decode), "no_worker", step.text, now_ms)
                case Release(transfer=transfer):
                    request = self._requests.pop(transfer)
                    del self._prompts[request]
                    actions += self._cache.forget(request)
                    self._scheduler.drop(request)
                    self._scheduler.sequences.unhold(request)
                    actions += self._pump(now_ms)
        return actions

    def _end_all(self, prompts: list[Prompt], code: str, text: str, now_ms: float) -> list[Action]:
        """End queued prompts first, or the room that the others leave would start them."""
        actions: list[Action] = []
        for prompt in sorted(prompts, key=lambda p: p.transfer is not None):
            if self._prompts.get(prompt.message.request) is prompt:
                actions += prompt.tell_ended(code, text, now_ms, retryable=code in _RETRYABLE)
                actions += self._end(prompt, code, now_ms)
        return actions

    def abandon(self) -> list[Action]:
        """The drain time is over: tell every gateway that still waits."""
        told = [a for p in self._prompts.values() for a in p.tell("peer_failed", DRAINED, retryable=True)]
        return [*told, *self._streams.open_all()]

    def _end(self, prompt: Prompt, code: str, now_ms: float) -> list[Action]:
        """Stop working on a prompt whose gateway needs no word of it any more."""
        forgotten = self._cache.forget(prompt.message.request)
        if prompt.transfer is None:
            self._queue.remove(prompt)
            del self._prompts[prompt.message.request]
            return forgotten
        self._scheduler.drop(prompt.message.request)
        return forgotten + self._carry_out(self._sender.cancel(prompt.transfer, code, now_ms), now_ms)

    def report(self, sequence: int, now_ms: float) -> Report:
        """State for whoever pinged."""
        queue = _queue_counts(self._scheduler.queue(), self._queue, self._prompts.values())
        return self._reporter.report(sequence, queue, self._totals.counters(), now_ms, self._queue)

    @property
    def idle(self) -> bool:
        """No request is here in any phase."""
        return not self._prompts and self._scheduler.idle and self._cache.idle

    def check(self) -> None:
        """Conservation laws. Raises RuntimeError with the numbers."""
        super().check()
        self._sender.check()


def _note_began(step: StepPlan | None, prompts: Mapping[RequestId, Prompt], began_ms: float) -> None:
    for segment in step.segments if step is not None else ():
        prompt = prompts.get(segment.request)
        if prompt is not None and prompt.began_ms is None:
            prompt.began_ms = began_ms


def _stuck(starved: list[Prompt], started: Collection[Prompt], now_ms: float) -> list[Prompt]:
    """Those that lack scratch, if nobody is left whose room could become theirs.

    That is nobody's either who waits for a grant of a decode worker which keeps pages for them: it may wait for just those.
    """
    others = [p for p in started if p not in starved]
    keepers = {p.decode for p in starved}
    if any(p.granted_ms is not None or p.decode not in keepers or _computes(p) for p in others):
        return []
    waited = all(p.granted_ms is not None and now_ms - p.granted_ms >= _SCRATCH_GRACE_MS for p in starved)
    return starved if waited or not others else []


def _computes(prompt: Prompt) -> bool:
    """Whether it goes on without a grant."""
    return prompt.computed_ms is None and (prompt.sequence is None or not prompt.sequence.is_barred)


def _too_large(prompt: Prompt, layout: KvLayout, streams: LayerStreams, mine: Member) -> str:
    """Why the prompt can never have its pages here; empty if it can."""
    pages, total = layout.pages_for(len(prompt.tokens)), streams.usable_pages
    if pages <= total or streams.fits_ever(len(prompt.tokens)):
        return ""
    return f"the prompt needs {pages} pages; {mine.id} has {total} in all"


def _queue_counts(computing: QueueCounts, queue: PromptQueue, prompts: Iterable[Prompt]) -> QueueCounts:
    return QueueCounts(
        waiting=len(queue) + computing.waiting,
        running=computing.running,
        handing_over=sum(1 for p in prompts if p.computed_ms is not None),
        waiting_tokens=computing.waiting_tokens + sum(len(p.tokens) for p in queue),
        kv_tokens=computing.kv_tokens,
    )


def finished_span(segment: Segment, layer: int, n_layers: int, layout: KvLayout) -> KvSpan | None:
    """The blocks of these layers that a step completes; a last, partly filled one counts when the prompt ends in it."""
    first = segment.start // layout.block_tokens
    end_tokens = segment.start + segment.count
    end = layout.blocks_for(end_tokens) if segment.sample else end_tokens // layout.block_tokens
    return KvSpan(layer, first, end - first, n_layers) if end > first else None
