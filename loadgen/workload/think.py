"""Pauses between the turns of a conversation, in seconds: `2.5`, `exp:5` or `lognormal:4:20:120`. Pure.

People read and type between turns, tools run between the steps of an agent. `str(law)` is what `parse_think` reads.
"""

import re
from dataclasses import dataclass
from random import Random

from loadgen.workload.lengths import draw_lognormal

_NUMBER = r"\d+(?:\.\d+)?"
_FIXED = re.compile(rf"(?:fixed:)?({_NUMBER})")
_EXPONENTIAL = re.compile(rf"exp:({_NUMBER})")
_LOGNORMAL = re.compile(rf"lognormal:({_NUMBER}):({_NUMBER})(?::({_NUMBER}))?")
ALLOWED = "seconds such as 2.5, exp:mean such as exp:5, or lognormal:p50:p90[:most] such as lognormal:4:20:120"


@dataclass(frozen=True, slots=True)
class FixedPause:
    """Always the same pause."""

    pause_s: float

    def draw_s(self, random: Random) -> float:
        """One pause."""
        return self.pause_s

    def __str__(self) -> str:
        return f"{self.pause_s:g}"


@dataclass(frozen=True, slots=True)
class ExponentialPause:
    """Exponential law: no memory, many short pauses, some long."""

    mean_s: float

    def draw_s(self, random: Random) -> float:
        """One pause."""
        return random.expovariate(1 / self.mean_s)

    def __str__(self) -> str:
        return f"exp:{self.mean_s:g}"


@dataclass(frozen=True, slots=True)
class LogNormalPause:
    """Log-normal law through its median and 90th percentile, never above `most_s`."""

    p50_s: float
    p90_s: float
    most_s: float | None = None

    def draw_s(self, random: Random) -> float:
        """One pause."""
        drawn_s = draw_lognormal(random, self.p50_s, self.p90_s)
        return drawn_s if self.most_s is None else min(drawn_s, self.most_s)

    def __str__(self) -> str:
        most = "" if self.most_s is None else f":{self.most_s:g}"
        return f"lognormal:{self.p50_s:g}:{self.p90_s:g}{most}"


ThinkLaw = FixedPause | ExponentialPause | LogNormalPause


def parse_think(text: str) -> ThinkLaw:
    """The law that `text` means. Raises ValueError that says what is allowed."""
    if (match := _FIXED.fullmatch(text.strip())) is not None:
        return FixedPause(float(match[1]))
    if (match := _EXPONENTIAL.fullmatch(text.strip())) is not None and float(match[1]) > 0:
        return ExponentialPause(float(match[1]))
    if (match := _LOGNORMAL.fullmatch(text.strip())) is not None:
        p50_s, p90_s = float(match[1]), float(match[2])
        most_s = None if match[3] is None else float(match[3])
        if 0 < p50_s <= p90_s and (most_s is None or most_s >= p50_s):
            return LogNormalPause(p50_s, p90_s, most_s)
    raise ValueError(f"{text!r}: must be {ALLOWED}")
