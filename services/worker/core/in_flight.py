"""Steps that the engine has been given and has not finished, and where they will leave each sequence. Pure."""

from collections import deque
from collections.abc import Sequence as Run
from dataclasses import dataclass

from common.ids import RequestId
from services.worker.core.plan import Segment, StepPlan, StepResult
from services.worker.core.sequence import Sequence

MAX_STEPS = 2


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a sequence stands when the steps in flight have ended."""

    sequence: Sequence
    computed_tokens: int
    known_tokens: int
    """One more than the sequence has now, if its next token is being drawn."""

    @property
    def pending(self) -> bool:
        """Whether its last token is being drawn."""
        return self.known_tokens > len(self.sequence.tokens)

    @property
    def ends(self) -> bool:
        """Whether it ends with the token that is being drawn, whichever that is."""
        return self.pending and self.known_tokens >= self.sequence.limit_tokens

    def segment(self, count: int) -> Segment:
        """The next `count` tokens of it."""
        sequence = self.sequence
        return Segment(
            request=sequence.request,
            tokens=sequence.tokens,
            prompt_tokens=sequence.prompt_tokens,
            start=self.computed_tokens,
            count=count,
            table=sequence.table,
            sampling=sequence.sampling,
            sample=self.computed_tokens + count == self.known_tokens,
            streamed=sequence.streamed,
            pending=self.pending,
        )


class StepsInFlight:
    """Owns the plans from `begin` to `end`. They end in the order in which they began."""

    def __init__(self) -> None:
        self._plans: deque[StepPlan] = deque()
        self._youngest: dict[RequestId, Segment] = {}  # of the youngest plan
        self.begun_total = self.ahead_total = 0
        """Plans so far; those of them that began while another was in flight."""

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def oldest(self) -> StepPlan | None:
        """What the engine computes now."""
        return self._plans[0] if self._plans else None

    def standing(self, sequence: Sequence) -> Standing:
        """Where the sequence will be after the one step in flight, or is if there is none."""
        segment = self._youngest.get(sequence.request)
        if segment is None or not counts(segment, sequence):
            return Standing(sequence, sequence.computed_tokens, len(sequence.tokens))
        return Standing(sequence, segment.start + segment.count, len(sequence.tokens) + segment.sample)

    def draft(self, chosen: Run[tuple[Standing, int]]) -> StepPlan:
        """The next step: so many tokens of each of these. Nothing changes before it begins."""
        loads = tuple(one.sequence.loading for one, _ in chosen if one.sequence.loading is not None)
        rings = tuple(one.sequence.ring for one, _ in chosen if one.sequence.ring is not None)
        return StepPlan(self.begun_total + 1, tuple(one.segment(count) for one, count in chosen), loads, rings)

    def begin(self, plan: StepPlan, sequences: Run[Sequence]) -> None:
        """The engine gets this draft; `sequences` are those of its segments."""
        assert len(self._plans) < MAX_STEPS, "a third step would draw from tokens that nobody knows"
        for sequence in sequences:
            sequence.in_steps += 1
        self.ahead_total += bool(self._plans)
        self._plans.append(plan)
        self._youngest = {segment.request: segment for segment in plan.segments}
        self.begun_total = plan.number

    def end(self, result: StepResult) -> StepPlan:
        """The oldest step has ended. Raises ValueError if the result is another one's."""
        step = self.oldest
        if step is None or step.number != result.number:
            raise ValueError(f"step {result.number} finished, but {step and step.number} was running")
        self._plans.popleft()
        if not self._plans:
            self._youngest = {}
        return step


def counts(segment: Segment, sequence: Sequence) -> bool:
    """Whether what the segment computes is of use: the sequence goes on, and was not set back since it was planned.

    For the oldest step in flight; of a later one it is known when that has become the oldest.
    """
    return not sequence.dropped and segment.start == sequence.computed_tokens
