"""Token lengths of prompts and answers, written `128`, `128:16`, `64-256` or `lognormal:200:900:4096`. Pure.

`str(law)` is the text that `parse_lengths` reads, so a law can be printed into a result and typed again.
"""

import math
import re
from dataclasses import dataclass
from random import Random

P90_DEVIATIONS = 1.2815515594457831
"""Standard deviations from the median to the 90th percentile of a normal law."""
MOST_TOKENS = 10_000_000
"""Longer ones are refused, or drawn as this: no server has such a context, and no generator the memory for it."""
_NUMBER = r"\d+(?:\.\d+)?"
_PATTERN = re.compile(rf"(?P<mean>{_NUMBER})(?::(?P<std>{_NUMBER})|-(?P<most>\d+))?")
_SHOWN_CHARACTERS = 60
_LOGNORMAL = re.compile(rf"lognormal:(?P<p50>{_NUMBER}):(?P<p90>{_NUMBER})(?::(?P<most>\d+))?")


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same length."""

    tokens: int

    def draw_tokens(self, random: Random) -> int:
        """One length."""
        return self.tokens

    def scaled(self, factor: float) -> "Fixed":
        """The law of `factor` times these lengths, never below 1."""
        return Fixed(scaled_tokens(self.tokens, factor))

    def __str__(self) -> str:
        return str(self.tokens)


@dataclass(frozen=True, slots=True)
class Normal:
    """Normal law, rounded, from 1 to MOST_TOKENS."""

    mean_tokens: float
    std_tokens: float

    def draw_tokens(self, random: Random) -> int:
        """One length."""
        return max(1, round(min(random.gauss(self.mean_tokens, self.std_tokens), MOST_TOKENS)))

    def scaled(self, factor: float) -> "Normal":
        """The law of `factor` times these lengths, never below 1."""
        return Normal(max(1.0, self.mean_tokens * factor), self.std_tokens * factor)

    def __str__(self) -> str:
        return f"{_plain(self.mean_tokens)}:{_plain(self.std_tokens)}"


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every length from `least_tokens` to `most_tokens`, both included, equally often."""

    least_tokens: int
    most_tokens: int

    def draw_tokens(self, random: Random) -> int:
        """One length."""
        return random.randint(self.least_tokens, self.most_tokens)

    def scaled(self, factor: float) -> "Uniform":
        """The law of `factor` times these lengths, never below 1."""
        return Uniform(scaled_tokens(self.least_tokens, factor), scaled_tokens(self.most_tokens, factor))

    def __str__(self) -> str:
        return f"{self.least_tokens}-{self.most_tokens}"


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Log-normal law through its median and 90th percentile, rounded, from 1 to `most_tokens` (None: MOST_TOKENS): the shape of most real logs.

    ln(length) is normal with mean ln(p50) and deviation ln(p90 / p50) / 1.2816; what lies above `most_tokens` becomes it.
    """

    p50_tokens: float
    p90_tokens: float
    most_tokens: int | None = None

    def draw_tokens(self, random: Random) -> int:
        """One length."""
        most_tokens = MOST_TOKENS if self.most_tokens is None else self.most_tokens
        return max(1, round(min(draw_lognormal(random, self.p50_tokens, self.p90_tokens), most_tokens)))

    def scaled(self, factor: float) -> "LogNormal":
        """The law of `factor` times these lengths, never below 1."""
        p50_tokens = max(1.0, self.p50_tokens * factor)
        most_tokens = None if self.most_tokens is None else scaled_tokens(self.most_tokens, factor)
        return LogNormal(p50_tokens, max(p50_tokens, self.p90_tokens * factor), most_tokens)

    def __str__(self) -> str:
        most = "" if self.most_tokens is None else f":{self.most_tokens}"
        return f"lognormal:{_plain(self.p50_tokens)}:{_plain(self.p90_tokens)}{most}"


LengthLaw = Fixed | Normal | Uniform | LogNormal
ALLOWED = (
    "a length such as 128, mean:std such as 128:16, least-most such as 64-256, "
    "or lognormal:p50:p90[:most] such as lognormal:200:900:4096"
)


def draw_lognormal(random: Random, p50: float, p90: float) -> float:
    """One value of the log-normal law with this median and 90th percentile."""
    return random.lognormvariate(math.log(p50), math.log(p90 / p50) / P90_DEVIATIONS)


def scaled_tokens(tokens: int, factor: float) -> int:
    """`factor` times a length, rounded, never below 1."""
    return max(1, round(tokens * factor))


def parse_lengths(text: str) -> LengthLaw:
    """The law that `text` means. Raises ValueError that says what is allowed."""
    if any(float(number) > MOST_TOKENS for number in re.findall(_NUMBER, text)):
        raise ValueError(f"{_short(text)!r}: a length must not exceed {MOST_TOKENS} tokens")
    if (lognormal := _LOGNORMAL.fullmatch(text.strip())) is not None:
        return _lognormal(text, lognormal)
    match = _PATTERN.fullmatch(text.strip())
    if match is None or float(match["mean"]) < 1:
        raise ValueError(f"{text!r}: must be {ALLOWED}, 1 or more")
    if match["std"] is not None:
        return Normal(float(match["mean"]), float(match["std"]))
    if "." in match["mean"]:
        raise ValueError(f"{text!r}: must be {ALLOWED}; only a mean may have a fraction")
    least_tokens = int(match["mean"])
    if match["most"] is None:
        return Fixed(least_tokens)
    if int(match["most"]) < least_tokens:
        raise ValueError(f"{text!r}: the first number must not exceed the second")
    return Uniform(least_tokens, int(match["most"]))


def _lognormal(text: str, match: re.Match[str]) -> LogNormal:
    p50_tokens, p90_tokens = float(match["p50"]), float(match["p90"])
    most_tokens = None if match["most"] is None else int(match["most"])
    if not 1 <= p50_tokens <= p90_tokens or (most_tokens is not None and most_tokens < p50_tokens):
        raise ValueError(f"{text!r}: must be lognormal:p50:p90[:most] with 1 <= p50 <= p90 and p50 <= most")
    return LogNormal(p50_tokens, p90_tokens, most_tokens)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _plain(number: float) -> str:
    return format(number, ".10g") if number < 1e9 else str(round(number))
