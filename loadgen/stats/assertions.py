"""Gates on a result's numbers: `--assert "p99_ttft_ms<800"`. Pure.

    NAME OP NUMBER     the number itself, in the unit that its name says
    NAME OP NUMBERx    how many times the base's number; only where there is a base

NAME is any numeric key of result.json (`send_lag_ms.p99` for one inside another), OP one of < <= > >= ==.
"""

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any  # Any: JSON

from loadgen.results.metrics import samples_needed

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
}
_FORM = re.compile(r"\s*([A-Za-z_][\w.]*)\s*(<=|>=|==|<|>)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*(x?)\s*")
_PERCENTILE = re.compile(r"p(\d\d?(?:\.\d+)?)_")
_MATCHES_SHOWN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Assertion:
    """One gate."""

    text: str
    """As it was written."""
    name: str
    operator: str
    limit: float
    of_base: bool
    """The limit is a multiple of the base's number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Of one gate."""

    holds: bool
    why: str
    """One line with the numbers."""


def parse(text: str) -> Assertion:
    """Read a gate. Raises ValueError that says what is allowed."""
    match = _FORM.fullmatch(text)
    try:
        if match is None:
            raise ValueError("no such form")
        name, compared, number, times = match.groups()
        return Assertion(text=text.strip(), name=name, operator=compared, limit=float(number), of_base=times == "x")
    except ValueError as error:
        allowed = "p99_ttft_ms<800, or against a base p99_ttft_ms<1.1x; signs are < <= > >= =="
        raise ValueError(f"{text!r}: must be like {allowed}") from error


def numbers(result: Mapping[str, Any]) -> dict[str, float | None]:
    """Numeric keys of a result.json; one inside another gets both names, with a dot between. None: no value there."""
    found: dict[str, float | None] = {}
    for name, value in result.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": number for inner, number in numbers(value).items()}
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            found[name] = value
    return found


def check(
    assertion: Assertion, values: Mapping[str, float | None], base: Mapping[str, float | None] | None = None
) -> Verdict:
    """Does it hold? A number that is not there makes it fail, with the reason.

    Raises ValueError for a name that there is not, and for a multiple of a base where there is none.
    """
    if assertion.name not in values:
        close = difflib.get_close_matches(assertion.name, values, n=_MATCHES_SHOWN, cutoff=0.5)
        hint = f"; did you mean {', '.join(close)}?" if close else "; see the keys of result.json"
        raise ValueError(f"{assertion.text!r}: there is no number {assertion.name!r}{hint}")
    value = values[assertion.name]
    if value is None or math.isnan(value):
        return Verdict(holds=False, why=f"{assertion.text}: failed, {_no_value(assertion.name)}")
    limit, of_base = assertion.limit, ""
    if assertion.of_base:
        if base is None:
            raise ValueError(f"{assertion.text!r}: a limit with x needs a base run; give one to penstock bench compare")
        of_base_value = base.get(assertion.name)
        if of_base_value is None or math.isnan(of_base_value):
            return Verdict(holds=False, why=f"{assertion.text}: failed, of the base {_no_value(assertion.name)}")
        limit, of_base = limit * of_base_value, f" = {limit:g} x {of_base_value:g}"
    holds = _OPERATORS[assertion.operator](value, limit)
    verdict = "holds" if holds else "failed"
    return Verdict(
        holds=holds, why=f"{assertion.text}: {verdict}, {assertion.name} is {value:g}, limit {limit:g}{of_base}"
    )


def _no_value(name: str) -> str:
    match = _PERCENTILE.match(name)
    if match is None:
        return f"{name} has no value: it was not measured"
    return f"{name} has no value: it needs {samples_needed(float(match[1]))} samples"
