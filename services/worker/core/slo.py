"""Which answers are in time, and which prompts may start beside them. Pure.

`SloWatch` owns one record per request from its arrival here until it ended, failed or was cancelled. `PromptGate` owns
nothing but a count: it asks the policy anew at every event.
Source: LayerKV (arXiv 2410.00428), its SLO-aware scheduler; eLLM (arXiv 2506.15155), whose misses per step these are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from common.cost.step_cost import StepCost
from common.ids import RequestId
from common.policy.admission import AdmissionGate, Drawing
from common.policy.output_length import LengthPredictor
from services.worker.core.parts import Parts
from services.worker.core.sequence import Sequence
from services.worker.core.waiting import WaitingPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What is promised."""

    ttft_ms: float
    """From a request's arrival at this worker, or at the prefill worker that hands it over, to its first token."""
    tpot_ms: float
    """Mean time per token after the first."""


@dataclass(frozen=True, slots=True)
class StepMisses:
    """Promises that were broken since the step before."""

    ttft: bool
    """A request got its first token late, or should have it by now."""
    tpot: bool
    """A request whose mean time per token is above the SLO got a token that took longer than the SLO, too: one that is late and
    catching up says nothing new."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast tokens will come."""

    step_ms: float
    """One token for all who draw in every step."""
    least_tpot_ms: float
    """The same if no prompt is computed and nobody more draws."""
    stepping: int
    """How many draw in every step; 1 or more."""
    places: Mapping[RequestId, int]
    """Those who draw, have no pages and wait for the end of others: who is before them, themselves included."""

    def tpot_ms(self, request: RequestId) -> float:
        """Mean time per token that is still to come, with the wait before it: one of those who step ends whenever the time of an
        answer, divided by their number, has passed.
        """
        return self.step_ms * (1.0 + self.places.get(request, 0) / self.stepping)


@dataclass(slots=True)
class _Watched:
    arrived_ms: float
    ttft_missed: bool = False
    first_ms: float | None = None
    last_ms: float = 0.0
    tokens: int = 0
    """Since the first one that was drawn here."""
    generated_tokens: int = 0
    """Of the whole answer, wherever they were drawn."""
    left_tokens: int = 0
    """At the most."""

    @property
    def past_ms(self) -> float:
        """From the first token to the last one."""
        return 0.0 if self.first_ms is None else self.last_ms - self.first_ms


class SloWatch:
    """Told of arrivals, tokens and ends; knows who draws, for how long still, and who is late."""

    def __init__(self, slo: Slo, lengths: LengthPredictor) -> None:
        self._slo, self._lengths = slo, lengths
        self._watched: dict[RequestId, _Watched] = {}
        self._n_drawing = 0
        self._misses = StepMisses(ttft=False, tpot=False)
        self.ttft_missed_total = self.tpot_missed_total = self.attained_total = 0

    def __len__(self) -> int:
        return len(self._watched)

    def arrived(self, request: RequestId, arrived_ms: float) -> None:
        """It waits for its first token from then on; a repeat changes nothing."""
        self._watched.setdefault(request, _Watched(arrived_ms))

    def drawn(self, sequence: Sequence, now_ms: float) -> None:
        """A token of a request that arrived is on its way; the sequence has it already."""
        one = self._watched[sequence.request]
        if one.first_ms is None:
            one.first_ms = now_ms
            self._n_drawing += 1
            self._judge_first(one, now_ms)
        else:
            one.tokens += 1
            late = now_ms - one.last_ms > self._slo.tpot_ms and now_ms - one.first_ms > one.tokens * self._slo.tpot_ms
            self._misses = StepMisses(self._misses.ttft, self._misses.tpot or late)
        one.last_ms, one.generated_tokens = now_ms, sequence.generated_tokens
        one.left_tokens = max(1, sequence.limit_tokens - len(sequence.tokens))

    def finished(self, request: RequestId) -> None:
        """Its last token was drawn: its length is learned, and whether it was in time."""
        one = self._watched[request]
        self._lengths.learn(one.generated_tokens)
        tpot_missed = one.past_ms > one.tokens * self._slo.tpot_ms
        self.tpot_missed_total += tpot_missed
        self.attained_total += not (tpot_missed or one.ttft_missed)
        self.forget(request)

    def forget(self, request: RequestId) -> None:
        """It is over, for whatever reason. Unknown requests are ignored."""
        one = self._watched.pop(request, None)
        if one is not None and one.first_ms is not None:
            self._n_drawing -= 1

    def end_step(self, now_ms: float) -> StepMisses:
        """What was missed since the last call."""
        for one in self._watched.values():
            if one.first_ms is None and not one.ttft_missed:
                self._judge_first(one, now_ms)
        misses, self._misses = self._misses, StepMisses(ttft=False, tpot=False)
        return misses

    def _judge_first(self, one: _Watched, now_ms: float) -> None:
        if not one.ttft_missed and now_ms - one.arrived_ms > self._slo.ttft_ms:
            one.ttft_missed = True
            self.ttft_missed_total += 1
            self._misses = StepMisses(ttft=True, tpot=self._misses.tpot)

    # -- state for others

    @property
    def n_drawing(self) -> int:
        """Requests whose first token is out."""
        return self._n_drawing

    def is_drawing(self, request: RequestId) -> bool:
        """Whether its first token is out."""
        one = self._watched.get(request)
        return one is not None and one.first_ms is not None

    def drawings(self, now_ms: float, pace: Pace, until_ms: float) -> list[Drawing]:
        """All whose first token is out, and that had arrived by `until_ms`."""
        return [
            Drawing(
                past_tokens=one.tokens,
                past_ms=now_ms - one.first_ms,
                future_tokens=self._lengths.remaining(one.generated_tokens, one.left_tokens),
                tpot_ms=pace.tpot_ms(request),
                least_tpot_ms=pace.least_tpot_ms,
                most_tokens=one.left_tokens,
            )
            for request, one in self._watched.items()
            if one.first_ms is not None and one.arrived_ms <= until_ms
        ]

    def slack_ms(self, request: RequestId, tpot_ms: float) -> float:
        """Of one that draws, as of its last token (common.policy.admission); 0 of anybody else, who can spare nothing."""
        one = self._watched.get(request)
        if one is None or one.first_ms is None:
            return 0.0
        future_tokens = self._lengths.remaining(one.generated_tokens, one.left_tokens)
        return Drawing(one.tokens, one.past_ms, future_tokens, tpot_ms).slack_ms(self._slo.tpot_ms)

    def foretell(self, sequence: Sequence) -> int:
        """Tokens after its first one, of a request that has none; 0: there will be none, or it draws already."""
        if self.is_drawing(sequence.request):
            return 0
        return self._after_first(sequence.generated_tokens, sequence.limit_tokens - len(sequence.tokens))

    def foretell_new(self, prompt: WaitingPrompt) -> int:
        """The same of a prompt that waits."""
        emitted = len(prompt.message.emitted)
        return self._after_first(emitted, prompt.message.sampling.max_tokens - emitted)

    def _after_first(self, generated: int, most: int) -> int:
        return max(1, self._lengths.remaining(generated, most) - 1) if most > 1 else 0

    def counters(self) -> dict[str, float]:
        """As in reports."""
        return {
            "slo_ttft_missed_total": float(self.ttft_missed_total),
            "slo_tpot_missed_total": float(self.tpot_missed_total),
            "slo_attained_total": float(self.attained_total),
        }


