"""Mixes as they are typed: `0.9:random(isl=128,osl=64),0.1:documents(prefix-len=8000)`. Pure.

A part is a weight, a colon and the name of a dataset or a shape, with options in parentheses if it needs any.
"""

import re
from dataclasses import dataclass

from loadgen.workload.datasets import DATASETS, complete
from loadgen.workload.options import Options, parse_options
from loadgen.workload.shapes import SHAPES

ALLOWED = 'weight:name(option=value,...) parts with commas between, such as "0.9:random(isl=128),0.1:loogle"'
_PART = re.compile(r"\s*(?P<weight>\d+(?:\.\d+)?)\s*:\s*(?P<name>[\w-]+)\s*(?:\((?P<options>[^()]*)\))?\s*")


@dataclass(frozen=True, slots=True)
class MixedPart:
    """One part as it was typed, with the options of its shape and its dataset filled in."""

    weight: float
    label: str
    dataset: str
    options: Options

    def __str__(self) -> str:
        options = ",".join(f"{name.replace('_', '-')}={value}" for name, value in self.options.given().items())
        return f"{self.weight:g}:{self.dataset}({options})"


def parse_mix(text: str) -> tuple[MixedPart, ...]:
    """The parts that `text` means. Raises ValueError that says what is allowed."""
    parts: list[MixedPart] = []
    end = 0
    while True:
        match = _PART.match(text, end)
        if match is None or (match.end() < len(text) and text[match.end()] != ","):
            raise ValueError(f"{text!r}: must be {ALLOWED}; not understood from {text[end:]!r} on")
        parts.append(_part(match))
        if match.end() == len(text):
            return _told_apart(parts)
        end = match.end() + 1


def _part(match: re.Match[str]) -> MixedPart:
    name, weight = match["name"], float(match["weight"])
    if weight <= 0:
        raise ValueError(f"{match[0].strip()!r}: the weight must be above 0")
    if name not in DATASETS and name not in SHAPES:
        raise ValueError(f"{name!r}: must be a dataset ({', '.join(DATASETS)}) or a shape ({', '.join(SHAPES)})")
    texts: dict[str, str] = {}
    for assignment in (match["options"] or "").split(","):
        option, equals, value = assignment.partition("=")
        if assignment.strip() and not equals:
            raise ValueError(f"{assignment.strip()!r}: must be option=value")
        if equals:
            texts[option] = value
    options, dataset = parse_options(texts), name
    if name in SHAPES:
        dataset, options = SHAPES[name].dataset, options.over(SHAPES[name].parsed())
    return MixedPart(weight, name, dataset, complete(dataset, options))


def _told_apart(parts: list[MixedPart]) -> tuple[MixedPart, ...]:
    """Parts of one name get numbers, so that reports can tell them apart."""
    names = [part.label for part in parts]
    return tuple(
        MixedPart(part.weight, f"{part.label}-{names[: place + 1].count(part.label)}", part.dataset, part.options)
        if names.count(part.label) > 1
        else part
        for place, part in enumerate(parts)
    )
