"""Options that made-up workloads take, as values. Pure.

One field per flag of the same name; None: the shape's value, or else the dataset's own default.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TypeVar

from loadgen.workload import documents, shared_prefix
from loadgen.workload.lengths import LengthLaw, parse_lengths
from loadgen.workload.think import ThinkLaw, parse_think

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user, a shape or a dataset says about a workload."""

    isl: LengthLaw | None = None
    osl: LengthLaw | None = None
    prefix_len: LengthLaw | None = None
    prefix_share: float | None = None
    prefix_groups: int | None = None
    zipf: float | None = None
    group_order: str | None = None
    siblings: int | None = None
    share_ratio: int | None = None
    turns: LengthLaw | None = None
    think_time: ThinkLaw | None = None
    observation_len: LengthLaw | None = None

    def given(self) -> dict[str, object]:
        """The options that are not None, by name."""
        return {name: value for name in OPTION_NAMES if (value := getattr(self, name)) is not None}

    def over(self, other: "Options") -> "Options":
        """These, and the other's where these say nothing."""
        return options_from({**other.given(), **self.given()})


OPTION_NAMES = tuple(field.name for field in fields(Options))


def options_from(values: Mapping[str, object]) -> Options:
    """Options of parsed values by name."""
    return Options(**values)  # type: ignore[arg-type]  # names and types are those that `given` or PARSERS made


def needed(value: _Value | None, name: str) -> _Value:
    """The value of an option that the dataset always has."""
    assert value is not None, f"{name}: complete() fills it in"
    return value


def flag(name: str) -> str:
    """How an option is typed: `prefix_len` is --prefix-len."""
    return f"--{name.replace('_', '-')}"


def parse_share(text: str) -> float:
    """A number from 0 to 1. Raises ValueError."""
    value = _number(text)
    if value is None or not 0 <= value <= 1:
        raise ValueError(f"{text!r}: must be between 0 and 1")
    return value


def parse_exponent(text: str) -> float:
    """A Zipf exponent from 0 to 10. Raises ValueError."""
    value = _number(text)
    if value is None or not 0 <= value <= 10:
        raise ValueError(f"{text!r}: must be between 0 (all alike) and 10")
    return value


def parse_count(least: int) -> Callable[[str], int]:
    """A reader of whole numbers from `least` on, which raises ValueError."""

    def read(text: str) -> int:
        if not text.isascii() or not text.isdecimal() or int(text) < least:
            raise ValueError(f"{text!r}: must be a whole number, {least} or more")
        return int(text)

    return read


def _parse_order(text: str) -> str:
    orders = dict.fromkeys((*shared_prefix.ORDERS, *documents.ORDERS))
    if text not in orders:
        raise ValueError(f"{text!r}: must be one of {', '.join(orders)}")
    return text


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


PARSERS: Mapping[str, Callable[[str], object]] = {
    "isl": parse_lengths,
    "osl": parse_lengths,
    "prefix_len": parse_lengths,
    "prefix_share": parse_share,
    "prefix_groups": parse_count(0),
    "zipf": parse_exponent,
    "group_order": _parse_order,
    "siblings": parse_count(1),
    "share_ratio": parse_count(1),
    "turns": parse_lengths,
    "think_time": parse_think,
    "observation_len": parse_lengths,
}


def parse_options(texts: Mapping[str, str]) -> Options:
    """Options as they are typed, by name with _ or -. Raises ValueError that names the option."""
    values: dict[str, object] = {}
    for typed, text in texts.items():
        name = typed.strip().replace("-", "_")
        if name not in PARSERS:
            raise ValueError(f"{typed!r}: no such option; there are {', '.join(OPTION_NAMES).replace('_', '-')}")
        try:
            values[name] = PARSERS[name](text.strip())
        except ValueError as error:
            raise ValueError(f"{typed}={error}") from error
    return options_from(values)
