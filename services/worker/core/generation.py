"""The requests whose answers are drawn on this worker. Pure.

Owns one `_Answer` per request from its first token's worker until it finished, failed, was cancelled, ran out of time,
or its gateway died. Pages belong to the Scheduler; an answer that ends drops its sequence there.
"""

from dataclasses import dataclass

from common.block_hash import BlockHash
from common.ids import PeerId, RequestId
from common.kv_layout import KvLayout
from common.messages.actions import Send
from common.messages.handover import HandOver
from common.messages.requests import Failed, Sampling, Timings, TokenDelta
from kvstore.index.page_table import PageTable
from services.worker.core.actions import Action
from services.worker.core.outputs import Outbox, finish_of
from services.worker.core.plan import StepPlan
from services.worker.core.scheduler import NewToken, Scheduler
from services.worker.core.sequence import NewPrompt, Sequence
from services.worker.core.slo import SloWatch
from services.worker.core.wire import too_large


@dataclass(slots=True)
class _Answer:
    gateway: PeerId
    deadline_ms: float
    cached_tokens: int | None
    """None: this worker computes the prompt, and its sequence knows."""
    arrived_ms: float
    """When it was heard of, or handed over."""
    timings: Timings | None = None
    """Of the worker that handed it over; None: its prompt is computed here."""
    began_ms: float | None = None
    """When the first step began that computes a part of a prompt of our own."""
    second: bool = False
    """Its next token is the second one, after a hand-over."""
    started: bool = False
    """Its first delta is on its way."""
    origin: PeerId | None = None
    """The prefill worker that handed it over."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request as this worker learns of it."""

    request: RequestId
    gateway: PeerId
    tokens: tuple[int, ...]
    """Prompt and emitted tokens."""
    emitted_tokens: int
    sampling: Sampling
    deadline_ms: float
    root: BlockHash
    """What the names of its blocks start from."""
    names: tuple[BlockHash, ...]
    """Of the whole blocks of its tokens."""
    origin: PeerId
    """The prefill worker that hands it over."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A handed-over request that has drawn its last token; its sequence is read before anything else happens."""

    sequence: Sequence
    origin: PeerId


