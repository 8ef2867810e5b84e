"""Which sequences run, and on which pages. Pure: plans steps, takes in their results, touches no tensor.

Owns every Sequence of the worker from `submit` or `adopt` until `drop`, and through the ledger their pages. A sequence
leaves only by `drop` (its owner is done with it, for whatever reason) and its pages are freed at once, or after the step
that computes it and after `unhold`.
"""

from collections import deque
from dataclasses import dataclass

from common.errors import OutOfPages
from common.ids import RequestId
from common.kv_layout import KvLayout
from common.messages.liveness import QueueCounts
from common.messages.requests import Sampling, TokenLogprob
from common.policy.batching import Candidate, DecodeFirst
from kvstore.index.ledger import Ledger, PageState
from kvstore.index.page_table import PageTable
from services.worker.core.plan import Segment, StepPlan, StepResult
from services.worker.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that a finished step drew for one sequence."""

    sequence: Sequence
    token: int
    logprob: TokenLogprob | None


class Scheduler:
    """Continuous batching over a page ledger.

    Admission is first come, first served; when a running sequence needs a page and none is free, the youngest one gives
    up its pages and is computed again later, so that the oldest always moves on.
    """

    def __init__(self, ledger: Ledger, layout: KvLayout, policy: DecodeFirst, *, max_running: int) -> None:
        self._ledger, self._layout, self._policy = ledger, layout, policy
        self._max_running = max_running
        self._sequences: dict[RequestId, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # by `order`
        self._step: StepPlan | None = None
        self._arrivals = 0
        self._steps = 0
        self.preemptions_total = 0
        self.computed_tokens_total = 0

    # -- arrivals and departures

    def submit(self, request: RequestId, prompt: tuple[int, ...], sampling: Sampling, *, streamed: bool) -> Sequence:
        """Queue a sequence of which nothing is computed. The caller made sure that it fits the pool (`fits_pool`)."""
        sequence = self._new(request, list(prompt), len(prompt), sampling)
        sequence.streamed = streamed
        self._waiting.append(sequence)
        return sequence

    def adopt(
        self, request: RequestId, prompt: tuple[int, ...], first_token: int, sampling: Sampling, table: PageTable
    ) -> Sequence:
        """Take over a sequence whose prompt is computed; the ledger already lists its pages under the request."""
        sequence = self._new(request, [*prompt, first_token], len(prompt), sampling)
        sequence.table, sequence.computed_tokens = table, len(prompt)
        self._running.append(sequence)
        return sequence

    def _new(self, request: RequestId, tokens: list[int], prompt_tokens: int, sampling: Sampling) -> Sequence:
        if request in self._sequences:
            raise ValueError(f"request {request} is here already")
        self._arrivals += 1
        table = PageTable(self._layout.layers)
        sequence = Sequence(request, self._arrivals, tokens, prompt_tokens, sampling, table)
        self._sequences[request] = sequence
        return sequence

    def get(self, request: RequestId) -> Sequence | None:
        """The sequence, unless it is unknown or dropped."""
        sequence = self._sequences.get(request)
        return None if sequence is None or sequence.dropped else sequence

    def drop(self, request: RequestId) -> None:
        """The sequence is over. Unknown requests are ignored: a cancel may come late."""
        sequence = self._sequences.get(request)
        if sequence is None or sequence.dropped:
            return
        sequence.dropped = True
        self.park(request)
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        self._free_if_idle(sequence)

    def park(self, request: RequestId) -> None:
        """Keep the sequence and its pages, but compute no further."""
        sequence = self._sequences[request]
        if sequence in self._running:
            self._running.remove(sequence)

    def hold(self, request: RequestId) -> None:
        """Keep the pages of a sequence, even if it is dropped, until `unhold`."""
        self._sequences[request].held = True

    def unhold(self, request: RequestId) -> None:
        """Nobody outside reads the pages any more."""
        sequence = self._sequences[request]
        sequence.held = False
        self._free_if_idle(sequence)

    def _free_if_idle(self, sequence: Sequence) -> None:
        if sequence.dropped and not sequence.in_step and not sequence.held:
            if sequence.table.n_blocks:
                self._ledger.free(sequence.owner)
            del self._sequences[sequence.request]

    # -- room

    def pool_pages_for(self, prompt_tokens: int, max_tokens: int) -> int:
        """Pages a sequence needs at its longest (the last drawn token needs none)."""
        return self._layout.pages_for(prompt_tokens + max_tokens - 1)

    def fits_pool(self, prompt_tokens: int, max_tokens: int) -> bool:
        """Whether the sequence could run alone on this worker. One that could not would wait for ever."""
        return self.pool_pages_for(prompt_tokens, max_tokens) <= self._ledger.total_pages

    def has_room(self, tokens: int, *, promised: int = 0) -> bool:
        """Whether a sequence of that length, arriving now, would start with the next plan.

        `promised` sequences have their pages already and will run here, but have not arrived.
        """
        return not self._waiting and self._room_for(tokens, promised)

    def _room_for(self, tokens: int, promised: int = 0) -> bool:
        """Pages for that many tokens, and one more block for each sequence that runs already or will."""
        others = len(self._running) + promised
        needed = self._layout.pages_for(tokens) + others * self._layout.layers
        return others < self._max_running and needed <= self._ledger.free_pages

    # -- steps

    def plan(self) -> StepPlan | None:
        """The next step, or None while one is being computed or when there is nothing to do."""
        if self._step is not None:
            return None
        self._grow()
        self._admit()
        candidates = [Candidate(s.computed_tokens, len(s.tokens)) for s in self._running]
        chosen = [
            (sequence, count)
            for sequence, count in zip(self._running, self._policy.choose(candidates), strict=True)
            if count
        ]
        if not chosen:
            return None
        chosen.sort(key=lambda pair: pair[0].uncomputed_tokens > 1)  # decoding rows first; stable
        self._steps += 1
        self._step = StepPlan(self._steps, tuple(self._segment(sequence, count) for sequence, count in chosen))
        return self._step

    def _segment(self, sequence: Sequence, count: int) -> Segment:
        sequence.in_step = True
        return Segment(
            request=sequence.request,
            tokens=sequence.tokens,
            prompt_tokens=sequence.prompt_tokens,
            start=sequence.computed_tokens,
            count=count,
            table=sequence.table,
            sampling=sequence.sampling,
            sample=sequence.computed_tokens + count == len(sequence.tokens),
            streamed=sequence.streamed,
        )

    def _grow(self) -> None:
        """Give every running sequence the pages for its next token, oldest first, at the cost of the youngest."""
        for sequence in list(self._running):
            while sequence in self._running:
                missing = self._layout.blocks_for(len(sequence.tokens)) - sequence.table.n_blocks
                if missing <= 0 or self._extend(sequence, missing, PageState.ACTIVE):
                    break
                self._preempt(self._running[-1])

    def _extend(self, sequence: Sequence, blocks: int, state: PageState) -> bool:
        try:
            pages = self._ledger.alloc(sequence.owner, blocks * self._layout.layers, state)
        except OutOfPages:
            return False
        sequence.table.append(pages)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self._running.remove(victim)
        self._ledger.free(victim.owner)
        victim.table = PageTable(self._layout.layers)
        victim.computed_tokens = 0
        self.preemptions_total += 1
        self._waiting.appendleft(victim)

    def _admit(self) -> None:
        while self._waiting and self._room_for(len(self._waiting[0].tokens)):
            sequence = self._waiting.popleft()
            self._extend(sequence, self._layout.blocks_for(len(sequence.tokens)), PageState.RESERVED)
            sequence.reserved = True
            self._running.append(sequence)
            self._running.sort(key=lambda s: s.order)

    def complete(self, result: StepResult) -> list[NewToken]:
        """Take in a finished step. Tokens of sequences dropped meanwhile are not reported."""
        step, self._step = self._step, None
        if step is None or step.number != result.number:
            raise ValueError(f"step {result.number} finished, but {step and step.number} was running")
        drawn = {sampled.request: sampled for sampled in result.sampled}
        new_tokens: list[NewToken] = []
        for segment in step.segments:
            sequence = self._sequences[segment.request]
            sequence.in_step = False
            sequence.computed_tokens = segment.start + segment.count
            self.computed_tokens_total += segment.count
            if sequence.dropped:
                self._free_if_idle(sequence)
                continue
            if not segment.sample:
                continue
            if sequence.reserved:
                self._ledger.move(sequence.owner, PageState.ACTIVE)
                sequence.reserved = False
            sampled = drawn[segment.request]
            sequence.tokens.append(sampled.token)
            new_tokens.append(NewToken(sequence, sampled.token, sampled.logprob))
        return new_tokens

    # -- state for others

    @property
    def step(self) -> StepPlan | None:
        """The step being computed now."""
        return self._step

    @property
    def steps_total(self) -> int:
        """Steps planned so far."""
        return self._steps

    @property
    def n_waiting(self) -> int:
        """Sequences without pages."""
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        """Sequences with pages that still draw tokens."""
        return len(self._running)

    def queue(self) -> QueueCounts:
        """Counts for reports."""
        pending = sum(s.uncomputed_tokens for s in self._waiting)
        pending += sum(s.uncomputed_tokens for s in self._running if s.uncomputed_tokens > 1)
        return QueueCounts(waiting=self.n_waiting, running=self.n_running, waiting_tokens=pending)

    @property
    def idle(self) -> bool:
        """No sequence is here at all."""
        return not self._sequences
