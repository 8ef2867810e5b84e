"""Readers of flags' values for argparse: each raises ArgumentTypeError that says what is allowed."""

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

_Value = TypeVar("_Value")


def typed(parse: Callable[[str], _Value]) -> Callable[[str], _Value]:
    """`parse`, whose ValueError becomes argparse's error."""

    def read(text: str) -> _Value:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def above_zero(text: str) -> float:
    """A finite number above 0."""
    return _number(text, "a number above 0", lambda value: value > 0)


def not_negative(text: str) -> float:
    """A finite number, 0 or more."""
    return _number(text, "a number, 0 or more", lambda value: value >= 0)


def id_range(text: str) -> tuple[int, int]:
    """Two token ids such as 10-250."""
    first, _, last = text.partition("-")
    if not (first.isascii() and first.isdecimal() and last.isascii() and last.isdecimal() and int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r}: must be two token ids such as 10-250")
    return int(first), int(last)


def _number(text: str, allowed: str, fits: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r}: must be {allowed}")
    return value
