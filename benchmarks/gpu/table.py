"""One line of a GPU benchmark's result."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A measured value, and beside what it is to be read."""

    name: str
    value: float
    unit: str
    ratio: float | None
    against: str
