"""How the request rate changes over a run: steady, ramps, repeating patterns. Pure.

A curve answers one question: when has it let through so many requests? With it, gaps of any law drawn at unit rate become
arrivals of that rate (inversion of the integrated rate; Çinlar, Introduction to Stochastic Processes, 1975).
"""

import math
from dataclasses import dataclass
from typing import Protocol


class RateCurve(Protocol):
    """Requests per second over the time of a run."""

    def time_at_s(self, requests: float) -> float:
        """When so many requests (a fraction counts) have been let through: the latest such time."""
        ...


@dataclass(frozen=True, slots=True)
class Steady:
    """One rate for ever; infinity sends everything at 0."""

    per_s: float

    def time_at_s(self, requests: float) -> float:
        """See RateCurve."""
        return 0.0 if math.isinf(self.per_s) else requests / self.per_s


@dataclass(frozen=True, slots=True)
class LinearRamp:
    """From one rate to another in a straight line, then the second for ever."""

    from_per_s: float
    to_per_s: float
    over_s: float

    def time_at_s(self, requests: float) -> float:
        """See RateCurve."""
        in_ramp = (self.from_per_s + self.to_per_s) / 2 * self.over_s
        if requests >= in_ramp:
            return self.over_s + (requests - in_ramp) / self.to_per_s
        if requests <= 0:  # at rate 0 the form below has nothing to divide by
            return 0.0
        slope = (self.to_per_s - self.from_per_s) / self.over_s
        # The root of from * t + slope * t^2 / 2 = requests, in the form that stays exact as the slope nears 0.
        return 2 * requests / (self.from_per_s + math.sqrt(self.from_per_s**2 + 2 * slope * requests))


@dataclass(frozen=True, slots=True)
class ExponentialRamp:
    """From one rate to another by a constant factor per second, then the second for ever."""

    from_per_s: float
    to_per_s: float
    over_s: float

    def time_at_s(self, requests: float) -> float:
        """See RateCurve."""
        growth = math.log(self.to_per_s / self.from_per_s) / self.over_s
        if growth == 0.0:
            return requests / self.from_per_s
        in_ramp = (self.to_per_s - self.from_per_s) / growth
        if requests >= in_ramp:
            return self.over_s + (requests - in_ramp) / self.to_per_s
        return math.log1p(requests * growth / self.from_per_s) / growth


@dataclass(frozen=True, slots=True)
class Pattern:
    """Pieces of constant rate, one after the other, again and again: bursts, pauses, the shape of a day."""

    pieces: tuple[tuple[float, float], ...]
    """(requests per second, seconds); at least one lets something through."""

    def time_at_s(self, requests: float) -> float:
        """See RateCurve."""
        per_cycle = sum(rate * length_s for rate, length_s in self.pieces)
        cycles, rest = divmod(requests, per_cycle)
        at_s = cycles * sum(length_s for _, length_s in self.pieces)
        for rate, length_s in self.pieces:
            if rest < rate * length_s:
                return at_s + rest / rate
            rest -= rate * length_s
            at_s += length_s
        return at_s  # rounding left a speck of the last piece


def parse_ramp(text: str) -> LinearRamp | ExponentialRamp:
    """`linear:1-10:60` or `exponential:1-10:60`: from 1 to 10 requests per second within 60 s. Raises ValueError."""
    allowed = f"{text!r}: must be linear:FROM-TO:SECONDS or exponential:FROM-TO:SECONDS, such as linear:1-10:60"
    kind, _, rest = text.partition(":")
    rates, _, length = rest.partition(":")
    first, _, last = rates.partition("-")
    try:
        from_per_s, to_per_s, over_s = float(first), float(last), float(length)
    except ValueError as error:
        raise ValueError(allowed) from error
    finite = all(map(math.isfinite, (from_per_s, to_per_s, over_s)))
    if not finite or to_per_s <= 0 or over_s <= 0 or from_per_s < 0:
        raise ValueError(f"{allowed}; numbers above 0")
    if kind == "linear":
        return LinearRamp(from_per_s, to_per_s, over_s)
    if kind == "exponential" and from_per_s > 0:
        return ExponentialRamp(from_per_s, to_per_s, over_s)
    raise ValueError(f"{allowed}; an exponential ramp starts above 0")


def parse_pattern(text: str) -> Pattern:
    """`20:5,2:15`: 20 requests per second for 5 s, 2 for 15 s, again and again. Raises ValueError."""
    allowed = f"{text!r}: must be RATE:SECONDS,RATE:SECONDS,... such as 20:5,2:15"
    pieces = []
    for piece in text.split(","):
        rate, _, length = piece.partition(":")
        try:
            pair = float(rate), float(length)
        except ValueError as error:
            raise ValueError(allowed) from error
        if not (math.isfinite(pair[0]) and pair[0] >= 0 and math.isfinite(pair[1]) and pair[1] > 0):
            raise ValueError(f"{allowed}; rates from 0 up, seconds above 0")
        pieces.append(pair)
    if not any(rate for rate, _ in pieces):
        raise ValueError(f"{allowed}; one rate must be above 0")
    return Pattern(tuple(pieces))
