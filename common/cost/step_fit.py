"""Learns a StepCost from the steps that an engine really took. Pure; one per engine.

It remembers the last few steps of each kind (how many tokens, how long their context, how many rows, how much KV) and
fits the formula to all of them anew, now and then. So a long run of equal steps does not make it forget the others.

    minimise   sum of weight * |predicted - real| / sqrt(predicted * real)   over numbers that are not negative
             + a little pull towards the prior

- Deviations count by their size, not by its square, and relative to both: a step that was disturbed has one vote, whether
  it took twice or a hundred times as long. What comes out is nearer to a median than to a mean.
- A remembered step loses half its weight with every 1000 newer ones, and all of it when eight newer of its kind are there.
- The pull decides where nothing was seen, or so little that noise would decide: with steps of one kind only, all numbers
  keep the proportions of the prior, at the level of those steps. It grows with the noise, and with the logarithm of a
  number that leaves its prior upwards: so a prior that is wrong by far is soon left.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.cost.step_cost import UNKNOWN_COST, StepCost

_KINDS, _STEPS_PER_KIND = 64, 8
_REFIT_STEPS = 16
"""Steps between two fits; the first ones are fitted one by one."""
_HALF_LIFE_STEPS = 1000.0
_LEAST_WEIGHT = 1e-3
"""An old step is better than none."""
_EXACT = 0.05
"""Deviations below this share count by their square: clocks and machines are no better."""
_GUESS_LOSS, _PRIOR_LOSS = 0.04, 0.4
"""Pull to a guess, and to a prior that was given: a number that is off by its own size costs as much as so many usual
deviations of a step."""
_ROUNDS = 4
"""Of reweighting per fit; the next fit goes on from there."""
_SETTLED_FITS = 8
"""After so many on the same steps, another one changes little."""
_SHORTEST_MS, _LONGEST_MS, _MOST_WORK = 1e-3, 3.6e6, 1e13
"""Beyond them an observation is somebody's mistake."""
_N_TERMS = 5
_USUAL_STEP = np.array([1.0, 256.0, 256.0 * 512.0, 8.0, 8.0 * 512.0])
_LEAST_SHARE = 1e-2
"""Of a number in a usual step, as far as a prior goes: from nothing there would be no way up."""
_SUBSETS = (np.arange(2**_N_TERMS)[:, None] >> np.arange(_N_TERMS)) & 1 == 1

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one step computes, in the terms of StepCost."""

    new_tokens: int = 0
    """Prompt tokens computed."""
    pairs: float = 0.0
    """Pairs of a computed prompt token and a token up to it."""
    rows: int = 0
    """Decoding sequences."""
    kv_tokens: int = 0
    """Tokens of KV that they read."""

    @property
    def kind(self) -> tuple[int, int, int, int]:
        """Equal for steps that teach about the same: sizes within a factor of two (KV: four)."""
        context = int(self.pairs / self.new_tokens) if self.new_tokens else 0
        kv_size = (self.kv_tokens.bit_length() + 1) // 2
        return self.new_tokens.bit_length(), context.bit_length(), self.rows.bit_length(), kv_size

    @property
    def terms(self) -> tuple[float, float, float, float, float]:
        """What the five numbers of StepCost are multiplied with."""
        return 1.0, float(self.new_tokens), self.pairs, float(self.rows), float(self.kv_tokens)

    @property
    def plausible(self) -> bool:
        """Something is computed, nothing is negative or absurd."""
        in_range = all(0.0 <= term <= _MOST_WORK for term in self.terms)
        some = self.new_tokens > 0 or self.rows > 0
        return in_range and some and self.pairs >= self.new_tokens and (self.new_tokens > 0 or self.pairs == 0.0)

    def predict_ms(self, cost: StepCost) -> float:
        """How long it takes."""
        prompts_ms = self.new_tokens * cost.token_ms + self.pairs * cost.pair_ms
        return prompts_ms + cost.step_ms(self.rows, self.kv_tokens)


def prefill_work(start: int, count: int) -> StepWork:
    """Of `count` prompt tokens behind `start` tokens whose KV is there."""
    return StepWork(new_tokens=count, pairs=count * start + count * (count + 1) / 2)


@dataclass(frozen=True, slots=True)
class TimedStep:
    """One observation."""

    work: StepWork
    ms: float

    @property
    def plausible(self) -> bool:
        """Worth learning from."""
        return _SHORTEST_MS <= self.ms <= _LONGEST_MS and self.work.plausible


class Misses:
    """How far off the last predictions were: a median in which each error counts 2 % less than the one after it."""

    def __init__(self) -> None:
        self._shares: deque[float] = deque(maxlen=200)  # older ones weigh nothing

    def add(self, predicted_ms: float, real_ms: float) -> None:
        """One step ended."""
        self._shares.append(abs(predicted_ms - real_ms) / real_ms)

    @property
    def median(self) -> float | None:
        """|predicted - real| / real; None before the first step."""
        if not self._shares:
            return None
        shares = np.array(self._shares)
        weights = 0.98 ** np.arange(len(shares))[::-1]
        order = np.argsort(shares)
        summed = np.cumsum(weights[order])
        return float(shares[order][np.searchsorted(summed, summed[-1] / 2)])


class StepFit:
    """Owns what it remembers of the engine's steps: 64 kinds, 8 steps each; the kind not seen for longest goes first.

    Learning costs some 10 us per step and a fit half a millisecond, for one step in 16.
    """

    def __init__(self, chunk_tokens: int, prior: StepCost | None = None) -> None:
        """`prior`: of a similar engine; None: nothing is known, and nothing is said before the first step."""
        self._chunk_tokens = max(1, chunk_tokens)
        given = _numbers(prior or UNKNOWN_COST)
        self._prior = np.maximum(given, given @ _USUAL_STEP * _LEAST_SHARE / _USUAL_STEP)
        self._loss = _GUESS_LOSS if prior is None else _PRIOR_LOSS
        self._terms = np.zeros((_KINDS * _STEPS_PER_KIND, _N_TERMS))
        self._ms = np.zeros(_KINDS * _STEPS_PER_KIND)  # 0: empty
        self._learned_at = np.zeros(_KINDS * _STEPS_PER_KIND)
        self._kinds: dict[tuple[int, int, int, int], int] = {}  # -> place; the one seen last is the last
        self._seen = [0] * _KINDS  # steps by place
        self._fitted: Array | None = None
        self._unfitted = 0
        self._n_samples = 0
        self._cost: StepCost | None = None if prior is None else self._as_cost(given)
        self.prefill_misses = Misses()
        """Of steps that computed prompt tokens."""
        self.decode_misses = Misses()
        """Of the others."""

    @property
    def cost(self) -> StepCost | None:
        """What is known; None before the first step, if there is no prior."""
        return self._cost

    def recall(self, steps: Iterable[TimedStep]) -> None:
        """Start from steps that were measured elsewhere; they count like own ones, until newer ones of their kind come."""
        for step in steps:
            if step.plausible:
                self._remember(step)
        for _ in range(_SETTLED_FITS if self._n_samples else 0):
            self._fit()

    def learn(self, work: StepWork, ms: float) -> None:
        """A step ended. What cannot be true is ignored."""
        step = TimedStep(work, ms)
        if not step.plausible:
            return
        if self._cost is not None:
            misses = self.prefill_misses if work.new_tokens else self.decode_misses
            misses.add(work.predict_ms(self._cost), ms)
        self._remember(step)
        self._unfitted += 1
        if self._unfitted >= _REFIT_STEPS or self._n_samples <= _REFIT_STEPS:
            self._fit()

    def _remember(self, step: TimedStep) -> None:
        kind = step.work.kind
        place = self._kinds.pop(kind, None)
        if place is None:
            place = len(self._kinds)
            if place == _KINDS:
                place = self._kinds.pop(next(iter(self._kinds)))
                self._ms[place * _STEPS_PER_KIND : (place + 1) * _STEPS_PER_KIND] = 0.0
                self._seen[place] = 0
        self._kinds[kind] = place
        slot = place * _STEPS_PER_KIND + self._seen[place] % _STEPS_PER_KIND
        self._seen[place] += 1
        self._n_samples += 1
        self._terms[slot], self._ms[slot], self._learned_at[slot] = step.work.terms, step.ms, self._n_samples

    def _fit(self) -> None:
        self._unfitted = 0
        rows = np.flatnonzero(self._ms)
        terms, real_ms = self._terms[rows], self._ms[rows]
        age = self._n_samples - self._learned_at[rows]
        weights = np.maximum(0.5 ** (age / _HALF_LIFE_STEPS), _LEAST_WEIGHT)
        prior = self._prior * _level(terms @ self._prior, real_ms)
        fitted = prior if self._fitted is None else self._fitted
        for _ in range(_ROUNDS):
            predicted_ms = np.maximum(terms @ fitted, real_ms * 1e-3)
            unit = predicted_ms * real_ms
            off = np.abs(predicted_ms - real_ms) / np.sqrt(unit)
            weighted = terms * (weights / (unit * np.maximum(off, _EXACT)))[:, None]
            gram, moments = weighted.T @ terms, weighted.T @ real_ms
            pull = self._loss * max(_EXACT, float(np.median(off))) * _pull(prior, fitted)
            fitted = _solve(gram + np.diag(pull), moments + pull * prior)
        self._fitted = fitted
        self._cost = self._as_cost(fitted)

    def _as_cost(self, numbers: Array) -> StepCost:
        base, token, pair, row, kv = (float(number) for number in numbers)
        return StepCost(base, token, pair, row, kv, chunk_tokens=self._chunk_tokens, n_samples=self._n_samples)


def _numbers(cost: StepCost) -> Array:
    """As an array; a prior that says nothing usable is that of an unknown engine."""
    numbers = (cost.base_ms, cost.token_ms, cost.pair_ms, cost.row_ms, cost.kv_ms)
    if not any(numbers) or not all(math.isfinite(number) and number >= 0 for number in numbers):
        return _numbers(UNKNOWN_COST)
    return np.array(numbers)


def _level(predicted_ms: Array, real_ms: Array) -> float:
    """Middle ratio of real to predicted; of two, the lower: what disturbs a step makes it longer."""
    ratios = np.sort(real_ms / np.maximum(predicted_ms, 1e-9))
    return float(ratios[(len(ratios) - 1) // 2])


def _pull(prior: Array, fitted: Array) -> Array:
    """Weight of (number - prior)^2 per number: that of its share of the prior, or of the logarithm where it is larger.

    `prior` is above 0; `fitted`: what was found so far.
    """
    times = np.maximum(fitted / prior, 1.0 + 1e-6)
    pull: Array = np.log(times) / (times * (times - 1.0)) / prior**2
    return pull


def _solve(gram: Array, moments: Array) -> Array:
    """The numbers, none negative, that minimise x gram x / 2 - moments x.

    Exact: the best of those among all 32 sets of terms whose own best solution has no negative number.
    """
    unit = np.sqrt(gram.diagonal())
    moments = moments / unit
    both = _SUBSETS[:, :, None] & _SUBSETS[:, None, :]
    grams = np.where(both, gram / np.outer(unit, unit), np.eye(_N_TERMS))
    wanted = np.where(_SUBSETS, moments, 0.0)
    found = np.linalg.solve(grams, wanted[:, :, None])[:, :, 0]
    gains = np.where((found >= -1e-12).all(axis=1), found @ moments, -1.0)
    best: Array = np.maximum(found[int(np.argmax(gains))], 0.0) / unit
    return best
