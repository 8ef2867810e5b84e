"""Which sequences run, and on which pages. Pure: plans steps, takes in their results, touches no tensor.

Owns every Sequence of the worker from `submit` or `adopt` until `drop`, and through the ledger their pages. A sequence
leaves only by `drop` (its owner is done with it, for whatever reason) and its pages are freed at once, or after the step
that computes it and after `unhold`.
"""

from dataclasses import dataclass

from common.ids import RequestId
from common.kv_layout import KvLayout
from common.messages.liveness import QueueCounts
from common.messages.requests import TokenLogprob
from common.policy.batching import Candidate, DecodeFirst
from kvstore.index.ledger import PageState
from kvstore.index.page_table import PageTable
from services.worker.core.calls import Calls
from services.worker.core.found import Started
from services.worker.core.giving_way import GivingWay
from services.worker.core.host_buffer import HostBuffer
from services.worker.core.in_flight import StepsInFlight, counts
from services.worker.core.layer_offload import LayerOffload
from services.worker.core.layer_rings import InOneStep, LayerWise, OffloadRule, alone_of
from services.worker.core.layer_streams import LayerStreams
from services.worker.core.lineup import Lineup
from services.worker.core.parking import Parking
from services.worker.core.plan import Sampled, Segment, StepPlan, StepResult
from services.worker.core.prefix import PrefixReuse
from services.worker.core.retained import RetainedLayers
from services.worker.core.room import Room
from services.worker.core.sequence import NewPrompt, Sequence
from services.worker.core.sequences import Sequences
from services.worker.core.starting import Starting


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that a finished step drew for one sequence."""

    sequence: Sequence
    token: int
    logprob: TokenLogprob | None


class Scheduler:
    """Continuous batching over a pool of blocks.

    Admission is first come, first served; when a running sequence needs a page and none is free, the youngest one gives
    up its pages, so that the oldest always moves on. Its KV is parked in the host buffer, or else computed again later.
    """

    def __init__(
        self, reuse: PrefixReuse, layout: KvLayout, policy: DecodeFirst, *, max_running: int, context_tokens: int
    ) -> None:
        """`max_running`: sequences with pages at the most. `context_tokens`: of one sequence at the most."""
        self._reuse, self._pool, self._layout, self._policy = reuse, reuse.pool, layout, policy
        self._scratch = reuse.memory.scratch
        self.room = Room(reuse.pool, layout.layers, max_running, reuse.memory.inflate)
        self.sequences = Sequences(self._pool, layout.layers, context_tokens)
        self._lineup = Lineup()
        self.park_in(Parking(reuse, HostBuffer(0, layout.layers), Calls()))
        self.flight = StepsInFlight()
        """To read."""
        self.computed_tokens_total, self.computed_ms_total = 0, 0.0

    def park_in(self, parking: Parking, rule: OffloadRule | None = None) -> None:
        """Who gives way is parked there from now on, and layers that leave by this rule too; nobody may be here yet."""
        self.parking, self.retained = parking, RetainedLayers(self._reuse)
        self.giving_way = GivingWay(self._lineup, parking, self._reuse)
        parts = self._reuse, self._lineup, self.room, parking
        self.offload = _layer_wise(parts, self.retained, rule)
        self.giving_way.let_go = self.retained.let_go
        self._starting = Starting(parts, self.offload, self.retained, self.giving_way)

    # -- arrivals and departures

    def submit(self, prompt: NewPrompt) -> Sequence:
        """Queue a sequence of which nothing is computed, and start it if there is room. It must fit the pool."""
        sequence = self.sequences.add(prompt)
        self._lineup.wait(sequence)
        self._starting.admit()
        return sequence

    def adopt(self, prompt: NewPrompt, first_token: int, table: PageTable, cached_blocks: int) -> Sequence:
        """Take over a sequence whose prompt is computed; its pages and pins belong to the request already.

        Its place was promised (`Room.count_promised`) when it was given pages.
        """
        sequence = self.sequences.add(prompt)
        sequence.tokens.append(first_token)
        sequence.table, sequence.computed_tokens = table, len(prompt.tokens)
        sequence.cached_blocks = sequence.published_blocks = cached_blocks
        sequence.reused_tokens, sequence.began_tokens = 0, len(sequence.tokens)
        self._lineup.run(sequence)
        self._reuse.publish(sequence)
        return sequence

    def drop(self, request: RequestId) -> None:
        """The sequence is over. Unknown requests are ignored: a cancel may come late."""
        sequence = self.sequences.get(request)
        if sequence is None:
            return
        sequence.dropped = True
        self._lineup.halt(sequence)
        if sequence in self._lineup.waiting:
            self._lineup.waiting.remove(sequence)
            self._starting.never(sequence)
        self.offload.forget(sequence)
        self.retained.forget(sequence)
        self.sequences.free_if_idle(sequence)

    def halt(self, request: RequestId) -> None:
        """Keep the sequence and its pages, but compute no further."""
        self._lineup.halt(self.sequences[request])

    # -- fetched blocks

    def take_started(self) -> list[Started]:
        """Sequences that have got their pages since the last call; their loads must begin before the next step does."""
        return self._starting.take()

    def spoil(self, request: RequestId) -> None:
        """A part of the sequence's load is worthless. What is computed with it will be computed again."""
        sequence = self.sequences[request]
        sequence.lost = True
        if not sequence.in_steps:
            self._restart(sequence)

    def loaded(self, request: RequestId) -> None:
        """The sequence's load has ended: nothing is written to its pages any more."""
        sequence = self.sequences[request]
        sequence.loading, sequence.awaits_load = None, False
        self.sequences.free_if_idle(sequence)

    def _restart(self, sequence: Sequence) -> None:
        sequence.lost = False
        if not sequence.dropped:
            self._reuse.restart(sequence)

    # -- room

    def has_room(self, tokens: int, *, pinned_blocks: int = 0, unpinned_blocks: int = 0, loads: bool = False) -> bool:
        """Whether a sequence of that length, arriving now, would start at once.

        `pinned_blocks` of it are cached here and pinned, `unpinned_blocks` after them by nobody; `loads`: more is elsewhere.
        """
        whole = self.has_room_for_all(tokens, pinned_blocks=pinned_blocks)
        return whole or self.offload.has_room(tokens, pinned_blocks, unpinned_blocks, loads=loads)

    def has_room_for_all(self, tokens: int, *, pinned_blocks: int = 0) -> bool:
        """The same, with all of its layers."""
        n_blocks = self._layout.blocks_for(tokens) - pinned_blocks + self.giving_way.kept_blocks
        return not self._lineup.waiting and self.room.fits(n_blocks, len(self._lineup.running))

    def grants(self, tokens: int, *, pinned_blocks: int = 0) -> bool:
        """As `has_room`, for a sequence that is computed elsewhere: for it some may give way, and then it goes before them.
        True is a promise: the caller takes the pages now."""
        n_blocks = self._layout.blocks_for(tokens) - pinned_blocks
        return self.giving_way.grants(n_blocks, fits=self.room.fits(n_blocks, len(self._lineup.running)))

    # -- steps

    def plan(self) -> StepPlan | None:
        """The next step, or None while one is in flight or when there is nothing to do."""
        if len(self.flight):
            return None
        starved = self.giving_way.grow(self._reach)
        self._starting.admit()
        return self._begin([s for s in self._lineup.running if s not in starved], follows=False)

    def plan_ahead(self) -> StepPlan | None:
        """The step after the one in flight, or None if that has to end first, or if there is nothing to do.

        It draws on with tokens that the step in flight will only draw. Who is certain to end with such a token has no part
        in it; who turns out to have ended has, and what is computed for it is thrown away. Nobody gives way for it, and it
        leaves out nobody whom `plan` would take: whatever only `plan` can do waits for no more than one step.
        """
        step = self.flight.oldest
        if step is None or len(self.flight) > 1 or not step.may_overlap:
            return None
        if not all(self._reach(one) for one in self._lineup.running) or self.giving_way.is_due():
            return None
        self._starting.admit()
        return self._begin(self._lineup.running, follows=True)

    def _begin(self, sequences: list[Sequence], *, follows: bool) -> StepPlan | None:
        standings = [self.flight.standing(s) for s in sequences if not s.is_barred]
        ready = [one for one in standings if not one.ends][: self.room.max_running]  # the engine's buffers end there
        alone = alone_of([one.sequence for one in ready])
        ready = [one for one in ready if alone in (None, one.sequence)]
        candidates = [Candidate(one.computed_tokens, one.known_tokens) for one in ready]
        counts = self._scratch.choose(self._policy if alone is None else InOneStep.of(candidates), candidates)
        if alone is not None and not any(counts):  # there is not the scratch for it
            left_out = [one for one in self._lineup.running if one not in sequences]
            if not self._reuse.memory.is_coming:
                self.offload.call_off(alone)
            self._starting.admit()
            left_out += [alone] if alone.ring is not None else []
            return self._begin([one for one in self._lineup.running if one not in left_out], follows=follows)
        chosen = [(one, count) for one, count in zip(ready, counts, strict=True) if count]
        chosen.sort(key=lambda pair: pair[0].known_tokens - pair[0].computed_tokens > 1)  # decoding rows first; stable
        plan = self.flight.draft(chosen)
        if not chosen or (follows and not plan.may_overlap):
            return None
        if alone is not None:
            self.offload.step_begins(alone)
        self.flight.begin(plan, [one.sequence for one, _ in chosen])
        self._reuse.extend_ahead(one.sequence for one, _ in chosen)
        self._scratch.began()
        return plan

    def _reach(self, sequence: Sequence) -> bool:
        """Whether the sequence has, or now gets, pages for all tokens that it will know after the steps in flight."""
        if sequence.table.n_blocks * self._layout.block_tokens > len(sequence.tokens):
            return True  # with a token that is being drawn
        standing = self.flight.standing(sequence)
        missing = self._layout.blocks_for(standing.known_tokens) - sequence.table.n_blocks
        return missing <= 0 or standing.ends or self._reuse.extend(sequence, missing)

    def complete(self, result: StepResult) -> list[NewToken]:
        """Take in the oldest step, which is finished. Tokens of sequences dropped meanwhile are not reported."""
        step = self.flight.end(result)
        self._scratch.ended()
        self.computed_ms_total += result.compute_ms
        drawn = {one.request: one for one in result.sampled}
        new_tokens: list[NewToken] = []
        for segment in step.segments:
            sequence = self.sequences[segment.request]
            sequence.in_steps -= 1
            self.computed_tokens_total += segment.count
            if sequence.lost:
                self._restart(sequence)
            elif counts(segment, sequence):
                new_tokens += self._advance(sequence, segment, drawn.get(segment.request))
            if sequence.ring is not None:
                self.offload.ended(sequence)
            self.sequences.free_if_idle(sequence)
        return new_tokens

    def _advance(self, sequence: Sequence, segment: Segment, sampled: Sampled | None) -> list[NewToken]:
        sequence.computed_tokens = segment.start + segment.count
        self._reuse.publish(sequence)
        if sampled is None:
            return []
        if sequence.reserved:
            self._pool.move(sequence.owner, PageState.ACTIVE)
            sequence.reserved = False
        if sequence.reused_tokens is None:
            self._reuse.count(sequence)
        sequence.tokens.append(sampled.token)
        return [NewToken(sequence, sampled.token, sampled.logprob)]

    # -- state for others

    @property
    def step(self) -> StepPlan | None:
        """The oldest step in flight: what the engine computes now."""
        return self.flight.oldest

    @property
    def n_waiting(self) -> int:
        """Sequences without pages."""
        return len(self._lineup.waiting)

    @property
    def n_running(self) -> int:
        """Sequences with pages that still draw tokens."""
        return len(self._lineup.running)

    @property
    def preemptions_total(self) -> int:
        """Sequences that gave way, since the start."""
        return self.giving_way.preemptions_total

    def queue(self) -> QueueCounts:
        """Counts for reports."""
        return self._lineup.queue(self._layout.block_tokens)

    @property
    def prompts(self) -> list[Sequence]:
        """Sequences that compute or will compute more than the next token; to read."""
        return self._lineup.prompts

    @property
    def wanted_pages(self) -> int:
        """Pages that sequences without any wait for."""
        return sum(self._layout.pages_for(len(sequence.tokens)) for sequence in self._lineup.waiting)

    @property
    def idle(self) -> bool:
        """No sequence is here at all."""
        return not self.sequences


def _layer_wise(
    parts: tuple[PrefixReuse, Lineup, Room, Parking], retained: RetainedLayers, rule: OffloadRule | None
) -> LayerWise:
    """Who computes prompts without room for all of their layers."""
    return LayerStreams(parts, rule) if rule is not None and rule.streams else LayerOffload(parts, retained, rule)
