"""Which answers are in time, and which prompts may start beside them. Pure.

`SloWatch` owns one record per request from its arrival here until it ended, failed or was cancelled. `PromptGate` owns
nothing but a count: it asks the policy anew at every event.
Source: LayerKV (arXiv 2410.00428), its SLO-aware scheduler; eLLM (arXiv 2506.15155), whose misses per step these are.
"""

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

    def drawings(self, now_ms: float, tpot_ms: float, least_tpot_ms: float) -> list[Drawing]:
        """All whose first token is out. `tpot_ms`: what each of their next tokens will take; `least_tpot_ms`: in every step."""
        return [
            Drawing(one.tokens, now_ms - one.first_ms, self._future_tokens(one), tpot_ms, least_tpot_ms)
            for one in self._watched.values()
            if one.first_ms is not None
        ]

    def foretell(self, sequence: Sequence) -> int:
        """Tokens after its first one, of a request that has none; 0: there will be none, or it draws already."""
        most = sequence.limit_tokens - len(sequence.tokens) - 1
        if self.is_drawing(sequence.request) or most < 1:
            return 0
        return min(most, max(1, self._lengths.remaining(sequence.generated_tokens) - 1))

    def _future_tokens(self, one: _Watched) -> int:
        return min(one.left_tokens, self._lengths.remaining(one.generated_tokens))

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

    def admits(self, prompt: WaitingPrompt, now_ms: float) -> bool:
        """Whether `prompt`, which would start next, may. While nothing is known of the engine's cost everybody may."""
        cost = self._costing.cost
        if cost is None:
            return True
        computing = self._scheduler.prompts
        computing_ms = [self._costing.sequence_ms(sequence) for sequence in computing]
        token_ms, least_ms = self._token_ms(computing, len(prompt.tokens), cost)
        drawings = self._watch.drawings(now_ms, token_ms, least_ms)
        for sequence, first_in_ms in zip(computing, accumulate(computing_ms), strict=True):
            n_tokens = self._watch.foretell(sequence)
            if n_tokens:  # who is computed before the new prompt draws while that is computed
                drawings.append(Drawing(0, -first_in_ms, n_tokens, token_ms, least_ms))
        n_admitted = self._policy.admit(drawings, [*computing_ms, self._costing.prompt_ms(prompt)])
        return n_admitted > len(computing_ms)

    def _token_ms(self, computing: list[Sequence], new_tokens: int, cost: StepCost) -> tuple[float, float]:
        """What a token will take who draws, and at the least. Foretold as if the new prompt, and those that are computed, drew already: either all draw in every step, which takes
        longer with each; or, where some who draw have no pages, they take turns, more of them with each.
        """
        without_pages = sum(self._watch.is_drawing(one.request) for one in computing)
        stepping = max(1, self._watch.n_drawing - without_pages)
        n_more, kv_tokens = len(computing) - without_pages + 1, self._scheduler.queue().kv_tokens
        least_ms = cost.step_ms(stepping, kv_tokens)
        if without_pages:
            token_ms = least_ms * (stepping + without_pages + n_more) / stepping
        else:
            more_tokens = new_tokens + sum(one.uncomputed_tokens for one in computing)
            token_ms = cost.step_ms(stepping + n_more, kv_tokens + more_tokens)
        return token_ms, least_ms
