"""How the text of a flag becomes a value: every refusal says what was wrong and what would be right."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar  # Any: JSON that the user gives

import msgspec

from common.errors import ConfigError

_Value = TypeVar("_Value")
MOST_PER_S = 1e6
_OUR_HEADERS = ("content-length", "transfer-encoding", "connection", "host")


class Parser(argparse.ArgumentParser):
    """Refuses by ConfigError instead of ending the process, and takes no abbreviations."""

    def __init__(self, **options: Any) -> None:
        """As argparse's."""
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(f"{message}; see {self.prog} --help")


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)


def rate(text: str) -> float:
    """Requests per second; `inf` for all at once."""
    allowed = f"a number of requests per second above 0 and up to {MOST_PER_S:g}, or inf"
    return _number(text, allowed, lambda value: 0 < value <= MOST_PER_S or value == math.inf)


def above_zero(text: str) -> float:
    """A finite number above 0."""
    return _number(text, "a number above 0", lambda value: 0 < value < math.inf)


def seconds(text: str) -> float:
    """A time above 0: `10` or `10s`."""
    return _number(
        text.removesuffix("s"), "a number of seconds above 0, such as 10", lambda value: 0 < value < math.inf
    )


def not_negative(text: str) -> float:
    """A finite number, 0 or more."""
    return _number(text, "a number, 0 or more", lambda value: 0 <= value < math.inf)


def share(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, "between 0 and 1", lambda value: 0 <= value <= 1)


def _number(text: str, allowed: str, fits: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):  # nothing fits what is not a number
        raise argparse.ArgumentTypeError(f"{text!r}: must be {allowed}")
    return value


def at_least(least: int) -> Callable[[str], int]:
    """A whole number, `least` or more."""

    def read(text: str) -> int:
        if not text.isascii() or not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, {least} or more")
        return int(text)

    return read


def count_or_seconds(text: str) -> int | float:
    """`20`: so many requests; `20s`: so many seconds (a float)."""
    if text.endswith("s"):
        return float(above_zero(text.removesuffix("s")))
    if text.isascii() and text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: must be a number of requests such as 20, or of seconds such as 20s")


def typed(parse: Callable[[str], _Value]) -> Callable[[str], _Value]:
    """`parse`, whose ValueError is the refusal."""

    def read(text: str) -> _Value:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def header(text: str) -> tuple[str, str]:
    """`name=value` of an HTTP header."""
    name, equals, value = text.partition("=")
    if not name or not equals or not (name + value).isprintable() or " " in name or not text.isascii():
        raise argparse.ArgumentTypeError("must be name=value in printable ASCII")
    if name.lower() in _OUR_HEADERS:
        raise argparse.ArgumentTypeError(f"{name} is set by the generator itself")
    return name.lower(), value


def label(text: str) -> tuple[str, str]:
    """`name=value` of a note."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: must be name=value")
    return name, value


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object: {error}") from error


def id_range(text: str) -> tuple[int, int]:
    """Two token ids such as 10-250."""
    first, _, last = text.partition("-")
    if not (first.isascii() and first.isdecimal() and last.isascii() and last.isdecimal() and int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r}: must be two token ids such as 10-250")
    return int(first), int(last)
