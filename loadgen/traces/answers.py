"""Lengths of answers that a file does not say: drawn by a law, equal under equal seeds. Pure."""

from dataclasses import dataclass
from random import Random

from loadgen.workload.lengths import LengthLaw


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """A law and its seed."""

    lengths: LengthLaw
    seed: int | str

    def tokens(self, place: int) -> int:
        """Of the line or entry at that place of the file."""
        return self.lengths.draw_tokens(Random(f"{self.seed}/answer/{place}"))
