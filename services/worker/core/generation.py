"""The requests whose answers are drawn on this worker. Pure.

Owns one `_Answer` per request from its first token's worker until it finished, failed, was cancelled, ran out of time,
or its gateway died. Pages belong to the Scheduler; an answer that ends drops its sequence there.
"""

from dataclasses import dataclass

import msgspec

from common.block_hash import BlockHash
from common.ids import PeerId, RequestId
from common.kv_layout import KvLayout
from common.messages.actions import Send
from common.messages.handover import HandOver
from common.messages.requests import Failed, Sampling, Timings, TokenDelta
from kvstore.index.page_table import PageTable
from services.worker.core.actions import Action
from services.worker.core.outputs import Outbox, finish_of
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
    timings: Timings
    begun_ms: float
    """When a prompt that is computed here left the queue, or one that was computed elsewhere came."""
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
        return "decode" if answer.started else "prefill", now_ms - answer.begun_ms

    def start(self, prompt: NewPrompt, gateway: PeerId, arrived_ms: float, deadline_ms: float, now_ms: float) -> None:
        """Compute prompt and answer here. The caller checked that the request fits."""
        timings = Timings(prefill_queue_ms=now_ms - arrived_ms)
        self._answers[prompt.request] = _Answer(gateway, deadline_ms, None, timings, now_ms)
        self.watch.arrived(prompt.request, arrived_ms)
        self._scheduler.submit(prompt)

    def take_over(
        self, arrival: Arrival, table: PageTable, cached_blocks: int, handover: HandOver, now_ms: float
    ) -> list[Action]:
        """Go on with a request whose prompt is computed; its first token goes out at once.

        `cached_blocks`: leading blocks of the table that were cached here.
        """
        answer = _Answer(arrival.gateway, arrival.deadline_ms, handover.cached_tokens, handover.timings, now_ms)
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
        self._emit(answer, NewToken(sequence, handover.first_token, handover.logprob), now_ms)
        return [*self._outbox.flush()]

    def on_tokens(self, new_tokens: list[NewToken], now_ms: float) -> list[Action]:
        """Tokens of a finished step; one message per gateway."""
        for new in new_tokens:
            answer = self._answers[new.sequence.request]
            if not answer.started:
                answer.timings = msgspec.structs.replace(answer.timings, compute_ms=now_ms - answer.begun_ms)
            self._emit(answer, new, now_ms)
        return [*self._outbox.flush()]

    def _emit(self, answer: _Answer, new: NewToken, now_ms: float) -> None:
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
            answer.timings if first else None,
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

    def end_too_large(self, layout: KvLayout, total_pages: int) -> list[Action]:
        """Ends requests that have no pages and would need more than there are."""
        actions: list[Action] = []
        for sequence in self._scheduler.prompts:
            if sequence.table.n_blocks or sequence.request not in self._answers:
                continue
            if text := too_large(layout.pages_for(sequence.limit_tokens - 1), total_pages):
                actions += self.fail(sequence.request, "out_of_pages", text, retryable=False)
        return actions

    def forget_gateway(self, gateway: PeerId) -> list[Action]:
        """The gateway fell silent. It is told all the same: if it only paused, it must not wait for ever."""
        mine = [request for request, answer in self._answers.items() if answer.gateway == gateway]
        text = f"gateway {gateway} was silent for too long"
        return [action for request in mine for action in self.fail(request, "peer_failed", text, retryable=True)]

    def abandon(self) -> list[Action]:
        """This worker ends: tell every gateway that still waits."""
        text = "the worker was told to stop, and its time to drain is over"
        return [a for request in list(self._answers) for a in self.fail(request, "peer_failed", text, retryable=True)]

    def fail(self, request: RequestId, code: str, text: str, *, retryable: bool = True) -> list[Action]:
        """End a request that is here with an error."""
        answer = self._answers[request]
        phase = "decode" if answer.started else "prefill"
        self.forget(request)
        failed = Failed(request=request, code=code, phase=phase, text=f"{text} (phase {phase})", retryable=retryable)
        return [Send(answer.gateway, failed)]

    def on_tick(self, now_ms: float) -> list[Action]:
        """Ends requests whose time is up."""
        late = [request for request, answer in self._answers.items() if now_ms >= answer.deadline_ms]
        text = "the request's time ran out"
        return [a for request in late for a in self.fail(request, "deadline_exceeded", text, retryable=False)]


def _total_ms(timings: Timings) -> float:
    """What it took until the hand-over."""
    parts = (timings.prefill_queue_ms, timings.grant_wait_ms, timings.compute_ms, timings.transfer_ms)
    return sum(parts) + timings.decode_queue_ms