class PromptGate:
    """Asks the policy whether the next prompt may start beside those that compute and those that draw."""

    def __init__(self, policy: AdmissionGate, watch: SloWatch, parts: Parts) -> None:
        self._policy, self._watch = policy, watch
        self._costing, self._scheduler = parts.costing, parts.scheduler

    def admits(self, prompt: WaitingPrompt, now_ms: float, held_from_ms: float | None = None) -> bool:
        """Whether `prompt`, which would start next, may. While nothing is known of the engine's cost everybody may.

        `held_from_ms`: since when it is held; None: it is not. It is held for those only who had arrived by then: who was
        handed over later passed it without asking, and while others follow those it would wait for ever.
        """
        cost = self._costing.cost
        if cost is None:
            return True
        computing = self._scheduler.prompts
        computing_ms = [self._missing_ms(sequence, cost) for sequence in computing]
        pace = self._pace(computing, prompt, cost)
        drawings = self._watch.drawings(now_ms, pace, now_ms if held_from_ms is None else held_from_ms)
        for sequence, first_in_ms in zip(computing, accumulate(computing_ms), strict=True):
            n_tokens = self._watch.foretell(sequence)
            if n_tokens:  # who is computed before the new prompt draws while that is computed
                drawings.append(_unborn(sequence.request, n_tokens, first_in_ms, pace))
        prompt_ms = self._costing.prompt_ms(prompt)
        if drawings and pace.places:  # it would be the last to wait for pages: for nothing, if it can only be late then
            n_tokens = self._watch.foretell_new(prompt)
            drawings.append(_unborn(prompt.message.request, n_tokens, sum(computing_ms) + prompt_ms, pace))
        return self._policy.admit(drawings, [*computing_ms, prompt_ms]) > len(computing_ms)

    def slack_ms(self, sequence: Sequence) -> float:
        """How long a sequence that draws can wait, for who chooses who gives way; nothing is known of costs: all alike."""
        cost = self._costing.cost
        if cost is None:
            return 0.0
        stepping = max(1, self._watch.n_drawing)
        return self._watch.slack_ms(sequence.request, cost.step_ms(stepping, self._scheduler.queue().kv_tokens))

    def _missing_ms(self, sequence: Sequence, cost: StepCost) -> float:
        """Who draws already is computed in steps that are taken anyway."""
        shared_ms = cost.base_ms if self._watch.is_drawing(sequence.request) else 0.0
        return max(0.0, self._costing.sequence_ms(sequence) - shared_ms)

    def _pace(self, computing: list[Sequence], prompt: WaitingPrompt, cost: StepCost) -> Pace:
        """Foretold as if the new prompt, and those that are computed, drew already: either all draw in every step, which takes
        longer with each; or, where some who draw have no pages, they wait behind those.
        """
        drawing = [one for one in computing if self._watch.is_drawing(one.request)]
        absent = [one.request for one in drawing if not one.has_pages]
        stepping = max(1, self._watch.n_drawing - len(absent))
        kv_tokens = self._scheduler.queue().kv_tokens
        least_ms = cost.step_ms(stepping, kv_tokens)
        if not absent:
            n_more = len(computing) - len(drawing) + 1
            more_tokens = len(prompt.tokens) + sum(one.uncomputed_tokens for one in computing)
            step_ms = cost.step_ms(stepping + n_more, kv_tokens + more_tokens)
            return Pace(step_ms=step_ms, least_tpot_ms=least_ms, stepping=stepping + n_more, places={})
        waiting = [*absent, *(one.request for one in computing if not self._watch.is_drawing(one.request))]
        places = {request: place for place, request in enumerate([*waiting, prompt.message.request], 1)}
        return Pace(step_ms=least_ms, least_tpot_ms=least_ms, stepping=stepping, places=places)


def _unborn(request: RequestId, n_tokens: int, first_in_ms: float, pace: Pace) -> Drawing:
    """Of one that gets its first token when the work admitted so far, up to its own, is done."""
    return Drawing(0, -first_in_ms, n_tokens, pace.tpot_ms(request), pace.least_tpot_ms)
