"""Token lengths of prompts and answers, written `128`, `128:16` or `64-256`. Pure."""

import re
from dataclasses import dataclass
from random import Random

_NUMBER = r"\d+(?:\.\d+)?"
_PATTERN = re.compile(rf"(?P<mean>{_NUMBER})(?::(?P<std>{_NUMBER})|-(?P<most>\d+))?")


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same length."""

    tokens: int

    def draw_tokens(self, random: Random) -> int:
        """One length."""
        return self.tokens


@dataclass(frozen=True, slots=True)
class Normal:
    """Normal law, rounded, never below 1."""

    mean_tokens: float
    std_tokens: float

    def draw_tokens(self, random: Random) -> int:
        """One length."""
        return max(1, round(random.gauss(self.mean_tokens, self.std_tokens)))


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every length from `least_tokens` to `most_tokens`, both included, equally often."""

    least_tokens: int
    most_tokens: int

    def draw_tokens(self, random: Random) -> int:
        """One length."""
        return random.randint(self.least_tokens, self.most_tokens)


LengthLaw = Fixed | Normal | Uniform
ALLOWED = "a length such as 128, mean:std such as 128:16, or least-most such as 64-256"


def parse_lengths(text: str) -> LengthLaw:
    """The law that `text` means. Raises ValueError that says what is allowed."""
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
