"""Keys of a report's counters and gauges: `hit_tokens_total{tier=host}` is a name with labels. Pure."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_NAME = r"[a-zA-Z_][a-zA-Z0-9_]*"
_KEY = re.compile(rf"({_NAME})(?:\{{({_NAME}=[^=,{{}}]*(?:,{_NAME}=[^=,{{}}]*)*)\}})?")


@dataclass(frozen=True, slots=True)
class Series:
    """One value of a report."""

    name: str
    labels: Mapping[str, str]
    value: float


def parse_key(key: str) -> tuple[str, dict[str, str]] | None:
    """Name and labels; None for a key that is none, or that names a label twice."""
    found = _KEY.fullmatch(key)
    if found is None:
        return None
    pairs = [part.partition("=") for part in (found[2] or "").split(",") if part]
    labels = {name: value for name, _, value in pairs}
    return (found[1], labels) if len(labels) == len(pairs) else None


def series(values: Mapping[str, float]) -> Iterator[Series]:
    """Every readable value, in the order of the report."""
    for key, value in values.items():
        parsed = parse_key(key)
        if parsed is not None:
            yield Series(parsed[0], parsed[1], value)


def by_label(values: Mapping[str, float], name: str, label: str) -> dict[str, float]:
    """The values of `name` by the value of its label `label`; without one that has it, empty."""
    return {one.labels[label]: one.value for one in series(values) if one.name == name and label in one.labels}