class Generation:
    """Draws answers: local requests from their prompt on, handed-over ones from their second token on."""

    def __init__(self, scheduler: Scheduler, watch: SloWatch) -> None:
        """`watch` is told of all tokens and ends."""
        self._scheduler, self.watch = scheduler, watch
        self._answers: dict[RequestId, _Answer] = {}
        self._outbox = Outbox()
        self._finished: list[Finished] = []
        self.generated_tokens_total = 0
        self.finished_total = 0

    def __contains__(self, request: RequestId) -> bool:
        return request in self._answers

    def __len__(self) -> int:
        return len(self._answers)

    def standing(self, request: RequestId, now_ms: float) -> tuple[str, float]:
        """Phase of a request, and how long it is here."""
        answer = self._answers.get(request)
        if answer is None:
            return "over", 0.0
        return "decode" if answer.started else "prefill", now_ms - answer.arrived_ms

    def start(self, prompt: NewPrompt, gateway: PeerId, arrived_ms: float, deadline_ms: float) -> None:
        """Compute prompt and answer here. The caller checked that the request fits."""
        self._answers[prompt.request] = _Answer(gateway, deadline_ms, None, arrived_ms)
        self.watch.arrived(prompt.request, arrived_ms)
        self._scheduler.submit(prompt)

    def take_over(
        self, arrival: Arrival, table: PageTable, cached_blocks: int, handover: HandOver, now_ms: float
    ) -> list[Action]:
        """Go on with a request whose prompt is computed; its first token goes out at once.

        `cached_blocks`: leading blocks of the table that were cached here.
        """
        answer = _Answer(arrival.gateway, arrival.deadline_ms, handover.cached_tokens, now_ms, handover.timings)
        answer.origin = arrival.origin
        self._answers[arrival.request] = answer
        prompt = NewPrompt(
            request=arrival.request,
            tokens=arrival.tokens,
            emitted_tokens=arrival.emitted_tokens,
            sampling=arrival.sampling,
            root=arrival.root,
            hashes=arrival.names,
        )
        sequence = self._scheduler.adopt(prompt, handover.first_token, table, cached_blocks)
        self.watch.arrived(arrival.request, now_ms - _total_ms(handover.timings))
        self._emit(answer, NewToken(sequence, handover.first_token, handover.logprob), handover.timings, now_ms)
        answer.second = True
        return [*self._outbox.flush()]

    def note_began(self, step: StepPlan | None, began_ms: float) -> None:
        """A step has ended: prompts that it was the first for began with it. A row of its own may be a prompt's last."""
        for segment in step.segments if step is not None else ():
            answer = self._answers.get(segment.request)
            if answer is not None and answer.began_ms is None and not answer.started:
                answer.began_ms = began_ms

    def on_tokens(self, new_tokens: list[NewToken], now_ms: float, began_ms: float) -> list[Action]:
        """Tokens of a finished step that began at `began_ms`; one message per gateway."""
        for new in new_tokens:
            answer = self._answers[new.sequence.request]
            timings: Timings | None = None
            if not answer.started:
                timings = _own_timings(answer, began_ms, now_ms)
            elif answer.second:
                answer.second = False
                timings = Timings(decode_queue_ms=began_ms - answer.arrived_ms, first_step_ms=now_ms - began_ms)
            self._emit(answer, new, timings, now_ms)
        return [*self._outbox.flush()]

    def _emit(self, answer: _Answer, new: NewToken, timings: Timings | None, now_ms: float) -> None:
        sequence = new.sequence
        finish = finish_of(sequence)
        first = not answer.started
        answer.started = True
        self.generated_tokens_total += 1
        self.watch.drawn(sequence, now_ms)
        delta = TokenDelta(
            sequence.request,
            sequence.generated_tokens - 1,
            (new.token,),
            finish,
            (new.logprob,) if new.logprob is not None else (),
            self._cached_tokens(answer, sequence) if first else None,
            timings,
        )
        self._outbox.add(answer.gateway, delta)
        if finish is not None:
            self.finished_total += 1
            self.watch.finished(sequence.request)
            if answer.origin is not None:
                self._finished.append(Finished(sequence, answer.origin))
            self.forget(sequence.request)

    @staticmethod
    def _cached_tokens(answer: _Answer, sequence: Sequence) -> int:
        if answer.cached_tokens is not None:
            return answer.cached_tokens
        return sequence.reused_prompt_tokens

    def take_finished(self) -> list[Finished]:
        """Handed-over requests that have finished since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def forget(self, request: RequestId) -> None:
        """The request is over; its pages go as soon as no step uses them. Unknown requests are ignored."""
        if self._answers.pop(request, None) is not None:
            self.watch.forget(request)
            self._scheduler.drop(request)

    def end_too_large(self, layout: KvLayout, total_pages: int, now_ms: float) -> list[Action]:
        """Ends requests that have no pages and would need more than there are."""
        actions: list[Action] = []
        for sequence in self._scheduler.prompts:
            if sequence.table.n_blocks or sequence.request not in self._answers:
                continue
            if text := too_large(layout.pages_for(sequence.limit_tokens - 1), total_pages):
                actions += self.fail(sequence.request, "out_of_pages", text, retryable=False, now_ms=now_ms)
        return actions

    def forget_gateway(self, gateway: PeerId, now_ms: float) -> list[Action]:
        """The gateway fell silent. It is told all the same: if it only paused, it must not wait for ever."""
        mine = [request for request, answer in self._answers.items() if answer.gateway == gateway]
        text = f"gateway {gateway} was silent for too long"
        return [a for request in mine for a in self.fail(request, "peer_failed", text, retryable=True, now_ms=now_ms)]

    def abandon(self) -> list[Action]:
        """This worker ends: tell every gateway that still waits."""
        text = "the worker was told to stop, and its time to drain is over"
        return [a for request in list(self._answers) for a in self.fail(request, "peer_failed", text, retryable=True)]

    def fail(
        self, request: RequestId, code: str, text: str, *, retryable: bool = True, now_ms: float | None = None
    ) -> list[Action]:
        """End a request that is here with an error. `now_ms`: tell the time that it took, too."""
        answer = self._answers[request]
        phase = "decode" if answer.started else "prefill"
        self.forget(request)
        failed = Failed(
            request=request,
            code=code,
            phase=phase,
            text=f"{text} (phase {phase})",
            retryable=retryable,
            timings=None if answer.started or now_ms is None else _own_timings(answer, now_ms, now_ms),
        )
        return [Send(answer.gateway, failed)]

    def on_tick(self, now_ms: float) -> list[Action]:
        """Ends requests whose time is up."""
        late = [request for request, answer in self._answers.items() if now_ms >= answer.deadline_ms]
        text = "the request's time ran out"
        return [
            action
            for request in late
            for action in self.fail(request, "deadline_exceeded", text, retryable=False, now_ms=now_ms)
        ]


def _own_timings(answer: _Answer, step_began_ms: float, now_ms: float) -> Timings:
    """Of a prompt that is computed here: so far, or up to its first token, drawn by the step that began then."""
    began_ms = step_began_ms if answer.began_ms is None else answer.began_ms
    return Timings(prefill_queue_ms=began_ms - answer.arrived_ms, compute_ms=now_ms - began_ms)


def _total_ms(timings: Timings) -> float:
    """What it took until the hand-over."""
    return timings.prefill_queue_ms + timings.grant_wait_ms + timings.compute_ms + timings.transfer_ms
