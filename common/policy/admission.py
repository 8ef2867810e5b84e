"""How many waiting prompts may be computed beside answers that are being drawn. Pure.

Source: LayerKV (arXiv 2410.00428), equations 1 and 2. A request may take slo * tokens in all from its first token to its
last; what it does not need of that can be spent on other people's prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Drawing:
    """A request whose first token is out, or will be."""

    past_tokens: int
    """Drawn since the first one."""
    past_ms: float
    """Since the first one; below 0: until the first one, which follows from work that is admitted already."""
    future_tokens: int
    """Still to be drawn, by prediction."""
    tpot_ms: float
    """What each of those will take if no prompt is computed meanwhile."""
    least_tpot_ms: float | None = None
    """What each would take if it never had to give its place to another answer; None: `tpot_ms`, it need not."""
    most_tokens: int | None = None
    """That it may still draw, however long answers are by prediction; None: `future_tokens`."""

    def slack_ms(self, slo_tpot_ms: float) -> float:
        """Equation 1: time that it can lose and still have a mean time per token of `slo_tpot_ms`; below 0: it will not, as things are."""
        return self._slack_ms(slo_tpot_ms, self.future_tokens, self.tpot_ms)

    def is_hopeless(self, slo_tpot_ms: float) -> bool:
        """Whether it cannot reach that mean time per token any more, whoever is held back for it and however long it gets."""
        best_ms = self.tpot_ms if self.least_tpot_ms is None else self.least_tpot_ms
        most = self.future_tokens if self.most_tokens is None else self.most_tokens
        return all(self._slack_ms(slo_tpot_ms, n_tokens, best_ms) < 0.0 for n_tokens in (self.future_tokens, most))

    def _slack_ms(self, slo_tpot_ms: float, n_tokens: int, tpot_ms: float) -> float:
        return slo_tpot_ms * (self.past_tokens + n_tokens) - (self.past_ms + n_tokens * tpot_ms)


class AdmissionGate(Protocol):
    """Decides anew at every event; it remembers nothing."""

    def admit(self, drawings: Sequence[Drawing], prefill_ms: Sequence[float]) -> int:
        """How many of the prompts, from the first on, may be computed now; each takes `prefill_ms` alone."""
        ...


@dataclass(frozen=True, slots=True)
class FirstComeFirstServed:
    """Never holds anybody."""

    def admit(self, drawings: Sequence[Drawing], prefill_ms: Sequence[float]) -> int:
        """All of them."""
        return len(prefill_ms)


@dataclass(frozen=True, slots=True)
class SlackGate:
    """As many prompts as the drawing request with the least slack can wait for.

    A request that cannot reach the SLO any more is left out: holding prompts would not help it, and it would hold them for as
    long as it lives. One that will not reach it as things are, and still could, holds all of them. With nobody left to protect
    there is no bound: whoever waits is admitted at the latest when all have ended that it is held for, so who asks must not
    name ever new ones.
    """

    slo_tpot_ms: float

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if not self.slo_tpot_ms > 0:
            raise ValueError(f"slo_tpot_ms={self.slo_tpot_ms}: must be above 0")

    def admit(self, drawings: Sequence[Drawing], prefill_ms: Sequence[float]) -> int:
        """The largest n whose first n prompts together take no longer than the least slack."""
        slacks = [one.slack_ms(self.slo_tpot_ms) for one in drawings if not one.is_hopeless(self.slo_tpot_ms)]
        if not slacks:
            return len(prefill_ms)
        budget_ms = min(slacks)
        return sum(1 for _ in takewhile(lambda sum_ms: sum_ms <= budget_ms, accumulate(prefill_ms)))
